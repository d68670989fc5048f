"""CC3M, CC12M and the two YFCC15M as tars, with their published numbers of pairs: "N of M pairs present".

Three layouts are known, and all are tars as `data_prep.sources.tars` reads them:

- of `data_prep.fetch`: FOLDER/status.parquet with one row a pair of the list, FOLDER/attempt-*/NNNNN.tar. The tars that
  the table names are read, and what it does not call a success is counted as "not downloaded"; a pair that came at the
  second attempt is in that one's tar only;
- of img2dataset: NNNNN.tar with NNNNN_stats.json and NNNNN.parquet; the counts beside each tar say what did not come;
- ready-made, as pixparse/cc3m-wds and cc12m-wds are: cc3m-train-0000.tar …, cc3m-validation-0000.tar …, `_info.json`. What
  is not there is not listed either, so the published number alone tells it.

Members and JSON entries of the ready-made tars were taken from published samples of them, not checked on whole files.
"""

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.fetch_status import STATUS_NAME
from data_prep.plan import Dropped, Plan, PrepareConfig, Record, Unit
from data_prep.sources.places import InputFile, check_split, find_files
from data_prep.sources.tars import CaptionRules, units_of
from data_prep.sources.untrusted import MAX_TEXT_BYTES, NOT_DOWNLOADED, RefusedError, parse_json
from data_prep.yfcc import clean_text
from setclip.errors import InputError
from setclip.lookup import look_up

_INFO_NAME = "_info.json"
_NAMED = 10  # files that a message names


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(PrepareConfig):
    """Packs the tars of a known corpus and says how many of its published pairs are present."""

    tars: tuple[str, ...]
    """Folders of `data_prep.fetch`, of img2dataset or ready-made (cc3m-wds, cc12m-wds); or tars, brace patterns, globs."""
    split: str | None = None
    """Split of all tars. Without it: what their names tell (cc3m-validation-0000.tar is val), else train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_split(self.split)


@dataclass(frozen=True, kw_only=True)
class YfccConfig(CorpusConfig):
    """Packs the tars of a YFCC15M and says how many of its published pairs are present."""

    clean_captions: bool = False
    """Whether to apply the text rules of data_prep/yfcc.py to each caption. For tars of others that hold texts as
    YFCC100M's metadata has them (yfcc15m-clip: url-encoded, with HTML); tars of `data_prep.fetch` are clean already."""


def clean_clip(captions: list[str]) -> list[str]:
    """Returns captions as people read them: rules 1 to 4 of `data_prep.yfcc`."""
    return [clean_text(caption) for caption in captions]


def clean_declip(captions: list[str]) -> list[str]:
    """Returns captions with white space collapsed; DeCLIP's texts are decoded already."""
    return [" ".join(caption.split()) for caption in captions]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One entry of CORPORA."""

    pairs: Mapping[str, int]
    """Split to its published number of pairs."""
    credit: str
    rules: CaptionRules | None = None
    """What `clean_captions` applies."""
    config: type[CorpusConfig] = CorpusConfig


_YFCC_CREDIT = "YFCC100M: photographs under their owners' Creative Commons licences, named per photo in its metadata"

CORPORA: Mapping[str, Corpus] = {
    "cc3m": Corpus(
        pairs={"train": 3_318_333, "val": 15_840},
        credit="Conceptual Captions (Google): captions free for any purpose; images belong to their owners",
    ),
    "cc12m": Corpus(
        pairs={"train": 12_423_374},
        credit="Conceptual 12M (Google): captions free for any purpose; images belong to their owners",
    ),
    "yfcc15m-clip": Corpus(
        pairs={"train": 14_829_396}, credit=f"{_YFCC_CREDIT}; CLIP's list", rules=clean_clip, config=YfccConfig
    ),
    "yfcc15m-declip": Corpus(
        pairs={"train": 15_388_848}, credit=f"{_YFCC_CREDIT}; DeCLIP's list", rules=clean_declip, config=YfccConfig
    ),
}


def plan(config: CorpusConfig, *, name: str) -> Plan:
    """Returns one unit a tar, one for each table of what was not downloaded, and the number of pairs published.

    The number is that of the splits that are there; where a fetched list has another number of rows, those count.
    """
    corpus = look_up(CORPORA, name, "corpus")
    files, warnings = find_files(config.tars, ".tar", "--tars", config.split)
    folders = [Path(text) for text in dict.fromkeys(config.tars) if Path(text).is_dir()]
    fetched = [folder for folder in folders if _is_fetched(folder)]
    rules = corpus.rules if isinstance(config, YfccConfig) and config.clean_captions else None
    units = []
    rows = 0
    for folder in fetched:
        inside = [file for file in files if folder in file.path.parents]
        files = [file for file in files if folder not in file.path.parents]
        listed, chosen, odd = _fetched_tars(folder, inside)
        rows += listed
        warnings += odd
        units += units_of(chosen, count_absent=False, rules=rules) if chosen else []
        table = folder / STATUS_NAME
        split = inside[0].split
        units.append(Unit(name=str(table), split=split, read=partial(read_absent, str(table))))
    units += units_of(files, rules=rules) if files else []
    for folder in folders:
        warnings += _missing_files(folder)
    order = list(dict.fromkeys(unit.split for unit in units))
    units.sort(key=lambda unit: order.index(unit.split))
    pairs = sum(corpus.pairs.get(split, 0) for split in order) or corpus.pairs["train"]
    if fetched and rows != pairs:
        warnings.append(
            f"{name} was published with {pairs:,} pairs; the list that was fetched has {rows:,}, which count"
        )
        pairs = rows
    return Plan(units=units, pairs_listed=pairs, credits=[corpus.credit], warnings=warnings)


def read_absent(table: str) -> Iterator[Record | Dropped]:
    """Yields what a status table does not call a success as not downloaded. Raises InputError if it is no such table."""
    try:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(columns=["status"]):
                absent = len(batch) - batch.column(0).to_pylist().count("success")
                if absent:
                    yield Dropped(NOT_DOWNLOADED, "absent", pairs=absent, samples=absent)
    except (OSError, pa.ArrowException) as error:
        raise _no_table(Path(table), error) from error


def _is_fetched(folder: Path) -> bool:
    """Whether a folder is one of `data_prep.fetch`. Raises InputError if it is and its first attempt is not done."""
    if (folder / STATUS_NAME).is_file():
        return True
    if any(folder.glob("attempt-*/*.tar")):
        raise InputError(
            f"expected {STATUS_NAME} beside the attempts in {folder}, found none; finish the download (`python -m "
            "data_prep.fetch` goes on where it stopped)"
        )
    return False


def _fetched_tars(folder: Path, found: list[InputFile]) -> tuple[int, list[InputFile], list[str]]:
    """Returns the rows of a fetched list, those tars that its status table names, and warnings.

    Raises InputError if one that it names is missing.
    """
    table = folder / STATUS_NAME
    named: set[str] = set()
    try:
        columns = pq.read_schema(table).names
        if not {"status", "tar"} <= set(columns):
            raise InputError(
                f"expected columns `status` and `tar` in {table}, found {', '.join(columns)}; give a folder of "
                "`data_prep.fetch`"
            )
        with pq.ParquetFile(table, read_dictionary=["tar"]) as file:
            rows = file.metadata.num_rows
            for batch in file.iter_batches(columns=["tar"]):
                named.update(batch.column(0).unique().drop_null().to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise _no_table(table, error) from error
    places = {file.path.relative_to(folder).as_posix(): file for file in found}
    if missing := sorted(named - places.keys()):
        raise InputError(
            f"expected the {len(named):,} tars that {table} names, found {len(named) - len(missing):,}; missing: "
            f"{_first(missing)}; copy them back"
        )
    other = sorted(name for name, file in places.items() if name not in named and not _is_empty(file.path))
    warnings = []
    if other:
        warnings.append(
            f"{len(other)} tars in {folder} are of no finished attempt and are left out: {_first(other)}; finish the download"
        )
    return rows, [file for name, file in places.items() if name in named], warnings


def _is_empty(tar: Path) -> bool:
    """Whether a tar has no member: the shard of a list of which nothing came."""
    with open(tar, "rb") as file:
        return not any(file.read(tarfile.BLOCKSIZE))


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _no_table(table: Path, error: Exception) -> InputError:
    return InputError(
        f"expected the table of a download at {table}, found {error}; run `python -m data_prep.fetch` again"
    )


def _missing_files(folder: Path) -> list[str]:
    """Returns a warning if `_info.json` of a ready-made corpus names tars that are not there."""
    path = folder / _INFO_NAME
    if not path.is_file():
        return []
    try:
        splits = parse_json(path.read_bytes() if path.stat().st_size <= MAX_TEXT_BYTES else b"")["splits"]
        names = [str(name) for entry in splits.values() for name in entry["filenames"]]
    except (RefusedError, KeyError, TypeError, AttributeError):
        return [f"{path} does not list the tars of the corpus, so whether all are there was not checked"]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return []
    return [f"{len(missing):,} of {len(names):,} tars of {path} are missing: {_first(missing)}"]


plan_cc3m = partial(plan, name="cc3m")
plan_cc12m = partial(plan, name="cc12m")
plan_yfcc15m_clip = partial(plan, name="yfcc15m-clip")
plan_yfcc15m_declip = partial(plan, name="yfcc15m-declip")

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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.plan import Plan, PrepareConfig
from data_prep.sources.fetched import take_fetched
from data_prep.sources.places import check_split, find_files, some
from data_prep.sources.tars import CaptionRules, units_of
from data_prep.sources.untrusted import MAX_TEXT_BYTES, RefusedError, parse_json
from data_prep.yfcc import clean_text
from setclip.lookup import look_up

_INFO_NAME = "_info.json"


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
    fetched, files = take_fetched(config.tars, files)
    rules = corpus.rules if isinstance(config, YfccConfig) and config.clean_captions else None
    units = []
    for folder in fetched:
        warnings += folder.warnings
        units += [*(units_of(folder.tars, count_absent=False, rules=rules) if folder.tars else []), folder.absent]
    units += units_of(files, rules=rules) if files else []
    for text in dict.fromkeys(config.tars):
        warnings += _missing_files(Path(text))
    order = list(dict.fromkeys(unit.split for unit in units))
    units.sort(key=lambda unit: order.index(unit.split))
    pairs = sum(corpus.pairs.get(split, 0) for split in order) or corpus.pairs["train"]
    rows = sum(folder.rows for folder in fetched)
    if fetched and rows != pairs:
        warnings.append(
            f"{name} was published with {pairs:,} pairs; the list that was fetched has {rows:,}, which count"
        )
        pairs = rows
    return Plan(units=units, pairs_listed=pairs, credits=[corpus.credit], warnings=warnings)


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
    return [f"{len(missing):,} of {len(names):,} tars of {path} are missing: {some(missing)}"]


plan_cc3m = partial(plan, name="cc3m")
plan_cc12m = partial(plan, name="cc12m")
plan_yfcc15m_clip = partial(plan, name="yfcc15m-clip")
plan_yfcc15m_declip = partial(plan, name="yfcc15m-declip")

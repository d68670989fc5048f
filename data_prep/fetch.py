"""Downloads the images of a published list (CC3M, CC12M, the two YFCC15M) with img2dataset, and accounts for every row.

    python -m data_prep.fetch setup                                                        # once: img2dataset's environment
    python -m data_prep.fetch cc3m --list Train_GCC-training.tsv --out data/raw/cc3m
    python -m data_prep.fetch cc3m --list Train_GCC-training.tsv --out data/raw/cc3m --retry failed --reason timeout,dns
    python -m data_prep.run cc3m --tars data/raw/cc3m --out data/cc3m

A download that was stopped, however it was, goes on when it is started again. OUT then holds

    urls.parquet         what is asked for: url, caption, row (number in the list, from 0), id
    dropped.parquet      rows of the list that cannot be asked for, with the reason
    attempt-1/           img2dataset's tars, tables and statistics; attempt-2/ and so on are those of --retry
    status.parquet       one row per row of the list: success, failed or not tried, why, and where the image lies
    fetch.json           list, settings and attempts

Shards of img2dataset without NNNNN_stats.json are not finished. `python -m data_prep.fetch NAME --help` lists the flags.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import fetch_environment, yfcc
from data_prep.fetch_run import Download, download
from data_prep.fetch_status import STATUS_NAME, Count, check_reasons, count_status, write_failed, write_status
from data_prep.lists import LISTS, BadRow, ListRow, PublishedList, read_tsv, tsv_columns
from setclip.config import command, parse_recipe
from setclip.decode import MAX_PIXELS
from setclip.errors import InputError
from setclip.files import remove, replacing, write_json
from setclip.log import Meter, say, warn

FETCH_NAME = "fetch.json"
FORMAT_VERSION = 1

_ROWS_AT_ONCE = 50_000
_HEAD_BYTES = 1 << 20
_BYTES_AT_256 = 32_000  # a picture of CC12M at 256 pixels, by img2dataset's report: 331 GB for 10.4 million

_SETTLED = ("image_size", "min_size", "max_aspect")
"""Settings that decide what a sample is: one folder has one value of each."""


@dataclass(frozen=True, kw_only=True)
class SetupConfig:
    """Makes img2dataset's own environment, or says that it is there."""

    env: Path | None = None
    """Folder of the environment; SETCLIP_IMG2DATASET_ENV where that is set, otherwise .venv-img2dataset here."""
    python: Path | None = None
    """Interpreter that makes it, Python 3.11 or 3.12; by default the one that runs this."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """What the download of any list can be told."""

    list: Path
    """The published list; plain, .gz or .bz2."""
    out: Path
    """Folder for images and their status; made if it is not there. A download that was stopped there goes on."""
    env: Path | None = None
    """Folder of img2dataset's environment; SETCLIP_IMG2DATASET_ENV where that is set, otherwise .venv-img2dataset here."""
    retry: Literal["none", "failed"] = "none"
    """"failed" asks again for what failed, in an attempt of its own."""
    reason: str = ""
    """With --retry: only failures of these reasons, separated by commas: timeout, dns, connection, tls, http_404,
    http_403, http_429, http_5xx, http_other, not_an_image, too_small, too_large, aspect, disallowed, other."""

    processes: int = 0
    """Processes that download and resize; 0 takes the CPUs of this job."""
    threads: int = 64
    """Downloads at a time in each process."""
    timeout: int = 10
    """Seconds that one operation on a connection may take."""
    deadline: float = 60.0
    """Seconds that one image may take, redirects included, however lively the connection."""
    retries: int = 0
    """Times that img2dataset asks again at once, whatever the reason; --retry asks later and chooses."""
    shard_size: int = 10_000
    """Rows of the list in one shard. An unfinished shard is begun again, so smaller ones lose less."""
    stall_after: float = 600.0
    """Seconds without any change on disk after which img2dataset is killed and started again; a shard that was under
    way twice at such a time is given up (reason timeout)."""

    image_size: int = 512
    """Images with a longer short side are resized to it, keeping the ratio; other JPEGs keep their bytes, other formats
    become JPEG."""
    min_size: int = 0
    """Leave out images with a shorter side than this, in pixels."""
    max_aspect: float = 0.0
    """Leave out images whose sides have a larger ratio; 0 keeps all."""
    max_bytes: int = 30_000_000
    """Leave out files larger than this; they are not read to their end."""
    max_pixels: int = MAX_PIXELS
    """Leave out images of more pixels (by their header; they are not decoded)."""

    user_agent_token: str | None = None
    """Name by which servers may know this download; X-Robots-Tag headers that forbid use (noai, noindex, …) are heeded
    with it and without."""
    min_free_gb: float = 5.0
    """Free disk, in 10⁹ bytes, below which the download stops."""
    memory_gb: float = 4.0
    """Most memory for joining and sorting tables, in 10⁹ bytes; more goes to the disk."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)}"
            for name, fits in {
                "processes": self.processes >= 0,
                "threads": self.threads >= 1,
                "timeout": self.timeout >= 1,
                "deadline": self.deadline > 0,
                "retries": self.retries >= 0,
                "shard_size": 2
                <= self.shard_size
                <= 100_000,  # with 1, img2dataset numbers all samples of a shard alike
                "stall_after": self.stall_after > 0,
                "image_size": self.image_size >= 1,
                "min_size": self.min_size >= 0,
                "max_aspect": self.max_aspect == 0 or self.max_aspect >= 1,
                "max_bytes": self.max_bytes >= 1,
                "max_pixels": self.max_pixels >= 1,
                "min_free_gb": self.min_free_gb >= 0,
                "memory_gb": self.memory_gb > 0,
            }.items()
            if not fits
        ]
        if wrong:
            raise InputError(
                "expected shard_size from 2 to 100,000, max_aspect of 0 or at least 1, nothing negative, and at least 1 "
                f"where a count or a time is asked for; found {', '.join(wrong)}; choose other values"
            )
        if self.reason and self.retry == "none":
            raise InputError(
                f"expected --retry failed with --reason, found --reason {self.reason} alone; add --retry failed"
            )
        check_reasons(reasons_of(self))


@dataclass(frozen=True, kw_only=True)
class TsvConfig(FetchConfig):
    """Any tab-separated list."""

    url_column: str = "1"
    """Number of the column of urls, from 1, or its name if the first line holds names."""
    caption_column: str = "2"
    """The same of the captions."""


@dataclass(frozen=True, kw_only=True)
class YfccClipConfig(FetchConfig):
    """CLIP's YFCC15M: its list holds ids, which are joined with YFCC100M's metadata."""

    metadata: tuple[Path, ...]
    """YFCC100M's metadata, yfcc100m_dataset.bz2 (or unpacked; or its parts, all of them)."""
    texts: yfcc.Texts = "title+description"
    """What of a photo is its caption."""
    min_match: float = 0.99
    """Least share of the list that the metadata must hold."""


def reasons_of(config: FetchConfig) -> list[str]:
    """Returns the reasons of --reason, sorted; empty for all."""
    return sorted({name.strip() for name in config.reason.split(",") if name.strip()})


Rows = Iterator[ListRow | BadRow]


@dataclass(frozen=True)
class Reader:
    """How fetch reads one list."""

    config: type[FetchConfig]
    check: Callable[[Any], None]
    """Raises InputError within a second if the list is not what it should be."""
    rows: Callable[[Any], Rows]
    several_captions: bool = False
    """Whether a row can have more than one; urls.parquet then has a column `captions`, and so has each sample's JSON."""


def _published_tsv(name: str) -> Reader:
    columns = (LISTS[name].url_column or "1", LISTS[name].caption_column or "2")

    def check(config: FetchConfig) -> None:
        tsv_columns(config.list, *columns)

    def rows(config: FetchConfig) -> Rows:
        return read_tsv(config.list, *columns)

    return Reader(FetchConfig, check, rows)


def _clip_join(config: YfccClipConfig) -> yfcc.Join:
    return yfcc.Join(
        metadata=config.metadata,
        texts=config.texts,
        min_match=config.min_match,
        memory_gb=config.memory_gb,
        folder=config.out / ".join",
    )


READERS: Mapping[str, Reader] = {
    "cc3m": _published_tsv("cc3m"),
    "cc12m": _published_tsv("cc12m"),
    "yfcc15m-clip": Reader(
        YfccClipConfig,
        lambda config: yfcc.check_clip(config.list, config.metadata),
        lambda config: yfcc.read_clip(config.list, _clip_join(config)),
    ),
    "yfcc15m-declip": Reader(
        FetchConfig,
        lambda config: yfcc.check_declip(config.list),
        lambda config: yfcc.read_declip(config.list),
        several_captions=True,
    ),
    "tsv": Reader(
        TsvConfig,
        lambda config: _check_tsv(config),
        lambda config: read_tsv(config.list, config.url_column, config.caption_column),
    ),
}
"""Name of LISTS to how it is read. To add a list: an entry there, and one here."""


def _check_tsv(config: TsvConfig) -> None:
    tsv_columns(config.list, config.url_column, config.caption_column)


# --- what is remembered


@dataclass
class Attempt:
    """One list given to img2dataset."""

    urls: str
    """Its file in the folder."""
    rows: int
    shard_size: int
    reasons: list[str] | None
    """None for the first attempt; otherwise the reasons asked for, empty for all."""
    is_complete: bool = False


@dataclass
class State:
    """The content of fetch.json."""

    name: str
    list_file: dict[str, Any]
    """Name, size and a checksum of the beginning of the list's file."""
    settings: dict[str, Any]
    rows_listed: int
    """Of the list's file, bad ones included."""
    rows_published: int | None
    dropped: dict[str, int]
    img2dataset: str
    attempts: list[Attempt] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)
    """Rows by status and reason, when status.parquet was last gathered."""
    format_version: int = FORMAT_VERSION

    def save(self, out: Path) -> None:
        """Writes fetch.json."""
        write_json(out / FETCH_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, out: Path) -> "State | None":
        """Reads fetch.json; None if there is none yet."""
        path = out / FETCH_NAME
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path}: expected format_version {FORMAT_VERSION}, found {content['format_version']!r}; choose another --out"
                )
            content["attempts"] = [Attempt(**attempt) for attempt in content["attempts"]]
            return cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: expected what a download remembers, found {error}; choose another --out"
            ) from error


# --- the road


def fetch(name: str, config: FetchConfig) -> list[Count]:
    """Downloads a list's images, or goes on with it, or asks again for what failed; returns the rows by status and reason.

    Raises InputError where something is missing or does not fit, before anything is downloaded.
    """
    python = fetch_environment.python_of(config.env)
    READERS[name].check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    with _locked(config.out):
        for half_written in config.out.glob(".*.partial*"):
            remove(half_written)
        state = State.load(config.out)
        if state is None:
            _check_disk(config)
            state = _read_list(name, config)
        else:
            _check_same(state, name, config)
        _say_list(LISTS[name], state)
        if not state.attempts:
            rows = pq.read_metadata(config.out / "urls.parquet").num_rows
            _say_disk(config, rows)
            _begin(state, config, "urls.parquet", rows, reasons=None)
        current = state.attempts[-1]
        was_complete = current.is_complete
        if not was_complete:
            _run(state, config, python)
        asked = config.retry == "failed" and (was_complete or current.reasons != reasons_of(config))
        if asked and _begin_retry(state, config):
            _run(state, config, python)
        elif was_complete and not asked:
            say(
                f"all of it was asked for already ({len(state.attempts)} attempts); `--retry failed` asks again for what failed"
            )
    return _say_summary(state, config.out)


def _read_list(name: str, config: FetchConfig) -> State:
    """Writes urls.parquet and dropped.parquet."""
    reader = READERS[name]
    fields = [("url", pa.string()), ("caption", pa.string()), ("row", pa.int64()), ("id", pa.string())]
    if reader.several_captions:
        fields.append(("captions", pa.list_(pa.string())))
    schema = pa.schema(fields)
    bad_schema = pa.schema([("row", pa.int64()), ("url", pa.string()), ("reason", pa.string())])
    dropped: Counter[str] = Counter()
    listed = 0
    meter = Meter(LISTS[name].pairs, "reading the list", "rows")
    with (
        replacing(config.out / "urls.parquet") as good_path,
        replacing(config.out / "dropped.parquet") as bad_path,
        pq.ParquetWriter(good_path, schema, compression="zstd") as good,
        pq.ParquetWriter(bad_path, bad_schema, compression="zstd") as bad,
    ):
        rows = reader.rows(config)
        while block := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            listed += len(block)
            found = [row for row in block if isinstance(row, ListRow)]
            lost = [row for row in block if isinstance(row, BadRow)]
            dropped.update(row.reason for row in lost)
            columns: list[Any] = [
                [row.url for row in found],
                [row.captions[0] for row in found],
                [row.row for row in found],
                [row.id for row in found],
            ]
            if reader.several_captions:
                columns.append([row.captions for row in found])
            good.write_batch(pa.record_batch(columns, schema=schema))
            bad.write_batch(
                pa.record_batch(
                    [[r.row for r in lost], [r.url for r in lost], [r.reason for r in lost]], schema=bad_schema
                )
            )
            meter.update(len(block))
    meter.close()
    if listed == sum(dropped.values()):
        raise InputError(
            f"expected rows with url and caption in {config.list}, found none: {dict(dropped)}; is it the list?"
        )
    state = State(
        name=name,
        list_file=_identity(config.list),
        settings=_settings(config),
        rows_listed=listed,
        rows_published=LISTS[name].pairs,
        dropped=dict(dropped.most_common()),
        img2dataset=fetch_environment.versions_of(config.env)["img2dataset"],
    )
    state.save(config.out)
    return state


def _begin(state: State, config: FetchConfig, urls: str, rows: int, reasons: list[str] | None) -> None:
    state.attempts.append(Attempt(urls=urls, rows=rows, shard_size=config.shard_size, reasons=reasons))
    state.save(config.out)


def _begin_retry(state: State, config: FetchConfig) -> bool:
    """Begins an attempt at what failed; says so and returns False if nothing did, with those reasons."""
    number, reasons = len(state.attempts) + 1, reasons_of(config)
    urls = f"urls-{number}.parquet"
    rows = write_failed(config.out, reasons, config.out / urls, config.memory_gb)
    of_reasons = f" with reason {', '.join(reasons)}" if reasons else ""
    if not rows:
        (config.out / urls).unlink()
        say(f"nothing failed{of_reasons}: there is nothing to ask for again")
        return False
    say(f"attempt {number}: {rows:,} rows failed{of_reasons} and are asked for again")
    _begin(state, config, urls, rows, reasons)
    return True


def _run(state: State, config: FetchConfig, python: Path) -> None:
    """Downloads the last attempt and gathers the status."""
    attempt, number = state.attempts[-1], len(state.attempts)
    if attempt.shard_size != config.shard_size:
        warn(f"attempt {number} was begun with --shard-size {attempt.shard_size} and keeps it")
    columns = pq.read_schema(config.out / attempt.urls).names
    download(
        Download(
            python=python,
            urls=config.out / attempt.urls,
            folder=config.out / f"attempt-{number}",
            log=config.out / f"attempt-{number}.log",
            shard_size=attempt.shard_size,
            options=_options(config, [name for name in columns if name not in ("url", "caption")]),
            deadline=config.deadline,
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            stall_after=config.stall_after,
            min_free_bytes=int(config.min_free_gb * 1e9),
        )
    )
    say("gathering what became of each row ...")
    write_status(config.out, [config.out / f"attempt-{n}" for n in range(1, number + 1)], config.memory_gb)
    attempt.is_complete = True
    state.counts = [dataclasses.asdict(count) for count in count_status(config.out)]
    state.save(config.out)


def _options(config: FetchConfig, further_columns: list[str]) -> dict[str, Any]:
    """Returns the arguments of img2dataset.download that do not depend on the attempt."""
    options: dict[str, Any] = {
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": further_columns,
        "output_format": "webdataset",
        "incremental_mode": "incremental",
        "processes_count": config.processes or len(os.sched_getaffinity(0)),
        "thread_count": config.threads,
        "timeout": config.timeout,
        "retries": config.retries,
        "image_size": config.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "min_image_size": config.min_size,
        "max_image_area": config.max_pixels,
        "compute_hash": "sha256",
        "extract_exif": False,
        "enable_wandb": False,
        "user_agent_token": config.user_agent_token,
    }
    return {**options, **({"max_aspect_ratio": config.max_aspect} if config.max_aspect else {})}


# --- checks


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps a second download out of the folder; the lock ends with the process, however it ends."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"expected {out} for this download alone, found another one at work there; wait for it, or choose another --out"
            ) from None
        yield


def _identity(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256_of_first_mebibyte": head}


def _settings(config: FetchConfig) -> dict[str, Any]:
    own = ("url_column", "caption_column", "texts")
    return {name: getattr(config, name) for name in (*_SETTLED, *own) if hasattr(config, name)}


def _check_same(state: State, name: str, config: FetchConfig) -> None:
    found = {"name": state.name, **{k: v for k, v in state.list_file.items() if k != "name"}, **state.settings}
    given = {"name": name, **{k: v for k, v in _identity(config.list).items() if k != "name"}, **_settings(config)}
    different = [key for key in given if given[key] != found.get(key)]
    if different:
        raise InputError(
            f"expected {config.out} to go on as it was begun, found "
            + ", ".join(f"{key} {given[key]} in place of {found.get(key)}" for key in different)
            + "; give what it was begun with, or choose another --out"
        )


def _check_disk(config: FetchConfig) -> None:
    free = shutil.disk_usage(config.out).free
    if free < config.min_free_gb * 1e9:
        raise InputError(
            f"expected at least {config.min_free_gb:g} GB free at {config.out}, found {free / 1e9:.1f} GB; make room, choose "
            "another --out, or lower --min-free-gb"
        )


def _say_disk(config: FetchConfig, rows: int) -> None:
    needed = rows * _BYTES_AT_256 * (config.image_size / 256) ** 2
    free = shutil.disk_usage(config.out).free
    if free < needed:
        warn(
            f"{rows:,} images may take up to {needed / 1e9:,.0f} GB with a short side of {config.image_size}; "
            f"{free / 1e9:,.0f} GB are free at {config.out}. The download stops at {config.min_free_gb:g} GB"
        )


# --- what is said


def _say_list(published: PublishedList, state: State) -> None:
    if state.rows_published is not None and state.rows_listed != state.rows_published:
        warn(
            f"{state.rows_listed:,} of {state.rows_published:,} rows of the published list ({published.what}; "
            f"{published.published_at})"
        )
    else:
        say(f"{state.rows_listed:,} rows of the list")
    for reason, number in state.dropped.items():
        say(f"cannot be asked for: {number:,} {reason}")


def _say_summary(state: State, out: Path) -> list[Count]:
    counts = count_status(out)
    say(f"{'rows':>12}  status      reason")
    for count in counts:
        say(f"{count.rows:>12,}  {count.status:<10}  {count.reason or ''}".rstrip())
    present = sum(count.rows for count in counts if count.status == "success")
    published = state.rows_published
    of_published = f"; the published list has {published:,}" if published not in (None, state.rows_listed) else ""
    say(f"{present:,} of {state.rows_listed:,} pairs present ({present / state.rows_listed:.1%}){of_published}")
    if not present:
        warn("not a single image could be fetched: is there a network?")
    say(f"images: {out}/attempt-*; status of each row: {out / STATUS_NAME}")
    return counts


def main() -> None:
    """The command."""
    recipes: dict[str, Any] = {"setup": SetupConfig, **{name: reader.config for name, reader in READERS.items()}}
    name, config = parse_recipe(recipes, description=__doc__ or "", what="list")
    if isinstance(config, SetupConfig):
        fetch_environment.make(config.env, config.python)
    else:
        fetch(name, config)


if __name__ == "__main__":
    command(main)

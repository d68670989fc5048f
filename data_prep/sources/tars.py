"""WebDataset tars: those of img2dataset, of other projects, and our own shards.

A sample is a run of members whose names agree up to the first dot of the file name, as webdataset groups them: an image
(jpg, jpeg, png, webp; the first of them) with a txt, a json, or both. Members with other extensions, names that begin
with a dot and `__names__` are passed over. The captions are those of the first `--caption-keys` entry of the JSON that
holds any text, else the txt: img2dataset writes the same into both, and of our own shards only the JSON has all captions.

Beside a tar of img2dataset, NNNNN_stats.json says how many images were listed and how many came: what is not there is
counted as "not downloaded", and what a tar lost that was cut short is counted exactly. One tar is one unit.
"""

import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images import MAX_BYTES as MAX_IMAGE_BYTES
from data_prep.plan import Dropped, Plan, PrepareConfig, Record, Unit
from data_prep.sources.fetched import take_fetched
from data_prep.sources.places import InputFile, check_split, find_files, state_of
from data_prep.sources.untrusted import (
    LARGE_IMAGE,
    LARGE_JSON,
    LARGE_TEXT,
    MAX_TEXT_BYTES,
    NO_CAPTION,
    NO_IMAGE,
    NOT_DOWNLOADED,
    RefusedError,
    as_captions,
    deliver,
    is_blank,
    kept_entries,
    parse_json,
    parse_text,
    printable,
)
from setclip.decode import IMAGE_EXTENSIONS
from setclip.errors import InputError
from setclip.tar_reader import DamagedTarError, Member, TarReader

CAPTION_KEYS = ("captions", "caption", "text", "TEXT")

CUT_SHORT = "tar cut short"
DAMAGED = "tar with a damaged header"
JOINED = "tar with data after its end"
REPEATED = "name occurs twice in the tar"
OUTSIDE = "name that would leave the folder"

_LOSSES = {"cut short": CUT_SHORT, "damaged header": DAMAGED, "data after its end": JOINED}
_LARGE = {"json": LARGE_JSON, "txt": LARGE_TEXT}

CaptionRules = Callable[[list[str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class TarsConfig(PrepareConfig):
    """Packs WebDataset tars: of img2dataset, of other projects, or our own shards again."""

    tars: tuple[str, ...]
    """Folders (with their subfolders), files, brace patterns (DIR/train-{00000..00331}.tar) or globs."""
    split: str | None = None
    """Split of all tars. Without it: the split that begins a file's name or stands before its number ("validation" and
    "valid" are val), or that its folder is named; else train."""
    caption_keys: tuple[str, ...] = CAPTION_KEYS
    """Entries of the JSON that may hold a caption or a list of them; the first with text is taken, before the txt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_split(self.split)


@dataclass(frozen=True)
class Counts:
    """What img2dataset says of one tar."""

    listed: int
    present: int


def plan(config: TarsConfig) -> Plan:
    """Returns one unit a tar, and one for what a download by `data_prep.fetch` did not get. Only names are looked at, and
    the first tar's header.
    """
    files, warnings = find_files(config.tars, ".tar", "--tars", config.split)
    fetched, files = take_fetched(config.tars, files)
    units = []
    for folder in fetched:
        warnings += folder.warnings
        found = units_of(folder.tars, config.caption_keys, count_absent=False) if folder.tars else []
        units += [*found, folder.absent]
    units += units_of(files, config.caption_keys) if files else []
    order = list(dict.fromkeys(unit.split for unit in units))
    return Plan(units=sorted(units, key=lambda unit: order.index(unit.split)), warnings=warnings)


def units_of(
    files: list[InputFile],
    caption_keys: tuple[str, ...] = CAPTION_KEYS,
    *,
    count_absent: bool = True,
    rules: CaptionRules | None = None,
) -> list[Unit]:
    """Returns one unit a tar. Raises InputError if the first is no tar: then the others are most likely none either."""
    with _open(files[0].path) as tar:
        try:
            next(iter(tar), None)
        except DamagedTarError as error:
            if error.problem not in _LOSSES:
                raise
    read = partial(read_tar, caption_keys=caption_keys, count_absent=count_absent, rules=rules)
    return [
        Unit(name=str(file.path), split=file.split, read=partial(read, str(file.path)), state=state_of(file.path))
        for file in files
    ]


def read_tar(
    path: str,
    caption_keys: tuple[str, ...] = CAPTION_KEYS,
    *,
    count_absent: bool = True,
    rules: CaptionRules | None = None,
) -> Iterator[Record | Dropped]:
    """Yields every sample of a tar, good or refused, in its order.

    A tar that is damaged or cut short gives all whole samples before the damage, then the loss: exactly as many as
    img2dataset's counts say, or one where there are none. With `count_absent` the images that img2dataset did not get
    follow. `rules` cleans captions. Raises InputError where the file is no tar or cannot be read.
    """
    counts = read_counts(Path(path))
    seen: set[str] = set()
    loss = None
    with _open(Path(path)) as tar:
        try:
            for group in _groups(tar):
                for _ in range(group.copies - (group.key not in seen)):
                    yield Dropped(REPEATED)
                if group.key not in seen:
                    yield from _read_group(tar, group, caption_keys, rules)
                seen.add(group.key)
        except DamagedTarError as error:
            loss = _LOSSES.get(error.problem)
            if loss is None:
                raise
        except OSError as error:
            raise _unreadable(path, error) from error
    if loss is not None:
        lost = 1 if counts is None else max(counts.present - len(seen), 0)
        if lost:
            yield Dropped(loss, pairs=lost, samples=lost)
    if counts is not None and count_absent:
        # A whole tar tells by itself what came: img2dataset may have counted a sample that it then failed to write.
        came = len(seen) if loss is None else counts.present
        if counts.listed > came:
            yield Dropped(NOT_DOWNLOADED, "absent", pairs=counts.listed - came, samples=counts.listed - came)


def read_counts(tar: Path) -> Counts | None:
    """Returns img2dataset's counts from NNNNN_stats.json beside the tar, else from NNNNN.parquet; None without both.

    Raises InputError where the counts are there and make no sense.
    """
    stats = tar.with_name(f"{tar.stem}_stats.json")
    try:
        if stats.is_file():
            entries = parse_json(stats.read_bytes() if stats.stat().st_size <= MAX_TEXT_BYTES else b"")
            counts = Counts(entries["count"], entries["successes"])
            if not all(isinstance(n, int) for n in (counts.listed, counts.present)):
                raise TypeError("counts that are no whole numbers")
            if not 0 <= counts.present <= counts.listed:
                raise ValueError(f"{counts.present} successes of {counts.listed}")
            return counts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"expected img2dataset's counts in {stats}, found {error!r}; restore the file, or move it away to do without"
        ) from error
    rows = tar.with_suffix(".parquet")
    return _counted_rows(rows) if rows.is_file() else None


def _counted_rows(path: Path) -> Counts | None:
    """Returns the counts of img2dataset's table; None if it was not finished (a killed download) or is another table."""
    try:
        with pq.ParquetFile(path) as table:
            if "status" not in table.schema_arrow.names:
                return None
            listed = present = 0
            for batch in table.iter_batches(columns=["status"]):
                listed += len(batch)
                present += batch.column(0).to_pylist().count("success")
            return Counts(listed, present)
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except (OSError, pa.ArrowException):
        return None


@dataclass
class _Group:
    """Adjacent members of one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """Extension to the first member of that extension."""
    _times: Counter[str] = field(default_factory=Counter)

    def add(self, extension: str, member: Member) -> None:
        self.members.setdefault(extension, member)
        self._times[extension] += 1

    @property
    def copies(self) -> int:
        """How often the sample is there: whole copies that follow each other are one group."""
        return max(self._times.values())

    @property
    def image(self) -> Member | None:
        return next((self.members[ext] for ext in self.members if ext in IMAGE_EXTENSIONS), None)

    def is_whole(self, before: "_Group | None") -> bool:
        """Whether nothing of it can be missing at the end of a tar that was cut: it has all that the one before has."""
        if before is not None:
            return before.members.keys() <= self.members.keys()
        return self.image is not None and len(self.members) > 1


def _groups(tar: TarReader) -> Iterator[_Group]:
    """Yields the samples of a tar. Where it is damaged, the sample before the damage comes only if it is whole."""
    before = group = None
    try:
        for member in tar:
            key, extension = _key_and_extension(member.name)
            if extension not in IMAGE_EXTENSIONS and extension not in ("txt", "json"):
                continue
            if group is None or key != group.key:
                if group is not None:
                    yield group
                before, group = group, _Group(key)
            group.add(extension, member)
    except DamagedTarError:
        if group is not None and group.is_whole(before):
            yield group
        raise
    if group is not None:
        yield group


def _key_and_extension(name: str) -> tuple[str, str]:
    """Returns folder and name up to the first dot, and the rest in small letters; ("", "") for what is no sample."""
    while name.startswith("./"):
        name = name[2:]
    folder, file = posixpath.split(name)
    base, _, extension = file.partition(".")
    if not base or (base.startswith("__") and base.endswith("__")):
        return "", ""
    return f"{folder}/{base}" if folder else base, extension.lower()


def _read_group(
    tar: TarReader, group: _Group, caption_keys: tuple[str, ...], rules: CaptionRules | None
) -> Iterator[Record | Dropped]:
    if group.key.startswith("/") or ".." in group.key.split("/"):
        yield Dropped(OUTSIDE)
        return
    if group.image is None:
        yield Dropped(NO_IMAGE)
        return
    if group.image.size > MAX_IMAGE_BYTES:
        yield Dropped(LARGE_IMAGE)
        return
    try:
        entries = parse_json(_read_text(tar, group, "json")) if "json" in group.members else {}
        if not isinstance(entries, dict):  # a list of boxes, say: other projects keep what they like there
            entries = {}
        captions = _captions_of(entries, caption_keys)
        if is_blank(captions) and "txt" in group.members:
            captions = [parse_text(_read_text(tar, group, "txt"))]
    except RefusedError as error:
        yield Dropped(str(error))
        return
    if not captions:
        yield Dropped(NO_CAPTION)
        return
    if rules is not None:
        captions = rules([caption for caption in captions if isinstance(caption, str)])
    key = printable(group.key)
    yield from deliver(
        image=tar.read(group.image),
        captions=captions,
        name=key,
        url=entries.get("url"),
        extra={"source_key": key, **kept_entries(entries)},
    )


def _captions_of(entries: dict, caption_keys: tuple[str, ...]) -> list:
    lists = [as_captions(entries.get(name)) for name in caption_keys]
    filled = [captions for captions in lists if not is_blank(captions)]
    return (filled or [captions for captions in lists if captions] or [[]])[0]


def _read_text(tar: TarReader, group: _Group, extension: str) -> bytes:
    member = group.members[extension]
    if member.size > MAX_TEXT_BYTES:
        raise RefusedError(_LARGE[extension])
    return tar.read(member)


def _open(path: Path) -> TarReader:
    try:
        return TarReader(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> InputError:
    return InputError(f"expected a readable file at {path}, found {error.strerror or error}; mend that or leave it out")

"""A folder or tar of images of one's own with a file of captions: JSON lines, or a table of names and captions.

- **JSON lines** (any name but .tsv): `{"file_name": …, "captions": […]}`, or `"caption"` for a single one. A line is a
  sample; `url`, if there, goes with it.
- **TSV** (a name that ends with .tsv or .tsv.gz): name, tab, caption. All lines of one image are one sample, wherever they
  stand in the file; captions keep their order. A first line of well-known column names ("image", "caption") is a header.

Both may be gzipped. Blank lines are passed over. Every line is looked at while planning, so that a broken one is named
before anything is written. A unit is 10,000 samples, given by where their lines lie; with .gz each unit unpacks the file
from its beginning, so a very large one is better unpacked first.
"""

import gzip
import itertools
import json
import os
import posixpath
import stat
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.images import MAX_BYTES as MAX_IMAGE_BYTES
from data_prep.plan import Dropped, Plan, PrepareConfig, Record, Unit
from data_prep.sources.places import check_split
from data_prep.sources.untrusted import (
    LARGE_IMAGE,
    MAX_TEXT_BYTES,
    NO_IMAGE,
    deliver,
)
from setclip.errors import InputError
from setclip.hashing import hash_text
from setclip.hold_out import held_out
from setclip.shards import is_image_extension, key_of
from setclip.tar_reader import Member, TarReader, iterate_members

_SAMPLES_PER_UNIT = 10_000

_NAME_HEADERS = ("file_name", "filename", "file", "image", "image_name", "image_path", "filepath", "path", "name")
_CAPTION_HEADERS = ("caption", "captions", "text", "title", "comment", "sentence")

Lines = Iterator[tuple[int, int, bytes]]
"""Number from 1, place of the first byte (after unpacking), and bytes of each line that is not blank."""

Entry = tuple[str, list[str], Any]
"""What a line says: file name, captions, url or None."""


HELD_OUT_SPLIT = "val"
UNNAMED = "image that no caption names (images, not samples)"


@dataclass(frozen=True, kw_only=True)
class FolderConfig(PrepareConfig):
    """Packs a folder (or plain tar) of images and a file of captions: JSON lines or TSV, plain or gzipped."""

    images: Path
    """Folder or uncompressed tar; the names in it are the file_name of the captions."""
    captions: Path
    """JSON lines: {"file_name": "a.jpg", "captions": ["…", "…"]}, or "caption" for a single one. Or NAME.tsv: name, tab,
    caption; lines of one image are one sample. Plain or .gz."""
    split: str = "train"
    """Name of the split that the samples make."""
    hold_out: int = 0
    """Make a split of its own, val, of so many pictures, to choose settings on: drawn by their keys alone, the same as
    `finetune.run --hold-out` takes. Planning then reads all images."""
    check: Literal["structure", "decode"] = "decode"
    """Of images that keep their bytes: headers and the marks of a complete file, or every pixel (several times slower;
    finds damage inside)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_split(self.split)
        if self.hold_out < 0:
            raise ValueError(f"hold_out must not be negative, found {self.hold_out}")
        if self.hold_out and self.split == HELD_OUT_SPLIT:
            raise ValueError(f"hold_out makes a split {HELD_OUT_SPLIT}; give the other samples another --split")


@dataclass(frozen=True)
class CaptionFile:
    """The file of captions as it was while planning."""

    path: str
    is_tsv: bool
    size: int
    changed: int
    """Time of its last change, in nanoseconds."""

    def check(self) -> None:
        """Raises InputError if the file is not the one that was planned with: places of lines may have moved."""
        if (self.size, self.changed) != _state(Path(self.path)):
            raise InputError(
                f"expected {self.path} as it was when the work was planned, found it changed; start again with another --out"
            )


@dataclass(frozen=True)
class Span:
    """Adjacent lines."""

    offset: int
    number: int
    """Of the first line, from 1."""
    end: int
    """Number of the line after the last."""


@dataclass(frozen=True)
class Picks:
    """Lines from all over the file, in the order in which they are wanted."""

    offsets: NDArray[np.int64]
    numbers: NDArray[np.int64]


def plan(config: FolderConfig) -> Plan:
    """Reads the captions file once, without the images, and returns units of 10,000 samples each.

    A last unit counts the images that no caption names. Raises InputError that names the line where one is broken, and
    where no caption names any image.
    """
    if not config.captions.is_file():
        raise InputError(
            f"expected a file of captions (JSON lines or .tsv) at {config.captions}, found none; give its place with "
            "--captions"
        )
    is_tsv = config.captions.name.lower().endswith((".tsv", ".tsv.gz"))
    file = CaptionFile(str(config.captions), is_tsv, *_state(config.captions))
    with open_images(config.images) as images:
        parts = _look_through(file, images)
        held = _names_held_out(file, images, config.hold_out) if config.hold_out else None
    units = [
        Unit(
            name=f"{config.captions}, samples {_SAMPLES_PER_UNIT * i + 1:,} to {_SAMPLES_PER_UNIT * i + samples:,}{what}",
            split=split,
            read=partial(read_samples, file, config.images, lines, wanted),
        )
        for split, what, wanted in _splits(config.split, held)
        for i, (samples, lines) in enumerate(parts.all())
    ]
    lonely = partial(read_lonely, file, config.images)
    return Plan(units=[*units, Unit(name=f"{config.images}, images without caption", split=config.split, read=lonely)])


@dataclass(frozen=True)
class Wanted:
    """Samples of the names, or of all but them."""

    names: frozenset[str]
    are_in: bool

    def __contains__(self, name: str) -> bool:
        return (_normal(name) in self.names) == self.are_in


def _splits(split: str, held: frozenset[str] | None) -> Iterator[tuple[str, str, Wanted | None]]:
    """Yields each split with what its units' names end with, and the samples that it has (None: all)."""
    if held is None:
        yield split, "", None
    else:
        yield HELD_OUT_SPLIT, ", held out", Wanted(held, True)
        yield split, ", the others", Wanted(held, False)


def _names_held_out(file: CaptionFile, images: "FolderImages | TarImages", number: int) -> frozenset[str]:
    """Returns the file names of pictures that are held out. Reads every image."""
    keys: dict[str, str] = {}
    for line_number, _, line in _lines(file.path):
        if line_number == 1 and file.is_tsv and _is_header(line):
            continue
        name = _normal(_parse(file, line_number, line)[0])
        if name not in keys and not isinstance(image := images.read(name), Dropped):
            keys[name] = key_of(image)[0]
    names = list(keys)
    return frozenset(names[row] for row in held_out(list(keys.values()), number))


def _look_through(file: CaptionFile, images: "FolderImages | TarImages") -> "_Parts":
    """Parses every line once; returns where those of each unit lie."""
    parts = _Parts(file.is_tsv)
    first, met = None, False
    for number, offset, line in _lines(file.path):
        if number == 1 and file.is_tsv and _is_header(line):
            continue
        name, _, _ = _parse(file, number, line)
        first = name if first is None else first
        met = met or images.has(name)
        parts.add(name, offset, number)
    if first is None:
        raise InputError(f"expected captions in {file.path}, found no line; check the file")
    if not met:
        names = list(images.names())
        raise InputError(
            f"expected the file_name of captions to be names in {images.place}, found no pair: {file.path} names {first!r}, "
            f"the images are {len(names)}, the first {min(names, default=None)!r}; give the folder that the names are "
            "relative to"
        )
    return parts


def read_samples(
    file: CaptionFile, images: Path, lines: Span | Picks, wanted: Wanted | None = None
) -> Iterator[Record | Dropped]:
    """Yields the samples of some lines, or the `wanted` ones of them: those whose image is not there as dropped.

    Raises InputError where a line is broken, the file has changed since it was planned, or an image cannot be read.
    """
    file.check()
    chosen = _picked(file.path, lines) if isinstance(lines, Picks) else _spanned(file.path, lines)
    parsed = (_parse(file, number, line) for number, _, line in chosen)
    with open_images(images) as found:
        for name, entries in _by_sample(parsed, file.is_tsv):
            if wanted is not None and name not in wanted:
                continue
            captions: list[Any] = [caption for _, more, _ in entries for caption in more]
            image = found.read(name)
            if isinstance(image, Dropped):
                yield Dropped(image.reason, image.kind, pairs=max(1, len(captions)))
            else:
                yield from deliver(
                    image=image, captions=captions, name=name, url=entries[0][2], extra={"file_name": name}
                )


def _by_sample(parsed: Iterable[Entry], is_tsv: bool) -> Iterator[tuple[str, list[Entry]]]:
    """Yields (file name, its entries): of JSON lines each by itself, of TSV all lines that follow each other."""
    if is_tsv:
        for name, entries in itertools.groupby(parsed, lambda entry: entry[0]):
            yield name, list(entries)
    else:
        for entry in parsed:
            yield entry[0], [entry]


def read_lonely(file: CaptionFile, images: Path) -> Iterator[Record | Dropped]:
    """Yields one `Dropped` for each image that no caption names. Takes 8 bytes of memory a line and an image."""
    file.check()
    named = array("Q", (_hash(_normal(_parse(file, n, line)[0])) for n, _, line in _lines(file.path)))
    with open_images(images) as found:
        there = array("Q", map(_hash, found.names()))
    lonely = ~np.isin(np.frombuffer(there, np.uint64), np.frombuffer(named, np.uint64))
    for _ in range(int(lonely.sum())):
        yield Dropped(UNNAMED, pairs=0, samples=0)


# --- images


class FolderImages:
    """Images as files of a folder."""

    def __init__(self, folder: Path):
        self.place = folder

    def __enter__(self) -> "FolderImages":
        return self

    def __exit__(self, *_) -> None:
        return None

    def names(self) -> Iterator[str]:
        """Yields the names of all images, relative to the folder, with "/"."""
        for place, _, files in os.walk(self.place):
            relative = Path(place).relative_to(self.place)
            for name in files:
                if is_image_extension(name.rpartition(".")[2]) and os.path.isfile(os.path.join(place, name)):
                    yield (relative / name).as_posix()

    def has(self, name: str) -> bool:
        """Whether there is an image of that name."""
        return self._path(name) is not None

    def read(self, name: str) -> bytes | Dropped:
        """Returns an image's bytes, or why it cannot be used. Raises InputError if it is there and cannot be read."""
        path = self._path(name)
        if path is None:
            return Dropped(NO_IMAGE)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise InputError(
                f"expected a readable image at {path}, found {error.strerror or error}; mend that"
            ) from error
        return Dropped(LARGE_IMAGE) if len(data) > MAX_IMAGE_BYTES else data

    def _path(self, name: str) -> str | None:
        name = _normal(name)
        if name.startswith(("/", "../")) or not is_image_extension(name.rpartition(".")[2]):
            return None
        path = os.path.join(self.place, name)
        try:
            return path if stat.S_ISREG(os.stat(path).st_mode) else None
        except (OSError, ValueError):  # not there, a name too long; a NUL or a lone surrogate in it
            return None


class TarImages:
    """Images as members of a tar. Of members with one name the last counts, as when the tar is unpacked."""

    def __init__(self, path: Path):
        self.place = path
        self._members = _index(str(path), *_state(path))
        self._tar = TarReader(path)

    def __enter__(self) -> "TarImages":
        return self

    def __exit__(self, *_) -> None:
        self._tar.__exit__()

    def names(self) -> Iterator[str]:
        """Yields the names of all images."""
        return iter(self._members)

    def has(self, name: str) -> bool:
        """Whether there is an image of that name."""
        return _normal(name) in self._members

    def read(self, name: str) -> bytes | Dropped:
        """Returns an image's bytes, or why it cannot be used."""
        member = self._members.get(_normal(name))
        if member is None:
            return Dropped(NO_IMAGE)
        return Dropped(LARGE_IMAGE) if member.size > MAX_IMAGE_BYTES else self._tar.read(member)


def open_images(path: Path) -> FolderImages | TarImages:
    """Returns the images of a folder or tar. Raises InputError if it is neither; a damaged tar is refused as a whole."""
    if path.is_dir():
        return FolderImages(path)
    if not path.is_file():
        raise InputError(f"expected a folder or tar of images at {path}, found neither; give its place with --images")
    try:
        return TarImages(path)
    except OSError as error:
        raise InputError(f"expected a readable tar at {path}, found {error.strerror or error}; mend that") from error


@lru_cache(maxsize=1)
def _index(path: str, size: int, changed: int) -> dict[str, Member]:
    """Returns name to place of the images in a tar; once a process, because every unit needs it."""
    return {
        _normal(member.name): member
        for member in iterate_members(path)
        if is_image_extension(member.name.rpartition(".")[2])
    }


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _hash(name: str) -> int:
    return hash_text(name.encode("utf-8", "backslashreplace").decode())  # JSON can spell what is no Unicode


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


# --- lines


@dataclass
class _Parts:
    """Collects where the lines of each unit lie."""

    is_tsv: bool
    _offsets: array = field(default_factory=lambda: array("q"))
    _numbers: array = field(default_factory=lambda: array("q"))
    _names: array = field(default_factory=lambda: array("Q"))
    _lines: int = 0
    _end: int = 0

    def add(self, name: str, offset: int, number: int) -> None:
        """Notes a line: 24 bytes each for TSV, next to nothing for JSON lines."""
        if self.is_tsv or self._lines % _SAMPLES_PER_UNIT == 0:
            self._offsets.append(offset)
            self._numbers.append(number)
            if self.is_tsv:
                self._names.append(_hash(name))
        self._lines += 1
        self._end = number + 1

    def all(self) -> Iterator[tuple[int, Span | Picks]]:
        """Yields (number of samples, where their lines lie) for each unit."""
        if not self.is_tsv:
            ends = [*self._numbers[1:], self._end]
            for i, (offset, number, end) in enumerate(zip(self._offsets, self._numbers, ends, strict=True)):
                yield min(_SAMPLES_PER_UNIT, self._lines - i * _SAMPLES_PER_UNIT), Span(offset, number, end)
            return
        offsets, numbers = np.frombuffer(self._offsets, np.int64), np.frombuffer(self._numbers, np.int64)
        _, firsts, group = np.unique(np.frombuffer(self._names, np.uint64), return_index=True, return_inverse=True)
        order = np.argsort(firsts[group], kind="stable")  # images in the order of their first lines
        starts = np.concatenate([[0], np.flatnonzero(np.diff(firsts[group][order])) + 1, [len(order)]])
        for i in range(0, len(starts) - 1, _SAMPLES_PER_UNIT):
            some = starts[i : i + _SAMPLES_PER_UNIT + 1]
            lines = order[some[0] : some[-1]]
            if np.array_equal(lines, np.arange(some[0], some[-1])):
                end = self._end if some[-1] == len(order) else int(numbers[some[-1]])
                yield len(some) - 1, Span(int(offsets[lines[0]]), int(numbers[lines[0]]), end)
            else:
                yield len(some) - 1, Picks(offsets[lines], numbers[lines])


def _lines(path: str, offset: int = 0, number: int = 1) -> Lines:
    """Yields the lines from `number` on, which begins at `offset`. A packed file is read from its beginning."""
    with _open(path) as file:
        if isinstance(file, gzip.GzipFile):
            offset, first = 0, 1
        else:
            file.seek(offset)
            first = number
        try:
            for n in itertools.count(first):
                line = file.readline(MAX_TEXT_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_TEXT_BYTES:
                    raise InputError(f"{path}, line {n}: expected at most 1 MB, found more; check the file")
                if n >= number and line.strip():
                    yield n, offset, line
                offset += len(line)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"expected a whole file at {path}, found {error}; copy it again") from error


def _spanned(path: str, span: Span) -> Lines:
    return itertools.takewhile(lambda line: line[0] < span.end, _lines(path, span.offset, span.number))


def _picked(path: str, picks: Picks) -> Lines:
    with _open(path) as file:
        is_packed = isinstance(file, gzip.GzipFile)
    wanted = set(picks.numbers.tolist()) if is_packed else set()
    kept = {number: line for number, _, line in _lines(path) if number in wanted} if is_packed else {}
    with _open(path) as file:
        for number, offset in zip(picks.numbers.tolist(), picks.offsets.tolist(), strict=True):
            if not is_packed:
                file.seek(offset)
                kept = {number: file.readline(MAX_TEXT_BYTES + 1)}
            yield number, offset, kept[number]


def _open(path: str) -> IO[bytes] | gzip.GzipFile:
    try:
        with open(path, "rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if is_packed else open(path, "rb")
    except OSError as error:
        raise InputError(f"expected a readable file at {path}, found {error.strerror or error}; mend that") from error


def _parse(file: CaptionFile, number: int, line: bytes) -> Entry:
    """Returns what a line says. Raises InputError that names it."""
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    if file.is_tsv:
        return _parse_tsv(file.path, number, line)
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise _bad_line(file.path, number, f"{_shown(line)} ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise _bad_line(file.path, number, f"{_shown(line)} (no file_name)")
    captions = entry.get("captions", entry.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise _bad_line(file.path, number, f"{_shown(line)} (no list of captions)")
    return entry["file_name"], captions, entry.get("url")


def _parse_tsv(path: str, number: int, line: bytes) -> Entry:
    try:
        columns = line.decode().rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: expected UTF-8, found {_shown(line)} ({error}); mend that line"
        ) from error
    if len(columns) != 2 or not columns[0].strip():
        raise InputError(
            f"{path}, line {number}: expected a name, a tab and a caption, found {len(columns)} columns: {_shown(line)}; "
            "mend that line"
        )
    return columns[0].strip(), [columns[1]], None


def _is_header(line: bytes) -> bool:
    words = [word.strip().lower() for word in line.decode("utf-8-sig", "replace").split("\t")]
    return len(words) == 2 and words[0] in _NAME_HEADERS and words[1] in _CAPTION_HEADERS


def _bad_line(path: str, number: int, found: str) -> InputError:
    return InputError(
        f'{path}, line {number}: expected {{"file_name": "…", "captions": ["…"]}}, found {found}; mend that line'
    )


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:60] + "…")

"""What the retrieval benchmarks have in common: packed whole, in the order of their lists, and checked against what is known.

A recall on fewer images, on other captions or in another order is another protocol. So no filter applies, one broken
image stops the job, and an annotation that is not the published one is an error. Used by `flickr30k`, `coco` and `cub`.
"""

import hashlib
import html
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from data_prep.plan import Dropped, Plan, PrepareConfig, Record, Unit
from setclip.errors import InputError

NOT_FOUND = "image not found"
BEYOND = "caption beyond those that the protocol takes (captions, not samples)"
NO_CAPTION = "image without caption"
DAMAGED = "image damaged in its zip"

IMAGES_PER_UNIT = 1_000  # photographs of about 150 kB: one shard of a good size

_FILTERS = ("min_side", "max_aspect", "min_caption_chars", "max_caption_chars")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(PrepareConfig):
    """What every retrieval benchmark can be told. Filters are refused: they would make another benchmark of it."""

    max_bad: float = 0.0
    """Share of samples that may be left out as bad; more than that stops the job. Above 0 it is another protocol."""
    short_side: int = 0
    """Images with a longer short side are resized to it, in pixels; others keep their bytes. 0 keeps all as they are:
    the protocols resize from the original."""
    check: Literal["structure", "decode"] = "decode"
    """Of images that keep their bytes: headers and the marks of a complete file, or every pixel (several times slower;
    finds damage inside)."""
    allow_missing: bool = False
    """Whether an evaluation split may lack images. Training images that are not there are counted in any case."""
    allow_other_version: bool = False
    """Whether to take an annotation that is not the published one; the differences are kept in the manifest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {entry.name: entry.default for entry in fields(self)}
        changed = [f"{name} {getattr(self, name)}" for name in _FILTERS if getattr(self, name) != defaults[name]]
        if changed:
            raise InputError(
                f"expected no filter on a retrieval benchmark (it would be another protocol, and ids would no longer "
                f"stand beside their captions), found {', '.join(changed)}; leave these out"
            )


@dataclass(frozen=True)
class Place:
    """Where an image's bytes lie: a file, a range of a tar, or a member of a zip."""

    path: str
    offset: int = 0
    size: int = -1
    """-1: to the end of the file."""
    member: str | None = None

    def read(self) -> bytes:
        """Returns the bytes."""
        if self.member is not None:
            return _open_zip(self.path).read(self.member)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image of a benchmark's list, with the captions that the protocol takes."""

    name: str
    """Of the image, from the folder that the user gives, with "/"."""
    split: str
    captions: tuple[str, ...]
    extra: dict[str, Any]
    beyond: int = 0
    """Captions of the list that the protocol leaves out."""


@dataclass(frozen=True)
class Fact:
    """Something that is known of a published split, and how it is found in a list."""

    what: str
    expected: int | str
    found: int | str
    is_confirmed: bool = True
    """Whether a difference means another version for sure. Where our value comes from a single copy that is not the
    original file, a difference is a warning."""


def check_version(path: Path, facts: Iterable[Fact], allow_other_version: bool) -> list[str]:
    """Returns the differences from the published annotation, as warnings.

    Raises InputError with all of them where one is certain, unless `allow_other_version`.
    """
    wrong = [fact for fact in facts if fact.found != fact.expected]
    differences = [f"{fact.what}: expected {_shown(fact.expected)}, found {_shown(fact.found)}" for fact in wrong]
    if any(fact.is_confirmed for fact in wrong) and not allow_other_version:
        raise InputError(
            f"{path}: expected the published annotation, found differences:\n  "
            + "\n  ".join(differences)
            + "\nTake the file as its owners publish it, or accept another protocol with --allow-other-version True"
        )
    return [f"{path.name} differs from the published annotation, {text}" for text in differences]


def make_plan(
    config: BenchmarkConfig,
    entries: Sequence[Entry],
    images: Path,
    splits: Sequence[str],
    credits: list[str],
    warnings: list[str],
) -> Plan:
    """Returns the units of `entries`, split by split in the order of `splits`, each split in the order of the list.

    Every split but "train" is for evaluation. Raises InputError where no image is there, or an evaluation split lacks
    some and `config.allow_missing` is not given.
    """
    _check_names(entries)
    places = find_images(images, [entry.name for entry in entries])
    missing: defaultdict[str, list[str]] = defaultdict(list)
    for entry in entries:
        if entry.name not in places:
            missing[entry.split].append(entry.name)
    if not places:
        raise InputError(
            f"expected {len(entries):,} images in {images}, found none of them, not even {entries[0].name}; give the "
            "folder (or plain tar, or zip) from which these names go on with --images"
        )
    totals = Counter(entry.split for entry in entries)
    lacking = [f"{s}: {len(missing[s]):,} of {totals[s]:,} ({missing[s][0]}, …)" for s in splits if missing[s]]
    if any(missing[split] for split in splits if split != "train") and not config.allow_missing:
        raise InputError(
            f"expected every image of the evaluation splits in {images}, did not find {'; '.join(lacking)}. Recall over "
            "fewer images is another protocol: get the missing ones, or accept that with --allow-missing True"
        )
    units = []
    for split in splits:
        of_split = [entry for entry in entries if entry.split == split]
        for start in range(0, len(of_split), IMAGES_PER_UNIT):
            chunk = of_split[start : start + IMAGES_PER_UNIT]
            work = [(entry, places.get(entry.name)) for entry in chunk]
            name = f"{split} images {start} to {start + len(chunk) - 1}"
            units.append(Unit(name=name, split=split, read=partial(read_entries, work)))
    return Plan(
        units=units, credits=credits, warnings=[*warnings, *(f"images not found in {text}" for text in lacking)]
    )


def read_entries(work: Sequence[tuple[Entry, Place | None]]) -> Iterator[Record | Dropped]:
    """Yields what `work` lists, in its order. Raises OSError where an image that was there can no longer be read."""
    for entry, place in work:
        if not entry.captions:
            yield Dropped(NO_CAPTION, "absent", pairs=0)
        elif place is None:
            yield Dropped(NOT_FOUND, "absent", pairs=len(entry.captions))
        else:
            try:
                image = place.read()
            except (zipfile.BadZipFile, zlib.error, EOFError):
                yield Dropped(DAMAGED, pairs=len(entry.captions))
                continue
            yield Record(image=image, captions=list(entry.captions), name=entry.name, extra=entry.extra)
            # The protocol does not list these pairs, so they are none that is missing.
            yield from [Dropped(BEYOND, "filtered", pairs=0, samples=0)] * entry.beyond


def find_images(root: Path, names: Iterable[str]) -> dict[str, Place]:
    """Returns the places of those `names` that are in `root`: a folder, an uncompressed tar, or a zip.

    A subfolder may be a zip or tar of the same name (`train2014.zip`). Folders are listed once instead of asking for
    each file. In an archive the names may stand in further folders. Raises InputError where `root` is nothing of these.
    """
    if root.is_file():
        return _in_archive(root, set(names))
    if not root.is_dir():
        raise InputError(
            f"expected a folder, plain tar or zip of images at {root}, found none; give its place with --images"
        )
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        wanted[name.rpartition("/")[0]].add(name)
    found: dict[str, Place] = {}
    for parent, of_parent in wanted.items():
        folder = root / parent
        if folder.is_dir():
            prefix = f"{parent}/" if parent else ""
            with os.scandir(folder) as files:
                found.update(
                    {prefix + file.name: Place(file.path) for file in files if prefix + file.name in of_parent}
                )
            continue
        for archive in (Path(f"{folder}.zip"), Path(f"{folder}.tar")):
            if archive.is_file():
                found.update(_in_archive(archive, of_parent))
                break
    return found


def one_line(text: str) -> str:
    """Returns `text` with every run of white space as one space, and none at its ends."""
    return " ".join(text.split())


def caption_letters(caption: str) -> str:
    """Returns the ASCII letters and digits of a caption, lower-cased: what copies of a data set agree on.

    They differ in spaces, in quotes, in tokenisation and in HTML entities ("&amp;").
    """
    return re.sub(r"[^a-z0-9]", "", html.unescape(caption).lower())


def digest_of(lines: Iterable[object]) -> str:
    """Returns the hex SHA-256 over `lines`, as text with a newline after each."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def captions_digest(captions: Mapping[str, Sequence[str]]) -> str:
    """Returns the digest of file name to captions: a line "NAME tab LETTERS" each, names sorted, captions in order."""
    return digest_of(f"{name}\t{caption_letters(text)}" for name in sorted(captions) for text in captions[name])


def _in_archive(path: Path, names: set[str]) -> dict[str, Place]:
    depths = {name.count("/") + 1 for name in names}
    found: dict[str, Place] = {}
    for member, place in _members(path):
        parts = [part for part in member.split("/") if part not in ("", ".")]
        for depth in depths:
            name = "/".join(parts[-depth:])
            if name not in names:
                continue
            if name in found:
                raise InputError(
                    f"expected each image once in {path}, found {name} twice; unpack it and give one of the folders"
                )
            found[name] = place
    return found


def _members(path: Path) -> Iterator[tuple[str, Place]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, Place(str(path), member=info.filename)
        return
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, Place(str(path), member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"expected an uncompressed tar or a zip at {path}, found {error}; unpack it and give the folder"
        ) from error


@lru_cache(maxsize=2)
def _open_zip(path: str) -> zipfile.ZipFile:
    """Returns an open zip: reading the list of 80,000 members takes a second, so once per process is enough."""
    return zipfile.ZipFile(path)


def _check_names(entries: Sequence[Entry]) -> None:
    """Raises InputError where names are not there once each, or would leave the folder."""
    if not entries:
        raise InputError("expected a list of images, found an empty one; check the annotation")
    repeated = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if repeated:
        raise InputError(
            f"expected each image once in the annotation, found {len(repeated):,} repeated, the first {repeated[0]}; take "
            "the file as its owners publish it"
        )
    for entry in entries:
        if entry.name.startswith("/") or ".." in entry.name.split("/"):
            raise InputError(
                f"expected names of images inside a folder, found {entry.name!r} in the annotation; such names are not read"
            )


def _shown(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value[:16]

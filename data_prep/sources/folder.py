"""A folder or tar of images with a JSON-lines file of captions: `{"file_name": …, "captions": […]}` on each line.

The first source for photographs of one's own. Image bytes go into the shards as they are, JPEG, PNG and WebP alike:
re-encoding would lose quality and break the tie between key and bytes, and every reader of ours takes all three.

Everything is read twice: once to check it (so that a bad input is refused before anything is written), once to pack it.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.parallel import run_tasks
from data_prep.plan import Plan, PrepareConfig, ShardPlan, check_share_of_bad
from setclip.decode import DecodeError, decode_rgb
from setclip.errors import InputError
from setclip.shards import KEY_LENGTH, Sample, is_image_extension

_CHECKED_AT_ONCE = 256  # images in one task of a process

NO_IMAGE = "caption without image"
NO_CAPTION = "image without caption"
EMPTY_SAMPLE = "no caption that is not empty"
DUPLICATE = "duplicate (same image, same captions)"
EMPTY_CAPTION = "empty caption (captions, not samples)"


@dataclass(frozen=True, kw_only=True)
class FolderConfig(PrepareConfig):
    """Packs a folder (or plain tar) of images and a JSON-lines file of captions."""

    images: Path
    """Folder or uncompressed tar; the names in it are the file_name of the captions."""
    captions: Path
    """JSON lines: {"file_name": "a.jpg", "captions": ["…", "…"]}, or "caption" for a single one."""
    split: str = "train"
    """Name of the split that the samples make."""
    shard_bytes: int = 256_000_000
    """Most bytes of images in one shard."""


@dataclass(frozen=True)
class Place:
    """Where an image's bytes lie: a file, or a range of a tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Returns the bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Record:
    """A line of the captions file whose image is there."""

    file_name: str
    captions: list[str]
    place: Place


@dataclass(frozen=True)
class Checked:
    """What checking one image found: its hash and shape, or the reason why it cannot be used."""

    sha256: str = ""
    image_ext: str = ""
    width: int = 0
    height: int = 0
    fault: str | None = None


def plan(config: FolderConfig) -> Plan:
    """Reads captions and images, drops what is bad, and returns the shards to be made."""
    listed = read_captions(config.captions)
    places = find_images(config.images)
    bad: Counter[str] = Counter()
    empty_captions = 0
    records = []
    for file_name, captions in listed:
        kept = [caption for caption in captions if caption.strip()]
        empty_captions += len(captions) - len(kept)
        if file_name not in places:
            bad[NO_IMAGE] += 1
        elif not kept:
            bad[EMPTY_SAMPLE] += 1
        else:
            records.append(Record(file_name, kept, places[file_name]))
    without_caption = places.keys() - {file_name for file_name, _ in listed}
    bad[NO_CAPTION] += len(without_caption)

    if places.keys().isdisjoint(file_name for file_name, _ in listed):
        raise InputError(
            f"expected the file_name of captions to be names in {config.images}, found no pair: {config.captions} names "
            f"{listed[0][0]!r}, the images are {len(places)}, the first {next(iter(places), None)!r}; give the folder "
            "that the names are relative to"
        )
    blocks = [records[i : i + _CHECKED_AT_ONCE] for i in range(0, len(records), _CHECKED_AT_ONCE)]
    checks = run_tasks(
        [partial(check_images, [r.place for r in block]) for block in blocks],
        config.processes,
        description="checking images",
        sizes=list(map(len, blocks)),
    )
    rows: list[tuple[Record, Checked, str]] = []
    seen: dict[str, list[list[str]]] = {}
    for record, checked in zip(records, (c for block in checks for c in block), strict=True):
        if checked.fault is not None:
            bad[checked.fault] += 1
            continue
        others = seen.setdefault(checked.sha256, [])
        if record.captions in others:
            bad[DUPLICATE] += 1
            continue
        # The same image again, with other captions: a suffix keeps keys apart; WebDataset cuts names at the first dot.
        suffix = f"-{len(others)}" if others else ""
        others.append(record.captions)
        rows.append((record, checked, checked.sha256[:KEY_LENGTH] + suffix))

    check_share_of_bad(+bad, len(listed) + len(without_caption), config.max_bad)
    if not rows:
        raise InputError(f"expected at least one good image in {config.images}, found none; {dict(+bad)} were left out")
    shards = []
    for number, chunk in enumerate(_chunks(rows, config.shard_size, config.shard_bytes)):
        name = f"{config.split}-{number:05d}.tar"
        shards.append(ShardPlan(name=name, split=config.split, samples=len(chunk), make=partial(read_samples, chunk)))
    dropped = dict(+bad)
    if empty_captions:
        dropped[EMPTY_CAPTION] = empty_captions
    pairs_listed = sum(max(1, len(captions)) for _, captions in listed)
    return Plan(shards=shards, folders={}, dropped=dropped, pairs_listed=pairs_listed, credits=[])


def read_captions(path: Path) -> list[tuple[str, list[str]]]:
    """Returns (file name, captions) of each line; blank lines are passed over.

    Raises InputError that names the file and the line where it is not what is expected.
    """
    if not path.is_file():
        raise InputError(
            f"expected a JSON-lines file of captions at {path}, found none; give its place with --captions"
        )
    result = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise _bad_line(path, number, f"{_shown(line)} ({error})") from error
            if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                raise _bad_line(path, number, f"{_shown(line)} (no file_name)")
            captions = entry.get("captions", entry.get("caption"))
            captions = [captions] if isinstance(captions, str) else captions
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise _bad_line(path, number, f"{_shown(line)} (no list of captions)")
            result.append((entry["file_name"], captions))
    if not result:
        raise InputError(f"expected captions in {path}, found no line; check the file")
    return result


def find_images(path: Path) -> dict[str, Place]:
    """Returns name to place of every image in a folder (names relative to it, with "/") or an uncompressed tar."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and is_image_extension(p.suffix[1:]))
        return {p.relative_to(path).as_posix(): Place(str(p), 0, p.stat().st_size) for p in files}
    if not path.is_file():
        raise InputError(f"expected a folder or tar of images at {path}, found neither; give its place with --images")
    try:
        with tarfile.open(path, "r:") as tar:
            return {
                os.path.normpath(member.name): Place(str(path), member.offset_data, member.size)
                for member in tar
                if member.isfile() and is_image_extension(member.name.rpartition(".")[2])
            }
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"expected an uncompressed tar at {path}, found {error}; unpack it and give the folder, or pack it without "
            "compression"
        ) from error


def check_images(places: list[Place]) -> list[Checked]:
    """Reads and decodes each image wholly."""
    return [_check(place) for place in places]


def read_samples(rows: list[tuple[Record, Checked, str]]) -> Iterator[Sample]:
    """Yields the samples of one shard, without parsed objects. Raises InputError if an image changed since its check."""
    for record, checked, key in rows:
        image = record.place.read()
        if hashlib.sha256(image).hexdigest() != checked.sha256:
            raise InputError(f"{record.file_name} in {record.place.path} changed while it was read; start again")
        yield Sample(
            key=key,
            image=image,
            image_ext=checked.image_ext,
            captions=record.captions,
            objects={},
            width=checked.width,
            height=checked.height,
            sha256=checked.sha256,
            extra={"file_name": record.file_name},
        )


def _check(place: Place) -> Checked:
    try:
        image = place.read()
        extension = _extension(image)
        if extension is None:
            return Checked(fault="unreadable image (empty file)" if not image else "not JPEG, PNG or WebP")
        height, width, _ = decode_rgb(image).shape
    except DecodeError as error:
        return Checked(fault=f"unreadable image ({error})")
    return Checked(hashlib.sha256(image).hexdigest(), extension, width, height)


def _extension(image: bytes) -> str | None:
    """Returns the extension by content; names lie."""
    if image[:2] == b"\xff\xd8":
        return "jpg"
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None


def _chunks(rows: list, most: int, most_bytes: int) -> Iterator[list]:
    chunk: list = []
    size = 0
    for row in rows:
        if chunk and (len(chunk) == most or size + row[0].place.size > most_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += row[0].place.size
    if chunk:
        yield chunk


def _bad_line(path: Path, number: int, found: str) -> InputError:
    return InputError(
        f'{path}, line {number}: expected {{"file_name": "…", "captions": ["…"]}}, found {found}; mend that line'
    )


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:60] + "…")

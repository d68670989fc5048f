"""Checks one shard sample by sample: in itself, against its index, and against its entry in the manifest.

The tar is walked header by header with tarfile's parser, not through the index, and on from the next valid header where
one is damaged. So every fault has its place, and what is whole around it is known. Used by `data_prep.verify`, which
reports, and by `data_prep.repair`, which keeps what is whole.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from setclip.decode import IMAGE_EXTENSIONS, DecodeError, decode_rgb, image_size
from setclip.errors import InputError
from setclip.hashing import hash_text
from setclip.manifest import Manifest
from setclip.shards import OBJECTS_PREFIX, Sample, Shard, ShardInfo, features_of, pair_hash, tar_header

MOST_FAULTS = 1_000  # named of one shard; more are counted

_BLOCK = tarfile.BLOCKSIZE
_MOST_NAME = 100  # bytes
_END = 2 * _BLOCK  # empty bytes behind the last member
_SCANNED_AT_ONCE = 1 << 20
_MAGIC, _MAGIC_OFFSET = b"ustar", 257
_PLACES = ("start", "end", "image_offset", "image_size", "json_offset", "json_size")
_COLUMNS = {"key", "image_ext", "image_crc32", "pair_hash", *_PLACES}


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it should be."""

    shard: str
    key: str | None
    """None where it is about the shard as a whole."""
    what: str


@dataclass(frozen=True, kw_only=True)
class CheckRules:
    """What is checked beyond the tar itself."""

    decode: float = 0.01
    """Share of samples whose pictures are decoded; which ones depends on their keys only."""
    resized_side: int = 0
    """Short side of pictures that the preparation may have made smaller, so that their bytes are not those of their
    `sha256`; 0 where it made none smaller."""

    @classmethod
    def of_manifest(cls, manifest: Manifest, decode: float) -> "CheckRules":
        """Takes them from a preparation's manifest."""
        side = manifest.config.get("short_side", 0)
        return cls(decode=decode, resized_side=side if manifest.resized and isinstance(side, int) else 0)

    def decodes(self, key: str) -> bool:
        """Whether the picture of this key is among those that are decoded."""
        return hash_text(key) < self.decode * 2**64


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What was found of one shard."""

    name: str
    found: int = 0
    """Samples that the tar holds, whole or not."""
    whole: int = 0
    """Samples that can be kept."""
    captions: int = 0
    """Of the whole samples."""
    decoded: int = 0
    bytes: int = 0
    sha256: str = ""
    """Of the tar as it is; "" where it cannot be read."""
    is_as_written: bool = False
    """Whether size and checksum are those of the manifest."""
    must_be_rewritten: bool = False
    """Whether tar or index are at fault in themselves, not only different from what the manifest says of them."""
    is_readable: bool = True
    """False where the system refuses to read it, which says nothing about its content."""
    unproven: int = 0
    """Whole samples of a changed tar without index whose pictures were resized: nothing vouches for every byte of them."""
    faults: list[Fault] = field(default_factory=list)
    unnamed_faults: int = 0


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    header: int
    """Offset of its header, in bytes; its data begins 512 later."""
    size: int

    @property
    def data(self) -> int:
        """Offset of its first byte."""
        return self.header + _BLOCK

    @property
    def end(self) -> int:
        """Offset behind its padding."""
        return self.data + _padded(self.size)


class Place(NamedTuple):
    """Where the members of a sample lie."""

    key: str
    ext: str
    image: Member
    text: Member | None
    """None where only the index knows of the sample: it does not say how long the text is."""
    record: Member

    @property
    def start(self) -> int:
        """Offset of the first header."""
        return self.image.header


def check_shard(folder: Path, info: ShardInfo, rules: CheckRules, keys_path: Path | None = None) -> ShardReport:
    """Returns what is found of one shard; raises nothing for whatever its files hold.

    Where anything is at fault, the keys of the samples that can be kept are written to `keys_path` (Parquet).
    """
    check = ShardCheck(folder, info, rules)
    report = check.run()
    if keys_path is not None and (report.faults or not report.is_readable):
        write_keys(keys_path, [place.key for place in check.whole])
    return report


def write_keys(path: Path, keys: list[str]) -> None:
    """Writes a Parquet file with the one column "key"."""
    pq.write_table(pa.table({"key": pa.array(keys, pa.string())}), path)


class ShardCheck:
    """The check of one shard; after `run`, `whole` holds the places of what can be kept, in order."""

    def __init__(self, folder: Path, info: ShardInfo, rules: CheckRules):
        self.path, self.info, self.rules = folder / info.name, info, rules
        self.whole: list[Place] = []
        self._rows: dict[str, dict[str, Any]] = {}
        self._faults: list[Fault] = []
        self._unnamed = self._found = self._decoded = self._captions = self._unproven = 0
        self._must_be_rewritten = self._is_as_written = False
        self._size = 0

    def run(self) -> ShardReport:
        """Returns the report."""
        digest, is_readable = "", True
        try:
            with open(self.path, "rb") as file:
                self._file = file.fileno()
                self._size = os.fstat(self._file).st_size
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._check(digest)
        except FileNotFoundError:
            self._fault(None, "the tar is missing")
        except OSError as error:
            is_readable = False
            self._fault(None, f"cannot be read: {error.strerror or error}")
        return ShardReport(
            name=self.info.name,
            found=self._found,
            whole=len(self.whole),
            captions=self._captions,
            decoded=self._decoded,
            bytes=self._size,
            sha256=digest,
            is_as_written=self._is_as_written,
            must_be_rewritten=self._must_be_rewritten,
            is_readable=is_readable,
            unproven=self._unproven,
            faults=self._faults,
            unnamed_faults=self._unnamed,
        )

    def samples(self) -> Iterator[tuple[Sample, dict[str, int | None]]]:
        """Yields the whole samples with the numbers that the index has of them. Raises OSError."""
        with open(self.path, "rb") as file:
            self._file = file.fileno()
            for place in self.whole:
                record = _record(self._read(place.record), place.key)
                yield _sample(place, self._read(place.image), record), features_of(self._rows.get(place.key, {}))

    def _check(self, digest: str) -> None:
        info = self.info
        self._is_as_written = self._size == info.bytes and digest == info.sha256
        if self._size != info.bytes:
            self._fault(None, f"the tar has {self._size:,} bytes, the manifest says {info.bytes:,}", of_manifest=True)
        elif digest != info.sha256:
            self._fault(None, "the tar's checksum is not the manifest's", of_manifest=True)
        members, damages = self._walk()
        places, strays = _grouped(members)
        self._found = len(places)
        self._read_index({place.key for place in places})
        for offset, what in damages:
            self._fault(self._key_at(offset, strays), what)
        named = {fault.key for fault in self._faults}
        for key, names in strays.items():
            if key not in named:
                self._fault(key, f"expected an image, {key}.txt and {key}.json together, found only {', '.join(names)}")
        captions_known = self._check_samples(places)
        if not self._is_as_written:
            self._look_where_the_index_says()
            if self._unproven and not self._must_be_rewritten:
                what = (
                    f"no sample can be named: {_count(self._unproven, 'picture')} were resized, so that no hash tells"
                )
                self._fault(None, f"{what} whether every byte is right; all can be decoded", of_manifest=True)
        if self._found != info.samples:
            what = f"{_count(self._found, 'sample')} in the tar, the manifest says {info.samples:,}"
            self._fault(None, what, of_manifest=True)
        elif captions_known and self._captions != info.captions:
            what = f"{_count(self._captions, 'caption')} in the tar, the manifest says {info.captions:,}"
            self._fault(None, what, of_manifest=True)

    # --- the tar

    def _walk(self) -> tuple[list[Member], list[tuple[int, str]]]:
        """Returns the files whose headers are valid, and what is damaged (offset, words)."""
        members: list[Member] = []
        damages: list[tuple[int, str]] = []
        position = 0
        while True:
            header = _header(self._read_at(position, _BLOCK))
            if header is None:
                following = self._next_header(position)
                if following is None:
                    break
                damages.append((position, f"damaged header at byte {position:,}"))
                position = following
                continue
            member = Member(_printable(header.name), position, header.size)
            if not header.isreg():
                damages.append((position, f"expected files only, found {member.name!r} of type {header.type!r}"))
                position = member.end
            elif member.data + member.size > self._size:
                damages.append((position, f"cut short in {member.name!r}"))
                return members, damages
            else:
                members.append(member)
                position = member.end
        rest = self._first_byte(position)
        if rest is not None:
            damages.append((position, f"damaged header at byte {position:,}"))
        elif self._size - position < _END:
            damages.append((position, f"cut short: the end of {_END:,} empty bytes is missing"))
        return members, damages

    def _next_header(self, position: int) -> int | None:
        """Returns where the next valid header behind `position` begins."""
        position += _BLOCK
        while data := self._read_at(position, _SCANNED_AT_ONCE):
            at = data.find(_MAGIC)
            while at >= 0:
                offset = at - _MAGIC_OFFSET
                if offset >= 0 and offset % _BLOCK == 0 and _header(data[offset : offset + _BLOCK]) is not None:
                    return position + offset
                at = data.find(_MAGIC, at + 1)
            position += _SCANNED_AT_ONCE
        return None

    def _first_byte(self, position: int) -> int | None:
        """Returns the offset of the first byte behind `position` that is not empty."""
        while data := self._read_at(position, _SCANNED_AT_ONCE):
            if stripped := data.lstrip(b"\0"):
                return position + len(data) - len(stripped)
            position += len(data)
        return None

    # --- the index

    def _read_index(self, keys: set[str]) -> None:
        """Keeps the index's rows by key, where it is readable and of this tar."""
        try:
            shard = Shard(self.path)
            rows = [shard.entry(row) for row in range(len(shard))]
        except (InputError, pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            missing = not self.path.with_suffix(".idx").exists()
            self._fault(None, "the index is missing" if missing else f"the index cannot be read: {error}")
            return
        if rows and not rows[0].keys() >= _COLUMNS:
            self._fault(None, f"the index has no column {', '.join(sorted(_COLUMNS - rows[0].keys()))}")
            return
        by_key: dict[str, dict[str, Any]] = {}
        for row in rows:
            if isinstance(row["key"], str):
                by_key.setdefault(row["key"], row)
        if keys and by_key.keys().isdisjoint(keys):
            self._fault(None, f"the index is of another shard: none of its {_count(len(rows), 'key')} is in the tar")
            return
        self._rows = by_key
        if len(by_key) < len(rows):
            self._fault(None, "the index has a key twice")
        order = [key for key in by_key if key in keys]
        if order != sorted(order, key=lambda key: by_key[key]["start"] or 0):
            self._fault(None, "the index has the samples in another order than the tar")

    def _key_at(self, offset: int, strays: Mapping[str, list[str]]) -> str | None:
        """Returns the key of the sample that lies at an offset, by the index, or by the one name that lost its others."""
        for key, row in self._rows.items():
            if _is_number(row["start"]) and _is_number(row["end"]) and row["start"] <= offset < row["end"]:
                return key
        return next(iter(strays)) if len(strays) == 1 else None

    def _look_where_the_index_says(self) -> None:
        """Keeps samples that the walk did not meet whole, because a header of theirs is damaged."""
        known = {place.key for place in self.whole}
        named = {fault.key for fault in self._faults}
        for key, row in self._rows.items():
            if key in known:
                continue
            place = _place_of(row)
            if place is None:
                captions, problems = 0, ["its place in the index is none"]
            else:
                captions, problems, _ = self._problems(place)
            if place is not None and not problems:
                self._keep(place, captions)
                if key not in named:
                    self._fault(key, "is whole, but the tar's headers do not lead to it")
            elif key not in named:
                self._fault(key, f"is in the index, but not whole in the tar: {problems[0]}")
        self.whole.sort(key=lambda place: place.start)

    # --- the samples

    def _check_samples(self, places: list[Place]) -> bool:
        """Checks and keeps what the walk has found; returns whether all is whole."""
        seen: set[str] = set()
        are_whole = True
        for place in places:
            if place.key in seen:
                self._fault(place.key, "the key occurs twice in this shard")
                are_whole = False
                continue
            captions, broken, blemishes = self._problems(place)
            for what in broken + blemishes:
                self._fault(place.key, what)
            if broken:
                are_whole = False
            else:
                seen.add(place.key)
                self._keep(place, captions)
        if self._is_as_written:
            for key in self._rows.keys() - {place.key for place in places}:
                self._fault(key, "is in the index, but not in the tar")
        return are_whole

    def _keep(self, place: Place, captions: int) -> None:
        self.whole.append(place)
        self._captions += captions

    def _problems(self, place: Place) -> tuple[int, list[str], list[str]]:
        """Returns the number of captions, what makes the sample useless, and what is wrong around it.

        The last goes away when the sample is written again.
        """
        try:
            record = _record(self._read(place.record), place.key)
        except _Broken as error:
            return 0, [str(error)], []
        broken: list[str] = []
        blemishes: list[str] = []
        row = self._rows.get(place.key)
        if row is None:
            if self._rows:
                blemishes.append("is not in the index")
        else:
            if place.text is not None and (wrong := [name for name, v in _places(place).items() if row[name] != v]):
                blemishes.append(f"the index has another {', '.join(wrong)}")
            if wrong := _differences(record, row):
                # Of a tar that is as it was written the index is wrong; of a changed one the sample may be.
                what = f"JSON and index disagree about {', '.join(wrong)}"
                (blemishes if self._is_as_written else broken).append(what)
        if place.text is not None:
            first = record["captions"][0] if record["captions"] else ""
            if self._read(place.text) != first.encode("utf-8", "surrogatepass"):
                blemishes.append(f"{place.key}.txt is not the first caption")
            if not self._is_as_written and not self._is_framed(place):
                blemishes.append("a header or padding is not as it was written")
        broken += self._problems_of_image(place, record)
        return len(record["captions"]), broken, blemishes

    def _problems_of_image(self, place: Place, record: Mapping[str, Any]) -> list[str]:
        image = self._read(place.image)
        said = (record["width"], record["height"])
        try:
            size = image_size(image)
            if all(said) and size != said:
                return [f"the picture has {size[0]} × {size[1]} pixels, its JSON says {said[0]} × {said[1]}"]
            row = self._rows.get(place.key)
            is_proven = (
                self._is_as_written
                or (row is not None and row["image_crc32"] == zlib.crc32(image))
                or hashlib.sha256(image).hexdigest() == record["sha256"]
            )
            if not is_proven and row is not None:
                return ["the picture's bytes are not those that were written"]
            if not is_proven and record["sha256"] and not (place.ext == "jpg" and min(size) == self.rules.resized_side):
                return ["the picture's bytes are not those of its sha256"]
            if not is_proven or self.rules.decodes(place.key):
                self._decoded += 1
                height, width, _ = decode_rgb(image).shape
                if (width, height) != size:
                    return [f"the picture decodes to {width} × {height} pixels, its header says {size[0]} × {size[1]}"]
            self._unproven += not is_proven
        except DecodeError as error:
            return [f"the picture cannot be decoded: {error}"]
        return []

    def _is_framed(self, place: Place) -> bool:
        """Whether headers and paddings are what our writer makes."""
        for member in (place.image, place.text, place.record):
            assert member is not None
            if self._read_at(member.header, _BLOCK) != tar_header(member.name, member.size):
                return False
            if self._read_at(member.data + member.size, member.end - member.data - member.size).strip(b"\0"):
                return False
        return True

    def _read(self, member: Member) -> bytes:
        return self._read_at(member.data, member.size)

    def _read_at(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes, fewer at the end of the file."""
        parts = []
        while size > 0 and (data := os.pread(self._file, size, offset)):
            parts.append(data)
            offset, size = offset + len(data), size - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fault(self, key: str | None, what: str, of_manifest: bool = False) -> None:
        self._must_be_rewritten = self._must_be_rewritten or not of_manifest
        if len(self._faults) < MOST_FAULTS:
            self._faults.append(Fault(self.info.name, key, what))
        else:
            self._unnamed += 1


class _Broken(ValueError):
    """A JSON that is none of ours; the message says why."""


def _record(encoded: bytes, key: str) -> dict[str, Any]:
    """Returns a sample's JSON. Raises _Broken."""
    try:
        record = json.loads(encoded.decode())
        json.dumps(record, ensure_ascii=False).encode()  # lone surrogates could not be written again
    except (ValueError, RecursionError) as error:
        raise _Broken(f"its JSON cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise _Broken("its JSON is no object")
    record = {"objects": {}, "width": 0, "height": 0, "sha256": "", **record}
    captions, objects = record.get("captions"), record["objects"]
    if record.get("key") != key:
        raise _Broken(f"its JSON is of key {record.get('key')!r}")
    if not _are_texts(captions):
        raise _Broken("its JSON has no list of captions")
    if not isinstance(objects, dict) or not all(
        isinstance(lists, list) and len(lists) == len(captions) and all(map(_are_texts, lists))
        for lists in objects.values()
    ):
        raise _Broken("its JSON has no list of objects a caption")
    if not all(_is_number(record[side]) for side in ("width", "height")) or not isinstance(record["sha256"], str):
        raise _Broken("its JSON has a width, height or sha256 of a wrong kind")
    return record


def _sample(place: Place, image: bytes, record: dict[str, Any]) -> Sample:
    own = ("captions", "objects", "width", "height", "sha256", "url")
    return Sample(
        key=place.key,
        image=image,
        image_ext=place.ext,
        **{name: record[name] for name in own if name in record},
        extra={name: value for name, value in record.items() if name not in (*own, "key")},
    )


def _differences(record: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Returns the columns of the index that do not follow from the JSON."""
    wrong = []
    if row["pair_hash"] != pair_hash(record["sha256"], record["captions"]):
        wrong.append("sha256 or captions")
    parsers = {name.removeprefix(OBJECTS_PREFIX) for name in row if name.startswith(OBJECTS_PREFIX)} | record[
        "objects"
    ].keys()
    for parser in sorted(parsers):
        lists = record["objects"].get(parser)
        distinct = None if lists is None else [list(dict.fromkeys(names)) for names in lists]
        if row.get(OBJECTS_PREFIX + parser) != distinct:
            wrong.append(f"objects of {parser}")
    return wrong


def _places(place: Place) -> dict[str, Any]:
    """Returns a place as the index has it."""
    return {
        "image_ext": place.ext,
        "start": place.start,
        "end": place.record.end,
        "image_offset": place.image.data,
        "image_size": place.image.size,
        "json_offset": place.record.data,
        "json_size": place.record.size,
    }


def _place_of(row: Mapping[str, Any]) -> Place | None:
    """Returns the place that a row of the index names; None where it cannot be one."""
    if not all(_is_number(row[name]) for name in _PLACES) or row["image_ext"] not in IMAGE_EXTENSIONS:
        return None
    key, ext = row["key"], row["image_ext"]
    image = Member(f"{key}.{ext}", row["image_offset"] - _BLOCK, row["image_size"])
    return Place(key, ext, image, None, Member(f"{key}.json", row["json_offset"] - _BLOCK, row["json_size"]))


def _grouped(members: list[Member]) -> tuple[list[Place], dict[str, list[str]]]:
    """Returns the samples whose members stand together, and key to the names of members that do not."""
    places: list[Place] = []
    strays: dict[str, list[str]] = {}
    position = 0
    while position < len(members):
        first = members[position]
        key, _, ext = first.name.partition(".")
        following = members[position + 1 : position + 3]
        stand_together = [m.name for m in following] == [f"{key}.txt", f"{key}.json"] and (
            first.end == following[0].header and following[0].end == following[1].header
        )
        if key and len(f"{key}.json".encode()) <= _MOST_NAME and ext in IMAGE_EXTENSIONS and stand_together:
            places.append(Place(key, ext, first, *following))
            position += 3
        else:
            strays.setdefault(key, []).append(first.name)
            position += 1
    return places, strays


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Returns what a header says; None where these 512 bytes are no valid one."""
    if len(block) < _BLOCK or not block.startswith(_MAGIC, _MAGIC_OFFSET):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

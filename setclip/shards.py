"""Samples in WebDataset tars with an index beside: written by data_prep, read by pretrain, finetune and eval_suite.

A shard is a plain ustar tar of `KEY.jpg` (or png, webp), `KEY.txt` (the first caption, for other tools) and `KEY.json`
(the authority). `SHARD.idx` beside `SHARD.tar` holds where each member lies, so that one sample, or a run of them, is
one ranged read. docs/formats.md describes both, and says why the index is not `wids`.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from setclip.decode import IMAGE_EXTENSIONS
from setclip.errors import InputError
from setclip.files import replacing

KEY_LENGTH = 24  # hex digits of the image's SHA-256: 96 bits, no collision to fear at a billion images

_PLACES = pa.schema(
    [
        ("key", pa.string()),
        ("image_ext", pa.string()),
        ("start", pa.int64()),  # of the sample's first tar header
        ("end", pa.int64()),  # after the padding of its last member
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("image_crc32", pa.int64()),  # of the image as stored: which one is damaged where the tar's checksum differs
        ("pair_hash", pa.binary(16)),  # of image and captions: equal for exact duplicates
    ]
)
OBJECTS_PREFIX = "objects."  # prefix of a parser's column
_OBJECTS_TYPE = pa.list_(
    pa.field("element", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False)
)
_LEAF = ".list.element.list.element"  # what Parquet appends to the name of such a column, where its values lie
FEATURES_PREFIX = "feature."  # prefix of a column of whole numbers that a preparation added, one a sample
_HEADER_END = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)  # of a regular file without owner
_HEADER_END_SUM = sum(_HEADER_END)
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_RESERVED = frozenset(("key", "captions", "objects", "width", "height", "sha256", "url"))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its captions, as it lies in a shard."""

    key: str
    """Joins side files; the first 24 hex digits of the SHA-256 of the source image's bytes, before any resizing."""
    image: bytes
    image_ext: str
    """"jpg", "png" or "webp"."""
    captions: list[str]
    objects: dict[str, list[list[str]]]
    """Parser name ("pos", "llm") to one list of object names per caption."""
    width: int
    """Of the stored image, in pixels; 0 if it is not known."""
    height: int
    sha256: str
    """Of the source image's bytes."""
    url: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Further entries of the JSON, kept as they are."""

    def __post_init__(self) -> None:
        if not _RESERVED.isdisjoint(self.extra):
            raise InputError(
                f"sample {self.key}: expected extra entries under names of their own, found "
                f"{sorted(_RESERVED & self.extra.keys())}, which the format uses; rename them"
            )
        for parser, lists in self.objects.items():
            if len(lists) != len(self.captions):
                raise InputError(
                    f"sample {self.key}: expected one object list per caption, found {len(lists)} lists of parser "
                    f"{parser!r} for {len(self.captions)} captions; parse the captions again"
                )


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest says of one shard."""

    name: str
    split: str
    samples: int
    captions: int
    bytes: int
    sha256: str
    """Of the tar file."""


def key_of(image: bytes) -> tuple[str, str]:
    """Returns (key, hex SHA-256) of a source image's bytes."""
    digest = hashlib.sha256(image).hexdigest()
    return digest[:KEY_LENGTH], digest


def pair_hash(sha256: str, captions: Sequence[str]) -> bytes:
    """Returns 16 bytes that are equal for samples with the same source image and the same captions."""
    text = "\0".join((sha256, *captions))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class ShardWriter:
    """Writes one shard and its index; both appear under their names only when the `with` block ends without error.

        with ShardWriter(out / "train-00000.tar", split="train") as writer:
            writer.add(sample)
        writer.info  # a ShardInfo

    The bytes depend on the samples only (no times, no owners), so equal input gives equal checksums.
    """

    info: ShardInfo

    def __init__(self, path: str | Path, split: str = "train"):
        self.path = Path(path)
        self.split = split
        self.samples = self.captions = self.bytes = 0
        self._digest = hashlib.sha256()
        self._places: list[tuple[Any, ...]] = []
        self._objects: dict[str, list[list[list[str]] | None]] = {}
        self._features: dict[str, list[int | None]] = {}

    def __enter__(self) -> "ShardWriter":
        self._stack = contextlib.ExitStack()
        self._index_path = self._stack.enter_context(replacing(self.path.with_suffix(".idx")))
        temporary = self._stack.enter_context(replacing(self.path))
        self._file = self._stack.enter_context(open(temporary, "wb"))
        return self

    def add(self, sample: Sample, features: Mapping[str, int | None] | None = None) -> None:
        """Appends one sample, its members together, image first. `features` are numbers for the index alone."""
        record = {
            "key": sample.key,
            "captions": sample.captions,
            "objects": sample.objects,
            "width": sample.width,
            "height": sample.height,
            "sha256": sample.sha256,
            **({"url": sample.url} if sample.url else {}),
            **sample.extra,
        }
        encoded = _JSON.encode(record).encode()
        text = (sample.captions[0] if sample.captions else "").encode()
        parts: list[bytes] = []
        end = self.bytes
        offsets = []
        for extension, data in ((sample.image_ext, sample.image), ("txt", text), ("json", encoded)):
            padding = -len(data) % tarfile.BLOCKSIZE
            parts += (tar_header(f"{sample.key}.{extension}", len(data)), data, bytes(padding))
            offsets.append(end + tarfile.BLOCKSIZE)
            end += tarfile.BLOCKSIZE + len(data) + padding
        place = (self.bytes, end, offsets[0], len(sample.image), offsets[2], len(encoded), zlib.crc32(sample.image))
        same = pair_hash(sample.sha256, sample.captions)
        distinct = {parser: [list(dict.fromkeys(names)) for names in each] for parser, each in sample.objects.items()}
        self._append(
            b"".join(parts),
            (sample.key, sample.image_ext, *place, same),
            len(sample.captions),
            distinct,
            features or {},
        )

    def copy(self, shard: "Shard", row: int, **changes: Any) -> None:
        """Appends a sample of another shard: byte by byte, or with changes of its fields (`key="…"`)."""
        entry = shard.entry(row)
        features = features_of(entry)
        if changes:
            self.add(dataclasses.replace(shard.read(row), **changes), features)
            return
        shift = self.bytes - entry["start"]
        offsets = ("start", "end", "image_offset", "json_offset")
        place = tuple(entry[name] + shift if name in offsets else entry[name] for name in _PLACES.names)
        objects = {name.removeprefix(OBJECTS_PREFIX): v for name, v in entry.items() if name.startswith(OBJECTS_PREFIX)}
        known = [lists for lists in objects.values() if lists is not None]
        captions = len(known[0]) if known else len(shard.read(row).captions)
        self._append(shard.read_bytes(entry["start"], entry["end"]), place, captions, objects, features)

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            self._write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.flush()
            columns = [pa.array([row[i] for row in self._places], field.type) for i, field in enumerate(_PLACES)]
            names = list(_PLACES.names)
            for parser in sorted(self._objects):
                names.append(OBJECTS_PREFIX + parser)
                columns.append(pa.array(self._objects[parser], _OBJECTS_TYPE))
            for feature in sorted(self._features):
                names.append(FEATURES_PREFIX + feature)
                columns.append(pa.array(self._features[feature], pa.int64()))
            # Names of objects are dictionary-encoded; compressed as well, they would take twice the time to count.
            compression = {
                name + _LEAF * name.startswith(OBJECTS_PREFIX): "none" if name.startswith(OBJECTS_PREFIX) else "snappy"
                for name in names
            }
            pq.write_table(pa.table(columns, names=names), self._index_path, compression=compression)
            self.info = ShardInfo(
                name=self.path.name,
                split=self.split,
                samples=self.samples,
                captions=self.captions,
                bytes=self.bytes,
                sha256=self._digest.hexdigest(),
            )
        self._stack.__exit__(kind, value, traceback)  # renames the tar, then the index

    def _append(
        self,
        data: bytes,
        place: tuple[Any, ...],
        captions: int,
        objects: Mapping[str, list[list[str]] | None],
        features: Mapping[str, int | None],
    ) -> None:
        self._write(data)
        self._places.append(place)
        _append_row(self._objects, objects, self.samples)
        _append_row(self._features, features, self.samples)
        self.samples += 1
        self.captions += captions

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def tar_header(name: str, size: int) -> bytes:
    """Returns the 512 bytes that `tarfile` writes for a regular file of that name (at most 100 bytes) and size."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        raise InputError(f"expected a name of at most 100 bytes and less than 8 GiB, found {name!r} of {size} bytes")
    number = b"%011o\0" % size
    before = encoded.ljust(100, b"\0") + b"0000644\x000000000\x000000000\0" + number + b"00000000000\0"
    checksum = sum(before) + 8 * ord(" ") + _HEADER_END_SUM
    return before + b"%06o\0 " % checksum + _HEADER_END


def features_of(entry: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the numbers for the index alone that a row of an index (`Shard.entry`) holds."""
    return {n.removeprefix(FEATURES_PREFIX): v for n, v in entry.items() if n.startswith(FEATURES_PREFIX)}


def _append_row(columns: dict[str, list], row: Mapping[str, Any], rows_before: int) -> None:
    """Appends one row to columns that need not all be in every row; where one is missing it holds None."""
    for name in row.keys() - columns.keys():
        columns[name] = [None] * rows_before
    for name, column in columns.items():
        column.append(row.get(name))


class Shard:
    """Reads a shard by row, in any order. Nothing is read until it is needed; safe to hand to a forked worker."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __len__(self) -> int:
        return self._index.num_rows

    @property
    def label(self) -> str:
        """What lists of bad samples call it: the tar's name."""
        return self.path.name

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in the order of the tar."""
        return self._index.column("key").to_pylist()

    def read(self, row: int) -> Sample:
        """Returns sample `row`. Raises InputError, naming shard and key, where the tar does not fit its index."""
        key, image_ext, image, encoded = self.read_raw(row)
        try:
            record = json.loads(encoded)
            return Sample(
                key=key,
                image=image,
                image_ext=image_ext,
                captions=record.pop("captions"),
                objects=record.pop("objects", {}),
                width=record.pop("width", 0),
                height=record.pop("height", 0),
                sha256=record.pop("sha256", ""),
                url=record.pop("url", None),
                extra={name: value for name, value in record.items() if name != "key"},
            )
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path}, sample {key}: expected JSON with captions, found {encoded[:60]!r} ({error!r}); the tar "
                "does not fit its index or is damaged: prepare it again"
            ) from error

    def read_raw(self, row: int) -> tuple[str, str, bytes, bytes]:
        """Returns (key, image extension, image bytes, JSON bytes) of sample `row`."""
        key, image_ext, image_offset, image_size, json_offset, json_size = (column[row] for column in self._columns)
        data = self._bytes
        if max(image_offset + image_size, json_offset + json_size) > len(data):
            raise InputError(
                f"{self.path}, sample {key}: expected at least {max(image_offset + image_size, json_offset + json_size)} "
                f"bytes, found {len(data)}; the tar is cut short: prepare it again"
            )
        image = data[image_offset : image_offset + image_size]
        return key, image_ext, image, data[json_offset : json_offset + json_size]

    def read_bytes(self, start: int, end: int) -> bytes:
        """Returns a range of the tar."""
        return self._bytes[start:end]

    def entry(self, row: int) -> dict[str, Any]:
        """Returns the index's row: where the sample's members lie, its pair hash, objects and features."""
        return {name: column[row] for name, column in self._entries.items()}

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(row) for row in range(len(self)))

    def object_lists(self) -> dict[str, pa.ChunkedArray]:
        """Returns parser to the distinct objects of each caption, (samples,) lists of lists of dictionary-encoded strings.

        Read from the index alone. Captions of samples that a parser did not see are null.
        """
        try:
            metadata = pq.read_metadata(self._index_path)
            columns = {metadata.schema.column(i).path.removesuffix(_LEAF) for i in range(metadata.num_columns)}
            names = sorted(name for name in columns if name.startswith(OBJECTS_PREFIX))
            leaves = [name + _LEAF for name in names]
            with pq.ParquetFile(self._index_path, metadata=metadata, read_dictionary=leaves, pre_buffer=False) as file:
                table = file.read(columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._bad_index(error) from error
        return {name.removeprefix(OBJECTS_PREFIX): table.column(name) for name in names}

    @property
    def _index_path(self) -> Path:
        path = self.path.with_suffix(".idx")
        if not path.exists():
            raise InputError(f"expected the index {path} beside the shard, found none; prepare the shards again")
        return path

    def _read_index(self, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.read_table(self._index_path, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise self._bad_index(error) from error

    def _bad_index(self, error: Exception) -> InputError:
        path = self.path.with_suffix(".idx")
        found = str(error).splitlines()[0]
        return InputError(f"expected an index at {path}, found {found}; prepare the shards again")

    @cached_property
    def _index(self) -> pa.Table:
        return self._read_index(_PLACES.names)

    @cached_property
    def _entries(self) -> dict[str, list]:
        return self._read_index().to_pydict()

    @cached_property
    def _columns(self) -> list[Any]:
        names = ("key", "image_ext", "image_offset", "image_size", "json_offset", "json_size")
        return [self._index.column(name).to_pylist() for name in names]

    @cached_property
    def _bytes(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # the map of the file is made again in another process


def is_image_extension(extension: str) -> bool:
    """Whether a member or file of this extension (no dot, any case) is read as an image."""
    return extension.lower() in IMAGE_EXTENSIONS

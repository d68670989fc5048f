"""Samples in WebDataset tars with an index beside: written by data_prep, read by pretrain, finetune and eval_suite.

A shard is a plain ustar tar of `KEY.jpg` (or png, webp), `KEY.txt` (the first caption, for other tools) and `KEY.json`
(the authority). `SHARD.idx` beside `SHARD.tar` holds where each member lies, so that one sample, or a run of them, is
one ranged read. docs/formats.md describes both, and says why the index is not `wids`.
"""

import contextlib
import hashlib
import io
import json
import mmap
import tarfile
from collections.abc import Iterator
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

_INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_ext", pa.string()),
        ("start", pa.int64()),  # of the sample's first tar header
        ("end", pa.int64()),  # after the padding of its last member
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ]
)


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
        self._rows: list[tuple[str, str, int, int, int, int, int, int]] = []

    def __enter__(self) -> "ShardWriter":
        self._stack = contextlib.ExitStack()
        self._index_path = self._stack.enter_context(replacing(self.path.with_suffix(".idx")))
        temporary = self._stack.enter_context(replacing(self.path))
        self._file = self._stack.enter_context(open(temporary, "wb"))
        return self

    def add(self, sample: Sample) -> None:
        """Appends one sample. Its members are written together, image first."""
        start = self.bytes
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
        encoded = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        image_offset = self._member(f"{sample.key}.{sample.image_ext}", sample.image)
        self._member(f"{sample.key}.txt", (sample.captions[0] if sample.captions else "").encode())
        json_offset = self._member(f"{sample.key}.json", encoded)
        place = (start, self.bytes, image_offset, len(sample.image), json_offset, len(encoded))
        self._rows.append((sample.key, sample.image_ext, *place))
        self.samples += 1
        self.captions += len(sample.captions)

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
            self._file.flush()
            columns = [[row[i] for row in self._rows] for i in range(len(_INDEX_SCHEMA))]
            pq.write_table(pa.table(columns, schema=_INDEX_SCHEMA), self._index_path)
            self.info = ShardInfo(
                name=self.path.name,
                split=self.split,
                samples=self.samples,
                captions=self.captions,
                bytes=self.bytes,
                sha256=self._digest.hexdigest(),
            )
        self._stack.__exit__(kind, value, traceback)  # renames the tar, then the index

    def _member(self, name: str, data: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.bytes
        self._write(data)
        self._write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


class Shard:
    """Reads a shard by row, in any order. Nothing is read until it is needed; safe to hand to a forked worker."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __len__(self) -> int:
        return self._index.num_rows

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

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(row) for row in range(len(self)))

    @cached_property
    def _index(self) -> pa.Table:
        path = self.path.with_suffix(".idx")
        if not path.exists():
            raise InputError(f"expected the index {path} beside the shard, found none; prepare the shards again")
        return pq.read_table(path, schema=_INDEX_SCHEMA)

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


def scan_tar(path: str | Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (key, extension to bytes) for each group of members with one base name, as WebDataset groups them.

    For tars that others made. Names that are absolute or climb with ".." are refused.
    """
    group: dict[str, bytes] = {}
    current = None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if member.name.startswith("/") or ".." in Path(member.name).parts:
                raise InputError(f"{path}: member {member.name!r} would leave the folder; such tars are not read")
            folder, _, name = member.name.rpartition("/")
            base, _, extension = name.partition(".")
            key = f"{folder}/{base}" if folder else base
            if key != current and current is not None:
                yield current, group
                group = {}
            current = key
            file = tar.extractfile(member) or io.BytesIO()
            group[extension.lower()] = file.read()
    if current is not None:
        yield current, group


def is_image_extension(extension: str) -> bool:
    """Whether a member or file of this extension (no dot, any case) is read as an image."""
    return extension.lower() in IMAGE_EXTENSIONS

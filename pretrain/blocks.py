"""The samples of shards, read block by block: from a folder, or from a server by way of a cache on local disk.

A lane of the data order reads a few blocks at a time (a window). A process enters a window, which reads the rows of the
index that it needs and holds its blocks in the cache; meanwhile threads fetch the lane's next window; leaving it gives both
up. So what a process keeps in memory depends on its lanes, and not on the number of shards or of epochs. Used by the loader.
"""

import contextlib
import json
import os
import queue
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pretrain.data_order import Block, Window
from setclip.disk_cache import KEPT_LONGER, DiskCache
from setclip.errors import InputError
from setclip.forks import at_end, this_process
from setclip.log import warn
from setclip.remote import Absent, RemoteFolder
from setclip.shards import ShardInfo, pair_hash

_THREADS = 4  # that fetch ahead, in each process
_OPEN_FILES = 128  # tars that a process keeps open
_KEPT_ROWS = 2048  # blocks read outside of a window whose rows are kept
_KEPT_INDEX = 100_000  # rows of indices that a process keeps: all of small data, and of large data what was read last

_KEYS = ["key", "image_ext"]
_CHECKED = ["start", "end", "image_crc32", "pair_hash"]
_PLACES = ["image_offset", "image_size", "json_offset", "json_size"]


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard is."""

    info: ShardInfo
    folder: Path | RemoteFolder
    source: str = ""
    """Named in lists of bad samples, where there are several sources."""

    @property
    def path(self) -> str:
        """For messages."""
        folder = self.folder.address if isinstance(self.folder, RemoteFolder) else self.folder
        return f"{folder}/{self.info.name}"

    @property
    def label(self) -> str:
        """What lists of bad samples call it: its name, and its source where there are several."""
        return f"{self.source}/{self.info.name}" if self.source else self.info.name


@dataclass(frozen=True)
class _Rows:
    """The part of a shard's index that a block needs."""

    first: int
    keys: list[str]
    extensions: list[str]
    places: NDArray[np.int64]
    """(n, 4) offset and size of image and of JSON, in `path`"""
    path: Path
    held: str
    """Name in the cache; "" for a tar in a folder"""


class Blocks:
    """The shards of a run by number, as `setclip.shards.Shard` gives them, and the windows that lanes read of them.

    Handed to workers as it is: open files, threads and what is held belong to one process each.
    """

    def __init__(self, places: Sequence[ShardPlace], block_size: int, cache: DiskCache | None = None):
        self.places, self.block_size, self.cache = places, block_size, cache
        if cache is None and any(isinstance(place.folder, RemoteFolder) for place in places):
            raise ValueError("shards on a server need a cache")
        self._owner = -1

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> "BlockShard":
        return BlockShard(self, number)

    def enter(self, window: Window) -> list[Block]:
        """Makes a window's blocks ready and returns them, for `leave`. Raises InputError where one cannot be had."""
        self._own()
        blocks = window.blocks()
        for block in blocks:
            users, rows = self._open.get(block, (0, None))
            self._open[block] = (users + 1, rows or self._load(block))
        return blocks

    def leave(self, blocks: Sequence[Block]) -> None:
        """Gives up a window's blocks."""
        for block in blocks:
            users, rows = self._open.pop(block, (0, None))
            if rows is None:  # closed meanwhile
                continue
            if users > 1:
                self._open[block] = (users - 1, rows)
            elif rows.held and self.cache is not None:
                self.cache.release(rows.held)

    def foresee(self, window: Window) -> None:
        """Lets threads fetch what a window will need from servers, as far as the cache has room."""
        self._own()
        for block in window.blocks():
            if isinstance(self.places[block[0]].folder, RemoteFolder):
                self._ahead.put(block)
                if len(self._threads) < _THREADS:
                    self._threads.append(threading.Thread(target=self._fetch_ahead, args=(self._ahead,), daemon=True))
                    self._threads[-1].start()

    def close(self, is_to_wait: bool = False) -> None:
        """Gives up all that this process has entered, and ends its threads; what is asked for later is opened again.

        `is_to_wait`: for the threads, which must not be in mid-download where this process is forked next: the fork would
        inherit their locks.
        """
        if self._owner != os.getpid():
            return
        for _, rows in self._open.values():
            if rows.held and self.cache is not None:
                self.cache.release(rows.held)
        while not self._ahead.empty():
            with contextlib.suppress(queue.Empty):
                self._ahead.get_nowait()
        for _ in self._threads:
            self._ahead.put(None)
        for thread in self._threads if is_to_wait else []:
            thread.join()
        _close_all(self._files)
        self._owner = -1

    def read(self, shard: int, row: int) -> tuple[str, str, bytes, bytes]:
        """Returns (key, image extension, image bytes, JSON bytes) of a sample."""
        self._own()
        block = (shard, row // self.block_size)
        for _ in range(3):
            rows = self._rows(block)
            image_offset, image_size, json_offset, json_size = rows.places[row - rows.first].tolist()
            begin = min(image_offset, json_offset)  # a sample's members lie together: one read
            end = max(image_offset + image_size, json_offset + json_size)
            try:
                data = self._read_file(rows.path, begin, end, is_kept=not rows.held)
            except FileNotFoundError:
                data = b""
            if len(data) == end - begin:
                image = data[image_offset - begin : image_offset - begin + image_size]
                encoded = data[json_offset - begin : json_offset - begin + json_size]
                return rows.keys[row - rows.first], rows.extensions[row - rows.first], image, encoded
            if not rows.held:
                raise InputError(
                    f"{rows.path}, sample {rows.keys[row - rows.first]}: expected at least {end} bytes, found "
                    f"{begin + len(data)}; the tar is cut short or gone: copy or prepare it again"
                )
            self._renew(block, rows)  # somebody removed or cut the file in the cache
        raise InputError(
            f"expected {rows.path} to stay as it was written, found it gone or cut again and again; see what removes files from "
            "the folder of --data.cache"
        )

    def _rows(self, block: Block) -> _Rows:
        if block in self._open:
            return self._open[block][1]
        if block not in self._others:
            rows = self._load(block)
            if rows.held and self.cache is not None:
                self.cache.release(rows.held)  # not held: it is fetched again where it went meanwhile
            self._others[block] = rows
            if len(self._others) > _KEPT_ROWS:
                self._others.popitem(last=False)
        return self._others[block]

    def _renew(self, block: Block, rows: _Rows) -> None:
        self._others.pop(block, None)
        with contextlib.suppress(FileNotFoundError):
            rows.path.unlink()
        if block in self._open:
            self._open[block] = (self._open[block][0], self._load(block))
            assert self.cache is not None
            self.cache.release(rows.held)

    def _load(self, block: Block) -> _Rows:
        place = self.places[block[0]]
        first = block[1] * self.block_size
        if isinstance(place.folder, RemoteFolder):
            table, path, held = self._fetch(block[0], place.folder, first, hold=True)
            base = table.column("start")[0].as_py()
        else:
            path, held, base = place.folder / place.info.name, "", 0
            table = self._index(block[0], path.with_suffix(".idx"), [*_KEYS, *_PLACES])[first : first + self.block_size]
        places = np.stack([table.column(name).to_numpy() for name in _PLACES], axis=1)
        places[:, [0, 2]] -= base
        return _Rows(first, table.column("key").to_pylist(), table.column("image_ext").to_pylist(), places, path, held)

    def _index(self, shard: int, path: Path, columns: list[str]) -> pa.Table:
        """Returns a shard's index, which is kept for a while."""
        with this_process():
            table = self._indices.pop(shard, None)
        if table is None:
            table = _read_index(path, self.places[shard], columns)
        with this_process():
            self._indices[shard] = table
            while len(self._indices) > 1 and sum(map(len, self._indices.values())) > _KEPT_INDEX:
                self._indices.popitem(last=False)
        return table

    def _fetch(self, shard: int, folder: RemoteFolder, first: int, hold: bool) -> tuple[pa.Table, Path, str]:
        """Returns (rows of the index, file in the cache, its name) of a block; it is held, or only made to be there."""
        assert self.cache is not None
        place = self.places[shard]
        index = f"{place.info.sha256[:32]}{KEPT_LONGER}"
        path = self.cache.hold(index, partial(fetch_index, place, folder))
        try:
            table = self._index(shard, path, [*_KEYS, *_PLACES, *_CHECKED])[first : first + self.block_size]
        finally:
            self.cache.release(index)
        name = f"{place.info.sha256[:32]}-{first}-{len(table)}.block"
        fetch = partial(fetch_block, place, folder, table)
        if hold:
            return table, self.cache.hold(name, fetch), name
        self.cache.prepare(name, fetch)
        return table, path, name

    def _fetch_ahead(self, blocks: "queue.SimpleQueue[Block | None]") -> None:
        while (block := blocks.get()) is not None:
            shard, number = block
            folder = self.places[shard].folder
            assert isinstance(folder, RemoteFolder)
            with contextlib.suppress(Exception):  # said when the block is needed, if it fails then as well
                self._fetch(shard, folder, number * self.block_size, hold=False)

    def _read_file(self, path: Path, begin: int, end: int, is_kept: bool) -> bytes:
        if not is_kept:  # kept open, a file that was removed would still take its room
            with open(path, "rb") as file:
                return os.pread(file.fileno(), end - begin, begin)
        descriptor = self._files.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        self._files[path] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return os.pread(descriptor, end - begin, begin)

    def _own(self) -> None:
        """A forked process begins with nothing open; reading a file that its parent opened would do no harm."""
        if self._owner == os.getpid():
            return
        self._owner = os.getpid()
        self._open: dict[Block, tuple[int, _Rows]] = {}
        self._others: OrderedDict[Block, _Rows] = OrderedDict()
        self._indices: OrderedDict[int, pa.Table] = OrderedDict()
        self._files: OrderedDict[Path, int] = OrderedDict()
        at_end(self, partial(_close_all, self._files))
        self._ahead: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places, "block_size": self.block_size, "cache": self.cache, "_owner": -1}


def _close_all(files: OrderedDict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


@dataclass(frozen=True)
class BlockShard:
    """One shard of `Blocks`."""

    blocks: Blocks
    number: int

    @property
    def path(self) -> str:
        """For messages."""
        return self.blocks.places[self.number].path

    @property
    def label(self) -> str:
        """What lists of bad samples call it."""
        return self.blocks.places[self.number].label

    def read_raw(self, row: int) -> tuple[str, str, bytes, bytes]:
        """Returns (key, image extension, image bytes, JSON bytes) of sample `row`."""
        return self.blocks.read(self.number, row)


def fetch_index(place: ShardPlace, folder: RemoteFolder) -> bytes:
    """Returns a shard's index, after seeing that it is one and fits the manifest. Raises InputError."""

    def check(data: bytes) -> bytes:
        try:
            table = pq.read_table(pa.BufferReader(data), columns=["end"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"no whole index ({str(error).splitlines()[0]})") from error
        if len(table) != place.info.samples or table.column("end")[-1].as_py() > place.info.bytes:
            raise InputError(
                f"{place.path}: expected an index of {place.info.samples:,} samples as the manifest says, found one of "
                f"{len(table):,} beside it; copy the folder to the server again"
            )
        return data

    return _present(
        place, partial(folder.read_checked, str(Path(place.info.name).with_suffix(".idx")), None, None, check)
    )


def fetch_block(place: ShardPlace, folder: RemoteFolder, table: pa.Table) -> bytes:
    """Returns the bytes of a shard from the first to the last of some rows of its index, after checking them.

    Each image is checked by its CRC-32, each JSON by the hash of its captions. Bytes that come damaged twice alike are so
    on the server: they are taken with a warning, and what cannot be decoded is skipped, as it is from a local disk.
    """
    start, end = table.column("start")[0].as_py(), table.column("end")[-1].as_py()
    rows = table.to_pylist()
    before: list[int] = []

    def check(data: bytes) -> bytes:
        if len(data) != end - start:
            raise ValueError(f"{len(data)} bytes instead of {end - start}")
        damaged = [row["key"] for row in rows if not _is_whole(data, row, start)]
        if not damaged:
            return data
        if len(damaged) > len(rows) // 2 and len(rows) > 1:
            raise ValueError(f"{len(damaged)} of {len(rows)} samples do not fit the index")
        digest = zlib.crc32(data)
        if digest in before:
            named = ", ".join(damaged[:10])
            warn(f"{place.path}: {len(damaged)} samples are damaged on the server: {named}")
            return data
        before.append(digest)
        raise ValueError(f"samples do not fit their checksums: {', '.join(damaged[:3])}")

    return _present(place, partial(folder.read_checked, place.info.name, start, end, check))


def _is_whole(data: bytes, row: dict[str, Any], start: int) -> bool:
    offset = row["image_offset"] - start
    if zlib.crc32(data[offset : offset + row["image_size"]]) != row["image_crc32"]:
        return False
    offset = row["json_offset"] - start
    try:
        record = json.loads(data[offset : offset + row["json_size"]])
        return pair_hash(record.get("sha256", ""), record["captions"]) == row["pair_hash"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _present(place: ShardPlace, read: Any) -> bytes:
    try:
        return read()
    except Absent as error:
        raise InputError(
            f"expected the shard {place.path} and its index, as the manifest says, found {error}; copy the folder to the server "
            "again, or see to its permissions"
        ) from error


def _read_index(path: Path, place: ShardPlace, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, use_threads=False, pre_buffer=False)
    except FileNotFoundError as error:
        raise InputError(f"expected the index {path} beside the shard, found none; prepare the shards again") from error
    except (pa.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise InputError(
            f"{place.path}: expected an index at {path}, found {found}; prepare the shards again"
        ) from error

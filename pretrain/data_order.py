"""Which sample comes when: an order that depends on no rank and no worker, and that a few whole numbers resume.

The samples of an epoch are put on a line: all *blocks* (runs of consecutive samples of a shard) in an order drawn from
(seed, epoch). The line is cut into V *lanes* of equal length, each shuffled within a window of a few blocks, so that
a reader of one lane stays in a few places of the data. Position g of the whole run (g counts samples over all epochs)
belongs to lane g mod V; global batch t is positions t·G … (t+1)·G − 1. Rank r serves lanes r, r + W, r + 2W, …

Every epoch is exactly each sample once, whatever the sizes: N samples take N positions, what does not fill a batch
begins the next one, and nothing is dropped or repeated. A sample that cannot be decoded is skipped by its lane, which
then is one ahead of the others. So a resume needs the number of samples seen and the skips of each lane, on any number
of ranks W that divides V and G. docs/formats.md, "Data order", has the reasons.

Several sources can have weights: each sample of a source of n samples and weight w is ⌊w⌋ times in every epoch, and
round((w − ⌊w⌋)·n) of them once more. Which ones goes round in a circle, so that after any number of epochs the samples of
a source have been seen equally often, give or take one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import floor, isfinite

import numpy as np
from numpy.typing import NDArray

from setclip.errors import InputError
from setclip.hashing import permutation

_BLOCKS, _WINDOW, _CIRCLE = 1, 2, 8  # keep the draws of block order, windows and the circle of a part apart

Block = tuple[int, int]
"""Number of a shard, and of a block in it: rows block·size … (block + 1)·size − 1."""


@dataclass(frozen=True)
class Place:
    """Where a lane's next sample lies."""

    epoch: int
    shard: int
    row: int
    repeat: int = 0
    """How often the epoch has had the sample before, where its source has a weight above 1."""


@dataclass(frozen=True)
class Share:
    """A source: consecutive shards of an order, and how often an epoch has each of their samples."""

    shards: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight > 0):
            raise InputError(f"expected weights above 0, found {self.weight}; leave out the source instead")


@dataclass(frozen=True)
class DataOrder:
    """The order over shards of `shard_sizes` samples."""

    shard_sizes: tuple[int, ...]
    seed: int
    num_lanes: int = 256
    block_size: int = 512
    window_blocks: int = 4
    """A lane shuffles within this many blocks."""
    shares: tuple[Share, ...] = ()
    """The sources that the shards are of, in their order; empty: one, each sample once an epoch."""

    def __post_init__(self) -> None:
        if self.shares and sum(share.shards for share in self.shares) != len(self.shard_sizes):
            raise ValueError(f"expected shares of {len(self.shard_sizes)} shards, found {self.shares}")
        if self.num_samples == 0:
            raise InputError("expected at least one sample, found none in the shards; prepare them again")

    @cached_property
    def num_samples(self) -> int:
        """Samples in an epoch, N: those that come twice count twice."""
        return sum(whole * size + more for whole, more, size in self._parts())

    def lane(self, lane: int, start: int = 0) -> Iterator[Place]:
        """Yields the places of a lane without end, from its item `start` (which counts skipped ones as well)."""
        for window in self.windows(lane, start):
            yield from window.places()

    def windows(self, lane: int, start: int = 0) -> Iterator["Window"]:
        """Yields the windows of a lane without end; the first begins at its item `start`."""
        item = start
        while True:
            epoch = (item * self.num_lanes + lane) // self.num_samples
            number, within = divmod(item - self._first_item(epoch, lane), self._window)
            window = Window(self, epoch, lane, number, within)
            item += len(window)
            yield window

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        """Yields of each source: how often an epoch has all of it, how many samples once more, and its size."""
        first = 0
        for share in self.shares or (Share(len(self.shard_sizes)),):
            size = sum(self.shard_sizes[first : first + share.shards])
            first += share.shards
            whole = floor(share.weight)
            yield whole, floor((share.weight - whole) * size + 0.5), size

    @property
    def _window(self) -> int:
        return self.window_blocks * self.block_size

    def _first_item(self, epoch: int, lane: int) -> int:
        """Items of `lane` before `epoch`: the number of g < epoch·N with g mod V = lane."""
        return max(0, -((lane - epoch * self.num_samples) // self.num_lanes))

    def _cut(self, epoch: int, lane: int, window: int) -> tuple[int, int]:
        """Returns (begin, end) of a lane's window on the epoch's line."""
        first, end = _lane_cuts(self.num_samples, self.num_lanes, epoch)[lane : lane + 2]
        begin = int(first) + window * self._window
        return begin, min(begin + self._window, int(end))

    def _line(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _line(self.shard_sizes, self.shares, self.block_size, self.seed, epoch)


@dataclass(frozen=True)
class Window:
    """What a lane reads at a time: some blocks, whose samples it shuffles."""

    order: DataOrder
    epoch: int
    lane: int
    number: int
    within: int
    """Samples at its beginning that are left out."""

    def __len__(self) -> int:
        begin, end = self.order._cut(self.epoch, self.lane, self.number)
        return end - begin - self.within

    def places(self) -> Iterator[Place]:
        """Yields the places in their order."""
        order = self.order
        begin, end = order._cut(self.epoch, self.lane, self.number)
        line = begin + permutation(end - begin, _WINDOW, order.seed, self.epoch, self.lane, self.number)
        blocks, ends = order._line(self.epoch)
        block = np.searchsorted(ends, line, side="right")
        row = line - (ends[block] - blocks[block, 2]) + blocks[block, 1]
        places = np.stack([blocks[block, 0], row, blocks[block, 3]], axis=1)[self.within :]
        return (Place(self.epoch, shard, row, repeat) for shard, row, repeat in places.tolist())

    def blocks(self) -> list[Block]:
        """Returns the blocks that hold its samples, each once."""
        begin, end = self.order._cut(self.epoch, self.lane, self.number)
        blocks, ends = self.order._line(self.epoch)
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        touched = blocks[first : last + 1, :2] // [1, self.order.block_size]
        return list(dict.fromkeys((shard, block) for shard, block in touched.tolist()))

    def following(self) -> "Window":
        """Returns the lane's next window."""
        order = self.order
        item = order._first_item(self.epoch, self.lane) + self.number * order._window + self.within + len(self)
        return next(order.windows(self.lane, item))


def automatic_block_size(num_samples: int, num_lanes: int) -> int:
    """Returns 512 (one ranged read of about 15 MB), or less so that each lane mixes at least eight blocks."""
    return max(1, min(512, num_samples // (8 * num_lanes)))


@lru_cache(maxsize=4)
def _line(
    shard_sizes: tuple[int, ...], shares: tuple[Share, ...], block_size: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the epoch's line: (b, 4) shard, first row, size and repeat of each block in order; (b,) where each ends."""
    order, parts, first = DataOrder(shard_sizes, seed, shares=shares), [], 0
    for source, (whole, more, _) in enumerate(order._parts()):
        last = first + (shares[source].shards if shares else len(shard_sizes))
        blocks = _blocks(shard_sizes, first, last, block_size)
        parts += [_repeated(blocks, number) for number in range(whole)]
        if more:
            circle = blocks[permutation(len(blocks), _CIRCLE, seed, source)]
            parts.append(_repeated(_arc(circle, epoch * more, more), whole))
        first = last
    line = np.concatenate(parts)
    line = line[permutation(len(line), _BLOCKS, seed, epoch)]
    return line, np.cumsum(line[:, 2])


def _blocks(shard_sizes: Sequence[int], first: int, last: int, block_size: int) -> NDArray[np.int64]:
    """Returns (b, 3) shard, first row and size of the blocks of some shards."""
    parts = [np.empty((0, 3), np.int64)]
    for shard in range(first, last):
        starts = np.arange(0, shard_sizes[shard], block_size)
        sizes = np.minimum(block_size, shard_sizes[shard] - starts)
        parts.append(np.stack([np.full_like(starts, shard), starts, sizes], axis=1))
    return np.concatenate(parts)


def _repeated(blocks: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    return np.concatenate([blocks, np.full((len(blocks), 1), number, np.int64)], axis=1)


def _arc(circle: NDArray[np.int64], begin: int, count: int) -> NDArray[np.int64]:
    """Returns the blocks of `count` samples of a circle of blocks, from sample `begin` on; those at its ends are cut."""
    ends = np.cumsum(circle[:, 2])
    total = int(ends[-1])
    begin %= total
    parts = []
    for low, high in ((begin, min(begin + count, total)), (0, begin + count - total)):
        starts = np.maximum(ends - circle[:, 2], low)
        sizes = np.minimum(ends, high) - starts
        kept = sizes > 0
        rows = circle[kept, 1] + (starts - (ends - circle[:, 2]))[kept]
        parts.append(np.stack([circle[kept, 0], rows, sizes[kept]], axis=1))
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _lane_cuts(num_samples: int, num_lanes: int, epoch: int) -> NDArray[np.int64]:
    """Returns (V + 1,) where the lanes begin on an epoch's line: lane v has as many samples as positions g ≡ v mod V."""
    lanes = np.arange(num_lanes)
    before = [np.maximum(0, -((lanes - e * num_samples) // num_lanes)) for e in (epoch, epoch + 1)]
    return np.concatenate([[0], np.cumsum(before[1] - before[0])])

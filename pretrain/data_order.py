"""Which sample comes when: an order that depends on no rank and no worker, and that a few whole numbers resume.

The samples of an epoch are put on a line: all *blocks* (runs of consecutive samples of a shard) in an order drawn from
(seed, epoch). The line is cut into V *lanes* of equal length, each shuffled within a window of a few blocks, so that
a reader of one lane stays in a few places of the data. Position g of the whole run (g counts samples over all epochs)
belongs to lane g mod V; global batch t is positions t·G … (t+1)·G − 1. Rank r serves lanes r, r + W, r + 2W, …

Every epoch is exactly each sample once, whatever the sizes: N samples take N positions, what does not fill a batch
begins the next one, and nothing is dropped or repeated. A sample that cannot be decoded is skipped by its lane, which
then is one ahead of the others. So a resume needs the number of samples seen and the skips of each lane, on any number
of ranks W that divides V and G. docs/formats.md, "Data order", has the reasons.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from setclip.errors import InputError
from setclip.hashing import permutation

_BLOCKS, _WINDOW = 1, 2  # keep the draws of the block order and of the windows apart


@dataclass(frozen=True)
class Place:
    """Where a lane's next sample lies."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class DataOrder:
    """The order over shards of `shard_sizes` samples."""

    shard_sizes: tuple[int, ...]
    seed: int
    num_lanes: int = 256
    block_size: int = 512
    window_blocks: int = 4
    """A lane shuffles within this many blocks."""

    def __post_init__(self) -> None:
        if self.num_samples == 0:
            raise InputError("expected at least one sample, found none in the shards; prepare them again")

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, N."""
        return sum(self.shard_sizes)

    def lane(self, lane: int, start: int = 0) -> Iterator[Place]:
        """Yields the places of a lane without end, from its item `start` (which counts skipped ones as well)."""
        item = start
        while True:
            epoch = (item * self.num_lanes + lane) // self.num_samples
            first, count = self._first_item(epoch, lane), self._first_item(epoch + 1, lane)
            order = self._lane_window(epoch, lane, (item - first) // self._window)
            within = (item - first) % self._window
            for shard, row in order[within:]:
                yield Place(epoch, int(shard), int(row))
                item += 1
            assert item <= count

    @property
    def _window(self) -> int:
        return self.window_blocks * self.block_size

    def _first_item(self, epoch: int, lane: int) -> int:
        """Items of `lane` before `epoch`: the number of g < epoch·N with g mod V = lane."""
        return max(0, -((lane - epoch * self.num_samples) // self.num_lanes))

    def _lane_window(self, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
        """Returns (n, 2) shard and row of one shuffled window of a lane."""
        first, end = _lane_cuts(self.num_samples, self.num_lanes, epoch)[lane : lane + 2]
        begin = first + window * self._window
        size = min(self._window, end - begin)
        line = begin + permutation(int(size), _WINDOW, self.seed, epoch, lane, window)
        blocks, ends = _line(self.shard_sizes, self.block_size, self.seed, epoch)
        block = np.searchsorted(ends, line, side="right")
        row = line - (ends[block] - blocks[block, 2]) + blocks[block, 1]
        return np.stack([blocks[block, 0], row], axis=1)


def automatic_block_size(num_samples: int, num_lanes: int) -> int:
    """Returns 512 (one ranged read of about 15 MB), or less so that each lane mixes at least eight blocks."""
    return max(1, min(512, num_samples // (8 * num_lanes)))


@lru_cache(maxsize=4)
def _line(
    shard_sizes: Sequence[int], block_size: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the epoch's line: (b, 3) shard, first row and size of each block in order, and (b,) where each ends."""
    parts = []
    for shard, size in enumerate(shard_sizes):
        starts = np.arange(0, size, block_size)
        parts.append(np.stack([np.full_like(starts, shard), starts, np.minimum(block_size, size - starts)], axis=1))
    blocks = np.concatenate(parts)
    blocks = blocks[permutation(len(blocks), _BLOCKS, seed, epoch)]
    return blocks, np.cumsum(blocks[:, 2])


@lru_cache(maxsize=4)
def _lane_cuts(num_samples: int, num_lanes: int, epoch: int) -> NDArray[np.int64]:
    """Returns (V + 1,) where the lanes begin on an epoch's line: lane v has as many samples as positions g ≡ v mod V."""
    lanes = np.arange(num_lanes)
    before = [np.maximum(0, -((lanes - e * num_samples) // num_lanes)) for e in (epoch, epoch + 1)]
    return np.concatenate([[0], np.cumsum(before[1] - before[0])])

"""A stream of random numbers that depends on its words only: the same for a scene on any number of processes.

numpy's and Python's generators do not promise equal streams over versions; `setclip.hashing` does. Used by `scenes`.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from setclip.hashing import hash_u64

T = TypeVar("T")

_BLOCK = 64  # numbers made at a time; most scenes need fewer than one block of them
_COUNTER = np.arange(_BLOCK, dtype=np.uint64)


class Draws:
    """Uniform numbers and choices keyed by `words`, drawn one after another."""

    def __init__(self, *words: int):
        self._words = words
        self._blocks = 0
        self._left: list[float] = []

    def uniform(self) -> float:
        """Returns a number in [0, 1)."""
        if not self._left:
            bits = hash_u64(*self._words, self._blocks, _COUNTER) >> np.uint64(11)  # 53 bits fill a float
            self._left = (bits * 2.0**-53).tolist()
            self._blocks += 1
        return self._left.pop()

    def chance(self, probability: float) -> bool:
        """Returns True with the given probability."""
        return self.uniform() < probability

    def index(self, n: int) -> int:
        """Returns a whole number in 0..n-1, all alike."""
        return int(self.uniform() * n)

    def pick(self, items: Sequence[T]) -> T:
        """Returns one of the items, all alike."""
        return items[int(self.uniform() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns the items in random order."""
        order = sorted((self.uniform(), i) for i in range(len(items)))
        return [items[i] for _, i in order]

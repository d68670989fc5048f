"""Words that are changed in training: of a share of them half is masked, a tenth replaced by any word, the rest dropped.

Stated by VSE∞'s, LAPS's and DivE's code (share 0.2). Drawn from (seed, epoch, key, …) alone, so that it depends on no rank, batch
or resume. Used by the tokenizers of text towers. Letters: B texts, L words of the longest.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from setclip.hashing import hash_u64

Draw = tuple[int, ...]
"""Whole numbers that decide what happens to a text: seed, epoch, hash of its key, …"""

KEEP, MASK, RANDOM, DROP = range(4)
_MASKED, _REPLACED = 0.5, 0.6
_WHAT, _WHICH = 0, 1  # keep what happens and the drawn words apart


def changes(draws: Sequence[Draw], length: int, rate: float) -> list[list[int]]:
    """Returns KEEP, MASK, RANDOM or DROP for each of so many words of B texts; the last three together come with `rate`."""
    if not rate:
        return [[KEEP] * length for _ in draws]
    share = _drawn(draws, _WHAT, length) / (2.0**64 * rate)
    return np.select([share >= 1, share < _MASKED, share < _REPLACED], [KEEP, MASK, RANDOM], DROP).tolist()


def random_numbers(draws: Sequence[Draw], length: int, first: int, end: int) -> list[list[int]]:
    """Returns so many numbers of `first` to before `end` for each of B texts."""
    return (first + _drawn(draws, _WHICH, length) % np.uint64(max(1, end - first))).astype(np.int64).tolist()


def changed_to(number: int, change: int, other: int, mask: int) -> int:
    """Returns what a token becomes that is not dropped."""
    return number if change == KEEP else mask if change == MASK else other


def _drawn(draws: Sequence[Draw], what: int, length: int) -> NDArray[np.uint64]:
    """Returns (B, L)."""
    columns = np.array(draws, np.int64).T[..., None]
    return hash_u64(*columns, what, np.arange(length))

"""Stable 64-bit hashes of whole numbers and names: the randomness that must not depend on ranks, workers or versions.

Data order, augmentation and caption choice are keyed by (seed, epoch, …) through these functions rather than through a
generator's state, so they are the same on any number of processes and after a resume. numpy does not promise that its
generators keep their streams over versions; these functions are the definition. Used by data_prep, pretrain, finetune.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN, _ALL = 0x9E3779B97F4A7C15, 2**64 - 1


def hash_u64(*words: ArrayLike) -> NDArray[np.uint64]:
    """Returns a 64-bit hash of the tuple of `words` (whole numbers or arrays of them, broadcast), as uint64.

    Each word is mixed by the finaliser of SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195).
    """
    # Single numbers first, by Python: numpy takes ten times as long for one. A loader draws several times a sample.
    number, position = 0, 0
    for position, word in enumerate((*words, None)):  # noqa: B007 (where the first array stands, or the end)
        if not isinstance(word, int | np.integer):
            break
        number = _mix_number((number + _GOLDEN & _ALL) ^ _mix_number(int(word) + _GOLDEN & _ALL))
    state = np.array(number, np.uint64)
    with np.errstate(over="ignore"):
        for word in words[position:]:
            word = np.asarray(word)
            state = _mix(state + np.uint64(_GOLDEN) ^ _mix(word.astype(np.uint64) + np.uint64(_GOLDEN)))
    return state


def hash_numbers(count: int, *words: int) -> list[int]:
    """Returns `hash_u64(*words, i)` for i in range(count), as Python numbers: for a few it is faster than numpy."""
    state = 0
    for word in words:
        state = _mix_number((state + _GOLDEN & _ALL) ^ _mix_number(word + _GOLDEN & _ALL))
    state = state + _GOLDEN & _ALL
    return [_mix_number(state ^ _mix_number(i + _GOLDEN & _ALL)) for i in range(count)]


def permutation(n: int, *words: int) -> NDArray[np.int64]:
    """Returns a permutation of range(n) that depends on n and `words` only."""
    return np.argsort(hash_u64(*words, np.arange(n, dtype=np.uint64)), kind="stable")


def hash_text(text: str) -> int:
    """Returns a 64-bit hash of a text's UTF-8 bytes (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_number(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _ALL
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _ALL
    return z ^ (z >> 31)

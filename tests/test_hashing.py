"""setclip.hashing: the same numbers for ever, whether they are asked for one by one or in arrays."""

import numpy as np
import pytest

from setclip.hashing import hash_text, hash_u64, permutation

PINNED = (
    17824878756907967,
    [7984769381972786702, 1122013632283654975, 8495055039903514955],
    [3, 4, 0, 7, 1, 5, 6, 2],
    4534862487770143250,
)


def test_the_numbers_are_those_of_every_run_so_far():
    assert int(hash_u64(1, 2, 3)) == PINNED[0]
    assert hash_u64(7, np.arange(3), 5).tolist() == PINNED[1]
    assert permutation(8, 1, 2).tolist() == PINNED[2]
    assert hash_text("Straße") == PINNED[3]


@pytest.mark.parametrize("last", [0, 5, 2**63, 2**64 - 1])
def test_single_numbers_and_arrays_agree(last):
    alone = hash_u64(3, last)
    assert alone.dtype == np.uint64
    assert int(alone) == int(hash_u64(np.array([3]), np.array([last], np.uint64))[0])


def test_a_negative_number_is_its_remainder():
    assert int(hash_u64(-1)) == int(hash_u64(2**64 - 1)) == int(hash_u64(np.array(-1)))

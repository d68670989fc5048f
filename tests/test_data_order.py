"""The data order: exact epochs, independent of ranks, resumable by a position."""

from collections import Counter
from itertools import islice

import pytest

from pretrain.data_order import DataOrder, automatic_block_size
from setclip.errors import InputError

SHAPES = [((7, 13, 5), 4, 3, 2), ((100,), 256, 1, 4), ((1000, 999, 500), 16, 64, 4), ((3,), 8, 1, 1), ((1,), 1, 9, 9)]


@pytest.mark.parametrize(("sizes", "lanes", "block", "window"), SHAPES)
def test_each_epoch_holds_each_sample_once(sizes, lanes, block, window):
    order = DataOrder(sizes, seed=5, num_lanes=lanes, block_size=block, window_blocks=window)
    readers = [order.lane(lane) for lane in range(lanes)]
    everything = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    orders = []
    for epoch in range(4):
        places = [next(readers[g % lanes]) for g in range(epoch * order.num_samples, (epoch + 1) * order.num_samples)]
        assert {place.epoch for place in places} == {epoch}
        assert Counter((place.shard, place.row) for place in places) == Counter(everything)
        orders.append([(place.shard, place.row) for place in places])
    if order.num_samples > 10:
        assert len(set(map(tuple, orders))) == 4, "every epoch has an order of its own"


@pytest.mark.parametrize(("sizes", "lanes", "block", "window"), SHAPES)
def test_a_lane_can_start_anywhere(sizes, lanes, block, window):
    order = DataOrder(sizes, seed=1, num_lanes=lanes, block_size=block, window_blocks=window)
    for lane in {0, lanes // 2, lanes - 1}:
        whole = list(islice(order.lane(lane), 60))
        for start in (1, 2, 17, 40):
            assert list(islice(order.lane(lane, start), 20)) == whole[start : start + 20]


def test_a_lane_stays_within_its_window_of_the_line():
    """Locality: consecutive reads of a lane come from a few blocks."""
    order = DataOrder((10_000,) * 10, seed=0, num_lanes=16, block_size=100, window_blocks=4)
    places = list(islice(order.lane(3), 400))
    assert len({(place.shard, place.row // 100) for place in places}) <= 5  # a lane may begin inside a block


def test_the_seed_changes_the_order():
    first, second = (list(islice(DataOrder((500,), seed, 4, 10).lane(0), 100)) for seed in (0, 1))
    assert first != second


def test_positions_of_a_batch_are_spread_over_the_data():
    order = DataOrder((4096,), seed=0, num_lanes=256, block_size=automatic_block_size(4096, 256))
    batch = [next(order.lane(lane)).row for lane in range(256)]
    halves = sum(row < 2048 for row in batch)
    assert 90 < halves < 166  # 128 ± 4.8 standard deviations


def test_small_data_gets_small_blocks_and_large_data_512():
    assert automatic_block_size(6_000, 256) == 2
    assert automatic_block_size(10, 256) == 1
    assert automatic_block_size(10_841_279, 256) == 512


def test_no_samples_is_an_error():
    with pytest.raises(InputError, match="at least one sample, found none"):
        DataOrder((), 0)

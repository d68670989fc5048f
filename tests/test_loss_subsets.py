"""The subset expansion: every pair of sets, every count and every target against loops over Python sets."""

import itertools
import math
from fractions import Fraction

import loss_reference as reference
import pytest
import torch
from loss_reference import BATCHES, CONFIGS, batch_sets, ids, weights

from pretrain.losses import LossConfig, mates, operators, sets, subsets
from pretrain.losses.counts import count_others
from pretrain.losses.exchange import Layout
from pretrain.losses.expansion import expand
from pretrain.losses.mates import find_mates
from pretrain.losses.operators import make_targets
from pretrain.losses.sets import collapse
from pretrain.losses.similarity import AtLeast, ExpIou, Iou, coefficient, remainder
from pretrain.losses.subsets import find_overlaps
from setclip.errors import InputError

SIMILARITIES = [Iou(), ExpIou(0.05), ExpIou(0.3), AtLeast(0.5), AtLeast(1.0), AtLeast(1e-9)]
ALL_CONFIGS = [
    *CONFIGS,
    LossConfig(target="softmax", temperature=0.3),
    LossConfig(name="multi_positive", threshold=1.0),
    LossConfig(name="multi_positive", threshold=1e-9),
]
batches = pytest.mark.parametrize("name", BATCHES)


@pytest.fixture(params=["pairs only where they are fewer", "every row but the smallest by its pairs"])
def few(request, monkeypatch):
    if request.param.startswith("every"):
        monkeypatch.setattr(subsets, "_FEW", 0)


@batches
@pytest.mark.usefixtures("few")
def test_the_expansion_is_the_similarity_of_every_pair(name):
    image_sets, text_sets, _ = BATCHES[name]
    overlaps = find_overlaps(collapse(ids(image_sets), ids(text_sets)))
    assert overlaps is not None
    of_images, of_texts = overlaps.classes.of_images, overlaps.classes.of_texts
    for similarity in SIMILARITIES:
        dense = expand(overlaps, similarity).times(torch.eye(len(overlaps.classes), dtype=torch.float64))
        wanted = [[float(similarity(len(a & b), len(a) + len(b))) for b in text_sets] for a in image_sets]
        torch.testing.assert_close(
            dense[of_images][:, of_texts], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=3e-15
        )
        torch.testing.assert_close(dense, dense.T, rtol=0, atol=3e-15)


@batches
@pytest.mark.usefixtures("few")
def test_the_counts_are_those_of_a_loop(name):
    image_sets, text_sets, text_ids = BATCHES[name]
    size = len(image_sets)
    text_ids = text_ids or range(size)
    equal = find_mates(torch.tensor(list(text_ids)), size, torch.device("cpu"))
    directions = (image_sets, text_sets), (text_sets, image_sets)
    overlaps = find_overlaps(collapse(ids(image_sets), ids(text_sets)))
    assert overlaps is not None
    for others, (rows, columns) in zip(count_others(overlaps, equal), directions, strict=True):
        found = {}
        entries = [part.tolist() for part in (others.kinds, others.shared, others.sizes, others.counts)]
        for kind, shared, size, count in zip(*entries, strict=True):
            assert (kind, shared, size) not in found
            found[kind, shared, size] = count
        for i, kind in enumerate(others.of_rows.tolist()):
            wanted = {}
            for j, b in enumerate(columns):
                if i != j and text_ids[i] != text_ids[j] and rows[i] & b:
                    key = (kind, len(rows[i] & b), len(rows[i]) + len(b))
                    wanted[key] = wanted.get(key, 0) + 1
            assert {key: n for key, n in found.items() if key[0] == kind} == wanted
            assert int(others.overlapping[kind]) == sum(wanted.values())
            assert int(others.numbers[kind]) == list(text_ids).count(text_ids[i])


@batches
def test_the_operator_is_the_mean_of_both_directions_targets(name):
    image_sets, text_sets, text_ids = BATCHES[name]
    size = len(image_sets)
    unit = torch.eye(size, dtype=torch.float64)
    everything = slice(0, size)
    for config in ALL_CONFIGS:
        made = make_targets(batch_sets(*BATCHES[name]), config, Layout(0, (size,)), weights(config), torch.float64)
        in_tiles = made.tiles.block(everything, everything) if made.tiles else 0 * unit
        assert bool(made.tiles) == (config.weights == "frequency")
        of_images = reference.targets(image_sets, text_sets, config, text_ids)
        of_texts = reference.targets(text_sets, image_sets, config, text_ids)
        wanted = (of_images + of_texts.T) / 2
        context = f"{name}, {config}"
        off_diagonal = wanted - wanted.diag().diag()
        for found, dense in (
            (made.diagonal, wanted.diag()),
            (made.times_texts(unit) + in_tiles, off_diagonal),
            (made.times_images(unit) + in_tiles.T, off_diagonal.T),
            (made.label_sums, of_images.sum(1)),
        ):
            torch.testing.assert_close(found, dense, rtol=1e-13, atol=1e-14, msg=lambda m, c=context: f"{c}: {m}")
        assert made.entropy == pytest.approx(float(reference.entropy(*BATCHES[name], config)), abs=1e-13), context
        is_true = torch.tensor([[i == j for j in text_ids or range(size)] for i in text_ids or range(size)])
        mass = float((of_images * is_true).sum() + (of_texts * is_true).sum()) / 2 / size
        assert made.true_pair_mass == pytest.approx(mass, abs=1e-14), context


@batches
@pytest.mark.parametrize("loss", ["hard", "object_iou"])
def test_the_meter_counts_the_pairs_that_a_hard_loss_takes_for_negatives(name, loss):
    image_sets, text_sets, text_ids = BATCHES[name]
    size = len(image_sets)
    text_ids = text_ids or range(size)
    pairs = [(i, j) for i in range(size) for j in range(size) if text_ids[i] != text_ids[j]]
    config = LossConfig(name=loss, weights="frequency")
    made = make_targets(batch_sets(*BATCHES[name]), config, Layout(0, (size,)), weights(config), torch.float64)
    if loss == "hard":  # whose meter counts objects alike
        config = LossConfig(name=loss)
    ious = [reference.iou(image_sets[i], text_sets[j], config) for i, j in pairs]
    alike = [bool(image_sets[i]) and image_sets[i] == text_sets[j] for i, j in pairs]
    assert made.similar_pairs == pytest.approx(sum(v >= 0.5 * (1 - 1e-5) for v in ious) / max(1, len(ious)))
    assert made.equal_pairs == pytest.approx(sum(alike) / max(1, len(ious)))


def test_coefficients_of_iou_have_the_closed_form():
    for sizes in (2, 3, 10, 64, 128):
        for order in range(1, sizes // 2 + 1):
            assert coefficient(Iou(), order, sizes) == Fraction(1, math.comb(sizes - 1, order))


def test_what_subsets_leave_of_a_pair_is_nothing_up_to_three_objects():
    for similarity in SIMILARITIES:
        for shared, sizes in itertools.product((1, 2, 3), (8, 30)):
            assert remainder(similarity, shared, sizes) == 0
    assert remainder(Iou(), 4, 8) == Fraction(1, math.comb(7, 4))


def test_thresholds_are_decided_on_whole_numbers():
    """3 of 10 objects in the union is 0.3, though 3 / 10 and 0.3 need not be the same number in floating point."""
    assert AtLeast(0.3)(3, 13) == 1
    assert AtLeast(0.30000001)(3, 13) == 0
    assert AtLeast(0.7)(7, 17) == 1


def test_ids_that_repeat_in_a_row_count_once():
    twice = torch.tensor([[5, 7, 5, -1], [7, 5, -1, -1], [-1, -1, 9, 9]])
    classes = collapse(twice, twice)
    assert classes.sides_are_equal
    assert classes.sizes[classes.of_images].tolist() == [2, 2, 1]
    assert classes.of_images[0] == classes.of_images[1] != classes.of_images[2]


@pytest.mark.parametrize("name", ["small sets on both sides", "equal sides", "0 to 64 objects"])
def test_equal_hashes_do_not_make_equal_sets(name, monkeypatch):
    image_sets, text_sets, _ = BATCHES[name]
    monkeypatch.setattr(sets, "_hash", lambda rows: (rows >= 0).sum(1) % 2)
    classes = collapse(ids(image_sets), ids(text_sets))
    everything = image_sets + text_sets
    numbers = torch.cat([classes.of_images, classes.of_texts]).tolist()
    for (a, number), (b, other) in itertools.combinations(zip(everything, numbers, strict=True), 2):
        assert (a == b) == (number == other)


def test_the_work_grows_with_the_captions_and_not_with_their_pairs():
    """Four times the captions of one law: the entries grow some four times, pairs that share an object sixteen times."""
    entries = []
    for size in (500, 2000):
        drawn = reference.zipf_sets(size, 5, 20_000, 7, least=1)
        overlaps = find_overlaps(collapse(ids(drawn), ids(drawn)))
        assert overlaps is not None
        assert len(overlaps.pairs.rows) < size
        expansion = expand(overlaps, Iou())
        entries.append(len(expansion.has.columns) + len(expansion.coefficients.columns))
    assert entries[1] < 7 * entries[0]


@pytest.mark.parametrize("loss", ["object_iou", "multi_positive", "hard"])
def test_many_captions_with_the_same_common_objects_take_little_memory(loss):
    """Five objects in common and one of its own: their pairs are N², and all share four."""
    drawn = [{1, 2, 3, 4, 5, 100 + i} for i in range(1_500)]
    made = make_targets(batch_sets(drawn, drawn), LossConfig(name=loss), Layout(0, (1_500,)), None, torch.float32)
    assert made.expansion is None
    assert made.similar_pairs == 1
    assert made.equal_pairs == 0
    assert find_overlaps(collapse(ids(drawn), ids(drawn)), most_pairs=1_000_000) is None


def test_the_meter_of_a_hard_loss_looks_at_the_first_images(monkeypatch):
    monkeypatch.setattr(operators, "_METER_ROWS", 3)
    image_sets = [{1}, {1}, {2}, {2}, {2}]
    made = make_targets(
        batch_sets(image_sets, image_sets), LossConfig(name="hard"), Layout(0, (5,)), None, torch.float32
    )
    assert made.similar_pairs == pytest.approx((1 + 1 + 2) / 12)


def test_very_many_equal_texts_are_refused(monkeypatch):
    monkeypatch.setattr(mates, "MOST_PAIRS", 10)
    with pytest.raises(InputError, match="in which a text occurs 4 times"):
        find_mates(torch.tensor([7, 7, 7, 7]), 4, torch.device("cpu"))

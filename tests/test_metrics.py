"""Metrics against hand-made cases and plain float64 formulas."""

import itertools
import math

import numpy as np
import pytest
import torch

from eval_suite.metrics import (
    TIE_RULES,
    bootstrap_percentages,
    chance_median_rank,
    chance_recall_at_k,
    class_ranks,
    dot_scores,
    images_of_group,
    mean_per_class_accuracy,
    median_rank,
    per_class_interval,
    percentile_interval,
    recall_at_k,
    retrieval_ranks,
    top_matches,
    wilson_interval,
)
from setclip.errors import InputError

# Four images, two captions each (columns 0-1, 2-3, 4-5, 6-7). Scores are such that ranks can be read off.
HAND_MADE = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0],  # best own 0.9: rank 0
        [0.8, 0.7, 0.6, 0.1, 0.0, 0.0, 0.0, 0.0],  # best own 0.6, behind 0.8 and 0.7: rank 2
        [0.0, 0.0, 0.0, 0.0, 0.1, 0.5, 0.4, 0.3],  # best own 0.5: rank 0
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],  # best own 0.3, behind six: rank 6
    ]
)
OWNERS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def table(scores):
    return lambda rows, columns: scores[rows, columns]


def test_hand_made_matrix_gives_the_ranks_that_one_reads_off():
    i2t, t2i = retrieval_ranks(table(HAND_MADE), OWNERS, 4)
    assert i2t.by("pessimistic").tolist() == [0, 2, 0, 6]
    # Caption 0: own image 0.9, equal to image 3's 0.9; caption 1: own 0.1, behind 0.8 and 0.7; and so on.
    assert t2i.by("pessimistic").tolist() == [1, 2, 1, 2, 1, 0, 1, 1]
    assert t2i.by("optimistic").tolist() == [0, 2, 1, 2, 1, 0, 1, 1]
    ranks = i2t.by("pessimistic")
    assert [recall_at_k(ranks, k) for k in (1, 2, 3, 7)] == [50.0, 50.0, 75.0, 100.0]
    assert median_rank(ranks) == 2  # median of 0, 0, 2, 6 is 1


def plain_ranks(scores, owners):
    """The rules by sorting the whole matrix in float64: order by score, then as the rule orders equal ones."""
    scores = scores.double().numpy()
    owners = owners.numpy()
    result = {rule: ([], []) for rule in TIE_RULES}

    def rank(values, is_right, rule):
        index = np.arange(len(values))
        second = {"pessimistic": is_right, "optimistic": ~is_right, "first_come": index}[rule]
        order = np.lexsort((index, second, -values))
        return int(np.flatnonzero(is_right[order])[0])

    for rule, (i2t, t2i) in result.items():
        i2t += [rank(scores[i], owners == i, rule) for i in range(scores.shape[0])]
        t2i += [rank(scores[:, t], np.arange(scores.shape[0]) == owners[t], rule) for t in range(scores.shape[1])]
    return result


@pytest.mark.parametrize("levels", [4, 1000])
@pytest.mark.parametrize("block_size", [1, 7, 64, 4096])
def test_ranks_equal_those_of_sorting_under_every_tie_rule_and_block_size(levels, block_size):
    generator = torch.Generator().manual_seed(levels)
    owners = torch.cat((torch.arange(23), torch.randint(23, (40,), generator=generator)))  # not in image order
    scores = torch.randint(levels, (23, 63), generator=generator).float()
    i2t, t2i = retrieval_ranks(table(scores), owners, 23, block_size)
    for rule, (expected_i2t, expected_t2i) in plain_ranks(scores, owners).items():
        # With several equal best captions plain first_come sees the first of them, as ours does.
        assert i2t.by(rule).tolist() == expected_i2t, rule
        assert t2i.by(rule).tolist() == expected_t2i, rule


def test_no_more_than_a_block_of_scores_is_asked_for():
    asked = []

    def score(rows, columns):
        asked.append((rows.stop - rows.start, columns.stop - columns.start))
        return HAND_MADE[rows, columns]

    retrieval_ranks(score, OWNERS, 4, block_size=2)
    assert max(max(shape) for shape in asked) == 2
    assert len(asked) == 8 + 4  # every block once, those with a right pair twice


def test_equal_vectors_tie_exactly_whatever_the_block_size():
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(50, 67, generator=generator), dim=1)
    texts = images.repeat(2, 1)  # caption 50 + i is caption i again, of another image
    owners = torch.arange(100) % 50
    owners[50:] = owners[50:].roll(1)
    expected = None
    for block_size in (3, 16, 33, 200):
        i2t, t2i = retrieval_ranks(dot_scores(images, texts), owners, 50, block_size)
        assert (i2t.equal == 1).all()  # the copy that another image owns
        found = [*i2t.by("pessimistic").tolist(), *t2i.by("pessimistic").tolist()]
        expected = expected or found
        assert found == expected


def test_scores_that_are_not_finite_are_an_error_that_names_the_pair():
    for value in (math.nan, math.inf):
        scores = HAND_MADE.clone()
        scores[2, 5] = value
        with pytest.raises(InputError, match=r"row 2 and column 5; the model gives NaN or infinite features"):
            retrieval_ranks(table(scores), OWNERS, 4, block_size=3)
        with pytest.raises(InputError, match="row 2 and column 5"):
            class_ranks(table(scores), torch.tensor([0, 1, 2, 3]), 8)


def test_an_image_without_text_is_an_error():
    with pytest.raises(InputError, match=r"none for 1 of them \(first: number 4\)"):
        retrieval_ranks(table(HAND_MADE), OWNERS, 5)
    with pytest.raises(InputError, match="of images 0 to 2"):
        retrieval_ranks(table(HAND_MADE), OWNERS, 3)


def test_class_ranks_equal_a_float64_sort_and_predict_the_first_of_equal_classes():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(5, (40, 9), generator=generator).float()
    labels = torch.randint(9, (40,), generator=generator)
    ranks, predicted = class_ranks(table(scores), labels, 9, block_size=11)
    assert predicted.tolist() == scores.double().numpy().argmax(1).tolist()
    order = np.argsort(-scores.double().numpy(), axis=1, kind="stable")
    expected = [int(np.flatnonzero(row == label)[0]) for row, label in zip(order, labels.tolist(), strict=True)]
    assert ranks.by("first_come").tolist() == expected
    assert ((ranks.by("first_come") == 0) == (predicted == labels)).all()
    assert (ranks.by("optimistic") <= ranks.by("first_come")).all()
    assert (ranks.by("first_come") <= ranks.by("pessimistic")).all()


def test_constant_scores_are_worth_nothing_under_the_headline_rule_of_retrieval():
    i2t, t2i = retrieval_ranks(table(torch.zeros(4, 8)), OWNERS, 4)
    assert i2t.by("pessimistic").tolist() == [6] * 4
    assert t2i.by("pessimistic").tolist() == [3] * 8
    assert t2i.by("first_come").tolist() == OWNERS.tolist()
    assert recall_at_k(t2i.by("optimistic"), 1) == 100.0


@pytest.mark.parametrize(("n", "m", "k"), [(8, 2, 1), (8, 2, 5), (8, 3, 7), (6, 1, 2), (5, 5, 1), (7, 6, 3)])
def test_chance_equals_counting_all_draws(n, m, k):
    draws = list(itertools.combinations(range(n), k))
    reached = sum(any(i < m for i in draw) for draw in draws) / len(draws)
    assert chance_recall_at_k(k, n, m) == pytest.approx(100 * reached, abs=1e-9)
    assert chance_recall_at_k(k, n, m) == pytest.approx(100 * (1 - math.comb(n - m, k) / math.comb(n, k)), abs=1e-9)


def test_chance_over_images_with_different_numbers_of_captions_is_their_mean():
    expected = (2 * chance_recall_at_k(5, 100, 4) + chance_recall_at_k(5, 100, 7)) / 3
    assert chance_recall_at_k(5, 100, torch.tensor([4, 7, 4])) == pytest.approx(expected)
    assert chance_recall_at_k(500, 100, 1) == 100.0


def test_chance_median_rank_is_where_half_of_random_queries_are():
    assert chance_median_rank(1000) == 500
    rank = chance_median_rank(5000, 5)
    assert chance_recall_at_k(rank, 5000, 5) >= 50 > chance_recall_at_k(rank - 1, 5000, 5)


def test_random_features_score_at_chance():
    generator = torch.Generator().manual_seed(0)
    image_features, text_features = (
        torch.randn(400, 16, generator=generator),
        torch.randn(2000, 16, generator=generator),
    )
    i2t, t2i = retrieval_ranks(dot_scores(image_features, text_features), torch.arange(2000) // 5, 400)
    for ranks, chance in ((i2t, chance_recall_at_k(100, 2000, 5)), (t2i, chance_recall_at_k(100, 400))):
        assert recall_at_k(ranks.by("pessimistic"), 100) == pytest.approx(chance, abs=6)


def test_median_rank_is_one_based_and_rounds_down():
    assert median_rank(torch.tensor([0, 0, 1])) == 1
    assert median_rank(torch.tensor([0, 1])) == 1  # median 0.5
    assert median_rank(torch.tensor([2, 3, 4, 9])) == 4  # median 3.5


def test_mean_per_class_weighs_classes_alike_and_leaves_out_empty_ones():
    labels = torch.tensor([0, 0, 0, 0, 3])  # classes 1 and 2 have no images
    is_correct = torch.tensor([True, False, False, False, True])
    assert mean_per_class_accuracy(is_correct, labels) == pytest.approx((25 + 100) / 2)


def test_images_of_a_group_are_those_of_its_classes():
    mask = images_of_group(torch.tensor([2, 0, 1, 0]), ["head", "tail", "tail"], "tail")
    assert mask.tolist() == [True, False, True, False]


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 16.11), abs=0.01)


def test_bootstrap_interval_of_a_share_is_near_wilsons_and_does_not_change_with_the_run():
    hits = (torch.arange(500) < 150).double()[:, None]
    draws = bootstrap_percentages(hits, torch.ones_like(hits), resamples=1000, seed=3)
    assert percentile_interval(draws[:, 0]) == pytest.approx(wilson_interval(150, 500), abs=1.0)
    assert torch.equal(draws, bootstrap_percentages(hits, torch.ones_like(hits), resamples=1000, seed=3))
    assert not torch.equal(draws, bootstrap_percentages(hits, torch.ones_like(hits), resamples=1000, seed=4))


def test_bootstrap_over_units_keeps_what_belongs_together():
    # Ten captions of an image are right or wrong together: the interval is that of 50 units, not of 500.
    hits = (torch.arange(50) < 15).double()[:, None] * 10
    low, high = percentile_interval(bootstrap_percentages(hits, torch.full_like(hits, 10.0))[:, 0])
    assert (low, high) == pytest.approx(wilson_interval(15, 50), abs=3.0)


def test_per_class_interval_holds_the_value_and_is_narrow_where_all_is_sure():
    labels = torch.arange(400) % 4
    is_correct = torch.arange(400) < 200
    low, high = per_class_interval(is_correct, labels)
    assert low < mean_per_class_accuracy(is_correct, labels) < high
    assert per_class_interval(torch.ones(400, dtype=torch.bool), labels) == (100.0, 100.0)


def test_top_matches_come_best_first_and_of_equal_ones_the_first():
    assert [i for i, _ in top_matches(table(HAND_MADE), 3, 8, 3, "row")] == [0, 1, 2]
    assert [i for i, _ in top_matches(table(HAND_MADE), 0, 4, 3, "column")] == [0, 3, 1]
    assert top_matches(table(HAND_MADE), 1, 8, 1, "row") == [(0, pytest.approx(0.8))]

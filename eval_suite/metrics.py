"""Recall, median rank, RSUM and accuracy, with their chance levels and 95 % intervals, from ranks.

Used by zero-shot classification, retrieval and the evaluations that training makes on its way. Ranks themselves are in
`eval_suite.ranks`, scores in `eval_suite.scores`; what an evaluation needs of both can be imported from here too.
Recalls and accuracies are percentages, 0 to 100. Letters: N queries, U resampled units, M metrics.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from eval_suite.ranks import TIE_RULES, Ranks, TieRule, class_ranks, retrieval_ranks
from eval_suite.scores import Score, dot_scores, top_matches

__all__ = [
    "TIE_RULES",
    "Ranks",
    "Score",
    "TieRule",
    "bootstrap_percentages",
    "chance_median_rank",
    "chance_of_lists",
    "chance_recall_at_k",
    "class_counts",
    "class_ranks",
    "dot_scores",
    "images_of_group",
    "mean_per_class_accuracy",
    "median_rank",
    "per_class_interval",
    "percentile_interval",
    "recall_at_k",
    "retrieval_ranks",
    "top_matches",
    "wilson_interval",
]

_Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


# --- from ranks to numbers


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Returns the percentage of queries whose 0-based rank, (N,) int, is below `k`; of classes it is top-k accuracy."""
    return 100.0 * (ranks < k).double().mean().item()


def median_rank(ranks: Tensor) -> int:
    """Returns floor(median of the 0-based ranks) + 1; of an even number the median is the mean of the middle two."""
    return math.floor(torch.quantile(ranks.double(), 0.5).item()) + 1


def mean_per_class_accuracy(is_correct: Tensor, labels: Tensor) -> float:
    """Returns the mean over classes of each class's accuracy in percent; classes without images do not count.

    `is_correct`: (N,) bool, `labels`: (N,) int64.
    """
    correct, total = class_counts(is_correct, labels)
    return 100.0 * (correct / total).mean().item()


def class_counts(is_correct: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (correct images, images) of each class that has images, float64."""
    total = torch.bincount(labels).double()
    correct = torch.bincount(labels, weights=is_correct.double())
    return correct[total > 0], total[total > 0]


def images_of_group(labels: Tensor, group_of_class: Sequence[str], group: str) -> Tensor:
    """Returns the mask of the images, (N,) bool, whose class is in the group ("head", "middle", "tail", …)."""
    return torch.tensor([name == group for name in group_of_class])[labels]


# --- chance


def chance_recall_at_k(k: int, gallery_size: int, num_positives: Tensor | int = 1) -> float:
    """Returns the expected recall in percent of a random order: the mean of 1 − C(n−m, k) / C(n, k).

    `gallery_size` is n; `num_positives` is m, one number or one a query.
    """
    if isinstance(num_positives, int):
        return 100.0 * _chance_to_reach(k, gallery_size, num_positives)
    values, counts = torch.unique(num_positives, return_counts=True)
    reached = [_chance_to_reach(k, gallery_size, m) for m in values.tolist()]
    return 100.0 * float(np.average(reached, weights=counts.numpy()))


def chance_median_rank(gallery_size: int, num_positives: Tensor | int = 1) -> int:
    """Returns the smallest 1-based rank that at least half of the queries reach in a random order."""
    low, high = 1, gallery_size
    while low < high:
        middle = (low + high) // 2
        if chance_recall_at_k(middle, gallery_size, num_positives) >= 50.0 - 1e-9:  # exactly half, up to rounding
            high = middle
        else:
            low = middle + 1
    return low


def _chance_to_reach(k: int, n: int, m: int) -> float:
    # C(n−m, k) / C(n, k) = product over j < m of (n−k−j) / (n−j), and the same with k and m exchanged
    fewer, more = min(k, m), max(k, m)
    return 1.0 - math.prod(max(0, n - more - j) / (n - j) for j in range(min(fewer, n)))


def chance_of_lists(gallery_size: int, num_positives: Tensor) -> tuple[float, float]:
    """Returns the expected (R-Precision, mAP@R) in percent of a random order, the mean over queries.

    `num_positives`: (N,) int, R of each. Of n answers the i-th is right with probability R/n; given that, i − 1 answers
    before it hold (i − 1)(R − 1)/(n − 1) right ones on average.
    """
    n = gallery_size
    values, counts = torch.unique(num_positives, return_counts=True)
    average_precisions = []
    for r in values.tolist():
        places = np.arange(1, r + 1)
        average_precisions.append(((1 + (places - 1) * (r - 1) / max(n - 1, 1)) / places).sum() / n)
    weights = counts.numpy()
    precision = np.average(values.numpy() / n, weights=weights)
    return 100.0 * float(precision), 100.0 * float(np.average(average_precisions, weights=weights))


# --- 95 % intervals


def wilson_interval(num_correct: float, num: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval in percent of a proportion of independent samples (Wilson 1927)."""
    p, z2 = num_correct / num, _Z95**2
    centre = (p + z2 / (2 * num)) / (1 + z2 / num)
    half = _Z95 / (1 + z2 / num) * math.sqrt(p * (1 - p) / num + z2 / (4 * num**2))
    return 100.0 * max(0.0, centre - half), 100.0 * min(1.0, centre + half)


def per_class_interval(is_correct: Tensor, labels: Tensor, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Returns the bootstrap 95 % interval in percent of the mean per class accuracy, drawing within classes."""
    correct, total = (counts.numpy() for counts in class_counts(is_correct, labels))
    # Drawing n images of a class with replacement is a binomial draw of the correct ones.
    draws = np.random.default_rng(seed).binomial(total.astype(np.int64), correct / total, (resamples, len(total)))
    low, high = np.percentile(100.0 * (draws / total).mean(1), (2.5, 97.5))
    return float(low), float(high)


def bootstrap_percentages(
    hits: Tensor, counts: Tensor, resamples: int = 1000, seed: int = 0, strata: Tensor | None = None
) -> Tensor:
    """Returns (resamples, M) percentages, hits over counts, of units drawn with replacement.

    `hits` and `counts`: (U, M), what each unit adds to the numerator and the denominator of each metric. All metrics
    see the same draws, so sums of columns (RSUM) can be formed before the percentiles are taken. `strata`: (U,) int64,
    parts of the units (folds) from each of which as many are drawn as it has; without, they are one.
    """
    generator = torch.Generator().manual_seed(seed)
    num_units = len(hits)
    columns = torch.cat((hits, counts), dim=1).double()

    def drawn_from_all() -> Tensor:
        return torch.randint(num_units, (num_units,), generator=generator)

    def drawn_within(strata: Tensor) -> Callable[[], Tensor]:
        order = torch.sort(strata, stable=True).indices
        sizes = strata.bincount()
        start, size = (sizes.cumsum(0) - sizes)[strata[order]], sizes[strata[order]]

        def drawn() -> Tensor:
            share = torch.rand(num_units, generator=generator, dtype=torch.float64)
            return order[start + (share * size).long()]

        return drawn

    draw = drawn_from_all if strata is None else drawn_within(strata)
    # One draw at a time: a (resamples, U) table of weights is large for many units.
    sums = [torch.bincount(draw(), minlength=num_units).double() @ columns for _ in range(resamples)]
    hits_sum, counts_sum = torch.stack(sums).chunk(2, dim=1)
    return 100.0 * hits_sum / counts_sum


def percentile_interval(samples: Tensor) -> tuple[float, float] | None:
    """Returns the 2.5 and 97.5 percentiles of bootstrap samples, (resamples,) float.

    Draws without any query of the metric (NaN; only where few images have one) do not count; None if none is left.
    """
    finite = samples[~samples.isnan()]
    if len(finite) == 0:
        return None
    low, high = np.percentile(finite.numpy(), (2.5, 97.5))
    return float(low), float(high)

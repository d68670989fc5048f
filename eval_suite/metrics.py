"""Recall, median rank, RSUM and accuracy, with their chance levels and 95 % intervals, from scores in blocks.

Ranks are found by counting what scores higher, so nothing is sorted and no more than one block of scores exists at a
time. Used by zero-shot classification, retrieval and the evaluations that training makes on its way.
Recalls and accuracies are percentages, 0 to 100. Letters: N queries, C classes, U resampled units, M metrics.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from setclip.errors import InputError

Score = Callable[[slice, slice], Tensor]
"""`score(rows, columns)` gives the scores of these rows against these columns, (rows, columns) float32; higher is
more alike. Rows are images; columns are texts or classes. The same call must give the same numbers each time."""

TieRule = Literal["pessimistic", "first_come", "optimistic"]
TIE_RULES: dict[TieRule, str] = {
    "pessimistic": "equal scores count against the right answer",
    "first_come": "of equal scores the one with the lower index comes first",
    "optimistic": "equal scores count for the right answer",
}

_Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


# --- ranks


@dataclass(frozen=True)
class Ranks:
    """For each of N queries, what stands before its (best) right answer; three (N,) int64 counts."""

    better: Tensor
    """Wrong answers that score higher than the best right one."""
    equal_before: Tensor
    """Wrong answers with exactly its score and a lower index."""
    equal: Tensor
    """Wrong answers with exactly its score."""

    def by(self, rule: TieRule) -> Tensor:
        """Returns the 0-based ranks, (N,) int64, under one rule for equal scores."""
        if rule == "pessimistic":
            return self.better + self.equal
        return self.better + self.equal_before if rule == "first_come" else self.better


def dot_scores(rows: Tensor, columns: Tensor) -> Score:
    """Returns the Score of dot products of unit vectors: `rows` (N, D) and `columns` (N', D), float.

    Sums are formed in float64 and rounded to float32. A float32 product depends in its last bits on the shape of the
    block that it is computed in, so that equal vectors would tie in one block and not in the next; this way ties,
    and so ranks, do not depend on the block size.
    """
    rows64, columns64 = rows.double(), columns.double()
    return lambda r, c: (rows64[r] @ columns64[c].T).float()


def retrieval_ranks(
    score: Score, image_of_text: Tensor, num_images: int, block_size: int = 2048
) -> tuple[Ranks, Ranks]:
    """Returns the ranks image→text (one query an image, its best caption counts) and text→image (one query a text).

    `image_of_text`: (number of texts,) int64, the image that each text belongs to; an image may have several texts and
    needs at least one. Texts in the order of their images are cheapest: blocks that hold a right pair are scored
    twice, all others once. At most `block_size`² scores exist at a time. Raises InputError on an image without text
    and on a score that is not finite.
    """
    num_texts = len(image_of_text)
    if num_texts == 0 or not bool(((image_of_text >= 0) & (image_of_text < num_images)).all()):
        raise InputError(
            f"expected texts of images 0 to {num_images - 1}, found {num_texts} texts of others; check both"
        )
    without = torch.bincount(image_of_text, minlength=num_images).eq(0).nonzero().flatten().tolist()
    if without:
        raise InputError(
            f"expected a text for each of {num_images} images, found none for {len(without)} of them"
            f" (first: number {without[0]}); leave such images out"
        )

    # Pass 1: the score of each right pair, from the blocks that hold one.
    own = torch.full((num_texts,), -torch.inf)  # of each text with its image
    best = torch.full((num_images,), -torch.inf)  # of each image with its best text
    for rows, columns in _blocks(num_images, num_texts, block_size):
        owner = image_of_text[columns]
        inside = ((owner >= rows.start) & (owner < rows.stop)).nonzero().flatten()
        if len(inside):
            found = _checked(score, rows, columns)[owner[inside] - rows.start, inside]
            own[inside + columns.start] = found
    best.scatter_reduce_(0, image_of_text, own, "amax")
    is_best = own == best[image_of_text]
    texts = torch.arange(num_texts)
    first_best = torch.full((num_images,), num_texts)  # the first text with that score
    first_best.scatter_reduce_(0, image_of_text[is_best], texts[is_best], "amin")

    # Pass 2: count what stands before it, in both directions at once.
    i2t = Ranks(*torch.zeros((3, num_images), dtype=torch.int64))
    t2i = Ranks(*torch.zeros((3, num_texts), dtype=torch.int64))
    images = torch.arange(num_images)
    for rows, columns in _blocks(num_images, num_texts, block_size):
        scores = _checked(score, rows, columns)
        wrong = image_of_text[columns] != images[rows, None]
        i2t.better[rows] += (wrong & (scores > best[rows, None])).sum(1)
        t2i.better[columns] += (wrong & (scores > own[columns])).sum(0)
        equal = wrong & (scores == best[rows, None])
        i2t.equal[rows] += equal.sum(1)
        i2t.equal_before[rows] += (equal & (texts[columns] < first_best[rows, None])).sum(1)
        equal = wrong & (scores == own[columns])
        t2i.equal[columns] += equal.sum(0)
        t2i.equal_before[columns] += (equal & (images[rows, None] < image_of_text[columns])).sum(0)
    return i2t, t2i


def class_ranks(score: Score, labels: Tensor, num_classes: int, block_size: int = 2048) -> tuple[Ranks, Tensor]:
    """Returns the rank of each image's class among all classes, and the predicted classes, (N,) int64.

    `labels`: (N,) int64 in [0, C). Of several classes with the highest score the first is predicted. `block_size` is
    in images. Raises InputError on a score that is not finite.
    """
    if len(labels) == 0 or not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise InputError(f"expected labels in [0, {num_classes}) of at least one image, found {len(labels)} labels")
    ranks = Ranks(*torch.zeros((3, len(labels)), dtype=torch.int64))
    predicted = torch.zeros(len(labels), dtype=torch.int64)
    classes = torch.arange(num_classes)
    for start in range(0, len(labels), block_size):
        rows = slice(start, min(start + block_size, len(labels)))
        scores, label = _checked(score, rows, slice(0, num_classes)), labels[rows, None]
        own = scores.gather(1, label)
        equal = (scores == own) & (classes != label)
        ranks.better[rows] = (scores > own).sum(1)
        ranks.equal[rows] = equal.sum(1)
        ranks.equal_before[rows] = (equal & (classes < label)).sum(1)
        # torch.argmax does not say which of equal values it returns
        is_highest = scores == scores.amax(1, keepdim=True)
        predicted[rows] = torch.where(is_highest, classes, num_classes).amin(1)
    return ranks, predicted


def top_matches(
    score: Score, query: int, gallery_size: int, k: int, axis: Literal["row", "column"]
) -> list[tuple[int, float]]:
    """Returns (index, score) of the `k` best answers of one query, best first; of equal scores the lower index first.

    `axis` says what the query is: "row" (an image, answers are columns) or "column" (a text, answers are rows).
    """
    everything, one = slice(0, gallery_size), slice(query, query + 1)
    scores = score(one, everything)[0] if axis == "row" else score(everything, one)[:, 0]
    values, indices = torch.sort(scores, descending=True, stable=True)
    return list(zip(indices[:k].tolist(), values[:k].tolist(), strict=True))


def _blocks(num_rows: int, num_columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, num_rows, size):
        for column in range(0, num_columns, size):
            yield slice(row, min(row + size, num_rows)), slice(column, min(column + size, num_columns))


def _checked(score: Score, rows: slice, columns: slice) -> Tensor:
    """Returns a block of scores; a NaN compares as neither better nor equal and would count as a perfect rank."""
    scores = score(rows, columns).float().cpu()
    expected = (rows.stop - rows.start, columns.stop - columns.start)
    assert scores.shape == expected, f"score gave {tuple(scores.shape)} for a block of {expected}"
    if not bool(scores.isfinite().all()):
        row, column = (~scores.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"expected finite scores, found {scores[row, column].item()} for row {rows.start + row} and column"
            f" {columns.start + column}; the model gives NaN or infinite features: evaluate an earlier checkpoint"
        )
    return scores


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


def bootstrap_percentages(hits: Tensor, counts: Tensor, resamples: int = 1000, seed: int = 0) -> Tensor:
    """Returns (resamples, M) percentages, hits over counts, of units drawn with replacement.

    `hits` and `counts`: (U, M), what each unit adds to the numerator and the denominator of each metric. All metrics
    see the same draws, so sums of columns (RSUM) can be formed before the percentiles are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    num_units = len(hits)
    columns = torch.cat((hits, counts), dim=1).double()
    sums = []
    for _ in range(resamples):  # one draw at a time: a (resamples, U) table of weights is large for many units
        drawn = torch.randint(num_units, (num_units,), generator=generator)
        sums.append(torch.bincount(drawn, minlength=num_units).double() @ columns)
    hits_sum, counts_sum = torch.stack(sums).chunk(2, dim=1)
    return 100.0 * hits_sum / counts_sum


def percentile_interval(samples: Tensor) -> tuple[float, float]:
    """Returns the 2.5 and 97.5 percentiles of bootstrap samples, (resamples,) float."""
    low, high = np.percentile(samples.numpy(), (2.5, 97.5))
    return float(low), float(high)

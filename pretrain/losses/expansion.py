"""A similarity of all distinct sets as a sparse product: K = G C Gᵀ + diagonal + pairs, applied without making K.

G says which (subset T, set size a) a class has, C holds c_|T|(a + b) for the sizes a and b that have T. Used by
`operators`; docs/losses.md derives it. Letters: U classes, Q columns of G, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.losses.ragged import SparseMatrix, grouped, spans, starts_of
from pretrain.losses.similarity import Similarity, coefficient, evaluate, remainder
from pretrain.losses.subsets import Overlaps


@dataclass(frozen=True)
class Expansion:
    """K, (U, U) and symmetric, in factors. Values are float64 until `to`."""

    has: SparseMatrix
    """G, (U, Q), all ones"""
    had_by: SparseMatrix
    """Gᵀ, (Q, U)"""
    coefficients: SparseMatrix
    """C, (Q, Q)"""
    diagonal: Tensor
    """(U,) what is to be added to G C Gᵀ there"""
    pairs: SparseMatrix
    """(U, U) what pairs hold that subsets do not"""

    def to(self, dtype: torch.dtype) -> "Expansion":
        """Returns K in another dtype."""
        return Expansion(
            self.has, self.had_by, self.coefficients.to(dtype), self.diagonal.to(dtype), self.pairs.to(dtype)
        )

    def times(self, dense: Tensor) -> Tensor:
        """Returns K times (U, D), in the dtype of both."""
        product = self.has.sum_rows(self.coefficients.sum_rows(self.had_by.sum_rows(dense)))
        product.addcmul_(self.diagonal[:, None], dense)
        if len(self.pairs.columns):
            product += self.pairs.sum_rows(dense)
        return product


def expand(overlaps: Overlaps, similarity: Similarity) -> Expansion:
    """Returns K of a similarity. Costs a few entries for each set, not for each pair of sets."""
    classes, num = overlaps.classes, len(overlaps.classes)
    device = classes.sizes.device
    base = classes.sizes.max() + 1
    rows = torch.cat([level.rows for level in overlaps.levels])
    firsts = starts_of(torch.tensor([level.count for level in overlaps.levels], device=device))
    subsets = torch.cat([level.subsets + first for level, first in zip(overlaps.levels, firsts[:-1], strict=True)])

    # A subset that few sets have costs less as the pairs of these sets than as columns of G, and pairs that have several
    # such subsets in common are one entry.
    holders = torch.bincount(subsets, minlength=int(firsts[-1]))
    keys, members = torch.unique(subsets * base + classes.sizes[rows], return_counts=True)
    widths = torch.bincount(keys // base, minlength=len(holders))
    alone = torch.bincount(keys[members == 1] // base, minlength=len(holders))
    is_few = holders * (holders - 1) <= 2 * holders + widths**2 - alone
    orders = torch.repeat_interleave(torch.arange(1, len(firsts), device=device), firsts.diff())
    few = is_few[subsets]
    pairs = _matrix_of_pairs(
        num,
        _listed_pairs(overlaps, similarity),
        _pairs_within(rows[few], subsets[few], orders, classes.sizes, similarity),
    )

    # The columns of G: the other subsets, with each size of the sets that have them.
    rows, subsets = rows[~few], subsets[~few]
    keys, columns, members = torch.unique(subsets * base + classes.sizes[rows], return_inverse=True, return_counts=True)
    subset_of, size_of = keys // base, keys % base

    # C: columns of one subset with each other. A column of one set would only meet itself, which is the diagonal's.
    widths = widths * ~is_few
    left, right = spans(starts_of(widths)[subset_of], widths[subset_of])
    needed = (left != right) | (members[left] > 1)
    left, right = left[needed], right[needed]
    values = evaluate(similarity, orders[subset_of[left]], size_of[left] + size_of[right], coefficient)

    # K_uu is 1 for IoU; what columns already give of it is taken off.
    diagonal = evaluate(similarity, classes.sizes, 2 * classes.sizes)
    on_diagonal = torch.zeros(len(keys), dtype=torch.float64, device=device)
    on_diagonal[left[left == right]] = values[left == right]
    diagonal.index_add_(0, rows, -on_diagonal[columns])
    return Expansion(
        SparseMatrix.of(rows, columns, num),
        SparseMatrix.of(columns, rows, len(keys)),
        SparseMatrix.of(left, right, len(keys), values),
        diagonal,
        pairs,
    )


Entries = tuple[Tensor, Tensor, Tensor]
"""Rows, columns and values of a matrix; equal places add up."""


def _listed_pairs(overlaps: Overlaps, similarity: Similarity) -> Entries:
    """Returns what the pairs that are taken one by one hold beyond their subsets."""
    pairs, sizes = overlaps.pairs, overlaps.classes.sizes
    both = sizes[pairs.rows] + sizes[pairs.columns]
    whole = evaluate(similarity, pairs.shared, both)
    return (
        pairs.rows,
        pairs.columns,
        torch.where(pairs.is_whole, whole, evaluate(similarity, pairs.shared, both, remainder)),
    )


def _pairs_within(rows: Tensor, subsets: Tensor, orders: Tensor, sizes: Tensor, similarity: Similarity) -> Entries:
    """Returns the pairs of different sets that have a subset in common, with its coefficient; `orders` are all subsets'."""
    by_subset, group, counts = grouped(subsets)
    members, starts = rows[by_subset], starts_of(counts)
    first, second = spans(starts[group], counts[group])
    differ = first != second
    order = orders[subsets[by_subset]][first[differ]]
    first, second = members[first[differ]], members[second[differ]]
    both = sizes[first] + sizes[second]
    return first, second, evaluate(similarity, order, both, coefficient)


def _matrix_of_pairs(num: int, *parts: Entries) -> SparseMatrix:
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    places, entry = torch.unique(rows * num + columns, return_inverse=True)
    total = torch.zeros(len(places), dtype=values.dtype, device=values.device).index_add_(0, entry, values)
    return SparseMatrix.of(places // num, places % num, num, total)

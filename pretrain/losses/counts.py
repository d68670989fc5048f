"""How many others of the batch share I objects with a pair and have b objects: exact, for every I, b and pair.

From these counts, which are whole numbers, come the row sums of every similarity, the entropies of the targets, what
shares nothing at all, and how many pairs lie above a threshold. Letters: N pairs, U classes, S distinct set sizes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pretrain.losses.mates import Mates
from pretrain.losses.ragged import SparseMatrix, grouped, spans, starts_of
from pretrain.losses.similarity import ORDER, Similarity, evaluate
from pretrain.losses.subsets import Overlaps


@dataclass(frozen=True)
class Others:
    """For each query of one direction, the gallery without its true pairs: its own and its mates.

    Queries with equal sets, own pairs' sets and mates are one kind.
    """

    of_rows: Tensor
    """(N,) int64: the kind of each query"""
    own_shared: Tensor
    """(K,) int64: objects shared with the own pair"""
    own_sizes: Tensor
    """(K,) int64: |A| + |B| of the own pair"""
    kinds: Tensor
    """(C,) int64 ascending: kind of each count"""
    shared: Tensor
    """(C,) int64 ≥ 1: I"""
    sizes: Tensor
    """(C,) int64: |A| + |B|"""
    counts: Tensor
    """(C,) int64 ≥ 1: how many others there are"""
    numbers: Tensor
    """(K,) int64 ≥ 1: true pairs"""

    @cached_property
    def multiplicity(self) -> Tensor:
        """(K,) int64: the queries of each kind."""
        return torch.bincount(self.of_rows, minlength=len(self.own_shared))

    @cached_property
    def overlapping(self) -> Tensor:
        """(K,) int64: others that share an object."""
        return torch.zeros_like(self.own_shared).index_add_(0, self.kinds, self.counts)

    def total(self, similarity: Similarity) -> Tensor:
        """Returns (K,) float64 sums of a similarity over the others."""
        return self.sum_by_kind(self.counts * evaluate(similarity, self.shared, self.sizes))

    def sum_by_kind(self, values: Tensor) -> Tensor:
        """Returns (K,) sums of (C,) values."""
        total = torch.zeros(len(self.own_shared), dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.kinds, values)


def count_others(overlaps: Overlaps, mates: Mates) -> tuple[Others, Others]:
    """Returns the counts of images over texts and of texts over images; the same object where the sides are equal."""
    classes = overlaps.classes
    images = _count(overlaps, mates, classes.of_images, classes.of_texts)
    return images, images if classes.sides_are_equal else _count(overlaps, mates, classes.of_texts, classes.of_images)


def _count(overlaps: Overlaps, mates: Mates, queries: Tensor, gallery: Tensor) -> Others:
    classes, num = overlaps.classes, len(overlaps.classes)
    keys, of_rows = torch.unique(queries * num + gallery, return_inverse=True)
    numbers = torch.ones_like(keys)
    if len(mates):
        groups = int(mates.groups.max()) + 1
        of_groups, of_rows = torch.unique(of_rows * groups + mates.groups, return_inverse=True)
        keys, numbers = keys[of_groups // groups], numbers[of_groups // groups]
        numbers[of_rows] = mates.numbers
    own_class, own_pair = keys // num, keys % num
    own_shared = overlaps.shared_by(own_class, own_pair)

    rows, shared, sizes, counts = _by_class(overlaps, torch.bincount(gallery, minlength=num))
    lengths = torch.bincount(rows, minlength=num)
    kinds, place = spans(starts_of(lengths)[own_class], lengths[own_class])
    own = torch.nonzero(own_shared)[:, 0]  # the own pair is counted among them, and taken out
    mate_kinds, mate_shared, mate_sizes = _mates_of_kinds(overlaps, mates, of_rows, own_class, gallery)
    kinds = torch.cat([kinds, own, mate_kinds])
    shared = torch.cat([shared[place], own_shared[own], mate_shared])
    sizes = torch.cat([sizes[place], classes.sizes[own_pair[own]], mate_sizes])
    counts = torch.cat([counts[place], -torch.ones_like(own), -torch.ones_like(mate_kinds)])

    base = classes.sizes.max() + 1
    order, group, members = grouped((kinds * base + shared) * base + sizes)
    summed = torch.zeros_like(members).index_add_(0, group, counts[order])
    first = order[starts_of(members)[:-1]][summed > 0]
    kinds, counts = kinds[first], summed[summed > 0]
    return Others(
        of_rows,
        own_shared,
        classes.sizes[own_class] + classes.sizes[own_pair],
        kinds,
        shared[first],
        classes.sizes[own_class[kinds]] + sizes[first],
        counts,
        numbers,
    )


def _mates_of_kinds(
    overlaps: Overlaps, mates: Mates, of_rows: Tensor, own_class: Tensor, gallery: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (kind, I, b) of the mates of each kind that share something with it."""
    if len(mates) == 0:
        return mates.rows, mates.rows, mates.rows
    some_row = torch.empty_like(own_class)
    some_row[of_rows] = torch.arange(len(of_rows), device=of_rows.device)  # any: their mates have the same sets
    kinds, place = spans(mates.starts[some_row], mates.numbers[some_row] - 1)
    classes = gallery[mates.columns[place]]
    shared = overlaps.shared_by(own_class[kinds], classes)
    meets = shared > 0
    return kinds[meets], shared[meets], overlaps.classes.sizes[classes[meets]]


def _by_class(overlaps: Overlaps, multiplicity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (class ascending, I, b, count) over a gallery that has (U,) `multiplicity` of each class."""
    classes, pairs, num = overlaps.classes, overlaps.pairs, len(overlaps.classes)
    sizes, size_of = torch.unique(classes.sizes, return_inverse=True)
    by_pairs = ~pairs.is_whole

    # First C(I, t) summed over the others of a class, by size: how often subsets of t objects are met.
    met = []
    for order, level in enumerate(overlaps.levels, start=1):
        members = torch.zeros(max(1, level.count), len(sizes), dtype=torch.float64, device=sizes.device)
        members.view(-1).index_add_(
            0, level.subsets * len(sizes) + size_of[level.rows], multiplicity[level.rows].to(torch.float64)
        )
        found = SparseMatrix.of(level.rows, level.subsets, num).sum_rows(members)
        itself = torch.bincount(level.rows, minlength=num) * multiplicity
        found.view(-1).index_add_(
            0, torch.arange(num, device=sizes.device) * len(sizes) + size_of, -itself.to(torch.float64)
        )
        rows, columns, shared = (part[by_pairs] for part in (pairs.rows, pairs.columns, pairs.shared))
        met_in_pairs = _choose(shared, order) * multiplicity[columns]
        found.view(-1).index_add_(0, rows * len(sizes) + size_of[columns], -met_in_pairs.to(torch.float64))
        met.append(found.round().to(torch.int64))
    # What is left shares 1 to ORDER objects, each met C(I, t) times: solved from the largest I down.
    exactly = dict(enumerate(met, start=1))
    for order in range(ORDER - 1, 0, -1):
        for more in range(order + 1, ORDER + 1):
            exactly[order] = exactly[order] - _choose(torch.tensor(more), order) * exactly[more]

    parts = [
        (pairs.rows, pairs.shared, classes.sizes[pairs.columns], multiplicity[pairs.columns]),
        (torch.arange(num, device=sizes.device), classes.sizes, classes.sizes, multiplicity * (classes.sizes > 0)),
    ]
    for order, table in exactly.items():
        rows, columns = torch.nonzero(table, as_tuple=True)
        parts.append((rows, torch.full_like(rows, order), sizes[columns], table[rows, columns]))
    rows, shared, found_sizes, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    by_row = torch.argsort(torch.where(counts > 0, rows, num), stable=True)[: int((counts > 0).sum())]
    return rows[by_row], shared[by_row], found_sizes[by_row], counts[by_row]


def _choose(shared: Tensor, order: int) -> Tensor:
    """Returns C(I, t) for t ≤ 3, int64."""
    product, divisor = torch.ones_like(shared), 1
    for step in range(order):
        product, divisor = product * (shared - step), divisor * (step + 1)
    return product // divisor

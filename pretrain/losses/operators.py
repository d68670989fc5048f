"""The targets of a batch as one linear operator: W = (Q^{I→T} + (Q^{T→I})ᵀ) / 2, applied without an N × N matrix.

The soft part of the loss is −s Σ W_ij x_i·y_j / N, so it and its gradients need W only as W Y and Wᵀ X. W is a diagonal,
two row- and column-scaled copies of the expansion, and two rank-one terms. Letters: N pairs, U classes, D width.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pretrain.losses.counts import Others, count_others
from pretrain.losses.expansion import Expansion, expand
from pretrain.losses.ragged import SparseMatrix
from pretrain.losses.sets import collapse
from pretrain.losses.similarity import AtLeast, Similarity, evaluate
from pretrain.losses.subsets import find_overlaps
from pretrain.losses.targets import LossConfig, Rows

_COLUMNS_AT_ONCE = 32
"""Width of a slice of features while W is applied: rows that are gathered stay in a processor's cache."""


@dataclass(frozen=True)
class Side:
    """One direction: what the rows of its queries give to others. float64 until `to`."""

    to_sets: SparseMatrix
    """(U, N): 1 for the queries of each set"""
    to_sets_by_share: SparseMatrix
    """(U, N): what each query gives per similarity"""
    from_sets: SparseMatrix
    """(N, U): 1/2 for the set of each query"""
    from_sets_by_share: SparseMatrix
    """(N, U): half of what it gives per similarity"""
    to_each: Tensor
    """(N,) what it gives to each other, whatever its objects"""

    @staticmethod
    def of(classes: Tensor, num_classes: int, per_similarity: Tensor, to_each: Tensor) -> "Side":
        """Returns the side of queries of (N,) classes that give (N,) `per_similarity` and `to_each`."""
        queries = torch.arange(len(classes), device=classes.device)
        by_share = SparseMatrix.of(classes, queries, num_classes, per_similarity)
        offsets = torch.arange(len(classes) + 1, device=classes.device)
        return Side(
            SparseMatrix(by_share.offsets, by_share.columns),
            by_share,
            SparseMatrix(offsets, classes, torch.full_like(per_similarity, 0.5)),
            SparseMatrix(offsets, classes, per_similarity / 2),
            to_each,
        )

    def to(self, dtype: torch.dtype) -> "Side":
        """Returns the side in another dtype."""
        return Side(*(getattr(self, entry.name).to(dtype) for entry in fields(self)))


@dataclass(frozen=True)
class Targets:
    """The targets of a batch over all ranks, and what is to be said of them. float64 until `to`."""

    images: Side
    texts: Side
    diagonal: Tensor
    """(N,) W_ii: the mean of what the true pair gets from its image and its text"""
    own: Tensor
    """(N,) what a diagonal without true pairs would hold: taken off"""
    expansion: Expansion | None
    """None where no other gets anything by similarity"""
    has_constant: bool
    """Whether any row gives the same to every other"""
    entropy: float
    """Mean over rows and directions, in nats: the floor of the loss"""
    true_pair_mass: float
    """Mean target on the true pair"""
    similar_pairs: float
    """Share of pairs of an image and another's text with IoU ≥ 1/2: false negatives of a hard loss"""
    equal_pairs: float
    """Share of those with IoU 1"""

    @property
    def gives_to_others(self) -> bool:
        """Whether W has anything off the diagonal."""
        return self.expansion is not None or self.has_constant

    def to(self, dtype: torch.dtype) -> "Targets":
        """Returns W in the dtype that it is applied in; its diagonal stays float64."""
        return replace(
            self,
            images=self.images.to(dtype),
            texts=self.texts.to(dtype),
            own=self.own.to(dtype),
            expansion=self.expansion.to(dtype) if self.expansion else None,
        )

    def times_texts(self, texts: Tensor) -> Tensor:
        """Returns (W − its diagonal) times (N, D) texts: a row for each image."""
        return self._times(self.images, self.texts, texts)

    def times_images(self, images: Tensor) -> Tensor:
        """Returns (W − its diagonal)ᵀ times (N, D) images: a row for each text."""
        return self._times(self.texts, self.images, images)

    def _times(self, queries: Side, gallery: Side, features: Tensor) -> Tensor:
        product = torch.empty_like(features, memory_format=torch.contiguous_format)
        for first in range(0, features.shape[1], _COLUMNS_AT_ONCE):
            columns = slice(first, first + _COLUMNS_AT_ONCE)
            product[:, columns] = self._times_slice(queries, gallery, features[:, columns].contiguous())
        return product

    def _times_slice(self, queries: Side, gallery: Side, features: Tensor) -> Tensor:
        if self.expansion is not None:
            product = queries.from_sets_by_share.sum_rows(self.expansion.times(gallery.to_sets.sum_rows(features)))
            product += queries.from_sets.sum_rows(self.expansion.times(gallery.to_sets_by_share.sum_rows(features)))
            product.addcmul_(self.own[:, None], features, value=-1)
        else:
            product = -self.own[:, None] * features
        if self.has_constant:
            product.addcmul_(queries.to_each[:, None], features.sum(0), value=0.5)
            product.add_(gallery.to_each @ features, alpha=0.5)
        return product


def make_targets(image_objects: Tensor, text_objects: Tensor, config: LossConfig) -> Targets:
    """Returns the targets of (N, M) and (N, M') int64 object ids, padded with −1. No gradient, no features needed."""
    size = len(image_objects)
    overlaps = find_overlaps(collapse(image_objects, text_objects))
    classes = overlaps.classes
    others = count_others(overlaps)
    target = config.find_target()
    similarity = target.similarity(config) if target.similarity else None
    rows = []
    for direction in others:
        zero = torch.zeros(len(direction.own_shared), dtype=torch.float64, device=image_objects.device)
        rows.append(target.rows(direction, direction.total(similarity) if similarity else zero, size, config))
    shares = [row.per_similarity[direction.of_rows] for row, direction in zip(rows, others, strict=True)]
    images, texts = (
        Side.of(of, len(classes), share, row.to_each[direction.of_rows])
        for of, share, row, direction in zip((classes.of_images, classes.of_texts), shares, rows, others, strict=True)
    )
    own = (images.to_each + texts.to_each) / 2
    if similarity:
        own_similarity = evaluate(similarity, others[0].own_shared, others[0].own_sizes)[others[0].of_rows]
        own = own + (shares[0] + shares[1]) / 2 * own_similarity
    gives = torch.stack([torch.stack([row.per_similarity.max(), row.to_each.max()]) for row in rows]).amax(0) > 0
    by_similarity, by_constant = gives.tolist()
    return Targets(
        images,
        texts,
        (rows[0].true[others[0].of_rows] + rows[1].true[others[1].of_rows]) / 2,
        own,
        expand(overlaps, similarity) if similarity and by_similarity else None,
        by_constant,
        sum(_entropy(d, row, similarity, size) for d, row in zip(others, rows, strict=True)) / 2,
        sum(float(row.true[d.of_rows].mean()) for d, row in zip(others, rows, strict=True)) / 2,
        *(_share_above(others[0], threshold, size) for threshold in (0.5, 1.0)),
    )


def _entropy(others: Others, rows: Rows, similarity: Similarity | None, size: int) -> float:
    """Returns the mean entropy of the rows, in nats."""
    given = rows.to_each[others.kinds]
    if similarity is not None:
        given = given + rows.per_similarity[others.kinds] * evaluate(similarity, others.shared, others.sizes)
    unshared = (size - 1 - others.overlapping) * torch.xlogy(rows.to_each, rows.to_each)
    of_kinds = (
        torch.xlogy(rows.true, rows.true) + unshared + others.sum_by_kind(others.counts * torch.xlogy(given, given))
    )
    return -float(of_kinds[others.of_rows].mean())


def _share_above(others: Others, threshold: float, size: int) -> float:
    """Returns the share of pairs, true ones apart, whose IoU is at least `threshold`."""
    if size == 1:
        return 0.0
    above = others.total(AtLeast(threshold))
    return float((above * others.multiplicity).sum()) / (size * (size - 1))

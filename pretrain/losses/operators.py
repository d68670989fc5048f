"""The targets of a batch as one linear operator: W = (Q^{I→T} + (Q^{T→I})ᵀ) / 2, applied without an N × N matrix.

The soft part of the loss is −s Σ W_ij x_i·y_j / N, so it and its gradients need W only as W Y and Wᵀ X. W is a diagonal,
two row- and column-scaled copies of the expansion, two rank-one terms, and what pairs with equal texts get. Or, where IoU
is weighted, similarities are made with each block of logits (`tiles`). Letters: N pairs, U classes, D width.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pretrain.losses.counts import count_others
from pretrain.losses.exchange import Layout
from pretrain.losses.expansion import Expansion, expand
from pretrain.losses.mates import Mates, find_mates
from pretrain.losses.ragged import SparseMatrix
from pretrain.losses.sets import BatchSets, SetClasses, collapse
from pretrain.losses.similarity import AtLeast, Similarity, evaluate
from pretrain.losses.subsets import Overlaps, find_overlaps
from pretrain.losses.targets import Crowd, LossConfig, Rows
from pretrain.losses.tiles import InTiles, SoftTiles, count_similar, make_tiles, sum_others
from pretrain.losses.weights import ObjectWeights

_COLUMNS_AT_ONCE = 32
"""Width of a slice of features while W is applied: rows that are gathered stay in a processor's cache."""

_PAIRS_A_SUBSET = 40
"""Similarities of pairs that are made in tiles, forward and backward, in the time that a subset takes; on a CPU."""
_METER_ROWS = 512
"""Images of a batch that the meter of a loss without similarities looks at"""
_SMALL = 1 << 20
"""Pairs of a batch for which neither takes long"""


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
    label_sums: Tensor
    """(N,) what each image gives in all; 1 but for siglip"""
    own: Tensor
    """(N,) what a diagonal without true pairs would hold: taken off"""
    expansion: Expansion | None
    """None where no other gets anything by similarity, or `tiles` say what"""
    tiles: InTiles | None
    """What others get by similarity where that is made with each block of logits"""
    mates: tuple[SparseMatrix, SparseMatrix] | None
    """(N, N) what is to be added at pairs with equal texts, and its transpose"""
    has_constant: bool
    """Whether any row gives the same to every other"""
    entropy: float
    """The floor of the loss, in nats: of softmax losses, the mean over rows and directions of the targets' entropy"""
    true_pair_mass: float
    """Mean target on true pairs, over rows"""
    similar_pairs: float
    """Share of other pairs of an image and a text with IoU ≥ 1/2: false negatives of a hard loss. Of a loss without
    similarities, counted on the batch's first 512 images"""
    equal_pairs: float
    """Share of those with equal objects"""

    @property
    def gives_to_others(self) -> bool:
        """Whether W has anything off the diagonal that tiles do not make."""
        return self.expansion is not None or self.has_constant or self.mates is not None

    def to(self, dtype: torch.dtype) -> "Targets":
        """Returns W in the dtype that it is applied in; its diagonal stays float64."""
        if self.tiles is not None and self.tiles.dtype != dtype:
            raise ValueError(f"targets were prepared for {self.tiles.dtype}, the logits are {dtype}")
        return replace(
            self,
            images=self.images.to(dtype),
            texts=self.texts.to(dtype),
            own=self.own.to(dtype),
            expansion=self.expansion.to(dtype) if self.expansion else None,
            mates=(self.mates[0].to(dtype), self.mates[1].to(dtype)) if self.mates else None,
        )

    def times_texts(self, texts: Tensor) -> Tensor:
        """Returns (W − its diagonal) times (N, D) texts: a row for each image."""
        return self._times(self.images, self.texts, texts, 0)

    def times_images(self, images: Tensor) -> Tensor:
        """Returns (W − its diagonal)ᵀ times (N, D) images: a row for each text."""
        return self._times(self.texts, self.images, images, 1)

    def _times(self, queries: Side, gallery: Side, features: Tensor, direction: int) -> Tensor:
        product = torch.empty_like(features, memory_format=torch.contiguous_format)
        for first in range(0, features.shape[1], _COLUMNS_AT_ONCE):
            columns = slice(first, first + _COLUMNS_AT_ONCE)
            part = features[:, columns].contiguous()
            product[:, columns] = self._times_slice(queries, gallery, part)
            if self.mates is not None:
                product[:, columns] += self.mates[direction].sum_rows(part)
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
            product.add_((gallery.to_each[:, None] * features).sum(0), alpha=0.5)  # (a product adds one by one)
        return product


def make_targets(
    sets: BatchSets, config: LossConfig, layout: Layout, weights: ObjectWeights | None, dtype: torch.dtype
) -> Targets:
    """Returns the targets of all ranks' sets. No gradient, no features needed. Collective.

    `dtype`: that of the logits. Raises ValueError where weights are wanted and not given.
    """
    size, device = len(sets), sets.image_objects.device
    classes = collapse(sets.image_objects, sets.text_objects)
    mates = find_mates(sets.text_ids if config.equal_texts == "positives" else None, size, device)
    target = config.find_target()
    similarity = target.similarity(config) if target.similarity else None
    if similarity is None:
        return _without_similarity(classes, mates, config, layout)
    if config.weights == "frequency" and weights is None:
        raise ValueError("weights 'frequency' needs the weights of objects")
    overlaps = None
    if config.weights == "none" and not _has_many_subsets(classes, layout):
        overlaps = find_overlaps(classes, _most_pairs(layout))
    if overlaps is None:
        return _in_tiles(classes, mates, config, layout, weights if config.weights == "frequency" else None, dtype)
    return _by_subsets(overlaps, mates, config, similarity)


def _most_pairs(layout: Layout) -> float:
    """Returns how many pairs may be listed: a linear number, which takes less time than tiles."""
    pairs = layout.total * max(layout.counts)
    return max(_SMALL, min(pairs / _PAIRS_A_SUBSET, 256 * layout.total))


def _has_many_subsets(classes: SetClasses, layout: Layout) -> bool:
    """Returns whether enumerating shared subsets, on every rank, takes longer than making this rank's similarities."""
    pairs = layout.total * max(layout.counts)
    if pairs < _SMALL:
        return False
    _, number, holders = torch.unique(classes.ids, return_inverse=True, return_counts=True)
    shared = torch.bincount(classes.rows[holders[number] > 1], minlength=len(classes)).double()
    subsets = shared + shared * (shared - 1) / 2 + shared * (shared - 1) * (shared - 2) / 6
    return float(subsets.sum()) * _PAIRS_A_SUBSET > pairs


def _without_similarity(classes: SetClasses, mates: Mates, config: LossConfig, layout: Layout) -> Targets:
    """Returns the targets of a loss to which all others are alike. The meter looks at the batch's first images."""
    size, numbers = layout.total, mates.numbers.double()
    none = torch.zeros_like(numbers)
    others = size - numbers
    row = config.find_target().rows(Crowd(numbers, others, none > 0, none), config)
    entropy = of_true_pairs(row, numbers, config) + others * information(row.to_each, config)
    looked_at = min(size, _METER_ROWS)
    part = Layout(0, (looked_at, size - looked_at))
    similar = count_similar(make_tiles(classes, mates, None, part, torch.float32))
    return _assemble(
        classes,
        mates,
        [row, row],
        total=none,
        entropy=float(entropy.mean()),
        similar=float(similar) / max(1.0, float(others[:looked_at].sum())),
    )


def _by_subsets(overlaps: Overlaps, mates: Mates, config: LossConfig, similarity: Similarity) -> Targets:
    """Returns the targets whose similarity is expanded over shared subsets."""
    classes, target = overlaps.classes, config.find_target()
    size = len(classes.of_images)
    directions, rows, totals, entropy = count_others(overlaps, mates), [], [], 0.0
    for direction in directions:
        numbers = direction.numbers.double()
        others = size - numbers
        total = direction.total(similarity)
        row = target.rows(Crowd(numbers, others, direction.overlapping > 0, total), config)
        rows.append(row)
        totals.append(total)
        found = evaluate(similarity, direction.shared, direction.sizes)
        given = row.to_each[direction.kinds] + row.per_similarity[direction.kinds] * found
        unshared = (others - direction.overlapping) * information(row.to_each, config)
        shared = direction.sum_by_kind(direction.counts * information(given, config))
        entropy += float((of_true_pairs(row, numbers, config) + unshared + shared)[direction.of_rows].mean())
    all_rows = [
        Rows(*(getattr(row, entry.name)[direction.of_rows] for entry in fields(Rows)))
        for row, direction in zip(rows, directions, strict=True)
    ]
    first = directions[0]
    pair = classes.of_images[mates.rows], classes.of_texts[mates.columns]
    gives = bool(torch.stack([row.per_similarity.max() for row in rows]).max() > 0)
    similar = (first.total(AtLeast(0.5)) * first.multiplicity).sum()
    return _assemble(
        classes,
        mates,
        all_rows,
        total=totals[0][first.of_rows],
        entropy=entropy / 2,
        similar=float(similar) / _other_pairs(mates),
        expansion=expand(overlaps, similarity) if gives else None,
        own_similarity=evaluate(similarity, first.own_shared, first.own_sizes)[first.of_rows],
        mate_similarity=evaluate(
            similarity, overlaps.shared_by(*pair), classes.sizes[pair[0]] + classes.sizes[pair[1]]
        ),
    )


def _in_tiles(
    classes: SetClasses,
    mates: Mates,
    config: LossConfig,
    layout: Layout,
    weights: ObjectWeights | None,
    dtype: torch.dtype,
) -> Targets:
    """Returns the targets whose similarity is made with each block of logits."""
    target = config.find_target()
    assert target.similarity is not None
    similarity = target.similarity(config)
    tiles = make_tiles(classes, mates, weights, layout, dtype)
    floor = similarity.floor

    def summand(values: Tensor) -> Tensor:
        if config.name == "siglip":
            return information(config.beta * values, config)
        given = values.add_(floor)
        return given.clamp_min(torch.finfo(given.dtype).tiny).log_().mul_(given)  # in a third of xlogy's time

    sums = sum_others(tiles, similarity, summand, layout)
    given, entropy = [], 0.0
    for direction in sums:
        numbers = mates.numbers.double()
        others = layout.total - numbers
        row = target.rows(Crowd(numbers, others, direction.overlapping > 0, direction.total), config)
        given.append(row)
        shared = direction.information
        if config.name != "siglip":  # of a row's a · g, where g = f + floor: − Σ a g log(a g)
            share, overlapping = row.per_similarity, direction.overlapping
            log_share = torch.xlogy(share, share)
            shared = -share * shared - log_share * (direction.total + floor * overlapping)
        unshared = (others - direction.overlapping) * information(row.to_each, config)
        entropy += float((of_true_pairs(row, numbers, config) + unshared + shared).mean())
    soft = SoftTiles(
        tiles,
        similarity,
        (given[0].per_similarity[layout.mine] / 2).to(dtype),
        (given[1].per_similarity / 2).to(dtype),
    )
    return _assemble(
        classes,
        mates,
        given,
        total=sums[0].total,
        entropy=entropy / 2,
        similar=float(sums[0].similar.sum()) / _other_pairs(mates),
        tiles=soft,
    )


def _other_pairs(mates: Mates) -> int:
    """Returns how many pairs of the batch are no true ones; 1 where there are none."""
    size = len(mates.numbers)
    return max(1, size * size - int(mates.numbers.sum()))


def _assemble(
    classes: SetClasses,
    mates: Mates,
    given: list[Rows],
    *,
    total: Tensor,
    entropy: float,
    similar: float,
    expansion: Expansion | None = None,
    own_similarity: Tensor | None = None,
    mate_similarity: Tensor | None = None,
    tiles: InTiles | None = None,
) -> Targets:
    """Returns the targets from what each row gives, (N,) by direction.

    `total`: the images' similarities to others, (N,). `own_similarity`, `mate_similarity`: those of true pairs, which the
    expansion holds.
    """
    size, num = len(classes.of_images), len(classes)
    constants = torch.stack([row.to_each.max() for row in given]).max() > 0
    # What the factors hold at true pairs, where it does not belong.
    shares = [row.per_similarity if expansion is not None else torch.zeros_like(row.true) for row in given]
    own = (given[0].to_each + given[1].to_each) / 2
    if expansion is not None and own_similarity is not None:
        own = own + (shares[0] + shares[1]) / 2 * own_similarity
    true = [row.true / mates.numbers for row in given]
    of_mates = None
    if len(mates):
        rows, columns = mates.rows, mates.columns
        value = (true[0][rows] + true[1][columns] - given[0].to_each[rows] - given[1].to_each[columns]) / 2
        if expansion is not None and mate_similarity is not None:
            value = value - (shares[0][rows] + shares[1][columns]) / 2 * mate_similarity
        of_mates = SparseMatrix.of(rows, columns, size, value), SparseMatrix.of(columns, rows, size, value)
    images, texts = (
        Side.of(of, num, share, row.to_each)
        for of, share, row in zip((classes.of_images, classes.of_texts), shares, given, strict=True)
    )
    return Targets(
        images,
        texts,
        (true[0] + true[1]) / 2,
        given[0].true + given[0].per_similarity * total + given[0].to_each * (size - mates.numbers),
        own,
        expansion,
        tiles,
        of_mates,
        bool(constants),
        entropy,
        float((given[0].true.mean() + given[1].true.mean()) / 2),
        similar,
        float(count_equal(classes, mates)) / _other_pairs(mates),
    )


def information(given: Tensor, config: LossConfig) -> Tensor:
    """Returns what a pair's target adds to the floor of the loss, elementwise: −q log q, of a label also −(1−q) log(1−q)."""
    found = -torch.xlogy(given, given)
    return found - torch.xlogy(1 - given, 1 - given) if config.name == "siglip" else found


def of_true_pairs(row: Rows, numbers: Tensor, config: LossConfig) -> Tensor:
    """Returns what the true pairs of each row add to the floor."""
    return numbers * information(row.true / numbers, config)


def count_equal(classes: SetClasses, mates: Mates) -> Tensor:
    """Returns how many pairs, true ones apart, have equal objects, at least one."""
    num = len(classes)
    images, texts = (torch.bincount(of, minlength=num) for of in (classes.of_images, classes.of_texts))
    is_own = (classes.of_images == classes.of_texts) & (classes.sizes[classes.of_images] > 0)
    first, second = classes.of_images[mates.rows], classes.of_texts[mates.columns]
    is_mate = (first == second) & (classes.sizes[first] > 0)
    return (images * texts * (classes.sizes > 0)).sum() - is_own.sum() - is_mate.sum()

"""The similarity of object sets block by block: the second design, for weighted IoU and for dense captions.

The most frequent ids are columns of a multi-hot matrix, whose product is what pairs share of them; pairs that share a
rarer id are found by id, and added to the block. So a block holds IoU exactly, at the cost of a thin product and a few
passes over the block. Used by `operators` and `softclip`. Letters: B images of this rank, N texts of all ranks, R × C a
block, F frequent ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.losses.blocks import blocks_of, scratch, shape_on, true_in
from pretrain.losses.exchange import Layout, add_over_ranks, gather_rows
from pretrain.losses.mates import Mates
from pretrain.losses.ragged import spans, starts_of
from pretrain.losses.sets import SetClasses
from pretrain.losses.similarity import AtLeast, Similarity
from pretrain.losses.weights import ObjectWeights

FREQUENT = 1 / 500
"""Share of all pairs that share an id from which it is frequent: a column of the product costs as much as these pairs."""

_TINY = 1e-30


@dataclass(frozen=True)
class Rare:
    """What pairs share of rarer ids: found anew for each block, so that no list of pairs is kept."""

    image_starts: list[int]
    """Where each block of rows starts among the entries and, last, where the last ends"""
    image_rows: Tensor
    """(E,) int64 ascending: this rank's image of each entry"""
    ids: Tensor
    """(E,) int64: number of its id, of V"""
    weights: Tensor
    """(E,) what it counts"""
    text_starts: Tensor
    """(blocks of columns, V + 1) int64: where the texts that have an id start among `texts`, and end"""
    texts: Tensor
    """int64: by block of columns, then id"""
    counts: list[list[int]]
    """Pairs to add, by block of rows and of columns"""

    def add_to(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Adds to a block what its pairs share."""
        height, width = shape_on(block.device)
        row, column = rows.start // height, columns.start // width
        part = slice(self.image_starts[row], self.image_starts[row + 1])
        starts, ids, count = self.text_starts[column], self.ids[part], self.counts[row][column]
        if count:
            first = starts[ids]
            owner, place = spans(first, starts[ids + 1] - first, count)
            places = (self.image_rows[part] - rows.start)[owner] * block.shape[1] + self.texts[place] - columns.start
            block.view(-1).index_add_(0, places, self.weights[part][owner])


@dataclass(frozen=True)
class Places:
    """Some of the B × N pairs, by block."""

    starts: list[int]
    """Where each block's start and, last, where the last's end"""
    places: Tensor
    """(E,) int64: row · C + column within the block"""

    @staticmethod
    def of(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> "Places":
        """Returns the places given by row and column of B × N = `num_rows` × `num_columns`."""
        height, width = shape_on(rows.device)
        blocks_a_row = -(-num_columns // width)
        block = rows // height * blocks_a_row + columns // width
        widths = (num_columns - columns // width * width).clamp_max(width)
        order = block.argsort(stable=True)
        counts = torch.bincount(block, minlength=-(-num_rows // height) * blocks_a_row)
        return Places(starts_of(counts).tolist(), (rows % height * widths + columns % width)[order])

    def within(self, rows: slice, columns: slice, num_columns: int) -> Tensor:
        """Returns the places of a block."""
        height, width = shape_on(self.places.device)
        number = rows.start // height * -(-num_columns // width) + columns.start // width
        return self.places[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class SetTiles:
    """IoU, weighted or not, of this rank's images and all texts; 0 for true pairs."""

    image_hot: Tensor
    """(B, F) the weight of each frequent id that an image's set has"""
    text_hot: Tensor
    """(N, F) 1 for each that a text's set has"""
    image_sizes: Tensor
    """(B,) weights of each set, added up"""
    text_sizes: Tensor
    """(N,)"""
    rare: Rare
    true: Places
    """True pairs off the diagonal"""
    first_pair: int
    """The text of this rank's first image"""
    is_weighted: bool
    """Whether objects count differently; else sizes and what is shared are whole numbers"""
    memory: tuple[Tensor, Tensor]
    """Two blocks: new memory for each would cost more than what is done with it"""

    def part_of_memory(self, number: int, rows: slice, columns: slice) -> Tensor:
        """Returns (R, C) memory for a block."""
        return (
            self.memory[number]
            .view(-1)[: (rows.stop - rows.start) * (columns.stop - columns.start)]
            .view(rows.stop - rows.start, -1)
        )

    def is_exact(self, similarity: Similarity) -> bool:
        """Whether a threshold is decided on whole numbers."""
        return isinstance(similarity, AtLeast) and not self.is_weighted

    def values(self, similarity: Similarity, rows: slice, columns: slice) -> Tensor:
        """Returns the (R, C) similarities of a block, in memory that the next call overwrites."""
        if isinstance(similarity, AtLeast) and self.is_exact(similarity):
            return similarity.from_counts(*self._shared_and_union(rows, columns))
        return similarity.from_iou(self.iou(rows, columns))

    def iou(self, rows: slice, columns: slice) -> Tensor:
        """Returns the (R, C) IoUs of a block, in memory that the next call overwrites."""
        shared, union = self._shared_and_union(rows, columns)
        return shared.div_(union.clamp_min_(_TINY))

    def _shared_and_union(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        shared, union = (self.part_of_memory(number, rows, columns) for number in (0, 1))
        torch.mm(self.image_hot[rows], self.text_hot[columns].T, out=shared)
        self.rare.add_to(shared, rows, columns)
        true_in(shared, rows, columns, self.first_pair)[0].zero_()
        shared.view(-1).index_fill_(0, self.true.within(rows, columns, len(self.text_hot)), 0)
        return shared, torch.add(self.image_sizes[rows, None], self.text_sizes[columns], out=union).sub_(shared)


def make_tiles(
    classes: SetClasses, mates: Mates, weights: ObjectWeights | None, layout: Layout, dtype: torch.dtype
) -> SetTiles:
    """Returns this rank's tiles. `dtype`: that of the logits."""
    size, num, device = layout.total, len(classes), classes.sizes.device
    mine = layout.mine
    of_my_images = classes.of_images[mine]
    ids, number = torch.unique(classes.ids, return_inverse=True)
    weight = torch.ones(len(ids), dtype=torch.float64, device=device) if weights is None else weights.look_up(ids)
    sizes = torch.zeros(num, dtype=torch.float64, device=device).index_add_(0, classes.rows, weight[number])

    images_of, texts_of = (torch.bincount(of, minlength=num) for of in (classes.of_images, classes.of_texts))
    with_images, with_texts = (
        torch.zeros(len(ids), dtype=torch.int64, device=device).index_add_(0, number, of[classes.rows])
        for of in (images_of, texts_of)
    )
    is_frequent = with_images.double() * with_texts > FREQUENT * size * size
    column = torch.where(is_frequent, is_frequent.cumsum(0) - 1, -1)[number]
    hot = torch.zeros(num, int(is_frequent.sum()), dtype=dtype, device=device)
    frequent = column >= 0
    hot[classes.rows[frequent], column[frequent]] = 1

    rare = ~frequent & (with_images > 0)[number] & (with_texts > 0)[number]
    true = slice(mates.starts[mine.start], mates.starts[mine.stop])
    return SetTiles(
        hot[of_my_images] * weight[is_frequent].to(dtype),
        hot[classes.of_texts],
        sizes[of_my_images].to(dtype),
        sizes[classes.of_texts].to(dtype),
        _rare(classes, of_my_images, rare, number, weight.to(dtype)),
        Places.of(mates.rows[true] - mine.start, mates.columns[true], len(of_my_images), size),
        mine.start,
        weights is not None,
        (scratch(len(of_my_images), size, dtype, device), scratch(len(of_my_images), size, dtype, device)),
    )


def _rare(classes: SetClasses, of_my_images: Tensor, rare: Tensor, number: Tensor, weight: Tensor) -> Rare:
    """Returns what pairs share of the entries that are `rare`, whose ids have a `number` each, and these a `weight`."""
    device = of_my_images.device
    height, width = shape_on(device)
    _, numbers = torch.unique(number[rare], return_inverse=True)
    weights = weight[number[rare]]
    starts = starts_of(torch.bincount(classes.rows[rare], minlength=len(classes)))
    lengths = starts.diff()
    image_rows, image_place = spans(starts[of_my_images], lengths[of_my_images])
    text_rows, text_place = spans(starts[classes.of_texts], lengths[classes.of_texts])
    num_ids = int(numbers.max()) + 1 if len(numbers) else 0
    num_blocks = -(-len(classes.of_texts) // width)
    keys = text_rows // width * num_ids + numbers[text_place]
    texts = text_rows[keys.argsort(stable=True)]
    held = torch.bincount(keys, minlength=num_blocks * num_ids)
    ends = starts_of(held)
    inside = torch.arange(num_blocks, device=device)[:, None] * num_ids + torch.arange(num_ids + 1, device=device)
    row_blocks = image_rows // height
    num_row_blocks = -(-len(of_my_images) // height)
    asked = torch.bincount(row_blocks * num_ids + numbers[image_place], minlength=num_row_blocks * num_ids)
    # Whole numbers below 2^53: exact.
    wanted = asked.view(num_row_blocks, num_ids).double() @ held.view(num_blocks, num_ids).double().T
    return Rare(
        starts_of(torch.bincount(row_blocks, minlength=num_row_blocks)).tolist(),
        image_rows,
        numbers[image_place],
        weights[image_place],
        ends[inside],
        texts,
        wanted.long().tolist(),
    )


def count_similar(tiles: SetTiles) -> Tensor:
    """Returns how many other pairs of this rank's images have IoU ≥ 1/2, float64."""
    total = torch.zeros((), dtype=torch.float64, device=tiles.image_hot.device)
    for rows, columns in blocks_of(len(tiles.image_hot), len(tiles.text_hot), tiles.image_hot.device):
        total += AtLeast(0.5).from_iou(tiles.iou(rows, columns)).sum()
    return total


@dataclass(frozen=True)
class Sums:
    """Of one direction, over each query's others. (N,) float64."""

    total: Tensor
    """The similarity"""
    overlapping: Tensor
    """How many share an object that counts"""
    information: Tensor
    """A function of the similarity of those"""
    similar: Tensor
    """How many have IoU ≥ 1/2"""


def sum_others(
    tiles: SetTiles, similarity: Similarity, information: Callable[[Tensor], Tensor], layout: Layout
) -> tuple[Sums, Sums]:
    """Returns the sums of images over texts and of texts over images, on every rank. Collective.

    `information`: of a tensor of similarities, which it may overwrite; taken of those that are not 0.
    """
    num_rows, num_columns, device = len(tiles.image_hot), len(tiles.text_hot), tiles.image_hot.device
    of_images, of_texts = (torch.zeros(4, n, dtype=torch.float64, device=device) for n in (num_rows, num_columns))
    for rows, columns in blocks_of(num_rows, num_columns, device):

        def add(place: int, values: Tensor, rows: slice = rows, columns: slice = columns) -> None:
            of_images[place, rows] += values.sum(1)
            of_texts[place, columns] += values.sum(0)

        iou = tiles.iou(rows, columns)
        other = tiles.part_of_memory(1, rows, columns)
        overlaps = iou > 0
        add(1, other.copy_(overlaps))
        add(3, AtLeast(0.5).from_iou(other.copy_(iou)))
        values = tiles.values(similarity, rows, columns) if tiles.is_exact(similarity) else similarity.from_iou(iou)
        add(0, values)
        add(2, information(values).mul_(other.copy_(overlaps)))
    return Sums(*gather_rows(of_images.T.contiguous(), layout).T), Sums(*add_over_ranks(of_texts, layout))


class InTiles(Protocol):
    """What rows give to others, made with each block of logits."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks."""
        ...

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Returns (R, C) of W, 0 for own pairs, which may be overwritten, and is by the next call."""
        ...


@dataclass(frozen=True)
class SoftTiles:
    """What rows give to others by similarity, of both directions, block by block."""

    tiles: SetTiles
    similarity: Similarity
    image_shares: Tensor
    """(B,) half of what each image gives per similarity"""
    text_shares: Tensor
    """(N,)"""

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks."""
        return self.image_shares.dtype

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Returns (R, C) of W, 0 for true pairs, in memory that the next call overwrites."""
        values = self.tiles.values(self.similarity, rows, columns)
        shares = self.tiles.part_of_memory(1, rows, columns)
        torch.add(self.image_shares[rows, None], self.text_shares[columns], out=shares)
        return values.mul_(shares)

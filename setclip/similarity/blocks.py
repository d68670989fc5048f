"""Scores of many sets with many others in blocks, so that no more than a block's inner products exist at a time.

`similarity_matrix` is what training and evaluation call; `Tiles` is the part without gradient, which also serves scores on
demand (eval_suite/set_scores.py) and search (eval_suite/two_stage.py). A tile is one matrix product, with the texts'
elements in planes, and its reduction in place while it lies in the cache: on a CPU it takes about as long as the bare
product, which has to write all inner products to memory.
Letters: Ni images, Nt texts, Ki and Kt elements in their sets, D width.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from setclip.errors import InputError
from setclip.similarity.base import GridSimilarity, SetSimilarity, VectorSimilarity, check_sets, filled, planes

_TILE = {"cpu": (1_024, 2_048), "cuda": (8_192, 16_384)}
"""Most image and text elements in a tile: 8 MB of inner products for the third-level cache of a CPU core, where the
product is as fast as a whole one."""


def similarity_matrix(
    similarity: SetSimilarity,
    image_sets: Tensor,
    text_sets: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Returns what `similarity(image_sets, text_sets, image_mask, text_mask)` does, (Ni, Nt), in blocks.

    `block_size`: most sets a side of a block; None: as many as are fast. With gradient the forward pass keeps the scores
    alone and the backward pass makes each block again. Without gradient the work is in float32 also for float64 sets,
    and scores depend in their last bits on the block size; with the default they are those of `set_scores`.
    """
    if block_size is not None and block_size < 1:
        raise InputError(f"expected a block_size of at least 1, found {block_size}; None takes what is fast")
    parameters = list(similarity.parameters())
    if torch.is_grad_enabled() and any(t.requires_grad for t in (image_sets, text_sets, *parameters)):
        check_sets(image_sets, text_sets, image_mask, text_mask)
        return _with_gradient(similarity, image_sets, text_sets, image_mask, text_mask, block_size or 512)
    if isinstance(similarity, VectorSimilarity):
        with torch.no_grad():
            return similarity(image_sets, text_sets, image_mask, text_mask)  # nothing larger than the scores
    if isinstance(similarity, GridSimilarity):
        tiles = Tiles(similarity, image_sets, text_sets, image_mask, text_mask, block_size)
        return tiles.scores(slice(0, len(image_sets)), slice(0, len(text_sets)))
    with torch.no_grad():
        return _in_blocks(similarity, image_sets, text_sets, image_mask, text_mask, block_size or 512)


def _in_blocks(
    similarity: SetSimilarity,
    image_sets: Tensor,
    text_sets: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    size: int,
) -> Tensor:
    """Returns the scores block by block, of a similarity that is more than a grid of inner products and its reduction."""
    rows = []
    for i in range(0, len(image_sets), size):
        images, images_mask = image_sets[i : i + size], None if image_mask is None else image_mask[i : i + size]
        row = []
        for t in range(0, len(text_sets), size):
            texts_mask = None if text_mask is None else text_mask[t : t + size]
            row.append(similarity(images, text_sets[t : t + size], images_mask, texts_mask))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def _with_gradient(
    similarity: SetSimilarity,
    image_sets: Tensor,
    text_sets: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    size: int,
) -> Tensor:
    # Split once: the gradients of the parts of one `split` are put together once, those of slices are each as large
    # as the whole.
    images, texts = image_sets.split(size), text_sets.split(size)
    image_masks = [None] * len(images) if image_mask is None else image_mask.split(size)
    text_masks = [None] * len(texts) if text_mask is None else text_mask.split(size)
    rows = []
    for image_part, image_part_mask in zip(images, image_masks, strict=True):
        row = []
        for text_part, text_part_mask in zip(texts, text_masks, strict=True):
            parts = (image_part, text_part, image_part_mask, text_part_mask)
            is_whole = len(images) == len(texts) == 1
            # no similarity draws random numbers, so their state need not be kept
            row.append(
                similarity(*parts)
                if is_whole
                else checkpoint(similarity, *parts, use_reentrant=False, preserve_rng_state=False)
            )
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


class Tiles:
    """The scores of all pairs of sets, without gradient, in tiles of one shape.

    All tiles have the same shape, the last ones filled up, and begin at fixed places. So a score does not depend on what
    else is asked for, and equal sets get equal scores: the same product of the same shape adds up in the same order.
    """

    def __init__(
        self,
        similarity: GridSimilarity,
        image_sets: Tensor,
        text_sets: Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        block_size: int | None = None,
    ):
        """Takes sets and masks as `SetSimilarity.forward` does, and raises as it does."""
        check_sets(image_sets, text_sets, image_mask, text_mask)
        similarity.check_sizes(image_sets.shape[1], text_sets.shape[1])
        self.similarity = similarity
        self.sets = (image_sets.detach().contiguous(), text_sets.detach().contiguous())
        self.masks = (image_mask, text_mask)
        elements = _TILE.get(image_sets.device.type, _TILE["cuda"])
        self.sizes = tuple(
            _even(len(sets), block_size or max(1, most // sets.shape[1]))
            for sets, most in zip(self.sets, elements, strict=True)
        )
        self.norms = tuple(
            largest_norm(sets, mask, size) for sets, mask, size in zip(self.sets, self.masks, self.sizes, strict=True)
        )
        self.bound = math.prod(self.norms)

    @torch.no_grad()
    def scores(self, rows: slice, columns: slice) -> Tensor:
        """Returns the scores of these images with these texts, (rows, columns) float32, on the sets' device."""
        device = self.sets[0].device
        result = torch.empty(rows.stop - rows.start, columns.stop - columns.start, device=device)
        height, width = self.sizes
        with torch.autocast(device.type, enabled=False):
            for column in range(columns.start // width * width, columns.stop, width):
                texts, text_mask = self._part(1, column)
                text_planes = planes(self.similarity.text_elements(texts))
                for row in range(rows.start // height * height, rows.stop, height):
                    images, image_mask = self._part(0, row)
                    tile = score_tile(self.similarity, images, text_planes, width, self.bound, image_mask, text_mask)
                    top, bottom = max(row, rows.start), min(row + height, rows.stop)
                    left, right = max(column, columns.start), min(column + width, columns.stop)
                    result[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start] = tile[
                        top - row : bottom - row, left - column : right - column
                    ]
        return result

    def _part(self, side: int, start: int) -> tuple[Tensor, Tensor | None]:
        """Returns the sets of a tile, float32, and their mask; filled up with zeros."""
        sets, mask, size = self.sets[side], self.masks[side], self.sizes[side]
        part = sets[start : start + size]
        mask = None if mask is None else mask[start : start + size]
        missing = size - len(part)
        part = filled(part, mask, torch.float32)
        if missing:
            part = torch.cat((part, part.new_zeros(missing, *part.shape[1:])))
            mask = None if mask is None else torch.cat((mask, mask.new_ones(missing, mask.shape[1])))
        return part, mask


def score_tile(
    similarity: GridSimilarity,
    images: Tensor,
    text_planes: Tensor,
    num_texts: int,
    bound: float,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Tensor:
    """Returns the scores, (m, n) float32, of images (m, Ki, D) with n texts, in one product.

    `text_planes`: (D', Kt·n), `planes` of the text elements. `bound`: no inner product of an image's and a text's element
    is larger in size.
    """
    elements = similarity.image_elements(images)
    grid = scaled_product(elements.flatten(0, 1), text_planes, similarity.grid_scale)
    return similarity.reduce_in_place(grid.view(*elements.shape[:2], -1, num_texts), bound, image_mask, text_mask)


def scaled_product(rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Returns scale · (rows @ columns); the scale costs no pass of its own."""
    unread = rows.new_empty(()).expand(rows.shape[0], columns.shape[1])
    return torch.addmm(unread, rows, columns, beta=0, alpha=scale)


def largest_norm(sets: Tensor, mask: Tensor | None, size: int) -> float:
    """Returns the largest norm of an element, looking at `size` sets at a time; infinite if one is not finite."""
    largest = 0.0
    for start in range(0, len(sets), size):
        part = filled(sets[start : start + size], None if mask is None else mask[start : start + size], torch.float32)
        norm = float(torch.linalg.vector_norm(part, dim=-1).amax())
        largest = max(largest, norm if math.isfinite(norm) else math.inf)
    return largest


def _even(count: int, most: int) -> int:
    """Returns the size of equal parts of `count` things, at most `most` each, that leaves the last part nearly full."""
    return -(-count // max(1, -(-count // most))) or 1

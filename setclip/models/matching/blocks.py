"""Scores of many sets with many others by any similarity, in blocks. Used by pairs of heads, training and evaluation."""

import math

import torch
from torch import Tensor

from setclip.similarity import GridSimilarity, SetSimilarity, VectorSimilarity, similarity_matrix

_PAIRS = 2**24
"""Most pairs of elements in a block of fragment matching: 64 MB a tensor, of which a few exist at a time."""


def score_matrix(
    similarity: SetSimilarity,
    image_sets: Tensor,
    text_sets: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Returns what `similarity(image_sets, text_sets, image_mask, text_mask)` does, (Ni, Nt) float32, in blocks of
    `block_size` sets a side; None: as many as are fast.

    As `setclip.similarity.similarity_matrix`, of matching whose elements are all inputs as well. With gradient the backward
    pass makes each block again.
    """
    if isinstance(similarity, GridSimilarity | VectorSimilarity):
        return similarity_matrix(similarity, image_sets, text_sets, image_mask, text_mask, block_size)
    if block_size is None:
        block_size = max(1, math.isqrt(_PAIRS // max(1, image_sets.shape[1] * text_sets.shape[1])))
    tensors = (image_sets, text_sets, *similarity.parameters())
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return similarity_matrix(similarity, image_sets, text_sets, image_mask, text_mask, block_size)
    with torch.no_grad():
        rows = []
        for i in range(0, len(image_sets), block_size):
            images, images_mask = (_part(x, i, block_size) for x in (image_sets, image_mask))
            assert images is not None
            row = []
            for t in range(0, len(text_sets), block_size):
                texts, texts_mask = (_part(x, t, block_size) for x in (text_sets, text_mask))
                assert texts is not None
                row.append(similarity(images, texts, images_mask, texts_mask))
            rows.append(torch.cat(row, 1))
        return torch.cat(rows)


def _part(values: Tensor | None, start: int, size: int) -> Tensor | None:
    return None if values is None else values[start : start + size]

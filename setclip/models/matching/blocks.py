"""Scores of many sets with many others by any similarity, in blocks. Used by pairs of heads, training and evaluation."""

import math

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
    if block_size is None and not isinstance(similarity, GridSimilarity | VectorSimilarity):
        block_size = max(1, math.isqrt(_PAIRS // max(1, image_sets.shape[1] * text_sets.shape[1])))
    return similarity_matrix(similarity, image_sets, text_sets, image_mask, text_mask, block_size)

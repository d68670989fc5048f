"""Scores of many sets with many others by any similarity, in blocks. Used by pairs of heads, training and evaluation."""

import math

from torch import Tensor

from setclip.similarity import GridSimilarity, SetSimilarity, VectorSimilarity, similarity_matrix

_PAIRS = {"cpu": 2**18}
_PAIRS_ELSEWHERE = 2**24
"""Most pairs of elements in a block of fragment matching, of which a few tensors exist at a time: 1 MB each stays in a CPU's
cache (half the time of 64 MB), a GPU wants large ones."""


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
        pairs = _PAIRS.get(image_sets.device.type, _PAIRS_ELSEWHERE)
        block_size = max(1, math.isqrt(pairs // max(1, image_sets.shape[1] * text_sets.shape[1])))
    return similarity_matrix(similarity, image_sets, text_sets, image_mask, text_mask, block_size)

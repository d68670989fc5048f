"""Scores of many sets with many others by any similarity, in blocks. Used by pairs of heads, training and evaluation."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from setclip.similarity import GridSimilarity, SetSimilarity, VectorSimilarity, similarity_matrix
from setclip.similarity.base import check_sets

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
    pass makes each block again. Matching of fragments takes texts of about the same length together.
    """
    if block_size is not None or isinstance(similarity, GridSimilarity | VectorSimilarity):
        return similarity_matrix(similarity, image_sets, text_sets, image_mask, text_mask, block_size)
    of_word = similarity.elements_of_word
    if of_word is None or text_mask is None or not len(text_sets):
        size = _size(image_sets, text_sets.shape[1])
        return similarity_matrix(similarity, image_sets, text_sets, image_mask, text_mask, size)
    return _by_length(similarity, image_sets, text_sets, image_mask, text_mask, of_word)


def _size(image_sets: Tensor, num_text_elements: int) -> int:
    """Returns the sets a side of a block that are fast."""
    pairs = _PAIRS.get(image_sets.device.type, _PAIRS_ELSEWHERE)
    return max(1, math.isqrt(pairs // max(1, image_sets.shape[1] * num_text_elements)))


def _by_length(
    similarity: SetSimilarity,
    image_sets: Tensor,
    text_sets: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor,
    of_word: int,
) -> Tensor:
    """Returns the scores of texts of about the same length together, without the places that are masked in all of them.

    Captions are half as long as the longest on the average, and so is this as what pads them.
    """
    check_sets(image_sets, text_sets, image_mask, text_mask)
    similarity.check_sizes(image_sets.shape[1], text_sets.shape[1])
    places = torch.arange(1, text_mask.shape[1] + 1, device=text_mask.device)
    lengths = (text_mask * places).amax(1)  # up to the last that is there
    lengths = (lengths + of_word - 1) // of_word * of_word
    lengths, order = lengths.sort(descending=True, stable=True)
    longest: list[int] = []
    sizes: list[int] = []
    while (start := sum(sizes)) < len(order):
        longest.append(max(1, int(lengths[start])))
        sizes.append(min(_size(image_sets, longest[-1]), len(order) - start))
    scores = []
    parts = zip(text_sets[order].split(sizes), text_mask[order].split(sizes), longest, strict=True)
    for texts, mask, length in parts:
        size = _size(image_sets, length)
        given = (image_sets, texts[:, :length], image_mask, mask[:, :length])
        if torch.is_grad_enabled() and len(sizes) > 1 and len(image_sets) <= size:
            # a block each, which similarity_matrix would keep for the backward pass
            scores.append(checkpoint(similarity, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            scores.append(similarity_matrix(similarity, *given, size))
    return torch.cat(scores, 1)[:, order.argsort()]

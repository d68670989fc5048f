"""Stacked cross attention between all inputs of an image and all words (Lee et al. 2018, SCAN, arXiv 1803.08024).

With regions v_i, words e_j, s_ij = v_iᵀ e_j and s̄ their positive part, to unit length (over regions for i-t, words for t-i):

    i-t: a_i = Σ_j softmax_j(λ₁ s̄_ij) e_j,  R_i = cos(v_i, a_i)     t-i: a_j = Σ_i softmax_i(λ₁ s̄_ij) v_i,  R_j = cos(e_j, a_j)
    score = mean, sum or maximum of R, or ln(Σ exp(λ₂ R)) / λ₂

Stated by the paper and the authors' code, which leaves a tenth of negative s (LeakyReLU, the default; "relu" is the paper's).
LSE favours long captions, by up to ln(M)/λ₂: kept, for it is the source's. One difference: lengths are divided by where
they are above 1e-8, instead of 1e-8 being added.
"""

from typing import Literal

import torch
from torch import Tensor

from setclip.models.matching.fragments import (
    checked_range,
    grid_of,
    lengths_over_images,
    lengths_over_texts,
    mean_along,
    scaled_to_length,
)
from setclip.models.pieces import check_choice
from setclip.similarity import SetSimilarity

Direction = Literal["i2t", "t2i"]
SHARPNESS: dict[str, float] = {"i2t": 4.0, "t2i": 9.0}
"""λ₁ where none is given: the source's."""


class Scan(SetSimilarity):
    """`direction` "i2t" or "t2i"; `aggregation`; `sharpness` λ₁ (None: 4 for i2t, 9 for t2i); `steepness_of_lse` λ₂, for
    which the source has 6 for t2i, 5 (Flickr30K) or 20 (COCO) for i2t; `clip` "leaky_relu" or "relu".

    Takes sets of unit norm. Memory is that of a few tensors of (Ni, N, M, Nt).
    """

    elements_of_word = 1

    def __init__(
        self,
        direction: Direction = "i2t",
        aggregation: Literal["avg", "lse", "max", "sum"] = "avg",
        sharpness: float | None = None,
        steepness_of_lse: float = 6.0,
        clip: Literal["leaky_relu", "relu"] = "leaky_relu",
    ):
        super().__init__()
        check_choice("direction", direction, ("i2t", "t2i"))
        check_choice("aggregation", aggregation, ("avg", "lse", "max", "sum"))
        check_choice("clip", clip, ("leaky_relu", "relu"))
        self.direction, self.aggregation = direction, aggregation
        self.sharpness = checked_range("sharpness", SHARPNESS[direction] if sharpness is None else sharpness)
        self.steepness_of_lse = checked_range("steepness_of_lse", steepness_of_lse)
        self.slope = 0.1 if clip == "leaky_relu" else 0.0

    def extra_repr(self) -> str:
        return f"direction={self.direction}, aggregation={self.aggregation}, sharpness={self.sharpness:g}"

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        relevance, mask = self.relevance(images, texts, image_mask, text_mask)
        if self.aggregation == "avg":
            return mean_along(relevance, 1, mask)
        if self.aggregation == "sum":
            return (relevance if mask is None else relevance.masked_fill(~mask, 0.0)).sum(1)
        relevance = relevance if mask is None else relevance.masked_fill(~mask, -torch.inf)
        if self.aggregation == "max":
            return relevance.amax(1)
        return (self.steepness_of_lse * relevance).logsumexp(1) / self.steepness_of_lse

    def relevance(
        self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns R, (Ni, N, Nt) for i2t and (Ni, M, Nt) for t2i, and the mask that goes with it."""
        grid = grid_of(images, texts)
        clipped = torch.nn.functional.leaky_relu(grid, self.slope)
        of_images = None if image_mask is None else image_mask[:, :, None]  # (Ni, N, 1)
        of_texts = None if text_mask is None else text_mask.T[None]  # (1, M, Nt)
        if self.direction == "i2t":
            logits = scaled_to_length(clipped, self.sharpness, 1)
            if of_texts is not None:
                logits = logits.masked_fill(~of_texts[:, None], -torch.inf)
            attention = logits.softmax(2)
            return (attention * grid).sum(2) / lengths_over_texts(attention, texts), of_images
        logits = scaled_to_length(clipped, self.sharpness, 2)
        if of_images is not None:
            logits = logits.masked_fill(~of_images[..., None], -torch.inf)
        attention = logits.softmax(1)
        return (attention * grid).sum(1) / lengths_over_images(attention, images), of_texts

"""Diversity of sets as uniformity: elements of one set are to lie far apart (Kim et al. 2023, DivE).

    R = Σ over pairs j < k of a set's elements of exp(−t ‖e_j − e_k‖²)

Over the pairs and the batch the mean is taken, of residuals of unit norm, t = 2: the authors' code; their slides sum.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.models.pieces import check_choice, unit


@dataclass(frozen=True, kw_only=True)
class UniformityConfig:
    """The kernel and what is done with its values."""

    sharpness: float = 2.0
    """t, above 0."""
    reduction: Literal["mean", "sum"] = "mean"
    """mean: over pairs and samples. sum: over pairs, the mean over samples."""

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, ("mean", "sum"))
        if not 0 < self.sharpness < float("inf"):
            raise InputError(f"expected sharpness above 0 and finite, found {self.sharpness}; DivE has 2")


def uniformity_loss(elements: Tensor, config: UniformityConfig | None = None) -> Tensor:
    """Returns the loss of sets (B, K, D), a scalar, float32 at least: 1 (mean) where all elements of a set are one point,
    0 of sets of one element. Elements come to unit norm first.
    """
    config = config or UniformityConfig()
    num = elements.shape[1]
    if num == 1:
        return 0.0 * unit(elements).sum()
    with torch.autocast(elements.device.type, enabled=False):
        directions = unit(elements)
        first, second = torch.triu_indices(num, num, 1, device=elements.device)
        # from the difference, not from the cosine: elements may lie near each other
        squares = (directions[:, first] - directions[:, second]).square().sum(-1)
        values = (-config.sharpness * squares).exp()
        return values.mean() if config.reduction == "mean" else values.sum(1).mean()

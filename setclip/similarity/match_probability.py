"""Match probability: the mean over all pairs of elements of a logistic, whose slope a and shift b are learned.

`match_prob_cos` (also `match_prob`) is the cosine form that Kim et al. 2023 (DivE) ablate: logistic(a·cos + b).
`match_prob_l2` is that of Chun et al. 2021 (PCME): σ(−a·‖e − e'‖ + b) with σ(t) = eᵗ / (eᵗ + e⁻ᵗ), which is the logistic
of 2t, written so that it cannot overflow. In DivE's released code a and b are never trained; here they are.
Used through the dict of `setclip.similarity`.
"""

import torch
from torch import Tensor, nn

from setclip.similarity.base import UNIT_ROUNDOFF, GridSimilarity, across, sum_over

_INSIDE_ROOT = 1e-6
"""Added to squared distances, as PCME does: the gradient of a root at 0 is infinite."""


class _MatchProbability(GridSimilarity):
    def __init__(self, a: float, b: float):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(a)))
        self.b = nn.Parameter(torch.tensor(float(b)))


class CosineMatchProbability(_MatchProbability):
    """logistic(a·cos(e, e') + b); `a` and `b` are where training starts."""

    def __init__(self, a: float = 1.0, b: float = 0.0):
        super().__init__(a, b)

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        return _mean(torch.sigmoid(self.a * grid + self.b), image_mask, text_mask)

    def reduce_in_place(
        self, grid: Tensor, bound: float, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        return _mean(_logistic_in_place(grid.mul_(-self.a).sub_(self.b)), image_mask, text_mask)

    def steepness(self) -> float:
        return abs(self.a.item()) / 4

    def rounding(self, num_elements: int) -> float:
        slope_and_shift = abs(self.a.item()) + abs(self.b.item())
        return 2 * UNIT_ROUNDOFF * (num_elements**2 + 8 + slope_and_shift)


class EuclideanMatchProbability(_MatchProbability):
    """logistic(2·(−a·‖e − e'‖ + b)); `a` and `b` are where training starts, by default PCME's of COCO.

    Elements need no unit norm here: PCME's are samples around a unit mean.
    """

    def __init__(self, a: float = 15.0, b: float = 15.0):
        super().__init__(a, b)

    # ‖x − y‖² = ⟨(x, ‖x‖², 1), (−2y, 1, ‖y‖²)⟩
    def image_elements(self, sets: Tensor) -> Tensor:
        squares = sets.square().sum(-1, keepdim=True)
        return torch.cat((sets, squares, torch.ones_like(squares)), -1)

    def text_elements(self, sets: Tensor) -> Tensor:
        squares = sets.square().sum(-1, keepdim=True)
        return torch.cat((-2 * sets, torch.ones_like(squares), squares), -1)

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        distance = (grid.clamp_min(0.0) + _INSIDE_ROOT).sqrt()
        return _mean(torch.sigmoid(2 * (self.b - self.a * distance)), image_mask, text_mask)

    def reduce_in_place(
        self, grid: Tensor, bound: float, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        distance = grid.clamp_min_(0.0).add_(_INSIDE_ROOT).sqrt_()
        return _mean(_logistic_in_place(distance.mul_(2 * self.a).sub_(2 * self.b)), image_mask, text_mask)


def _logistic_in_place(values: Tensor) -> Tensor:
    """Returns the logistic of −values, which it overwrites; see `GridSimilarity.reduce_in_place` for why not `sigmoid`."""
    return values.exp_().add_(1.0).reciprocal_()  # e^x may be infinite, and its reciprocal is then 0, as it should be


def _mean(probabilities: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
    for mask in across(image_mask, text_mask):
        if mask is not None:
            probabilities = probabilities.masked_fill(~mask, 0.0)
    sizes_i = probabilities.shape[1] if image_mask is None else image_mask.sum(1)[:, None]
    sizes_t = probabilities.shape[2] if text_mask is None else text_mask.sum(1)
    return sum_over(sum_over(probabilities, 1), 1) / (sizes_i * sizes_t)

"""Similarities by maxima: the best pair of elements (MIL), and Chamfer, the mean of each element's best partner.

Used through the dict of `setclip.similarity`. Of equal maxima each gets its share of the gradient.
"""

import torch
from torch import Tensor

from setclip.similarity.base import UNIT_ROUNDOFF, GridSimilarity, across, mean_over


class MultipleInstance(GridSimilarity):
    """max over e, e' of cos(e, e'): Song and Soleymani 2019, PVSE."""

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        return _without(grid, image_mask, text_mask).amax((1, 2))

    def steepness(self) -> float:
        return 1.0

    def rounding(self, num_elements: int) -> float:
        return 0.0


class Chamfer(GridSimilarity):
    """½ (mean over e of max over e' of cos(e, e') + mean over e' of max over e): smooth-Chamfer's limit, as Kim et al.
    2023 (DivE) ablate.
    """

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        images, texts = across(image_mask, text_mask)
        best_text = _without(grid, None, text_mask).amax(2)  # (Ni, Ki, Nt)
        best_image = _without(grid, image_mask, None).amax(1)  # (Ni, Kt, Nt)
        over_images = mean_over(best_text, 1, None if images is None else images[..., 0])
        return (over_images + mean_over(best_image, 1, None if texts is None else texts[:, 0])) / 2

    def steepness(self) -> float:
        return 1.0

    def rounding(self, num_elements: int) -> float:
        return 2 * (num_elements + 4) * UNIT_ROUNDOFF


def _without(grid: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
    """Returns the grid with −∞ where an element is masked."""
    for mask in across(image_mask, text_mask):
        if mask is not None:
            grid = grid.masked_fill(~mask, -torch.inf)
    return grid

"""Max–mean matching: each element's best match, averaged over each side (Fu et al. 2024, LAPS, CVPR).

    score = mean over words of max over inputs of c + mean over inputs of max over words of c,  c = LeakyReLU₀.₁(uᵀ v)

Stated by the authors' code. It is Chamfer similarity, doubled, of cosines of which negative ones count a tenth.
"""

import torch
from torch import Tensor

from setclip.similarity.base import GridSimilarity, across, mean_over

_SLOPE = 0.1


class MaxMean(GridSimilarity):
    """Takes sets of unit norm; lies in [−0.2, 2]."""

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        grid = torch.nn.functional.leaky_relu(grid, _SLOPE)
        images, texts = across(image_mask, text_mask)
        over_texts = grid if texts is None else grid.masked_fill(~texts, -torch.inf)
        over_images = grid if images is None else grid.masked_fill(~images, -torch.inf)
        of_images = mean_over(over_texts.amax(2), 1, None if images is None else images[..., 0])
        return of_images + mean_over(over_images.amax(1), 1, None if texts is None else texts[:, 0])

"""MaxPair: the best one-to-one assignment of elements (MaxMatch, ACL 2025, arXiv 2506.21538), a reconstruction.

Of all ways to pair each element of the smaller set with an element of its own of the other, the one with the largest
Σ exp(scale · cos) over its pairs counts. The paper's text was not to be had; that pairs are assigned one to one and summed
after an exponential is known, the scale and the way back to cosines are ours.
Used through the dict of `setclip.similarity`.
"""

import math
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from setclip.errors import InputError
from setclip.similarity.base import UNIT_ROUNDOFF, GridSimilarity, across

_BY_SUBSETS = 6
"""Up to this size of the larger set all assignments are tried at once, on tensors: 2^K·K/2 additions. Above it scipy
solves each pair of sets for itself, on the CPU."""
_LARGEST_SCALE_OF_A_SUM = 80.0  # e^80 is a float32


class MaxPair(GridSimilarity):
    """`scale` > 0. `value`: "cosine" gives ln(mean of exp(scale·cos) over the pairs) / scale, which lies between the mean
    and the maximum of their cosines; "sum" the plain sum. They rank alike where all sets have one size.
    """

    def __init__(self, scale: float = 16.0, value: Literal["cosine", "sum"] = "cosine"):
        super().__init__()
        if not 0.0 < scale < math.inf:
            raise InputError(f"expected scale of maxpair above 0 and finite, found {scale}; the default is 16")
        if value not in ("cosine", "sum"):
            raise InputError(f"expected value of maxpair cosine or sum, found {value!r}; the default is cosine")
        if value == "sum" and scale > _LARGEST_SCALE_OF_A_SUM:
            raise InputError(
                f"expected scale up to {_LARGEST_SCALE_OF_A_SUM:g} for maxpair's plain sum, found {scale:g}, of which "
                "float32 cannot hold the exponential; take value cosine"
            )
        self.scale = float(scale)
        self.value = value

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, value={self.value}"

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        num_images, num_texts = grid.shape[1:3]
        for mask in across(image_mask, text_mask):
            if mask is not None:
                grid = grid.masked_fill(~mask, -torch.inf)
        # The largest cosine of each pair of sets is taken out, so nothing overflows; masked elements weigh nothing.
        largest = grid.detach().amax((1, 2))
        weights = (self.scale * (grid - largest[:, None, None])).exp()
        if num_images > num_texts:
            weights = weights.transpose(1, 2)
        total = _by_subsets(weights) if max(num_images, num_texts) <= _BY_SUBSETS else _by_scipy(weights)
        if self.value == "sum":
            return total * (self.scale * largest).exp()
        sizes_i = grid.new_full((1, 1), num_images) if image_mask is None else image_mask.sum(1)[:, None].to(grid)
        sizes_t = grid.new_full((1, 1), num_texts) if text_mask is None else text_mask.sum(1)[None].to(grid)
        return largest + (total / torch.minimum(sizes_i, sizes_t)).log() / self.scale

    def steepness(self) -> float | None:
        return 1.0 if self.value == "cosine" else None

    def rounding(self, num_elements: int) -> float:
        return 2 * UNIT_ROUNDOFF * ((num_elements + 8 + 4 * math.log(num_elements)) / self.scale + 12)


def _by_subsets(weights: Tensor) -> Tensor:
    """Returns the largest sums, (Ni, Nt), of weights (Ni, R, C, Nt), R ≤ C, all of them 0 or more.

    Row by row, the best sum for each set of columns that are taken; a bit of its number for each column.
    """
    num_columns = weights.shape[2]
    best: dict[int, Tensor] = {0: weights.new_zeros(())}
    for row in weights.unbind(1):
        of_column = row.unbind(1)
        longer: dict[int, Tensor] = {}
        for taken, total in best.items():
            for column in range(num_columns):
                if taken >> column & 1:
                    continue
                candidate, key = total + of_column[column], taken | 1 << column
                longer[key] = torch.maximum(longer[key], candidate) if key in longer else candidate
        best = longer
    result, *others = best.values()
    for other in others:
        result = torch.maximum(result, other)
    return result


def _by_scipy(weights: Tensor) -> Tensor:
    """Returns the same, by one assignment problem for each pair of sets."""
    weights = weights.permute(0, 3, 1, 2)  # (Ni, Nt, R, C)
    costs = weights.detach().double().cpu().numpy()
    chosen = np.empty(costs.shape[:3], dtype=np.int64)
    for place in np.ndindex(*costs.shape[:2]):
        chosen[place] = linear_sum_assignment(costs[place], maximize=True)[1]
    columns = torch.from_numpy(chosen).to(weights.device)
    return weights.gather(3, columns[..., None])[..., 0].sum(2)

"""Smooth-Chamfer similarity (Kim et al. 2023, DivE): Chamfer with a log-sum-exp in place of the maximum.

    s = 1/(2α|V|) Σ_{e∈V} ln Σ_{e'∈T} exp(α cos(e, e')) + 1/(2α|T|) Σ_{e'∈T} ln Σ_{e∈V} exp(α cos(e, e'))

It lies up to ln(|V||T|)/2α above Chamfer, so that it is no cosine: at most 1.087 for sets of four and α = 16.
Used through the dict of `setclip.similarity`.
"""

import math

import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.similarity.base import UNIT_ROUNDOFF, GridSimilarity, across, mean_over

_EXPONENTS = 87.0  # float32 holds e to the power of ±87 as a normal number


class SmoothChamfer(GridSimilarity):
    """`alpha` α, greater than 0: the larger, the nearer to Chamfer.

    `subtract_offset`: subtracts ln(|V||T|)/2α, without which larger sets score higher; of no effect on ranks where all
    sets of a side have one size.
    """

    def __init__(self, alpha: float = 16.0, subtract_offset: bool = False):
        super().__init__()
        if not 0.0 < alpha < math.inf:
            raise InputError(f"expected alpha of smooth_chamfer above 0 and finite, found {alpha}; DivE has 16")
        self.alpha = float(alpha)
        self.subtract_offset = subtract_offset
        self.grid_scale = self.alpha

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, subtract_offset={self.subtract_offset}"

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        images, texts = across(image_mask, text_mask)
        scaled = self.alpha * grid
        over_texts = scaled if texts is None else scaled.masked_fill(~texts, -torch.inf)
        over_images = scaled if images is None else scaled.masked_fill(~images, -torch.inf)
        of_images = mean_over(over_texts.logsumexp(2), 1, None if images is None else images[..., 0])
        of_texts = mean_over(over_images.logsumexp(1), 1, None if texts is None else texts[:, 0])
        return (of_images + of_texts) / (2 * self.alpha) - self._offset(grid, image_mask, text_mask)

    def reduce_in_place(
        self, grid: Tensor, bound: float, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        # A sum of exponentials lies within e^±exponents, so this many can be multiplied in float32: one exponential for
        # each inner product, two logarithms for each pair of sets.
        num_images, num_texts = grid.shape[1:3]
        exponents = self.alpha * max(bound, 1.0) + math.log(max(num_images, num_texts))
        at_once = int(_EXPONENTS / exponents)
        if at_once == 0:
            result, of_texts = _sums_of_stable_logs(grid, image_mask, text_mask)
        else:
            grid.exp_()
            for mask in across(image_mask, text_mask):
                if mask is not None:
                    grid *= mask
            over_texts, over_images = _sum_in_place(grid, 2), _sum_in_place(grid, 1)  # (Ni, Ki, Nt), (Ni, Kt, Nt)
            if image_mask is not None:
                over_texts.masked_fill_(~image_mask[:, :, None], 1.0)  # whose logarithm adds nothing
            if text_mask is not None:
                over_images.masked_fill_(~text_mask.T[None], 1.0)
            result, of_texts = _sum_of_logs(over_texts, at_once), _sum_of_logs(over_images, at_once)
        sizes_i = num_images if image_mask is None else image_mask.sum(1)[:, None]
        sizes_t = num_texts if text_mask is None else text_mask.sum(1)
        if sizes_i is num_images and sizes_t is num_texts and num_images == num_texts:
            result += of_texts
            result *= 1 / (2 * self.grid_scale * num_images)
        else:
            result /= sizes_i * (2 * self.grid_scale)
            result += of_texts.div_(sizes_t * (2 * self.grid_scale))
        if self.subtract_offset:
            result -= self._offset(grid, image_mask, text_mask)
        return result

    def _offset(self, grid: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor | float:
        """Returns ln(|V||T|)/2α, a number or (Ni, Nt); 0 if it is not wanted."""
        if not self.subtract_offset:
            return 0.0
        num_images, num_texts = grid.shape[1:3]
        of_images = math.log(num_images) if image_mask is None else image_mask.sum(1).to(grid.dtype).log()[:, None]
        of_texts = math.log(num_texts) if text_mask is None else text_mask.sum(1).to(grid.dtype).log()
        return (of_images + of_texts) / (2 * self.alpha)

    def steepness(self) -> float:
        return 1.0  # its derivatives by the cosines are positive and sum to 1

    def rounding(self, num_elements: int) -> float:
        # In units of 2^-24: a sum errs by K + 4 of its size (exponential 4), so the mean of logarithms by that over α;
        # a logarithm by 4 of its own size, at most 1 + ln(K)/α; the rest by 8. Twice that is taken.
        k = num_elements
        return 2 * UNIT_ROUNDOFF * ((k + 6 + 4 * math.log(k)) / self.alpha + 12)


def _sum_in_place(values: Tensor, dim: int) -> Tensor:
    """Returns `sum_over` in a new tensor, which is added to in place."""
    first, *rest = values.unbind(dim)
    if not rest:
        return first.clone()
    total = first + rest[0]
    for part in rest[1:]:
        total += part
    return total


def _sum_of_logs(sums: Tensor, at_once: int) -> Tensor:
    """Returns Σ ln of (Ni, K, Nt) along K, of products of `at_once` of them; overwrites them."""
    parts = sums.unbind(1)
    total: Tensor | None = None
    for start in range(0, len(parts), at_once):
        product = parts[start]
        for part in parts[start + 1 : start + at_once]:
            product *= part
        product.log_()
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _sums_of_stable_logs(grid: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns Σ over image elements of ln Σ exp over text elements, and the other way round, (Ni, Nt) each.

    With the largest exponent taken out, so for any α; by an exponential more for each inner product.
    """
    images, texts = across(image_mask, text_mask)
    results = []
    for dim, inner, outer in ((2, texts, images), (1, images, texts)):
        values = grid if inner is None else grid.masked_fill(~inner, -torch.inf)
        largest = values.amax(dim, keepdim=True)
        logs = _sum_in_place((values - largest).exp_(), dim).log_().add_(largest.squeeze(dim))
        if outer is not None:
            logs.masked_fill_(~outer.squeeze(dim), 0.0)
        results.append(_sum_in_place(logs, 1))
    return results[0], results[1]

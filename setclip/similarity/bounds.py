"""Cheap forms of elements with a proven bound on what they do to an inner product. Used by search in two stages.

`Rounded` holds elements in bf16, `Plain` as they are, in float32. For elements x, y of norm at most X, Y and their cheap
forms x', y', whose product p(x', y') is computed:

    |⟨x, y⟩ − p(x', y')| ≤ e_x·Y + X·e_y + s·X·Y + t·|p(x', y')|

with an error e of each set (of its worst element), and s and t that all have. Letters: N sets, K elements, D width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from setclip.similarity.base import UNIT_ROUNDOFF
from setclip.similarity.blocks import scaled_product


@dataclass(frozen=True)
class CheapSets:
    """Sets in a cheap form."""

    elements: Tensor
    """(N, K, D)."""
    error: Tensor
    """e of each set, (N,) float32."""


class CheapForm(Protocol):
    """Makes cheap forms and multiplies them."""

    slack: float
    """s, the rounding of sums included."""

    def of(self, sets: Tensor) -> CheapSets:
        """Returns the cheap form of sets, (N, K, D) float32."""

    relative: float
    """Share of its own size by which a product errs beside that: 2^-8 where it comes out in bf16, else 0."""

    def product(self, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
        """Returns scale · p(rows, columns), float32, of (n, D) and (D, m) cheap elements."""


class Rounded:
    """Elements in bf16, for processors with units for it; without them the same rounded elements in float32.

    With δ the rounding error of an element, ⟨x, y⟩ − ⟨x', y'⟩ = ⟨δx, y⟩ + ⟨x', δy⟩: each element's own error counts, less
    than half of the format's worst.
    """

    def __init__(self, width: int, has_units: bool, on_gpu: bool = False):
        self.has_units = has_units
        # Products of bf16 are exact in float32 and are added up in it. x' may be longer than x by one in 2^8; the bound's
        # norms are those of x.
        self._longer = 1 + 2.0**-6
        self.slack = accumulated(width) * self._longer
        # A CPU's product comes out in bf16. (The rounded value, not the true one, is what is known: a little more.)
        self.relative = 2.0**-8 * self._longer if has_units and not on_gpu else 0.0

    def of(self, sets: Tensor) -> CheapSets:
        rounded = sets.bfloat16()
        error = torch.linalg.vector_norm(sets - rounded.float(), dim=-1, dtype=torch.float64).amax(1) * self._longer
        return CheapSets(rounded if self.has_units else rounded.float(), upwards(error))

    def product(self, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
        if not self.has_units:
            return scaled_product(rows, columns, scale)
        if rows.is_cuda:  # without this argument a GPU may add up in bf16
            return torch.mm(rows, columns, out_dtype=torch.float32).mul_(scale)
        return (rows @ columns).float().mul_(scale)  # the scale after what is rounded to bf16


class Plain:
    """The elements themselves, in float32, which is cheap beside float64."""

    relative = 0.0

    def __init__(self, width: int):
        self.slack = accumulated(width)

    def of(self, sets: Tensor) -> CheapSets:
        return CheapSets(sets, torch.zeros(len(sets), device=sets.device))

    def product(self, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
        return scaled_product(rows, columns, scale)


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products are faster than float32 ones there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def accumulated(width: int) -> float:
    """Returns the most by which a float32 product of unit vectors errs, in any order (Higham 2002, section 3.1)."""
    # Some more than the width: the grid's scale rounds once more, and norms are not quite the bound's.
    number = (width + 8) * UNIT_ROUNDOFF
    return number / (1 - number)


def upwards(values: Tensor) -> Tensor:
    """Returns float64 values as float32 that are not smaller."""
    return (values * (1 + 2.0**-22)).float() + torch.finfo(torch.float32).tiny

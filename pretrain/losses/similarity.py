"""Similarities of two object sets that depend only on I = |A ∩ B| and n = |A| + |B|, in exact arithmetic.

Such a function f with f(0, n) = 0 is a sum over the shared subsets T: f(I, n) = Σ_t C(I, t) c_t(n), where by binomial
inversion c_t(n) = Σ_k (−1)^(t−k) C(t, k) f(k, n). For IoU, c_t(n) = 1 / C(n − 1, t) (docs/losses.md derives it). The
alternating sum loses all digits in floating point, so it is taken over fractions. Used by `targets` and `expansion`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from math import comb, exp

import torch
from torch import Tensor

ORDER = 3
"""Largest subsets that are enumerated. What pairs share beyond that is added pair by pair."""

WEIGHTED_SLACK = 1e-5
"""A weighted IoU that is this much (relative) below a threshold counts as above: it is no fraction of whole numbers."""

_DIGITS = Context(prec=50)


@dataclass(frozen=True)
class Iou:
    """|A ∩ B| / |A ∪ B|."""

    floor = 0.0
    """What a target of this similarity gives, in units of it, to pairs that share nothing"""

    def __call__(self, shared: int, sizes: int) -> Fraction:
        """Returns f(I, n); 0 where nothing is shared, empty sets included."""
        return Fraction(shared, sizes - shared) if shared else Fraction(0)

    def from_iou(self, iou: Tensor) -> Tensor:
        """Returns f of (weighted) IoUs, which it overwrites."""
        return iou


@dataclass(frozen=True)
class ExpIou:
    """(exp(IoU / τ) − 1) / exp(1 / τ): what softmax targets add to the constant exp(−1 / τ) of every pair."""

    temperature: float

    def __call__(self, shared: int, sizes: int) -> Fraction:
        """Returns f(I, n), to 50 digits."""
        inverse = 1 / Fraction(self.temperature)
        return _exp(Iou()(shared, sizes) * inverse - inverse) - _exp(-inverse) if shared else Fraction(0)

    @property
    def floor(self) -> float:
        """exp(−1 / τ)."""
        return exp(-1 / self.temperature)

    def from_iou(self, iou: Tensor) -> Tensor:
        """Returns f of (weighted) IoUs, which it overwrites; exactly 0 of 0."""
        if self.temperature > 1 / 80:
            return iou.div_(self.temperature).expm1_().mul_(self.floor)
        # exp(80) is near fp32's end; the floor, under 2e-35, is not worth taking off.
        shared = iou > 0
        return iou.sub_(1).div_(self.temperature).exp_().mul_(shared)


@dataclass(frozen=True)
class AtLeast:
    """1 where IoU ≥ threshold, else 0; decided on whole numbers."""

    threshold: float
    floor = 0.0

    def __call__(self, shared: int, sizes: int) -> Fraction:
        """Returns f(I, n). The threshold is the decimal that was written: 0.1 is 1/10."""
        return Fraction(shared > 0 and Iou()(shared, sizes) >= Fraction(str(self.threshold)))

    def from_iou(self, iou: Tensor) -> Tensor:
        """Returns f of weighted IoUs, which it overwrites. For lack of exact numbers, just below is above."""
        return torch.ge(iou, self.threshold * (1 - WEIGHTED_SLACK), out=iou)

    def from_counts(self, shared: Tensor, union: Tensor) -> Tensor:
        """Returns f of |A ∩ B|, which it overwrites, and |A ∪ B|: whole numbers, so decided exactly."""
        ratio = Fraction(str(self.threshold))
        is_above = shared.double() * ratio.denominator >= union.double() * ratio.numerator
        return shared.copy_(is_above.logical_and_(shared > 0))


Similarity = Iou | ExpIou | AtLeast


@lru_cache(maxsize=1 << 16)
def value(similarity: Similarity, shared: int, sizes: int) -> Fraction:
    """Returns f(I, n)."""
    return similarity(shared, sizes)


@lru_cache(maxsize=1 << 16)
def coefficient(similarity: Similarity, order: int, sizes: int) -> Fraction:
    """Returns c_t(n) for subsets of t = `order` objects and n = `sizes`."""
    terms = (comb(order, k) * value(similarity, k, sizes) * (-1) ** (order - k) for k in range(1, order + 1))
    return sum(terms, Fraction(0))


@lru_cache(maxsize=1 << 16)
def remainder(similarity: Similarity, shared: int, sizes: int) -> Fraction:
    """Returns f(I, n) − Σ_{t ≤ ORDER} C(I, t) c_t(n): what subsets of up to ORDER objects leave of a pair."""
    expanded = (comb(shared, t) * coefficient(similarity, t, sizes) for t in range(1, min(ORDER, shared) + 1))
    return value(similarity, shared, sizes) - sum(expanded, Fraction(0))


def evaluate(
    similarity: Similarity,
    first: Tensor,
    second: Tensor,
    function: Callable[[Similarity, int, int], Fraction] = value,
) -> Tensor:
    """Returns float64 `function` of the similarity and each pair of non-negative int64, called once a distinct pair."""
    if first.numel() == 0:
        return torch.empty(first.shape, dtype=torch.float64, device=first.device)
    base = second.max() + 1
    pairs, place = torch.unique(first * base + second, return_inverse=True)
    left, right = (pairs // base).tolist(), (pairs % base).tolist()
    values = [float(function(similarity, a, b)) for a, b in zip(left, right, strict=True)]
    return torch.tensor(values, dtype=torch.float64, device=first.device)[place]


def _exp(exponent: Fraction) -> Fraction:
    quotient = _DIGITS.divide(Decimal(exponent.numerator), Decimal(exponent.denominator))
    return Fraction(_DIGITS.exp(quotient))

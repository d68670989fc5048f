"""Pieces that heads and matching share: masked means and softmaxes in float32 at least, unit vectors, checks of options.

Letters: B samples, N inputs, D width.
"""

import torch
from torch import Tensor, nn

from setclip.errors import InputError


def projection(in_width: int, width: int) -> nn.Module:
    """Returns a linear layer from one width to another, or nothing where they are equal."""
    return nn.Identity() if in_width == width else nn.Linear(in_width, width)


def exact(values: Tensor) -> Tensor:
    """Returns values in float32, float64 ones as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns vectors, (…, D), of unit norm in float32 at least; zero where the mask (…) is False."""
    vectors = torch.nn.functional.normalize(exact(values), dim=-1)
    return vectors if mask is None else vectors.masked_fill(~mask[..., None], 0.0)


def softmax_over(values: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Returns the softmax along `dim`, in float32 at least, of what the mask, of a shape that goes with it, leaves."""
    values = exact(values)
    return (values if mask is None else values.masked_fill(~mask, -torch.inf)).softmax(dim)


def mean_of_inputs(values: Tensor, mask: Tensor | None) -> Tensor:
    """Returns (B, D), the mean of (B, N, D) over the inputs that there are, in float32 at least."""
    values = exact(values)
    if mask is None:
        return values.mean(1)
    return values.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)


def lengths_of(local: Tensor, mask: Tensor | None) -> Tensor:
    """Returns how many inputs each sample has, (B,) int64."""
    if mask is None:
        return torch.full((len(local),), local.shape[1], device=local.device)
    return mask.sum(1)


def first_places(lengths: Tensor, size: int) -> Tensor:
    """Returns (B, size) bool, True at the first `lengths`, (B,), places."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises InputError where an option is none of those allowed."""
    if value not in allowed:
        raise InputError(
            f"expected {name} to be one of {', '.join(allowed)}, found {value!r}; the first is the default"
        )

"""A step in micro-batches whose loss is that of the whole batch (GradCache: Gao et al. 2021, arXiv 2101.06983).

All micro-batches are encoded without gradient; the loss, taken once over all features, gives the gradient of each
feature; then each micro-batch is encoded again, with gradient, which goes on from there. So memory is that of a
micro-batch, and negatives and all gradients, the temperature's included, are those of the undivided step: for one more
forward pass. Used by the engine. Letters: B pairs on this rank, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What a model makes of B pairs, and the scalars that the loss takes."""

    images: Tensor
    """(B, D), unit norm"""
    texts: Tensor
    """(B, D), unit norm"""
    logit_scale: Tensor
    """[1], exponentiated and capped"""
    logit_bias: Tensor | None = None
    """[1]; None where the model has none"""


class FeatureCache:
    """A batch's features, made in micro-batches without gradient; `backward` takes their gradient to the model."""

    def __init__(
        self,
        encode: Callable[..., Features],
        model: torch.nn.Module,
        inputs: tuple[Tensor, ...],
        micro_batches: int,
    ):
        """`encode(*inputs)`: by `model`. `inputs`: images (B, 3, S, S), tokens (B, L), …; `micro_batches` divides B."""
        self._encode = encode
        self._parts = list(zip(*(value.chunk(micro_batches) for value in inputs), strict=True))
        self._random = []
        parts = []
        with torch.no_grad(), _statistics_unchanged(model):
            for part in self._parts:
                self._random.append(random_state(inputs[0].device))
                parts.append(encode(*part))
        bias = parts[0].logit_bias
        self.features = Features(
            torch.cat([part.images for part in parts]).requires_grad_(),
            torch.cat([part.texts for part in parts]).requires_grad_(),
            parts[0].logit_scale.detach().requires_grad_(),
            None if bias is None else bias.detach().requires_grad_(),
        )

    def backward(self, loss: Tensor, backward: Callable[[Tensor, bool], None]) -> None:
        """Calls `backward(part, is_last)` for each micro-batch; the parts' gradients add up to that of `loss`.

        `loss`: a scalar made of `features`. It need not be the sum of anything over micro-batches.
        """
        loss.backward()
        number, given = len(self._parts), self.features
        # The scalars' gradients are spread over all parts: at ZeRO 3 a parameter that takes no part in the first
        # backward pass of a step would add to the gradient of the step before.
        scalars = [value for value in (given.logit_scale, given.logit_bias) if value is not None]
        gradients = [_gradient(value) / number for value in scalars]
        of_images, of_texts = (_gradient(value).chunk(number) for value in (given.images, given.texts))
        for i, (part, state) in enumerate(zip(self._parts, self._random, strict=True)):
            set_random_state(state, part[0].device)
            again = self._encode(*part)
            pairs = [(again.images, of_images[i]), (again.texts, of_texts[i])]
            values = [value for value in (again.logit_scale, again.logit_bias) if value is not None]
            pairs += zip(values, gradients, strict=True)
            backward(sum((value * gradient).sum() for value, gradient in pairs), i == number - 1)  # type: ignore[arg-type]


def _gradient(value: Tensor) -> Tensor:
    """Returns a leaf's gradient; zeros where the loss does not depend on it."""
    return torch.zeros_like(value) if value.grad is None else value.grad


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Returns the state from which dropout on `device` draws (some modules draw on the CPU even then)."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Goes back to a state of `random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def _statistics_unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Batch norm goes on normalising by the batch, but leaves its running statistics: each micro-batch counts once."""
    tracking: list[Any] = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True

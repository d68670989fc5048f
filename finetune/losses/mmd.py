"""Maximum mean discrepancy between the elements of image sets and those of text sets: how differently they are spread.

    mean κ(X, X) − 2 mean κ(X, Y) + mean κ(Y, Y), over all pairs, those of an element with itself included

"laplace": κ = exp(−γ ‖x − y‖), as the code of PVSE and DivE has it (which calls it RBF); "gauss": exp(−γ ‖x − y‖²).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.models.pieces import check_choice, exact


@dataclass(frozen=True, kw_only=True)
class MmdConfig:
    """The kernel."""

    kernel: Literal["laplace", "gauss"] = "laplace"
    """laplace: of the distance. gauss: of its square."""
    gamma: float = 0.5
    """γ, above 0."""

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, ("laplace", "gauss"))
        if not 0 < self.gamma < float("inf"):
            raise InputError(f"expected gamma above 0 and finite, found {self.gamma}; PVSE and DivE have 0.5")


def mmd_loss(images: Tensor, texts: Tensor, config: MmdConfig | None = None) -> Tensor:
    """Returns the discrepancy of elements (P, D) and (Q, D), a scalar, 0 of equal sets, float32 at least.

    Coincident elements give no gradient to each other. Masked elements are to be left out.
    """
    config = config or MmdConfig()
    images, texts = exact(images), exact(texts)
    with torch.autocast(images.device.type, enabled=False):
        return (
            _mean_kernel(images, images, config)
            - 2 * _mean_kernel(images, texts, config)
            + _mean_kernel(texts, texts, config)
        )


def _mean_kernel(x: Tensor, y: Tensor, config: MmdConfig) -> Tensor:
    distances = torch.cdist(x, y)  # whose gradient at 0 is 0, unlike that of a root of a sum
    powers = distances if config.kernel == "laplace" else distances.square()
    return (-config.gamma * powers).exp().mean()

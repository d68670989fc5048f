"""Diversity of DH-Set's sub-spaces: their key dimensions are to differ. Our reconstruction of Zhang et al. 2025 (CVPR).

2 / (K (K − 1)) Σ over i < i' of cos(cⁱ, cⁱ') + η mean over the batch of [cos(cⁱ ⊙ u_i, cⁱ' ⊙ u_i')]₊
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.models.pieces import exact, unit


@dataclass(frozen=True, kw_only=True)
class DhSetDiversityConfig:
    """How much the elements count beside the profiles."""

    eta: float = 1.0
    """η, not negative."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta < float("inf"):
            raise InputError(f"expected eta of at least 0 and finite, found {self.eta}; the default is 1")


def dhset_diversity_loss(
    profiles: Tensor, elements: Tensor, mask: Tensor | None = None, config: DhSetDiversityConfig | None = None
) -> Tensor:
    """Returns the loss, a scalar, float32 at least; 0 of one sub-space.

    `profiles`: (K, D) c. `elements`: (B, K', D) of a text head, weighted by c; K' = K, or a multiple of it in the fragment
    form, K a word, where `mask`, (B, K') bool, tells which words there are.
    """
    config = config or DhSetDiversityConfig()
    num = len(profiles)
    if elements.shape[1] % num:
        raise InputError(
            f"expected a multiple of {num} elements, one for each profile, found {elements.shape[1]}; give the sets of the "
            "head that the profiles are of"
        )
    with torch.autocast(profiles.device.type, enabled=False):
        groups = exact(elements).unflatten(1, (-1, num))
        groups = groups.flatten(0, 1) if mask is None else groups[mask.unflatten(1, (-1, num))[..., 0]]
        if num == 1:
            return 0.0 * (profiles.sum() + groups.sum())
        first, second = torch.triu_indices(num, num, 1, device=profiles.device)
        of_profiles = _cosines(unit(profiles), first, second).mean()
        return of_profiles + config.eta * _cosines(unit(groups), first, second).relu().mean()


def _cosines(vectors: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns the cosines of pairs of unit vectors, (…, P), of (…, K, D)."""
    return (vectors @ vectors.transpose(-1, -2))[..., first, second]

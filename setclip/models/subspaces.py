"""DH-Set's sub-spaces: learned sparse matrices that say which dimensions of the embedding are key (Zhang et al. 2025).

    t_j = min(w_j) + (max(w_j) − min(w_j)) · sigmoid(α)    stated (CVPR 2025, supplement, Eq. 1); one α a sub-space
    m_j = tanh(exp(λ (w_j − t_j)))                         stated (Eq. 2); λ "a large constant"
    c = Σ_j m_j ⊙ w_j                                      the profile; our reconstruction, and so is all below

w are rows of sigmoid(W), each of unit norm after the mask. The main paper was not to be had; docs/heads.md lists what is
stated and what is ours. Letters: K sub-spaces, R rows of each, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.pieces import check_choice, exact

_FLAT = 4.0
"""From here (from 3, in fact) the mask is 1 and its slope 0 to float64's precision; exp overflows at 89 in float32, at 11
in float16, and the gradient is then 0 · ∞."""

COLLAPSED = 0.7
"""Mean cosine of profiles from which sub-spaces count as one: in a toy of ours those that learned at the common rate ended at
0.7 to 0.98, those at ten times that below 0.1. Random ones begin there too, at 0.94 with 16 rows, and have to come apart."""


def soft_mask(x: Tensor) -> Tensor:
    """Returns tanh(exp(x)) in float32 at least, with a finite gradient for every finite x; 0.76 at 0, 1 from 3 on."""
    with torch.autocast(x.device.type, enabled=False):
        return exact(x).clamp_max(_FLAT).exp().tanh()


def thresholds(rows: Tensor, alpha: Tensor) -> Tensor:
    """Returns t, (K, R, 1), of rows (K, R, D) and α (K,)."""
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    return low + (high - low) * alpha.sigmoid()[:, None, None]


class SubSpaces(nn.Module):
    """The matrices of `num` sub-spaces.

    `num_rows` R: with many, profiles become alike (the sum of many rows is near uniform). `sharpness` λ.
    `row_activation` of W. `unit_rows`: rows have unit norm after the mask. Stays in float32: in bf16 the mask's argument
    would move in steps of 0.2.
    """

    def __init__(
        self,
        num: int,
        width: int,
        num_rows: int = 16,
        sharpness: float = 50.0,
        row_activation: Literal["sigmoid", "identity", "softplus"] = "sigmoid",
        unit_rows: bool = True,
    ):
        super().__init__()
        check_choice("row_activation", row_activation, ("sigmoid", "identity", "softplus"))
        if num < 1 or num_rows < 1 or not sharpness > 0:
            raise InputError(
                f"expected at least one sub-space and row, and a sharpness above 0, found {num}, {num_rows} and "
                f"{sharpness}; the defaults are 4, 16 and 50"
            )
        self.sharpness, self.row_activation, self.unit_rows = sharpness, row_activation, unit_rows
        self.weight = nn.Parameter(torch.randn(num, num_rows, width))
        self.alpha = nn.Parameter(torch.zeros(num))

    def extra_repr(self) -> str:
        num, rows, width = self.weight.shape
        return f"num={num}, num_rows={rows}, width={width}, sharpness={self.sharpness:g}, {self.row_activation}"

    def importances(self) -> Tensor:
        """Returns the rows before the mask, (K, R, D)."""
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"expected sub-spaces in float32, found {self.weight.dtype}; train under autocast instead of converting "
                "the head"
            )
        if self.row_activation == "identity":
            return self.weight
        return self.weight.sigmoid() if self.row_activation == "sigmoid" else nn.functional.softplus(self.weight)

    def arguments(self, rows: Tensor) -> Tensor:
        """Returns λ (w − t), the mask's argument, (K, R, D), of rows before the mask."""
        return self.sharpness * (rows - thresholds(rows, self.alpha))

    def forward(self) -> Tensor:
        """Returns the sparse rows, (K, R, D) float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            rows = self.importances()
            sparse = soft_mask(self.arguments(rows)) * rows
            return nn.functional.normalize(sparse, dim=-1) if self.unit_rows else sparse

    def profiles(self) -> Tensor:
        """Returns c, (K, D): how much each sub-space makes of each dimension. Not negative, but of identity rows."""
        return self().sum(1)

    @torch.no_grad()
    def statistics(self, top: int = 100) -> dict[str, float]:
        """Returns what to log, since sub-spaces may collapse to one profile or stop learning where they cut:

        `kept`: share of entries with a mask above 1/2; `near_threshold`: share with |λ(w − t)| < 4, through which α learns;
        of pairs of sub-spaces, 0 of a single one: `profile_cosine`, the mean, and `top_overlap`, the mean share of the `top`
        largest dimensions (at most a tenth of D) that are the other's, too.
        """
        x = self.arguments(self.importances())
        profiles = self.profiles()
        num, width = profiles.shape
        top = max(1, min(top, width // 10))
        is_top = torch.zeros_like(profiles).scatter_(1, profiles.topk(top, 1).indices, 1.0)
        directions = nn.functional.normalize(profiles, dim=1)
        pairs = torch.ones(num, num, device=profiles.device).triu_(1).bool()
        cosines, overlaps = (directions @ directions.T)[pairs], (is_top @ is_top.T)[pairs] / top
        return {
            "kept": (soft_mask(x) > 0.5).double().mean().item(),
            "near_threshold": (x.abs() < 4).double().mean().item(),
            "profile_cosine": cosines.mean().item() if num > 1 else 0.0,
            "top_overlap": overlaps.mean().item() if num > 1 else 0.0,
        }

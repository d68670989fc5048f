"""What VSE∞ and DivE put between a detector's regions and the head: a linear layer with a residual MLP.

    vseinf: x ← FC(x) + MLP(x), MLP of E → D/2 → D, on the raw features      stated (Chen et al. 2021, code)
    dive:   z = FC(x), x ← z + MLP(z), MLP of D → D/2 → D, dropout           stated (Kim et al. 2023, code)

Batch norm and ReLU lie behind the MLP's first layer; statistics are of the inputs that are there. The global feature is the
maximum over the projected inputs (DivE's code). Any head of images may lie behind it. Letters: B samples, N inputs, E their
width, D width.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from setclip.models.heads.asa import RowNorm
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import check_choice, exact

Kind = Literal["vseinf", "dive"]
KINDS = ("vseinf", "dive")


class Projected(SetHead):
    """A head behind a projection to `width`; `make_head` builds it of that width. Its own options are none of these."""

    takes_global = True  # and has no use for it: what it gives the head is its own

    def __init__(self, in_width: int, width: int, kind: Kind, head: SetHead, dropout: float = 0.1):
        super().__init__(in_width, width, None)
        check_choice("projection", kind, KINDS)
        self.takes_global = False
        self.kind = kind
        self.layer = nn.Linear(in_width, width)
        self.into = nn.Linear(in_width if kind == "vseinf" else width, max(1, width // 2))
        self.norm, self.out = RowNorm(max(1, width // 2)), nn.Linear(max(1, width // 2), width)
        self.dropout = nn.Dropout(dropout if kind == "dive" else 0.0)
        self.head = head

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        projected = self.layer(local)
        hidden = self.norm(self.into(local if self.kind == "vseinf" else projected), mask).relu()
        values = self.dropout(projected + self.out(hidden.to(self.out.weight.dtype)))
        pooled = None
        if self.head.takes_global:
            there = exact(values) if mask is None else exact(values).masked_fill(~mask[..., None], -torch.inf)
            pooled = there.amax(1)
        return self.head(values, mask, pooled)

    def learning_rate_factors(self) -> dict[str, float]:
        return {f"head.{name}": factor for name, factor in self.head.learning_rate_factors().items()}

    def without_weight_decay(self) -> set[str]:
        return {f"head.{name}" for name in self.head.without_weight_decay()}


def projected(kind: Kind, in_width: int, width: int, cls: type[SetHead], options: dict[str, Any]) -> Projected:
    """Returns a head of a class behind the projection."""
    return Projected(in_width, width, kind, cls(width, width, width, **options))

"""PIE-Net: K attention maps over the inputs, each added to the global feature (Song and Soleymani 2019, PVSE).

    A = softmax over inputs of W₂ tanh(W₁ x),  r = sigmoid(FC(A x)),  S = LN(φ + r),  each element of unit norm

Stated by the authors' code: no biases in W₁ and W₂, Xavier weights, hidden width E/2, dropout after the sigmoid.
Letters: B samples, N inputs, E their width, K elements, D their width.
"""

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import exact, projection, softmax_over, unit


class Pie(SetHead):
    """Sets of `num_elements`. `residuals` are r."""

    takes_global = needs_global = True

    def __init__(
        self,
        in_width: int,
        width: int = 1024,
        global_width: int | None = None,
        num_elements: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__(in_width, width, global_width)
        if num_elements < 1:
            raise InputError(f"expected num_elements of at least 1, found {num_elements}; PVSE has 2")
        assert global_width is not None
        hidden = max(1, in_width // 2)
        self.to_hidden = nn.Linear(in_width, hidden, bias=False)
        self.to_maps = nn.Linear(hidden, num_elements, bias=False)
        self.to_residuals = nn.Linear(in_width, width)
        for layer in (self.to_hidden, self.to_maps, self.to_residuals):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.to_residuals.bias)
        self.dropout = nn.Dropout(dropout)
        self.global_projection, self.norm = projection(global_width, width), nn.LayerNorm(width)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        maps = self.to_maps(torch.tanh(self.to_hidden(local)))
        weights = softmax_over(maps, None if mask is None else mask[..., None], 1).transpose(1, 2)  # (B, K, N)
        taken = weights.to(local.dtype) @ local
        residuals = self.dropout(torch.sigmoid(self.to_residuals(taken)))
        together = self.norm(self.global_projection(global_features)[:, None] + residuals)
        return HeadOutput(unit(together), attention=weights.detach(), residuals=exact(residuals))

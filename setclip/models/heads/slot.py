"""Set prediction module of DivE: K slots compete for the inputs, block after block (Kim et al. 2023, arXiv 2211.08251).

    M = k qᵀ / √Dh,  A = softmax over slots,  Â = A / (Σ over inputs of A + 1e-7)
    Ē = concat over heads (Âᵀ v) W_o + E,  E ← MLP(LN(Ē)) + Ē,  T times with the same weights
    S = LN(E) + LN(φ),  each element of unit norm

Equations: the authors' slides; four heads of 512 with a competition each, LayerNorm before attention and MLP, the epsilon,
dropout and a position code on the keys of texts alone: their released code. The slots are learned and the same for all
samples; the code's variant that draws them from a Gaussian is left out, since sets would then differ from run to run.
Letters: B samples, N inputs, E their width, K slots, D their width, H heads, T blocks.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import check_choice, exact, lengths_of, projection, softmax_over, unit

_EPSILON = 1e-7  # below float16's smallest normal number: attention is computed in float32
_WAVELENGTH = 10_000.0


class Slot(SetHead):
    """Sets of `num_elements` slots. `auxiliary["competition"]`: (B, K, N) without gradient, the mean over heads of A in the
    last block; over slots it sums to 1.

    `blocks` T; `heads` of `head_width` each; `mlp_ratio`: the MLP's inner width over D. `position` "sine": a code of
    where an input stands is added to the keys (the code has it for texts); the fraction of the sample's own length is
    what it is made of. `compat`: as the released code, whose padding is not masked (each padded input gives 1/K of itself to
    each slot) and whose positions are fractions of the padded length, so that batch mates change a set.
    """

    takes_global = True
    competes_over: Literal["slots", "inputs"] = "slots"

    def __init__(
        self,
        in_width: int,
        width: int = 1024,
        global_width: int | None = None,
        num_elements: int = 4,
        blocks: int = 4,
        heads: int = 4,
        head_width: int = 512,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        position: Literal["none", "sine"] = "none",
        compat: bool = False,
    ):
        super().__init__(in_width, width, global_width)
        check_choice("position", position, ("none", "sine"))
        for name, value in (("num_elements", num_elements), ("blocks", blocks), ("heads", heads)):
            if value < 1:
                raise InputError(f"expected {name} of at least 1, found {value}; DivE has 4")
        if position == "sine" and in_width % 2:
            raise InputError(
                f"expected inputs of even width for position sine, found {in_width}; take position none or project them"
            )
        self.blocks, self.heads, self.position, self.compat = blocks, heads, position, compat
        self.reads_padding = compat
        inner = heads * head_width
        self.slots = nn.Parameter(torch.randn(num_elements, width))
        self.slot_norm, self.input_norm = nn.LayerNorm(width), nn.LayerNorm(in_width)
        self.to_queries = nn.Linear(width, inner, bias=False)
        self.to_keys = nn.Linear(in_width, inner, bias=False)
        self.to_values = nn.Linear(in_width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(dropout))
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.set_norm = nn.LayerNorm(width)
        if global_width is not None:
            self.global_projection, self.global_norm = projection(global_width, width), nn.LayerNorm(width)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        inputs = self.input_norm(local)
        keyed = inputs if self.position == "none" else inputs + self._code(local, mask).to(inputs.dtype)
        # the blocks share their weights, so keys and values are made once
        keys, values = self._by_head(self.to_keys(keyed)), self._by_head(self.to_values(inputs))
        slots = self.slots.expand(len(local), -1, -1)
        for _ in range(self.blocks):
            queries = self._by_head(self.to_queries(self.slot_norm(slots)))
            with torch.autocast(local.device.type, enabled=False):
                competition, weights = self._attend(exact(queries), exact(keys), mask)
                taken = (weights @ exact(values)).transpose(1, 2).flatten(2)  # (B, K, H·Dh)
            slots = slots + self.to_out(taken.to(values.dtype))
            slots = slots + self.mlp(slots)
        elements = exact(self.set_norm(slots))
        sets = elements
        if global_features is not None:
            sets = elements + exact(self.global_norm(self.global_projection(global_features)))[:, None]
        return HeadOutput(
            unit(sets),
            attention=weights.detach().mean(1),
            residuals=elements,
            auxiliary={"competition": competition.detach().mean(1)},
        )

    def _by_head(self, values: Tensor) -> Tensor:
        """Returns (B, H, …, Dh) of (B, …, H·Dh)."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the softmax, and the weights of the inputs, whose sum over them is 1; (B, H, K, N) each."""
        logits = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        valid = None if mask is None else mask[:, None, None]
        if self.competes_over == "inputs":
            weights = softmax_over(logits, valid, -1)
            return weights, weights
        if self.compat and valid is not None:
            # the released code fills the logits of padding with one number: equal for all slots, it drops out of the softmax
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
        competition = logits.softmax(-2)
        if valid is not None and not self.compat:
            competition = competition * valid
        return competition, competition / (competition.sum(-1, keepdim=True) + _EPSILON)

    def _code(self, local: Tensor, mask: Tensor | None) -> Tensor:
        """Returns sines and cosines of places 1 to n as fractions of n, (B, N, E), in float32 at least."""
        dtype = torch.promote_types(local.dtype, torch.float32)
        places = torch.arange(1, local.shape[1] + 1, device=local.device, dtype=dtype)[None]
        lengths = lengths_of(local, None if self.compat else mask)[:, None].to(dtype)
        angles = places / (lengths + 1e-6) * (2 * math.pi)
        pair = torch.arange(self.in_width // 2, device=local.device, dtype=dtype)
        angles = angles[..., None] / _WAVELENGTH ** (2 * pair / self.in_width)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)

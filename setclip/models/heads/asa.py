"""Adaptive self-attention over feature maps of several scales (ACML 2021, multi-scale visual semantics aggregation).

For each scale, X of n inputs:

    X ← ReLU(BN(W X)) where its width is not C,  A = softmax over inputs of θ(X) φ(X)ᵀ,  Z = X + γ BN(W_z A g(X))
    instances = W_o Z, of unit norm; finer grids are pooled to the coarsest, and all become elements of one set

Stated: C = 2,048 candidates' width, D = 1,024, weights as in Non-local networks, that BatchNorm is crucial, that finer
maps are pooled (max or average) after aggregation and concatenated. The source's main paper was not to be had: the formula
is that of Non-local networks (Wang et al. 2018, arXiv 1711.07971, embedded Gaussian), our reconstruction, and so are the
place of the normalisations and of the pooling, the gate γ and the smaller θ, φ, g of C/2.
Letters: B samples, n inputs of a scale (N of all), E widths, C candidates' width, D width.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import check_choice, exact, softmax_over, unit
from setclip.models.shared_norm import SharedBatchNorm1d

Scale = tuple[int, int]
"""Rows and columns of a feature map."""


class RowNorm(nn.Module):
    """BatchNorm of inputs (B, N, C), over those of all ranks that the mask, (B, N), leaves, in float32 at least; zero
    elsewhere.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = SharedBatchNorm1d(width)

    def forward(self, values: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            values = values.to(torch.promote_types(values.dtype, self.norm.weight.dtype))
            if mask is None:
                return self.norm(values.flatten(0, 1)).view_as(values)
            rows = self.norm(values[mask])
            return torch.zeros_like(values).masked_scatter(mask[..., None], rows)


class SelfAttention(nn.Module):
    """One scale: (B, n, E) and its mask → instances (B, n, D) of any norm, in float32 at least."""

    def __init__(self, in_width: int, candidate_width: int, width: int, gate: bool, scaled: bool, subsample: bool):
        super().__init__()
        inner = max(1, candidate_width // 2)
        self.scaled, self.subsample = scaled, subsample
        self.expand = None if in_width == candidate_width else nn.Linear(in_width, candidate_width, bias=False)
        self.expand_norm = None if in_width == candidate_width else RowNorm(candidate_width)
        self.theta, self.phi = nn.Linear(candidate_width, inner), nn.Linear(candidate_width, inner)
        self.g, self.back = nn.Linear(candidate_width, inner), nn.Linear(inner, candidate_width)
        for layer in (self.theta, self.phi, self.g, self.back):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.back_norm = RowNorm(candidate_width)
        if gate:
            self.gate: Tensor | float = nn.Parameter(torch.zeros(1))
        else:
            self.gate = 1.0
            nn.init.zeros_(self.back_norm.norm.weight)  # the block begins as identity
        self.out = nn.Linear(candidate_width, width)

    def forward(self, values: Tensor, mask: Tensor | None, scale: Scale | None) -> Tensor:
        if self.expand is not None and self.expand_norm is not None:
            values = self.expand_norm(self.expand(values), mask).relu()
        queries, keys, content, key_mask = self.theta(values), self.phi(values), self.g(values), mask
        if self.subsample and scale is not None:
            keys, content = (
                pool_grid(x, scale, (-(-scale[0] // 2), -(-scale[1] // 2)), "max") for x in (keys, content)
            )
        with torch.autocast(values.device.type, enabled=False):
            logits = exact(queries) @ exact(keys).transpose(1, 2)
            if self.scaled:
                logits = logits / math.sqrt(queries.shape[-1])
            attention = softmax_over(logits, None if key_mask is None else key_mask[:, None], -1)
            taken = attention @ exact(content)
        values = exact(values) + self.gate * self.back_norm(self.back(taken.to(content.dtype)), mask)
        return exact(self.out(values.to(self.out.weight.dtype)))


class Asa(SetHead):
    """Sets of instances. Inputs of one scale are (B, N, E), of several the maps side by side, (B, n₁ + n₂ + …, E) with E the
    largest of their widths, as `side_by_side` makes them.

    `scales`: rows and columns of each map, finest first; None: inputs without a grid (words, regions; a mask may tell how
    many there are). `widths`: of each map; None: E of all. `candidate_width` C; None: E. `pool`: of finer maps; `fusion`
    "instances" gives Σ of the coarsest grid's places for each scale, "channels" one element a place, of all scales'
    instances through one more layer. `only`: of several maps one
    alone, by its number. `gate`: a learned factor that begins at 0, in place of a BatchNorm that does.
    `scaled`: logits are divided by √(C/2). `subsample`: keys and values of maps above 14 × 14 are pooled by 2 × 2.
    """

    def __init__(
        self,
        in_width: int,
        width: int = 1024,
        global_width: int | None = None,
        scales: Sequence[Scale] | None = None,
        widths: Sequence[int] | None = None,
        candidate_width: int | None = None,
        pool: Literal["max", "avg"] = "max",
        fusion: Literal["instances", "channels"] = "instances",
        gate: bool = False,
        scaled: bool = False,
        subsample: bool = True,
        only: int | None = None,
    ):
        super().__init__(in_width, width, global_width)
        check_choice("pool", pool, ("max", "avg"))
        check_choice("fusion", fusion, ("instances", "channels"))
        self.scales = None if scales is None else [(int(rows), int(columns)) for rows, columns in scales]
        self.widths = list(widths) if widths is not None else [in_width] * len(self.scales or [(1, 1)])
        if len(self.widths) != len(self.scales or [(1, 1)]) or max(self.widths) != in_width:
            raise InputError(
                f"expected widths of {len(self.scales or [(1, 1)])} scales, the largest {in_width}, found {self.widths}; "
                "give the channels of each map, and the largest as in_width"
            )
        self.pool, self.fusion, self.only = pool, fusion, only
        if only is not None and not (self.scales is not None and 0 <= only < len(self.scales)):
            raise InputError(
                f"expected only to be the number of a map, from 0 to {len(self.scales or ()) - 1}, found {only}; leave it out, "
                "or take more maps (--backbone.maps)"
            )
        candidates = candidate_width or in_width
        self.attention = nn.ModuleList(
            SelfAttention(
                own_width,
                candidates,
                width,
                gate,
                scaled,
                subsample and scale is not None and scale[0] * scale[1] > 14 * 14,
            )
            for own_width, scale in self._taken()
        )
        self.fuse = nn.Linear(len(self.attention) * width, width) if fusion == "channels" else None

    def _taken(self) -> list[tuple[int, Scale | None]]:
        """Returns width and scale of each map that is taken."""
        maps: list[tuple[int, Scale | None]] = list(zip(self.widths, self.scales or (None,), strict=True))
        return maps if self.only is None else [maps[self.only]]

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        if self.scales is None:
            return HeadOutput(unit(self.attention[0](local, mask, None), mask), mask)
        sizes = [rows * columns for rows, columns in self.scales]
        if local.shape[1] != sum(sizes) or mask is not None:
            raise InputError(
                f"expected {sum(sizes)} inputs of maps {self.scales}, without a mask, found {local.shape[1]} inputs and "
                f"{'no' if mask is None else 'a'} mask; give the scales of the backbone's maps, or none"
            )
        parts = local.split(sizes, 1) if self.only is None else local.split(sizes, 1)[self.only : self.only + 1]
        coarsest, maps = self.scales[-1] if self.only is None else self.scales[self.only], []
        for part, (own_width, scale), attention in zip(parts, self._taken(), self.attention, strict=True):
            assert scale is not None
            instances = unit(attention(part[..., :own_width], None, scale))
            maps.append(pool_grid(instances, scale, coarsest, self.pool))
        if self.fuse is not None:
            together = torch.cat(maps, -1)
            return HeadOutput(unit(self.fuse(together.to(self.fuse.weight.dtype))))
        return HeadOutput(unit(torch.cat(maps, 1)))


def side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """Returns maps (B, C_s, rows, columns) of several scales as one input of `Asa`, (B, Σ rows · columns, largest C_s);
    narrower ones are filled up with zeros, which are not read.
    """
    width = max(m.shape[1] for m in maps)
    parts = [m.flatten(2).transpose(1, 2) for m in maps]
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in parts], 1)


def pool_grid(values: Tensor, scale: Scale, target: Scale, pool: str) -> Tensor:
    """Returns (B, n, D) of a grid, row by row, pooled to another grid; nothing changes where they are equal."""
    if scale == target:
        return values
    function = nn.functional.adaptive_max_pool2d if pool == "max" else nn.functional.adaptive_avg_pool2d
    return function(values.transpose(1, 2).unflatten(2, scale), target).flatten(2).transpose(1, 2)

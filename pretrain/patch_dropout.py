"""Patch dropout whose draws belong to samples, not to ranks (FLIP: Li et al. 2023, arXiv 2212.00794). Used by the engine.

open_clip and timm draw the patches that stay from torch's generator, so that they depend on how a batch is spread over ranks and
micro-batches. Here they depend on a number that each sample carries, and a step is the same however it is cut up. Letters: B
pairs, N patches, K of them that stay, L tokens (N and those before them, as the class token).
"""

from typing import Any

import torch
from torch import Tensor, nn

_MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685))  # SplitMix64's, as int64
_LAST_SHIFT = 31


class PatchDropout(nn.Module):
    """Takes the place of a tower's own; `draw` says which patches stay in the next forward pass. Evaluation keeps all."""

    def __init__(self, share: float, prefix: int, returns_indices: bool = False):
        """`share` of the patches is dropped, but never all; the first `prefix` tokens are none."""
        super().__init__()
        self.share, self.prefix, self.returns_indices = share, prefix, returns_indices
        self.patches: int | None = None
        self.kept: Tensor | None = None

    def draw(self, numbers: Tensor) -> None:
        """Draws for B samples by their `numbers`, (B,) int64, for the passes until the next draw."""
        assert self.patches is not None, "the number of patches is set when the tower is prepared"
        self.kept = kept_patches(numbers, self.patches, self.share)

    def forward(self, tokens: Tensor) -> Any:
        """(B, L, C) → (B, prefix + K, C), and (B, K) indices of patches where the tower wants them."""
        if not self.training:
            return (tokens, None) if self.returns_indices else tokens
        kept = self.kept
        if kept is None:  # memory and FLOPs are counted without a batch
            numbers = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
            kept = kept_patches(numbers, tokens.shape[1] - self.prefix, self.share)
        patches = tokens[:, self.prefix :].gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        result = torch.cat((tokens[:, : self.prefix], patches), dim=1)
        return (result, kept) if self.returns_indices else result


def kept_patches(numbers: Tensor, patches: int, share: float) -> Tensor:
    """Returns (B, K) int64, ascending: K = N·(1 − share), at least 1, of `patches` for each of (B,) int64 `numbers`.

    The same on every device: whole numbers only.
    """
    count = max(1, int(patches * (1 - share)))
    scores = _mix(numbers[:, None] ^ _mix(torch.arange(1, patches + 1, device=numbers.device)[None]))
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def _mix(z: Tensor) -> Tensor:
    """Returns SplitMix64's finaliser of int64 (Steele et al. 2014); products wrap round."""
    for shift, factor in _MIXERS:
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, _LAST_SHIFT)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Returns z >> by with zeros from the left, which torch's shift of signed numbers has not."""
    return (z >> by) & ((1 << (64 - by)) - 1)

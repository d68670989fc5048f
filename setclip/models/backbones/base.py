"""What all backbones share: features of one side, and the interface.

Letters: B samples, N local features of one sample (padded), E their width, F width of the global feature, L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from setclip.models.heads import SideWidths


@dataclass(frozen=True)
class Features:
    """What a backbone gives of B samples of one side."""

    local: Tensor
    """(B, N, E): patches, places of a map, or words"""
    mask: Tensor | None
    """(B, N) bool, True where there is one; None: everywhere"""
    pooled: Tensor | None
    """(B, F), the global feature; None: there is none"""


class Backbone(nn.Module):
    """Towers of both sides. Features come as the towers have them: of any norm, in the dtype in which they compute."""

    image_widths: SideWidths
    text_widths: SideWidths
    image_size: int
    """Side of the square pictures that `image` takes, in pixels"""
    tokenizer: Callable[[list[str]], Tensor]
    """B texts to (B, L) int64, as `text` takes them"""
    scales: list[tuple[int, int]] | None = None
    """Rows and columns of each map, finest first, where local features of several maps lie side by side (head asa)"""
    scale_widths: list[int] | None = None
    """Channels of each of these maps"""

    @property
    def description(self) -> dict[str, Any]:
        """What builds the same backbone anew, weights aside: JSON for `make_backbone`."""
        raise NotImplementedError

    def image(self, pixels: Tensor) -> Features:
        """Returns the features of pictures, (B, 3, S, S) float, normalised as the towers want it."""
        raise NotImplementedError

    def text(self, tokens: Tensor) -> Features:
        """Returns the features of texts, (B, L) int64. Words are cut behind the longest text of the batch."""
        raise NotImplementedError

    def side_of(self, name: str) -> str:
        """Returns "image" or "text": whose tower a parameter of that name is."""
        raise NotImplementedError


def cut(features: Features) -> Features:
    """Returns features without the places at the end that no sample of the batch has."""
    if features.mask is None:
        return features
    there = features.mask.any(0).nonzero()
    length = int(there.max()) + 1 if len(there) else 1
    return Features(features.local[:, :length], features.mask[:, :length].contiguous(), features.pooled)


def first(lengths: Tensor, size: int) -> Tensor:
    """Returns (B, size) bool, True at the first `lengths` places."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]

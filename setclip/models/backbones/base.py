"""What all backbones share: features of one side, and the interface.

Letters: B samples, N local features of one sample (padded), E their width, F width of the global feature, L text tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.heads import SideWidths
from setclip.word_noise import Draw


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
    """Side of the square pictures that `image` takes, in pixels; 0 where it takes regions"""
    takes_regions = False
    """Whether `image` takes features of regions, (B, N, E) float, in place of pictures"""
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

    def regions(self, values: Tensor, mask: Tensor) -> Features:
        """Returns the features of regions of which some are left out; `mask` (B, N) bool. Where `takes_regions`."""
        raise NotImplementedError

    def text(self, tokens: Tensor) -> Features:
        """Returns the features of texts, (B, L) int64. Words are cut behind the longest text of the batch."""
        raise NotImplementedError

    def words_of(self, texts: Sequence[str]) -> list[list[str]] | None:
        """Returns the words, or pieces of words, that `text` gives local features of, by text; None: it does not tell."""
        return None

    def noisy_tokens(self, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
        """Returns what the tokenizer gives of texts with words changed in training (`setclip.word_noise`), each by its own draw.

        Raises InputError where the tokenizer has no token for a masked word.
        """
        raise _without_mask()

    def side_of(self, name: str) -> str:
        """Returns "image" or "text": whose tower a parameter of that name is."""
        raise NotImplementedError


class ImageTower(nn.Module):
    """One side of `Towers`: pictures, or regions, to features, by `forward`."""

    widths: SideWidths
    image_size: int
    """As of Backbone"""
    scales: list[tuple[int, int]] | None = None
    scale_widths: list[int] | None = None

    @property
    def description(self) -> dict[str, Any]:
        """Its kind, and the arguments that build it anew, weights aside: JSON."""
        raise NotImplementedError


class TextTower(nn.Module):
    """The other side: tokens to features."""

    widths: SideWidths
    tokenizer: Callable[[list[str]], Tensor]

    @property
    def description(self) -> dict[str, Any]:
        """Its kind, and the arguments that build it anew, weights aside: JSON."""
        raise NotImplementedError

    def words_of(self, texts: Sequence[str]) -> list[list[str]] | None:
        """As of Backbone."""
        return None

    def noisy_tokens(self, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
        """As of Backbone."""
        raise _without_mask()


def _without_mask() -> InputError:
    return InputError(
        "expected a text tower with a token for masked words for --noise.words, found open_clip's, which has none; take "
        "--backbone.text bigru or bert, or leave the noise out"
    )


def cut(features: Features) -> Features:
    """Returns features without the places at the end that no sample of the batch has."""
    if features.mask is None:
        return features
    there = features.mask.any(0).nonzero()
    length = int(there.max()) + 1 if len(there) else 1
    return Features(features.local[:, :length], features.mask[:, :length].contiguous(), features.pooled)


def places_of(trunk: nn.Module, found: Tensor) -> Tensor:
    """Returns (B, N, E) of what a trunk of timm gives: tokens without those in front, or a map with channels first or last."""
    if found.ndim == 3:
        return found[:, getattr(trunk, "num_prefix_tokens", 0) :]
    is_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    return found.flatten(1, 2) if is_last else found.flatten(2).transpose(1, 2)

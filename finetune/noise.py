"""What is taken out of inputs in training: words, regions, places of a map. Drawn from (seed, epoch, key) alone.

Regions: each stays with 1 − rate. Places of a map and patches: of each picture r is drawn from 0 to 1, and where r > rate, each
place goes with rate · r. Words: `setclip.word_noise`. All stated by VSE∞'s code (rates 0.2), but for patches, which are ours: it
has maps alone. At least one region or place stays. Letters: b pictures, N regions or places of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from setclip.hashing import hash_u64
from setclip.models.backbones import Backbone, Features
from setclip.word_noise import Draw

_WORDS, _PLACES = 27, 28  # keep the draws apart from those of the data and of a step


@dataclass(frozen=True)
class Dropping:
    """How places of b pictures go."""

    rate: float
    seed: int
    epoch: int
    keys: Tensor
    """(b,) int64, hashes of the pictures' keys"""


@dataclass(frozen=True)
class DroppedPixels:
    """Pictures (b, 3, S, S) whose places go once the tower has made features of them, or regions (b, N, E) that go before."""

    pixels: Tensor
    dropping: Dropping


def word_draws(seed: int, epoch: int, keys: Tensor, captions: np.ndarray) -> list[Draw]:
    """Returns a draw of each caption of pictures; `keys` (b,) int64, `captions` (b, n) their numbers."""
    return [
        (_WORDS, seed, epoch, key, int(number))
        for key, own in zip(keys.tolist(), captions, strict=True)
        for number in own
    ]


def kept_places(dropping: Dropping, number: int, are_regions: bool) -> Tensor:
    """Returns (b, N) bool, True where a region or place stays."""
    keys = dropping.keys.numpy().astype(np.int64).view(np.uint64)[:, None]
    drawn = hash_u64(_PLACES, dropping.seed, dropping.epoch, keys, np.arange(number + 1)[None]) / 2.0**64
    share, each = drawn[:, :1], drawn[:, 1:]
    limit = dropping.rate if are_regions else np.where(share > dropping.rate, dropping.rate * share, 0.0)
    kept = each >= limit
    kept[np.arange(len(kept)), each.argmax(1)] = True
    return torch.from_numpy(kept)


def without_some(features: Features, dropping: Dropping) -> Features:
    """Returns features whose mask leaves some places out; the global feature stays that of all."""
    kept = kept_places(dropping, features.local.shape[1], are_regions=False).to(features.local.device)
    return replace(features, mask=kept if features.mask is None else kept & features.mask)


def features_of_pictures(backbone: Backbone, images: Features | Tensor | DroppedPixels) -> Features:
    """Returns the features of a step's pictures."""
    if isinstance(images, Features):
        return images
    if isinstance(images, Tensor):
        return backbone.image(images)
    if backbone.takes_regions:
        kept = kept_places(images.dropping, images.pixels.shape[1], are_regions=True)
        return backbone.regions(images.pixels, kept.to(images.pixels.device))
    return without_some(backbone.image(images.pixels), images.dropping)


def noisy_tokens(backbone: Backbone, texts: Sequence[str], rate: float, draws: Sequence[Draw]) -> Tensor:
    """Returns the tokens of texts, words changed where there is a rate."""
    return backbone.noisy_tokens(texts, rate, draws) if rate else backbone.tokenizer(list(texts))

"""PCME's soft contrastive loss between samples of two embeddings (Chun et al. 2021, arXiv 2101.05068, Eq. 3 and 4).

    p = mean over pairs of samples of σ(−a ‖z − z'‖ + b),  σ(t) = eᵗ / (eᵗ + e⁻ᵗ) (stated by the authors' code)
    loss = −Σ over matched pairs of ln p − Σ over others of ln(1 − p), over both directions

Written with nested log-sum-exps, so that no probability is made that rounds to 0 or 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.losses.pairs import Pairs
from setclip.models.pieces import check_choice, exact

_INSIDE_ROOT = 1e-6  # as PCME's, and as `match_prob_l2` has it


@dataclass(frozen=True, kw_only=True)
class PcmeConfig:
    """How pairs are summed."""

    reduction: Literal["sum", "mean"] = "sum"
    """sum: over all pairs and both directions, which are equal here. mean: that divided by the number of pairs."""
    same_image_negatives: bool = False
    """Historic: texts of the same image in another row are mismatches. Else they, and excluded pairs, count as neither."""

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, ("sum", "mean"))


def pcme_loss(
    images: Tensor, texts: Tensor, a: Tensor, b: Tensor, pairs: Pairs, config: PcmeConfig | None = None
) -> Tensor:
    """Returns the loss, a scalar, float32 at least.

    `images`: (B, J, D) and `texts`: (T, J', D) samples of any norm; `a`, `b`: one number each, those of `match_prob_l2`.
    Makes (B, J, T, J').
    """
    config = config or PcmeConfig()
    images, texts = exact(images), exact(texts)
    with torch.autocast(images.device.type, enabled=False):
        x, y = images.flatten(0, 1), texts.flatten(0, 1)
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        distances = (squares.clamp_min(0.0) + _INSIDE_ROOT).sqrt()
        logits = 2 * (b - a * distances).view(len(images), images.shape[1], len(texts), texts.shape[1])
        constant = math.log(images.shape[1] * texts.shape[1])
        log_p = torch.nn.functional.logsigmoid(logits).logsumexp((1, 3)) - constant
        log_not_p = torch.nn.functional.logsigmoid(-logits).logsumexp((1, 3)) - constant
        pairs.check(log_p)
        matched = pairs.matches(len(images))
        negatives = pairs.negatives(len(images), config.same_image_negatives)
        total = -2 * (log_p[matched].sum() + log_not_p[negatives].sum())
        return total / (matched.sum() + negatives.sum()) if config.reduction == "mean" else total


def gaussian_kl(mean: Tensor, log_sigma: Tensor) -> Tensor:
    """Returns KL(N(μ, σ²) ‖ N(0, 1)), summed over dimensions and averaged over the batch, of μ and ln σ, (B, D) each."""
    mean, log_sigma = exact(mean), exact(log_sigma)
    return ((mean.square() + (2 * log_sigma).exp() - 1) / 2 - log_sigma).sum(-1).mean()

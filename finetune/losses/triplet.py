"""Triplet ranking loss over a matrix of scores, with all options that the systems of the literature use.

    Σ over matched pairs (i, t) of [δ + s(i, t') − s(i, t)]₊ + [δ + s(i', t) − s(i, t)]₊

t' is a text that is no match of image i, i' an image that is no match of text t: the hardest (Faghri et al. 2018, VSE++,
Eq. 6), or each of them in turn. Letters: B images, T texts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.losses.pairs import Pairs
from setclip.errors import InputError
from setclip.models.pieces import check_choice

Mining = Literal["hardest", "all", "semi_hard"]


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    """How triplets are chosen and summed."""

    margin: float = 0.2
    """δ, in units of the scores."""
    mining: Mining = "hardest"
    """hardest: each match against its hardest negative. all: against every negative. semi_hard: against every negative that
    scores below the match (DivE's code: the loss is cut at the margin), averaged over the triplets that violate it."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the triplets of a direction; the two directions are added. VSE++, SCAN and VSE∞ sum, PVSE and DivE average."""
    all_epochs: float = 0.0
    """Epochs from the start in which all negatives count, whatever `mining` says; VSE∞, X-Dim and LAPS: 1."""
    mix_epochs: float = 0.0
    """Epochs after those in which the share of `mining` grows from 0 to 1, the rest being all negatives."""
    ramp_epoch: int | None = None
    """The epoch, from 0, whose steps count from 0 to 1 in full: LAPS 0, VSE∞ on grids 1. None: no ramp."""
    same_image_negatives: bool = False
    """Historic: other captions of the same image, that came in another row, count as negatives."""

    def __post_init__(self) -> None:
        check_choice("mining", self.mining, ("hardest", "all", "semi_hard"))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        if not 0 <= self.margin < float("inf") or self.all_epochs < 0 or self.mix_epochs < 0:
            raise InputError(
                f"expected margin, all_epochs and mix_epochs of at least 0, found {self.margin}, {self.all_epochs} and "
                f"{self.mix_epochs}; usual are 0.2, 0 or 1, and 0"
            )

    def share_of_mining(self, epoch: float) -> float:
        """Returns the share of `mining` after so many epochs, fractions included."""
        if self.mining == "all" or epoch < self.all_epochs:
            return 0.0
        return 1.0 if not self.mix_epochs else min(1.0, (epoch - self.all_epochs) / self.mix_epochs)

    def ramp(self, epoch: float) -> float:
        """Returns what the loss is multiplied by after so many epochs."""
        return epoch - self.ramp_epoch if self.ramp_epoch is not None and int(epoch) == self.ramp_epoch else 1.0


def triplet_loss(scores: Tensor, pairs: Pairs, config: TripletConfig | None = None, epoch: float = 0.0) -> Tensor:
    """Returns the loss, a scalar float32 (float64 of float64 scores).

    `scores`: (B, T), higher is more alike. `epoch`: epochs since the start, fractions included. A match without a
    negative gives nothing. Does not reduce over ranks.
    """
    config = config or TripletConfig()
    pairs.check(scores)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    negatives = pairs.negatives(len(scores), config.same_image_negatives)
    share = config.share_of_mining(epoch)
    total = scores.new_zeros(())
    for mining, weight in ((config.mining, share), ("all", 1 - share)):
        if weight:
            total = total + weight * _both_directions(scores, pairs, negatives, mining, config)
    return total * config.ramp(epoch)


def _both_directions(scores: Tensor, pairs: Pairs, negatives: Tensor, mining: str, config: TripletConfig) -> Tensor:
    texts = torch.arange(scores.shape[1], device=scores.device)
    matched = scores[pairs.image_of_text, texts]  # (T,): each text is a match of one image
    # rows of negatives: for each match, all texts of its image; and all images of its text
    return _one_direction(matched, scores, negatives, pairs.image_of_text, mining, config) + _one_direction(
        matched, scores.T, negatives.T, texts, mining, config
    )


def _one_direction(
    matched: Tensor, scores: Tensor, negatives: Tensor, rows: Tensor, mining: str, config: TripletConfig
) -> Tensor:
    """Returns the loss of matches (T,), each against the negatives in its row of scores (Q, C)."""
    if mining == "hardest":
        hardest = scores.masked_fill(~negatives, -torch.inf).amax(1)[rows]
        cost = (config.margin + hardest - matched).relu()
        has_negative = negatives.any(1)[rows]
        return cost.sum() / (has_negative.sum().clamp_min(1) if config.reduction == "mean" else 1)
    cost = config.margin + scores[rows] - matched[:, None]
    is_negative = negatives[rows]
    if mining == "all":
        cost = cost.relu().masked_fill(~is_negative, 0.0)
        return cost.sum() / (is_negative.sum().clamp_min(1) if config.reduction == "mean" else 1)
    cost = cost.clamp(0.0, config.margin).masked_fill(~is_negative, 0.0)
    return cost.sum() / ((cost > 0).sum().clamp_min(1) if config.reduction == "mean" else 1)

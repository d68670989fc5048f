"""The family of targets: how each row spreads its mass of 1. Its parameters, and one plain dict of names.

A row gives `true` to its own pair, and `per_similarity` · f(I, n) + `to_each` to each other, where f is a similarity of
the two object sets. So a row needs only the sum of f over its others. AlignCLIP (Zhang et al., ACM MM 2024) states the
idea of object_iou and its result; all formulas of object_iou are our reconstruction.
Letters: N pairs of the batch, K kinds of rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp
from typing import Literal

import torch
from torch import Tensor

from pretrain.losses.counts import Others
from pretrain.losses.similarity import AtLeast, ExpIou, Iou, Similarity
from setclip.lookup import look_up


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss, and its parameters. Parameters of the other losses are ignored."""

    name: str = "object_iou"
    """hard, label_smoothing, object_iou or multi_positive."""
    target: str = "budget"
    """object_iou: budget (1 − β on the true pair, β by IoU), mix (1 − β on the true pair, β by IoU, the true pair's own
    included), l1 (IoU over its row's sum) or softmax (of IoU over a temperature)."""
    beta: float = 0.2
    """object_iou, budget: the mass that goes to other pairs that share objects; mix: the share of l1."""
    no_overlap: Literal["one_hot", "uniform"] = "one_hot"
    """object_iou, budget: what a row gets that shares no object with any other."""
    temperature: float = 0.05
    """object_iou, softmax: what IoU is divided by."""
    threshold: float = 0.5
    """multi_positive: the IoU from which a pair counts as true; 1 is equal sets."""
    smoothing: float = 0.2
    """label_smoothing: α."""
    smoothing_split: Literal["others", "all"] = "others"
    """label_smoothing: α over the other pairs (PyramidCLIP), or over all (PyTorch)."""

    def __post_init__(self) -> None:
        self.find_target()
        for name in ("beta", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), found {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], found {self.threshold}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, found {self.temperature}")

    def find_target(self) -> "Target":
        """Returns the entry of this name and target. Raises InputError with the nearest name."""
        targets = look_up(LOSSES, self.name, "loss")
        return targets[""] if "" in targets else look_up(targets, self.target, f"target of {self.name}")


@dataclass(frozen=True)
class Rows:
    """What each kind of row gives, (K,) float64."""

    true: Tensor
    per_similarity: Tensor
    to_each: Tensor


@dataclass(frozen=True)
class Target:
    """An entry of the family."""

    rows: Callable[[Others, Tensor, int, LossConfig], Rows]
    """From the others of each row, the (K,) sums of the similarity over them, N, and the configuration."""
    similarity: Callable[[LossConfig], Similarity] | None = None
    """None: all others are alike, whatever their objects."""


def hard(others: Others, total: Tensor, size: int, config: LossConfig) -> Rows:
    """One-hot: CLIP (Radford et al. 2021, arXiv 2103.00020). Stated."""
    return Rows(torch.ones_like(total), torch.zeros_like(total), torch.zeros_like(total))


def label_smoothing(others: Others, total: Tensor, size: int, config: LossConfig) -> Rows:
    """All other texts alike: PyramidCLIP (Gao et al. 2022, arXiv 2204.14095) states equal weights and 0.2.

    Split "others": 1 − α on the true pair, α/(N − 1) on each other; "all" (PyTorch's own): α/N on each, the true pair
    included. Which of them the papers mean is not stated.
    """
    if size == 1:
        return hard(others, total, size, config)
    alpha = config.smoothing
    share = alpha / (size - 1) if config.smoothing_split == "others" else alpha / size
    true = 1 - alpha + (0.0 if config.smoothing_split == "others" else alpha / size)
    return Rows(torch.full_like(total, true), torch.zeros_like(total), torch.full_like(total, share))


def budget(others: Others, total: Tensor, size: int, config: LossConfig) -> Rows:
    """1 − β on the true pair, β on the others in proportion to their IoU. Reconstructed.

    A row that overlaps no other text stays one-hot, or spreads β evenly (`no_overlap="uniform"`). β = 0.2 moves the
    same mass as label smoothing of 0.2 does, so the two differ only in where it goes.
    """
    beta, overlaps = config.beta, others.overlapping > 0
    spread = torch.where(overlaps, beta / total.where(overlaps, torch.ones_like(total)), 0.0)
    if config.no_overlap == "one_hot" or size == 1:
        return Rows(1 - beta * overlaps.to(total.dtype), spread, torch.zeros_like(total))
    return Rows(torch.full_like(total, 1 - beta), spread, beta / (size - 1) * (~overlaps).to(total.dtype))


def mix(others: Others, total: Tensor, size: int, config: LossConfig) -> Rows:
    """(1 − β) of one-hot and β of `l1`. Reconstructed."""
    share = config.beta / (1 + total)
    return Rows(1 - config.beta + share, share, torch.zeros_like(total))


def l1(others: Others, total: Tensor, size: int, config: LossConfig) -> Rows:
    """Similarity divided by its sum over the row, the true pair's being 1: the true pair's share falls as batches grow.

    Reconstructed. With a similarity of 0 and 1 it makes all pairs above the threshold equally true (multi_positive).
    """
    return Rows(1 / (1 + total), 1 / (1 + total), torch.zeros_like(total))


def softmax(others: Others, total: Tensor, size: int, config: LossConfig) -> Rows:
    """Softmax of IoU over a temperature, the true pair's IoU being 1: never zero. Reconstructed."""
    floor = exp(-1 / config.temperature)  # of exp((IoU − 1) / τ), where nothing is shared
    share = 1 / (1 + (size - 1) * floor + total)
    return Rows(share, share, share * floor)


LOSSES: Mapping[str, Mapping[str, Target]] = {
    "hard": {"": Target(hard)},
    "label_smoothing": {"": Target(label_smoothing)},
    "object_iou": {
        "budget": Target(budget, lambda config: Iou()),
        "mix": Target(mix, lambda config: Iou()),
        "l1": Target(l1, lambda config: Iou()),
        "softmax": Target(softmax, lambda config: ExpIou(config.temperature)),
    },
    "multi_positive": {"": Target(l1, lambda config: AtLeast(config.threshold))},
}
"""Loss name to target name to entry; "" is the only target of a loss that has no choice."""

"""Target distributions: which texts count as right for an image, and how much. One plain dict of names.

Each takes the IoU of B rows (the queries of this rank) with all G columns and where the true pairs lie, and returns
(B, G) rows that sum to 1. The true pair's IoU counts as 1, whatever the sets. AlignCLIP (Zhang et al., ACM MM 2024)
states the idea and its result; the formulas of `budget` and `l1` are our reconstruction.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TargetFunction = Callable[..., Tensor]


def hard(iou: Tensor, positives: Tensor, **_: Any) -> Tensor:
    """One-hot: CLIP (Radford et al. 2021, arXiv 2103.00020)."""
    return _one_hot(iou, positives)


def label_smoothing(iou: Tensor, positives: Tensor, smoothing: float, smoothing_split: str, **_: Any) -> Tensor:
    """All other texts alike: PyramidCLIP (Gao et al. 2022, arXiv 2204.14095) uses 0.2.

    Split "others": 1 − α on the true pair, α/(G − 1) on each other; "all" (PyTorch's own): α/G on each, the true pair
    included. Which of them the papers mean is not stated.
    """
    size = iou.shape[1]
    if size == 1:
        return _one_hot(iou, positives)
    on_others = smoothing / (size - 1) if smoothing_split == "others" else smoothing / size
    on_true = 1 - smoothing + (0.0 if smoothing_split == "others" else smoothing / size)
    return torch.full_like(iou, on_others).scatter_(1, positives[:, None], on_true)


def object_iou_budget(iou: Tensor, positives: Tensor, beta: float, no_overlap: str, **_: Any) -> Tensor:
    """1 − β on the true pair, β on the others in proportion to their IoU.

    A row that overlaps no other text stays one-hot, or spreads β evenly (`no_overlap="uniform"`). β = 0.2 moves the
    same mass as label smoothing of 0.2 does, so the two differ only in where it goes.
    """
    others = iou.scatter(1, positives[:, None], 0.0)
    total = others.sum(1, keepdim=True)
    spread = beta * others / total.clamp_min(torch.finfo(iou.dtype).tiny)
    soft = spread.scatter(1, positives[:, None], 1 - beta)
    alone = label_smoothing(iou, positives, beta, "others") if no_overlap == "uniform" else _one_hot(iou, positives)
    return torch.where(total > 0, soft, alone)


def object_iou_l1(iou: Tensor, positives: Tensor, **_: Any) -> Tensor:
    """IoU divided by its sum over the row: no parameter, but the true pair's share falls as batches grow."""
    iou = iou.scatter(1, positives[:, None], 1.0)
    return iou / iou.sum(1, keepdim=True)


def _one_hot(iou: Tensor, positives: Tensor) -> Tensor:
    return torch.zeros_like(iou).scatter_(1, positives[:, None], 1.0)

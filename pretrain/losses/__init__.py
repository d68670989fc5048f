"""Contrastive losses with hard and soft targets: one family, one interface, a plain dict of names.

    loss = 1/2 [ CE(Q^{I→T}, softmax(s · I Tᵀ)) + CE(Q^{T→I}, softmax(s · T Iᵀ)) ],  s = exp(logit_scale)

Q^{I→T} is made from each image's object set and all texts' sets, Q^{T→I} from each text's set and all images'. Both
have rows that sum to 1; Q^{T→I} is not the transpose of Q^{I→T}.

Scope: each rank computes the rows of its own B images and B texts against all G, and returns the mean over them. The
mean of the ranks' losses is the loss over all pairs, and so are the gradients once the engine averages them over the
ranks (features are gathered with gradient). Letters: B pairs on this rank, G over all ranks, D width, M objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.losses.objects import iou_matrix
from pretrain.losses.targets import TargetFunction, hard, label_smoothing, object_iou_budget, object_iou_l1
from setclip.distributed import gather, gather_with_gradient, world_size
from setclip.lookup import look_up

LOSSES: Mapping[str, Mapping[str, TargetFunction]] = {
    "hard": {"": hard},
    "label_smoothing": {"": label_smoothing},
    "object_iou": {"budget": object_iou_budget, "l1": object_iou_l1},
}
"""Loss name to target name to function; "" is the only target of a loss that has no choice."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss, and its parameters. Parameters of the other losses are ignored."""

    name: str = "object_iou"
    """hard, label_smoothing or object_iou."""
    target: str = "budget"
    """object_iou: budget (1 − β on the true pair, β by IoU) or l1 (IoU over its row's sum)."""
    beta: float = 0.2
    """object_iou, budget: the mass that goes to other pairs that share objects."""
    no_overlap: Literal["one_hot", "uniform"] = "one_hot"
    """object_iou, budget: what a row gets that shares no object with any other."""
    smoothing: float = 0.2
    """label_smoothing: α."""
    smoothing_split: Literal["others", "all"] = "others"
    """label_smoothing: α over the other pairs (PyramidCLIP), or over all (PyTorch)."""

    def __post_init__(self) -> None:
        self.target_function()
        for name in ("beta", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), found {getattr(self, name)}")

    def target_function(self) -> TargetFunction:
        """Returns the function of this name and target. Raises InputError with the nearest name."""
        targets = look_up(LOSSES, self.name, "loss")
        return targets[""] if "" in targets else look_up(targets, self.target, f"target of {self.name}")


@dataclass(frozen=True)
class LossOutput:
    """Scalars of this rank; their means over ranks are the batch's. Only `loss` carries gradient."""

    loss: Tensor
    kl: Tensor
    """The loss less its floor, the targets' entropy, which depends on the batch."""
    true_pair_mass: Tensor
    """Mean target on the true pair."""


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_objects: Tensor,
    text_objects: Tensor,
    config: LossConfig,
) -> LossOutput:
    """Returns the loss of this rank's pairs against all ranks' pairs.

    `image_features`, `text_features`: (B, D) float, unit norm, B alike on all ranks. `logit_scale`: exp(θ), one
    number. `image_objects`, `text_objects`: (B, M) int64 distinct ids padded with −1. Computes in the features' dtype,
    at least fp32.
    """
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    images, texts = image_features.to(dtype), text_features.to(dtype)
    all_images, all_texts = gather_with_gradient(images), gather_with_gradient(texts)
    first = (dist.get_rank() if dist.is_initialized() else 0) * len(images)
    positives = torch.arange(first, first + len(images), device=images.device)
    scale = logit_scale.to(dtype)

    loss, entropy, mass = images.new_zeros(()), images.new_zeros(()), images.new_zeros(())
    directions = (
        (images, all_texts, image_objects, text_objects),
        (texts, all_images, text_objects, image_objects),
    )
    for queries, gallery, query_objects, gallery_objects in directions:
        targets = _targets(query_objects, gallery_objects, positives, dtype, config)
        log_probabilities = torch.log_softmax(scale * (queries @ gallery.T), dim=1)
        loss = loss - (targets * log_probabilities).sum(1).mean() / 2
        entropy = entropy - torch.xlogy(targets, targets).sum(1).mean() / 2
        mass = mass + targets.gather(1, positives[:, None]).mean() / 2
    return LossOutput(loss, (loss - entropy).detach(), mass)


def _targets(
    query_objects: Tensor, gallery_objects: Tensor, positives: Tensor, dtype: torch.dtype, config: LossConfig
) -> Tensor:
    """Returns (B, G) targets. A loss without object sets computes no IoU."""
    if config.name == "object_iou":
        iou = iou_matrix(query_objects, gather(_padded_alike(gallery_objects)), dtype)
    else:
        iou = torch.zeros(len(positives), len(positives) * world_size(), dtype=dtype, device=positives.device)
    return config.target_function()(
        iou,
        positives,
        beta=config.beta,
        no_overlap=config.no_overlap,
        smoothing=config.smoothing,
        smoothing_split=config.smoothing_split,
    )


def _padded_alike(objects: Tensor) -> Tensor:
    """Returns the ids padded to the widest of all ranks, so that they can be gathered."""
    if world_size() == 1:
        return objects
    width = torch.tensor(objects.shape[1], device=objects.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    return torch.nn.functional.pad(objects, (0, int(width) - objects.shape[1]), value=-1)

"""Contrastive losses with hard and soft targets: one family, one interface, a plain dict of names.

    loss = 1/2 [ CE(Q^{I→T}, softmax(s · I Tᵀ)) + CE(Q^{T→I}, softmax(s · T Iᵀ)) ],  s = exp(logit_scale)

Q^{I→T} is made from each image's object set and all texts' sets, Q^{T→I} from each text's set and all images'. Both
have rows that sum to 1; Q^{T→I} is not the transpose of Q^{I→T}. Neither is ever made: docs/losses.md explains how.

Read `targets` for the family, `similarity`, `subsets` and `expansion` for the soft part, `operators` for both together,
`blockwise` for the rest. Scope: each rank computes its share, such that the mean of the ranks' losses is the loss over
all pairs, and so are the gradients once the engine averages them. Letters: B pairs on this rank, N over all ranks, D
width, M objects.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.losses.blockwise import blockwise_loss
from pretrain.losses.exchange import Layout, agree
from pretrain.losses.operators import Targets, make_targets
from pretrain.losses.targets import LOSSES, LossConfig

__all__ = ["LOSSES", "LossConfig", "LossOutput", "contrastive_loss", "prepare_targets"]


@dataclass(frozen=True)
class LossOutput:
    """Scalars of this rank; their means over ranks are the batch's. Only `loss` carries gradient."""

    loss: Tensor
    kl: Tensor
    """The loss less its floor, the targets' entropy, which depends on the batch."""
    true_pair_mass: Tensor
    """Mean target on the true pair."""
    similar_pairs: Tensor
    """Share of pairs, true ones apart, with IoU ≥ 1/2: what a hard loss takes for negatives."""
    equal_pairs: Tensor
    """Share of pairs, true ones apart, with the same objects."""


def prepare_targets(image_objects: Tensor, text_objects: Tensor, config: LossConfig) -> tuple[Targets, Layout]:
    """Returns the targets over all ranks, which need no features: they can be made while the towers encode.

    `image_objects`, `text_objects`: (B, M) int64 ids padded with −1. Collective.
    """
    layout, all_image_objects, all_text_objects = agree(image_objects, text_objects)
    return make_targets(all_image_objects, all_text_objects, config), layout


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_objects: Tensor,
    text_objects: Tensor,
    config: LossConfig,
    prepared: tuple[Targets, Layout] | None = None,
) -> LossOutput:
    """Returns this rank's share of the loss over all ranks' pairs.

    `image_features`, `text_features`: (B, D) float, unit norm; ranks may differ in B. `logit_scale`: exp(θ), one
    number. `image_objects`, `text_objects`: (B, M) int64 ids padded with −1. `prepared`: what `prepare_targets` returned
    for these. Computes in the features' dtype, sums in fp32 at least. Collective, and so is its backward pass.
    """
    targets, layout = prepared or prepare_targets(image_objects, text_objects, config)
    loss = blockwise_loss(image_features, text_features, logit_scale, targets, layout)
    numbers = (targets.true_pair_mass, targets.similar_pairs, targets.equal_pairs)
    return LossOutput(loss, (loss.detach() - targets.entropy), *(torch.as_tensor(n).to(loss) for n in numbers))

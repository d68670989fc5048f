"""Contrastive losses with hard and soft targets: one family, one interface, a plain dict of names.

    loss = 1/2 [ CE(Q^{I→T}, softmax(s · I Tᵀ)) + CE(Q^{T→I}, softmax(s · T Iᵀ)) ],  s = exp(logit_scale)

Q^{I→T} is made from each image's object set and all texts' sets, Q^{T→I} from each text's set and all images'. Both
have rows that sum to 1; Q^{T→I} is not the transpose of Q^{I→T}. Neither is ever made: docs/losses.md explains how.

Read `targets` for the family, `similarity`, `subsets` and `expansion` for the soft part, `operators` for both together,
`blockwise` for the rest; `tiles` for the second design, `sigmoid`, `softclip` and `self_distillation` for the losses that
are no such cross-entropies. Scope: each rank computes its share, such that the mean of the ranks' losses is the loss over
all pairs, and so are the gradients once the engine averages them. Letters: B pairs on this rank, N over all ranks, D
width, M objects.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.losses.blockwise import blockwise_loss
from pretrain.losses.exchange import Layout, agree
from pretrain.losses.operators import Targets, make_targets
from pretrain.losses.self_distillation import distil
from pretrain.losses.sets import BatchSets
from pretrain.losses.sigmoid import sigmoid_loss
from pretrain.losses.softclip import SoftClipTargets, make_softclip_targets, softclip_loss
from pretrain.losses.targets import LOSSES, LossConfig
from pretrain.losses.weights import ObjectWeights

__all__ = [
    "LOSSES",
    "BatchSets",
    "LossConfig",
    "LossOutput",
    "Moment",
    "ObjectWeights",
    "Prepared",
    "contrastive_loss",
    "prepare_targets",
]


@dataclass(frozen=True)
class LossOutput:
    """Scalars of this rank; their means over ranks are the batch's. Only `loss` carries gradient."""

    loss: Tensor
    kl: Tensor
    """The loss less its floor, which depends on the batch: of cross-entropies the targets' entropy."""
    true_pair_mass: Tensor
    """Mean target on true pairs."""
    similar_pairs: Tensor
    """Share of other pairs with IoU ≥ 1/2: what a hard loss takes for negatives."""
    equal_pairs: Tensor
    """Share of other pairs with the same objects, one at least."""


@dataclass(frozen=True)
class Moment:
    """When in a run a batch comes: what psd's targets depend on."""

    progress: float = 0.0
    """Share of the run that is over, 0 to 1"""
    seed: int = 0
    """Of what is drawn in this step; the same on all ranks"""


@dataclass(frozen=True)
class Prepared:
    """The targets of a batch over all ranks."""

    targets: Targets | SoftClipTargets
    layout: Layout


def prepare_targets(
    sets: BatchSets,
    config: LossConfig,
    weights: ObjectWeights | None = None,
    dtype: torch.dtype = torch.float32,
) -> Prepared:
    """Returns the targets over all ranks, which need no features: they can be made while the towers encode. Collective.

    `sets`: this rank's. `weights`: needed where config.weights is "frequency", on the sets' device. `dtype`: that of the
    logits, the features' promoted to float32.
    """
    layout, gathered = agree(sets)
    make = make_softclip_targets if config.name == "softclip" else make_targets
    return Prepared(make(gathered, config, layout, weights, dtype), layout)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    sets: BatchSets,
    config: LossConfig,
    *,
    logit_bias: Tensor | None = None,
    weights: ObjectWeights | None = None,
    moment: Moment | None = None,
    prepared: Prepared | None = None,
) -> LossOutput:
    """Returns this rank's share of the loss over all ranks' pairs.

    `image_features`, `text_features`: (B, D) float, unit norm; ranks may differ in B. `logit_scale`: exp(θ), one
    number; `logit_bias`: one number, for siglip. `sets`: of this rank's pairs. `prepared`: what `prepare_targets` returned
    for them. `moment`: for psd. Computes in the features' dtype, sums in fp32 at least. Collective, and so is its
    backward pass.
    """
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    prepared = prepared or prepare_targets(sets, config, weights, dtype)
    targets, layout = prepared.targets, prepared.layout
    if isinstance(targets, SoftClipTargets):
        loss = softclip_loss(image_features, text_features, logit_scale, targets, layout)
    elif config.name == "siglip":
        if logit_bias is None:
            raise ValueError("siglip needs logit_bias")
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, targets, layout)
    else:
        if config.name == "psd":
            if moment is None:
                raise ValueError("psd needs moment")
            targets = distil(targets, image_features, text_features, config, layout, moment.progress, moment.seed)
        loss = blockwise_loss(image_features, text_features, logit_scale, targets, layout)
    numbers = (targets.true_pair_mass, targets.similar_pairs, targets.equal_pairs)
    return LossOutput(loss, (loss.detach() - targets.entropy), *(loss.new_tensor(n) for n in numbers))

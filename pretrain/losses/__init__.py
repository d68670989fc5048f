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

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.losses.blockwise import blockwise_loss
from pretrain.losses.exchange import Layout, agree
from pretrain.losses.operators import Targets, make_targets
from pretrain.losses.self_distillation import distil, draw_hard, hard_share_at
from pretrain.losses.sets import BatchSets
from pretrain.losses.sigmoid import sigmoid_loss
from pretrain.losses.softclip import SoftClipTargets, make_softclip_targets, softclip_loss
from pretrain.losses.targets import LOSSES, LossConfig
from pretrain.losses.weights import ObjectWeights
from setclip.distributed import world_size

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
class Group:
    """Pairs that are contrasted with each other, and with no others: all of a step, or some of this rank's."""

    targets: Targets | SoftClipTargets
    layout: Layout

    @property
    def size(self) -> int:
        """Its pairs on this rank."""
        return self.layout.counts[self.layout.rank]


@dataclass(frozen=True)
class Prepared:
    """The targets of a batch, and what they were made for."""

    groups: tuple[Group, ...]
    """In the order of this rank's pairs"""
    config: LossConfig
    dtype: torch.dtype


def prepare_targets(
    sets: BatchSets,
    config: LossConfig,
    weights: ObjectWeights | None = None,
    dtype: torch.dtype = torch.float32,
) -> Prepared:
    """Returns the targets over all ranks, which need no features: they can be made while the towers encode. Collective.

    With config.group_size they are of this rank's groups alone, and not collective. `sets`: this rank's. `weights`: needed
    where config.weights is "frequency", on the sets' device. `dtype`: that of the logits, the features' promoted to float32.
    """
    _check_sets(sets)
    make = make_softclip_targets if config.name == "softclip" else make_targets
    return Prepared(
        tuple(Group(make(part, config, layout, weights, dtype), layout) for layout, part in _grouped(sets, config)),
        config,
        dtype,
    )


def _grouped(sets: BatchSets, config: LossConfig) -> list[tuple[Layout, BatchSets]]:
    """Returns the pairs of each group, and where they lie: those of all ranks, or of this rank alone."""
    if config.group_size is None:
        return [agree(sets)]
    if len(sets) % config.group_size:
        raise ValueError(f"expected pairs in groups of {config.group_size}, found {len(sets)}")
    parts = (sets.image_objects, sets.text_objects, *(() if sets.text_ids is None else (sets.text_ids,)))
    alone = Layout(0, (config.group_size,))
    return [(alone, BatchSets(*part)) for part in zip(*(x.split(config.group_size) for x in parts), strict=True)]


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
    """Returns this rank's share of the loss over all ranks' pairs; with config.group_size, of the mean over groups.

    `image_features`, `text_features`: (B, D) float, unit norm; ranks may differ in B. `logit_scale`: exp(θ), one
    number; `logit_bias`: one number, for siglip. `sets`: of this rank's pairs. `prepared`: what `prepare_targets` returned
    for them. `moment`: for psd. Computes in the features' dtype, sums in fp32 at least. Collective, and so is its
    backward pass; in groups neither is, and all ranks must hold equally many pairs.
    """
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    _check_features(image_features, text_features, logit_scale, logit_bias, sets)
    prepared = prepared or prepare_targets(sets, config, weights, dtype)
    sizes = [group.size for group in prepared.groups]
    if (prepared.config, prepared.dtype) != (config, dtype) or sum(sizes) != len(sets):
        raise ValueError(
            f"expected targets prepared for this loss, {len(sets)} pairs and {dtype}, found those of "
            f"{prepared.config.full_name}, {sum(sizes)} pairs and {prepared.dtype}"
        )
    found = [
        _loss_of(group, images, texts, logit_scale, logit_bias, config, is_hard)
        for group, images, texts, is_hard in zip(
            prepared.groups,
            image_features.split(sizes),
            text_features.split(sizes),
            _hard_pairs(prepared, moment),
            strict=True,
        )
    ]
    if len(found) == 1:
        return found[0]
    names = [field.name for field in fields(LossOutput)]
    return LossOutput(**{name: torch.stack([getattr(each, name) for each in found]).mean(0) for name in names})


def _hard_pairs(prepared: Prepared, moment: Moment | None) -> Sequence[Tensor | None]:
    """Returns which pairs of each group psd gives one-hot targets; None of other losses. They are drawn once a step."""
    config, groups = prepared.config, prepared.groups
    if config.name != "psd":
        return [None] * len(groups)
    if moment is None:
        raise ValueError("psd needs moment")
    share = hard_share_at(moment.progress, config.hard_share)
    if config.group_size is None:
        return [draw_hard(groups[0].layout.counts, share, moment.seed)]
    ranks = world_size()
    rank = dist.get_rank() if ranks > 1 else 0
    drawn = draw_hard((len(groups) * config.group_size,) * ranks, share, moment.seed)  # alike on all ranks
    return drawn.split(config.group_size)[rank * len(groups) :][: len(groups)]


def _loss_of(
    group: Group,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    config: LossConfig,
    is_hard: Tensor | None,
) -> LossOutput:
    """Returns the loss and meters of one group. `is_hard`, (pairs of the group,) bool: of psd."""
    targets, layout = group.targets, group.layout
    if isinstance(targets, SoftClipTargets):
        loss = softclip_loss(image_features, text_features, logit_scale, targets, layout)
    elif config.name == "siglip":
        if logit_bias is None:
            raise ValueError("siglip needs logit_bias")
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, targets, layout)
    else:
        if config.name == "psd":
            assert is_hard is not None
            targets = distil(targets, image_features, text_features, config, layout, is_hard)
        loss = blockwise_loss(image_features, text_features, logit_scale, targets, layout)
    numbers = (targets.true_pair_mass, targets.similar_pairs, targets.equal_pairs)
    return LossOutput(loss, loss.detach() - targets.entropy, *(loss.new_tensor(n) for n in numbers))


def _check_sets(sets: BatchSets) -> None:
    images, texts, text_ids = sets.image_objects, sets.text_objects, sets.text_ids
    if images.ndim != 2 or texts.ndim != 2 or len(images) != len(texts):
        raise ValueError(
            f"expected (B, M) object ids of B images and of their B texts, found {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    if text_ids is not None and text_ids.shape != images.shape[:1]:
        raise ValueError(f"expected {len(images)} text ids, found {tuple(text_ids.shape)}")
    dtypes = {x.dtype for x in (images, texts, text_ids) if x is not None}
    if dtypes != {torch.int64}:
        raise ValueError(f"expected ids of {torch.int64}, found {sorted(map(str, dtypes))}")


def _check_features(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, sets: BatchSets
) -> None:
    if images.ndim != 2 or images.shape != texts.shape or len(images) != len(sets):
        raise ValueError(
            f"expected (B, D) features of B = {len(sets)} images and of their texts, found {tuple(images.shape)} and "
            f"{tuple(texts.shape)}"
        )
    if images.dtype != texts.dtype or images.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"expected features of float32, float64 or bfloat16, found {images.dtype} and {texts.dtype}")
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if value is not None and value.numel() != 1:
            raise ValueError(f"expected one number as {name}, found {tuple(value.shape)}")

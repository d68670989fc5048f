"""Losses of fine-tuning: functions of tensors, one a file, and a plain dict of names over what a step gives.

    terms = {"triplet": Weighted(TripletConfig(margin=0.2)), "mmd": Weighted(MmdConfig(), 0.01)}
    out = total_loss(LossStep(scores, pairs, images, texts, epoch=1.5), terms)     # out.loss, out.parts

`pairs` says what matches what. Which systems use which, and what is stated and what reconstructed: docs/heads.md.
Letters: B images, T texts, K elements, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune.losses.contrastive import BatchObjects, contrastive_loss_of_scores
from finetune.losses.dhset_diversity import DhSetDiversityConfig, dhset_diversity_loss
from finetune.losses.gram import gram_loss
from finetune.losses.mmd import MmdConfig, mmd_loss
from finetune.losses.objects import share_objects
from finetune.losses.pairs import Pairs
from finetune.losses.pcme import PcmeConfig, gaussian_kl, pcme_loss
from finetune.losses.triplet import TripletConfig, triplet_loss
from finetune.losses.uniformity import UniformityConfig, uniformity_loss
from pretrain.losses import LossConfig, Moment
from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.models.heads import HeadOutput
from setclip.similarity import SetSimilarity
from setclip.similarity.match_probability import EuclideanMatchProbability

__all__ = [
    "LOSSES",
    "BatchObjects",
    "DhSetDiversityConfig",
    "GaussianKlConfig",
    "GramConfig",
    "HybridTripletConfig",
    "LossStep",
    "MmdConfig",
    "Pairs",
    "PcmeConfig",
    "Term",
    "TotalLoss",
    "TripletConfig",
    "UniformityConfig",
    "Weighted",
    "gaussian_kl",
    "share_objects",
    "total_loss",
]


@dataclass(frozen=True)
class LossStep:
    """What a training step gives to its losses."""

    scores: Tensor
    """(B, T) by the similarity of training"""
    pairs: Pairs
    images: HeadOutput
    texts: HeadOutput
    epoch: float = 0.0
    """Epochs since the start, fractions included"""
    hybrid_scores: Tensor | None = None
    """(B, T) by DH-Set's similarity of inference, for "triplet_hybrid\""""
    similarity: SetSimilarity | None = None
    """For "pcme", whose slope and shift it learns"""
    logit_scale: Tensor | None = None
    """One number, exponentiated, for "contrastive\""""
    logit_bias: Tensor | None = None
    """One number, for siglip"""
    objects: BatchObjects | None = None
    """For soft targets"""
    moment: Moment | None = None
    """For psd"""


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """Nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class GaussianKlConfig:
    """Nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class HybridTripletConfig(TripletConfig):
    """As the triplet loss, of DH-Set's hybrid scores: closes the gap between training and inference. Ours."""


@dataclass(frozen=True)
class Term:
    """An entry of `LOSSES`."""

    config: type
    """Of its options; all have defaults"""
    compute: Callable[[LossStep, Any], Tensor]


def _hybrid(step: LossStep, config: TripletConfig) -> Tensor:
    if step.hybrid_scores is None:
        raise InputError("expected hybrid scores for triplet_hybrid, found none; take it with a dhset head alone")
    return triplet_loss(step.hybrid_scores, step.pairs, config, step.epoch)


def _contrastive(step: LossStep, config: LossConfig) -> Tensor:
    if step.logit_scale is None:
        raise InputError(
            "expected a logit_scale for contrastive, found none; give a learned one that begins at 1 / 0.07"
        )
    return contrastive_loss_of_scores(
        step.scores, step.logit_scale, step.pairs, config, step.objects, step.logit_bias, step.moment
    )


def _pcme(step: LossStep, config: PcmeConfig) -> Tensor:
    if not isinstance(step.similarity, EuclideanMatchProbability):
        raise InputError(
            f"expected similarity match_prob_l2 for pcme, found {type(step.similarity).__name__}; give it to the head"
        )
    return pcme_loss(step.images.sets, step.texts.sets, step.similarity.a, step.similarity.b, step.pairs, config)


def _kl(step: LossStep, config: GaussianKlConfig) -> Tensor:
    sides = [output.auxiliary for output in (step.images, step.texts)]
    if any("log_sigma" not in side for side in sides):
        raise InputError(
            "expected a pcme head for gaussian_kl, found sets that are no samples of a Gaussian; leave it out"
        )
    return sum(gaussian_kl(side["mean"], side["log_sigma"]) for side in sides)  # type: ignore[return-value]


def _mmd(step: LossStep, config: MmdConfig) -> Tensor:
    return mmd_loss(_elements(step.images), _elements(step.texts), config)


def _elements(output: HeadOutput) -> Tensor:
    """Returns all elements that there are, (P, D)."""
    return output.sets.flatten(0, 1) if output.mask is None else output.sets[output.mask]


def _diversity(step: LossStep, loss: Callable[[Tensor], Tensor]) -> Tensor:
    sides = [output.residuals for output in (step.images, step.texts)]
    if sides[0] is None or sides[1] is None:
        raise InputError(
            "expected heads with residuals (slot, transformer, pie) for this diversity loss, found others; leave it out, or "
            "take dhset_diversity with dhset"
        )
    return loss(sides[0]) + loss(sides[1])


def _dhset(step: LossStep, config: DhSetDiversityConfig) -> Tensor:
    profiles = step.texts.auxiliary.get("profiles")
    if profiles is None:
        raise InputError("expected a dhset head for dhset_diversity, found texts without profiles; leave it out")
    return dhset_diversity_loss(profiles, step.texts.auxiliary["weighted"], step.texts.mask, config)


LOSSES: dict[str, Term] = {
    "triplet": Term(TripletConfig, lambda step, config: triplet_loss(step.scores, step.pairs, config, step.epoch)),
    "triplet_hybrid": Term(HybridTripletConfig, _hybrid),
    "contrastive": Term(LossConfig, _contrastive),
    "pcme": Term(PcmeConfig, _pcme),
    "gaussian_kl": Term(GaussianKlConfig, _kl),
    "mmd": Term(MmdConfig, _mmd),
    "uniformity": Term(UniformityConfig, lambda step, config: _diversity(step, lambda r: uniformity_loss(r, config))),
    "gram": Term(GramConfig, lambda step, config: _diversity(step, gram_loss)),
    "dhset_diversity": Term(DhSetDiversityConfig, _dhset),
}


@dataclass(frozen=True)
class Weighted:
    """A loss's options and what it counts."""

    config: Any
    weight: float = 1.0


@dataclass(frozen=True)
class TotalLoss:
    """A weighted sum of losses."""

    loss: Tensor
    """With gradient"""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Each loss before its weight, without gradient"""


def total_loss(step: LossStep, terms: Mapping[str, Weighted]) -> TotalLoss:
    """Returns the weighted sum of the losses named in `terms`. Raises InputError on an unknown name, on a loss that the step
    has not what it needs for, and where there is no loss at all.
    """
    if not terms:
        raise InputError("expected at least one loss, found none; triplet is the usual one")
    total: Tensor = torch.zeros((), device=step.scores.device)
    parts = {}
    for name, weighted in terms.items():
        term = look_up(LOSSES, name, "loss")
        if not isinstance(weighted.config, term.config):
            raise InputError(
                f"expected options of {term.config.__name__} for {name}, found {type(weighted.config).__name__}; give its own"
            )
        value = term.compute(step, weighted.config)
        total = total + weighted.weight * value
        parts[name] = value.detach()
    return TotalLoss(total, parts)

"""The losses of pretraining on scores of sets: soft-label cross-entropies, siglip, softclip and psd, by their names there.

    1/2 [CE(Q^{I→T}, softmax(s · S)) + CE(Q^{T→I}, softmax(s · Sᵀ))],  S the scores of sets, s a learned scale

Targets are those of `pretrain.losses.targets`, made in full here: batches of fine-tuning are small, and an image may have
several texts, which share what a row gives to its true pairs. Letters: B images, T texts, M objects of a caption.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.losses.objects import shared_and_union
from finetune.losses.pairs import Pairs
from pretrain.losses import LossConfig, Moment, ObjectWeights
from pretrain.losses.self_distillation import draw_hard, hard_share_at
from pretrain.losses.similarity import AtLeast
from pretrain.losses.targets import Crowd
from setclip.errors import InputError


@dataclass(frozen=True)
class BatchObjects:
    """What soft targets are made of. No gradient."""

    images: Tensor
    """(B, M) int64 ids of each image's objects, padded with −1"""
    texts: Tensor
    """(T, M') int64, of each text's"""
    weights: ObjectWeights | None = None
    """Where the loss's `weights` is "frequency\""""


def contrastive_loss_of_scores(
    scores: Tensor,
    scale: Tensor,
    pairs: Pairs,
    config: LossConfig,
    objects: BatchObjects | None = None,
    bias: Tensor | None = None,
    moment: Moment | None = None,
) -> Tensor:
    """Returns the loss, a scalar float32 at least.

    `scores`: (B, T); `scale`: one number, the exponentiated logit scale; `bias`: one number, of siglip. `objects`: of losses
    that look at them. `moment`: of psd. Rows of one image are true pairs of all its texts. Pairs that `pairs.excluded` takes out
    are neither true nor others: they are in no softmax and in no sum, and no target has a share for them. Does not reduce over
    ranks. With one text an image it is pretraining's loss of vectors whose cosines are the scores.
    """
    pairs.check(scores)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    true = pairs.same_image(len(scores))
    counts = torch.ones_like(true) if pairs.excluded is None else true | ~pairs.excluded
    similarity = _similarities(config, objects, scores.shape, scores.device)
    targets = [_targets(config, true, counts, similarity), _targets(config, true.T, counts.T, _turned(similarity))]
    logits = scale * scores
    if config.name == "siglip":
        if bias is None:
            raise InputError("expected a bias for siglip, found none; give one that begins at -10")
        labels = targets[0].to(logits)
        both = torch.nn.functional.binary_cross_entropy_with_logits(
            logits + bias, labels, counts.to(logits), reduction="sum"
        )
        return both / scores.shape[1]
    if config.name == "psd":
        targets = _distilled(targets, scores.masked_fill(~counts, -torch.inf), config, moment)
    total = scores.new_zeros(())
    for target, rows, is_true, is_in in zip(
        targets, (logits, logits.T), (true, true.T), (counts, counts.T), strict=True
    ):
        q, rows = target.to(rows), rows.masked_fill(~is_in, -torch.inf)
        log_p = rows.log_softmax(1)
        if config.name == "softclip":
            total = total + _softclip(q, rows, log_p, is_true, is_in, config)
        else:
            total = total - (q * log_p.masked_fill(~is_in, 0.0)).sum(1).mean()
    return total / 2


def _similarities(
    config: LossConfig, objects: BatchObjects | None, shape: torch.Size, device: torch.device
) -> Tensor | None:
    """Returns what the targets are made of, (B, T) float64; None where they look at no objects."""
    make = config.find_target().similarity
    if make is None:
        return None
    if objects is None or (config.weights == "frequency" and objects.weights is None):
        raise InputError(
            f"expected objects{'' if objects is None else ' with weights'} for {config.full_name}, found none; prepare the "
            "data with parsed objects, or take a loss without them (hard, label_smoothing)"
        )
    if (len(objects.images), len(objects.texts)) != tuple(shape):
        raise InputError(
            f"expected objects of {shape[0]} images and {shape[1]} texts, found {len(objects.images)} and "
            f"{len(objects.texts)}; give those of the batch"
        )
    weights = objects.weights if config.weights == "frequency" else None
    shared, union = shared_and_union(objects.images, objects.texts, weights)
    similarity = make(config)
    if isinstance(similarity, AtLeast) and weights is None:
        return similarity.from_counts(shared, union).to(device)
    iou = torch.where(shared > 0, shared / union.where(shared > 0, torch.ones_like(union)), 0.0)
    return similarity.from_iou(iou).to(torch.float64).to(device)


def _turned(similarity: Tensor | None) -> Tensor | None:
    return None if similarity is None else similarity.T


def _targets(config: LossConfig, true: Tensor, counts: Tensor, similarity: Tensor | None) -> Tensor:
    """Returns Q, (Q, C) float64, of queries with true pairs (Q, C) bool, 0 where a pair does not count."""
    others = ~true & counts
    values = torch.zeros(true.shape, dtype=torch.float64, device=true.device) if similarity is None else similarity
    values = values.masked_fill(~others, 0.0)
    num_true = true.sum(1).double()
    crowd = Crowd(true=num_true, others=others.sum(1).double(), overlaps=(values > 0).any(1), total=values.sum(1))
    rows = config.find_target().rows(crowd, config)
    to_others = rows.per_similarity[:, None] * values + rows.to_each[:, None]
    return torch.where(true, (rows.true / num_true)[:, None], to_others.masked_fill(~others, 0.0))


def _distilled(targets: list[Tensor], scores: Tensor, config: LossConfig, moment: Moment | None) -> list[Tensor]:
    """Returns psd's targets: the model's own predictions of the other direction, but for a share of the pairs."""
    if moment is None or scores.shape[0] != scores.shape[1]:
        raise InputError(
            f"expected for psd a moment of the run and one text an image, found {'no' if moment is None else 'a'} moment and "
            f"{scores.shape[1]} texts of {scores.shape[0]} images; take another loss for several captions"
        )
    share = hard_share_at(moment.progress, config.hard_share)
    is_hard = draw_hard([len(scores)], share, moment.seed).to(scores.device)[:, None]
    own = scores.detach() / config.teacher_temperature
    teachers = (own.T.softmax(1), own.softmax(1))
    return [torch.where(is_hard, q.to(scores), teacher) for q, teacher in zip(targets, teachers, strict=True)]


def _softclip(q: Tensor, logits: Tensor, log_p: Tensor, is_true: Tensor, is_in: Tensor, config: LossConfig) -> Tensor:
    """Returns the symmetric divergence over all pairs, and with its weight that over negatives alone."""
    log_q = q.masked_fill(~is_in, 1.0).log()
    total = _both_ways(q, log_q, log_p.masked_fill(~is_in, 0.0)).masked_fill(~is_in, 0.0).sum(1).mean()
    is_out = is_true | ~is_in
    if is_out.all(1).any():  # a row without negatives: a batch of one image, or of one class
        return total
    log_p_off = logits.masked_fill(is_out, -torch.inf).log_softmax(1).masked_fill(is_out, 0.0)
    log_q_off = log_q.masked_fill(is_out, -torch.inf).log_softmax(1).masked_fill(is_out, 0.0)
    apart = _both_ways(log_q_off.exp(), log_q_off, log_p_off).masked_fill(is_out, 0.0)
    return total + config.negatives_weight * apart.sum(1).mean()


def _both_ways(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Returns the terms of [KL(q ‖ p) + KL(p ‖ q)] / 2."""
    return (q - log_p.exp()) * (log_q - log_p) / 2

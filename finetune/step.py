"""One training step's computation as a module: inputs of this rank in, the loss of the whole batch out.

Sets are gathered over ranks with exact gradients, and every rank computes the loss of everything with everything: DDP's mean over
ranks of the gradients is then that of one process. Letters: b pictures and t texts of this rank, B and T of all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config import FinetuneConfig
from finetune.features import Inputs
from finetune.losses import BatchObjects, LossStep, Pairs, Weighted, total_loss
from finetune.noise import DroppedPixels, features_of_pictures
from pretrain.losses import Moment
from setclip import distributed
from setclip.errors import InputError
from setclip.models.backbones import Features
from setclip.models.heads import HeadOutput
from setclip.models.matching import DhSetRows, HybridOf, make_matching
from setclip.models.set_model import SetModel


@dataclass(frozen=True)
class StepBatch:
    """What is known of a batch beside its inputs; of all ranks, the same on each."""

    pairs: Pairs
    epoch: float
    objects: BatchObjects | None = None
    moment: Moment | None = None


def loss_numbers(terms: Mapping[str, Weighted]) -> nn.ParameterDict:
    """Returns what losses learn beside the model: the scale (its logarithm) and the bias of contrastive ones."""
    if "contrastive" not in terms:
        return nn.ParameterDict()
    # as pretraining begins: CLIP's and SigLIP's
    if terms["contrastive"].config.name == "siglip":
        return nn.ParameterDict({"log_scale": torch.tensor(math.log(10.0)), "bias": torch.tensor(-10.0)})
    return nn.ParameterDict({"log_scale": torch.tensor(math.log(1 / 0.07))})


@dataclass(frozen=True)
class Pull:
    """Gradients of the loss: of outputs of heads on this rank, by name, and of parameters that the loss itself looks at."""

    images: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]


class StepModule(nn.Module):
    """A SetModel with its losses, and the numbers that these learn (`loss_numbers`)."""

    def __init__(
        self, model: SetModel, terms: Mapping[str, Weighted], numbers: nn.ParameterDict, max_scale: float = 100.0
    ):
        super().__init__()
        self.model, self.terms, self.numbers, self.max_scale = model, dict(terms), numbers, max_scale
        self._hybrid = _hybrid_similarity(model) if "triplet_hybrid" in terms else None

    def forward(
        self, images: Inputs | DroppedPixels, texts: Inputs, batch: StepBatch | None = None, pull: Pull | None = None
    ) -> Any:
        """Returns the loss, the same on all ranks, and each part of it before its weight. Without a batch the outputs of the
        heads on this rank alone; with a `pull` the sum of their products with it (`finetune.micro_batches`).
        """
        model = self.model
        image_features = features_of_pictures(model.backbone, images)
        text_features = texts if isinstance(texts, Features) else model.backbone.text(texts)
        own_images, own_texts = model.images(image_features), model.texts(text_features)
        if batch is not None:
            return self.loss_of(own_images, own_texts, batch)
        if pull is None:
            return own_images, own_texts
        total = _product(own_images, pull.images) + _product(own_texts, pull.texts)
        parameters = dict(self.named_parameters()) if pull.parameters else {}
        return total + sum((parameters[name] * gradient).sum() for name, gradient in pull.parameters.items())

    def loss_of(self, images: HeadOutput, texts: HeadOutput, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns what `forward` gives of a batch, of this rank's outputs of the heads. Collective."""
        image_sets, text_sets = gathered(images), gathered(texts)
        pair = self.model.pair
        step = LossStep(
            pair.scores(image_sets, text_sets),
            batch.pairs,
            image_sets,
            text_sets,
            batch.epoch,
            None if self._hybrid is None else self._hybrid(image_sets.sets, text_sets.sets),
            pair.similarity,
            self.numbers["log_scale"].exp().clamp(max=self.max_scale) if "log_scale" in self.numbers else None,
            self.numbers.get("bias"),
            batch.objects,
            batch.moment,
        )
        total = total_loss(step, self.terms)
        return total.loss, dict(total.parts)


def _product(output: HeadOutput, gradients: Mapping[str, Tensor]) -> Tensor:
    """Returns the sum of an output's tensors times their gradients."""
    values = {"sets": output.sets, "residuals": output.residuals, **output.auxiliary}
    total = 0.0 * output.sets.sum()
    for name, gradient in gradients.items():
        value = values[name]
        assert value is not None
        # sets of this micro-batch may be smaller than the largest
        total = total + (value * (gradient[:, : value.shape[1]] if value.ndim == 3 else gradient)).sum()
    return total


def _hybrid_similarity(model: SetModel) -> nn.Module:
    if model.settings.name != "dhset":
        raise InputError(
            f"expected the head dhset for triplet_hybrid, found {model.settings.name}; leave its weight at 0"
        )
    trained = model.pair.similarity
    return HybridOf(trained) if isinstance(trained, DhSetRows) else make_matching("dhset_hybrid")


def gathered(output: HeadOutput) -> HeadOutput:
    """Returns the output of all ranks, in rank order, with gradient; what is no row of the batch stays. Collective."""
    if distributed.world_size() == 1:
        return output
    size = _largest(output.sets.shape[1], output.sets.device)
    missing = size - output.sets.shape[1]
    sets, mask, residuals = output.sets, output.mask, output.residuals
    has_mask = bool(_largest(int(mask is not None), sets.device)) or bool(_largest(missing, sets.device))
    if has_mask:
        mask = mask if mask is not None else torch.ones(sets.shape[:2], dtype=torch.bool, device=sets.device)
        mask = distributed.gather(nn.functional.pad(mask, (0, missing)).to(torch.uint8)).bool()
    auxiliary = dict(output.auxiliary)
    if "weighted" in auxiliary:
        auxiliary["weighted"] = _rows(auxiliary["weighted"], missing)
    for name in ("mean", "log_sigma"):
        if name in auxiliary:
            auxiliary[name] = distributed.gather_with_gradient(auxiliary[name].contiguous())
    return replace(
        output,
        sets=_rows(sets, missing),
        mask=mask if has_mask else None,
        attention=None,
        residuals=None if residuals is None else _rows(residuals, missing),
        auxiliary=auxiliary,
    )


def _rows(values: Tensor, missing: int) -> Tensor:
    return distributed.gather_with_gradient(nn.functional.pad(values, (0, 0, 0, missing)).contiguous())


def _largest(value: int, device: torch.device) -> int:
    return int(distributed.reduce_over_ranks(torch.tensor(value), "max", device))


def terms_of(config: FinetuneConfig) -> dict[str, Weighted]:
    """Returns the losses of a run. Raises InputError where they need what is not there."""
    terms = config.terms()
    if not terms:
        raise InputError("expected at least one loss with a weight above 0, found none; triplet is the usual one")
    if "contrastive" in terms and config.contrastive.weights == "frequency":
        raise InputError(
            "expected a contrastive loss whose objects count alike, found --contrastive.weights frequency; leave it out"
        )
    if config.contrastive.group_size is not None:
        raise InputError(
            "expected a contrastive loss of all pairs of a step, found --contrastive.group-size "
            f"{config.contrastive.group_size}; groups are for pretraining: leave it out, or give a smaller --batch-size"
        )
    return terms

"""A step in micro-batches whose loss is that of the whole batch (GradCache: Gao et al. 2021, arXiv 2101.06983), for sets.

All micro-batches are encoded without gradient; the loss, taken once over all sets, gives the gradient of each; then each
micro-batch is encoded again, with gradient, which goes on from there. So memory is that of a micro-batch, and negatives and
gradients are those of the undivided step, what is drawn (dropout, samples) and bf16's rounding aside: for one more forward pass.
Batch norm would see micro-batches, so heads with one are refused (towers' statistics stay anyway). Used by the loop.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.features import Inputs
from finetune.noise import DroppedPixels
from finetune.step import Pull, StepBatch, StepModule
from pretrain.feature_cache import random_state, set_random_state
from setclip.errors import InputError
from setclip.models.backbones import Features
from setclip.models.heads import HeadOutput
from setclip.models.set_model import SetModel


def check_micro_batches(number: int, local_batch_size: int, model: SetModel) -> None:
    """Raises InputError where a step cannot be divided so."""
    if number == 1:
        return
    if local_batch_size % number:
        raise InputError(
            f"expected --accumulate to divide the {local_batch_size} pictures of a rank's step, found {number}; take "
            f"{math.gcd(number, local_batch_size)}, or another --batch-size"
        )
    norms = [n for n, module in model.pair.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        is_projection = model.settings.projection is not None and all(n.startswith("image.norm.") for n in norms)
        what, found = ("projection", model.settings.projection) if is_projection else ("head", model.settings.name)
        raise InputError(
            f"expected a {what} without batch norm for --accumulate {number}, found {found}, whose statistics would be "
            "those of micro-batches; take more ranks, which share them, or a smaller batch"
        )


def divided_backward(
    module: StepModule,
    wrapped: nn.Module,
    accelerator: Accelerator,
    images: Inputs | DroppedPixels,
    texts: Inputs,
    batch: StepBatch,
    number: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the gradient of the whole batch's loss to the parameters; returns what `StepModule` gives. Collective.

    `wrapped`: the module as accelerate prepared it. A loss that is not finite gives gradients that are not.
    """
    shares = list(zip(parts_of(images, number), parts_of(texts, number), strict=True))
    random: list[tuple[Tensor, Tensor | None]] = []
    made: list[tuple[HeadOutput, HeadOutput]] = []
    device = next(module.parameters()).device
    with torch.no_grad():
        for share in shares:
            random.append(random_state(device))
            made.append(wrapped(*share))
    leaves = [_leaves(_joined([pair[side] for pair in made])) for side in (0, 1)]
    loss, parts = module.loss_of(leaves[0], leaves[1], batch)
    scaled = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
    tensors = [each for leaf in leaves for each in _tensors(leaf).values()]
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(scaled, [*tensors, *parameters], allow_unused=True)
    found = iter(gradients)
    of_sides = [{name: next(found) for name in _tensors(leaf)} for leaf in leaves]
    of_loss = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    for place, (share, state) in enumerate(zip(shares, random, strict=True)):
        is_last = place == number - 1
        pulls = [_pull(of_side, place, number, is_last) for of_side in of_sides]
        set_random_state(state, device)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(wrapped):
            pulled = wrapped(*share, pull=Pull(pulls[0], pulls[1], of_loss if is_last else {}))
            accelerator.backward(pulled)
    return loss.detach(), parts


_ROWS = ("sets", "residuals", "weighted", "mean", "log_sigma")
"""What of a HeadOutput has a row a sample; "profiles" are of the weights alone"""


def parts_of(inputs: Inputs | DroppedPixels, number: int) -> list[Inputs | DroppedPixels]:
    """Returns inputs in so many equal parts."""
    if isinstance(inputs, Tensor):
        return list(inputs.chunk(number))
    if isinstance(inputs, DroppedPixels):
        pixels, keys = inputs.pixels.chunk(number), inputs.dropping.keys.chunk(number)
        return [
            DroppedPixels(own, replace(inputs.dropping, keys=of_own)) for own, of_own in zip(pixels, keys, strict=True)
        ]
    masks: Sequence[Tensor | None] = [None] * number if inputs.mask is None else inputs.mask.chunk(number)
    pooled: Sequence[Tensor | None] = [None] * number if inputs.pooled is None else inputs.pooled.chunk(number)
    return [Features(*each) for each in zip(inputs.local.chunk(number), masks, pooled, strict=True)]


def _joined(outputs: Sequence[HeadOutput]) -> HeadOutput:
    """Returns the outputs of micro-batches as one; smaller sets get masked places behind."""
    size = max(output.sets.shape[1] for output in outputs)
    first = outputs[0]
    mask = None
    if any(output.mask is not None or output.sets.shape[1] != size for output in outputs):
        masks = [
            output.mask if output.mask is not None else torch.ones_like(output.sets[..., 0], dtype=torch.bool)
            for output in outputs
        ]
        mask = torch.cat([nn.functional.pad(each, (0, size - each.shape[1])) for each in masks])

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        if tensors[0].ndim == 2:
            return torch.cat(list(tensors))
        return torch.cat([nn.functional.pad(each, (0, 0, 0, size - each.shape[1])) for each in tensors])

    auxiliary = {
        name: rows([output.auxiliary[name] for output in outputs]) for name in first.auxiliary if name in _ROWS
    }
    auxiliary |= {"profiles": first.auxiliary["profiles"]} if "profiles" in first.auxiliary else {}
    residuals = None if first.residuals is None else rows([o.residuals for o in outputs if o.residuals is not None])
    return HeadOutput(rows([output.sets for output in outputs]), mask, None, residuals, auxiliary)


def _tensors(output: HeadOutput) -> dict[str, Tensor]:
    """Returns by name what losses look at."""
    residuals = {} if output.residuals is None else {"residuals": output.residuals}
    return {"sets": output.sets, **residuals, **output.auxiliary}


def _leaves(output: HeadOutput) -> HeadOutput:
    """Returns the output with tensors that gradients stop at."""
    return replace(
        output,
        sets=output.sets.detach().requires_grad_(),
        residuals=None if output.residuals is None else output.residuals.detach().requires_grad_(),
        auxiliary={name: value.detach().requires_grad_() for name, value in output.auxiliary.items()},
    )


def _pull(gradients: dict[str, Tensor | None], place: int, number: int, is_last: bool) -> dict[str, Tensor]:
    """Returns the gradients of one micro-batch's outputs; those of "profiles" with the last."""
    found = {}
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        if name in _ROWS:
            found[name] = gradient.chunk(number)[place]
        elif is_last:
            found[name] = gradient
    return found

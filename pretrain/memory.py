"""How much memory a rank needs, estimated before anything is built. Used by the checks of a run and by pretrain.doctor.

What the towers keep for the backward pass is counted on the actual model with tensors that have a shape and no content (torch's
fake tensors), for two batches, and is linear in the pairs. What DeepSpeed keeps per parameter was measured on DeepSpeed 0.19
(tests compare the estimate with the peak of real steps). Letters: B pairs on this rank, N over all ranks, D width.

Not counted: NCCL's buffers and evaluation along the way; and, in the machine's memory, the program itself, loader processes,
and the copy of weights and moments that is made while a checkpoint is written. torch.compile keeps other (mostly fewer)
activations than are counted.
"""

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.engine import EngineConfig
from pretrain.losses.blocks import SHAPES
from pretrain.model_options import ModelConfig, build_for_training
from setclip.models.clip import image_size_of

MARGIN = 0.9  # of what is there: an estimate above it is said

BUCKET_ELEMENTS = 500_000_000
"""Gradients that ZeRO collects before it sends them (DeepSpeed's reduce_bucket_size): memory that a GPU gives at once, and a CPU
only as far as it is written to."""

_ROUGH_PAIRS = 16  # on which the bound is counted: enough that what is made of weights is a small part
_PAIRS = (128, 256)  # on which activations are counted; with fewer, the gradient of a large embedding would be the peak
_BLOCKS = 3  # of logits that are held at once: the block, its partner, and what is rounded
_ALLOWANCE = 8  # one part in so many of the activations: real steps on a CPU took 10 to 18 % more than is counted
_TARGET_BYTES = 2048  # a pair's share of the targets: the expansion's entries and columns, and what they are made from


@dataclass(frozen=True)
class ModelCost:
    """What a model costs, whatever the batch."""

    trained: int
    """Parameters that are trained"""
    frozen: int
    """Parameters that are not"""
    image_size: int
    """Side of the pictures, in pixels"""
    width: int
    """D"""
    fixed: int
    """Bytes of activations that do not depend on the batch"""
    per_pair: int
    """Bytes of activations a pair: at the peak of a forward and backward pass"""

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trained + self.frozen

    def activations(self, pairs: int) -> int:
        """Returns the bytes of activations of so many pairs at once."""
        return self.fixed + self.per_pair * pairs


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank needs at the peak of a step, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    batch: int
    allowance: int
    """For gaps between an allocator's blocks and for the scratch memory of kernels"""

    @property
    def total(self) -> int:
        """All together."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Name to bytes."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {in_units(value)}" for name, value in self.parts.items())
        return f"{in_units(self.total)} ({parts})"


def in_units(value: float) -> str:
    """Returns bytes as "3.21 GB" or "32 MB"."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def cost_of(model_cfg: Mapping[str, Any], options: ModelConfig, precision: str) -> ModelCost:
    """Returns what a model costs in "fp32" or "bf16", trained as `options` say. Takes 0.5 to 3 s, and 1 s more the first time."""
    return _cost_of(json.dumps(model_cfg, sort_keys=True), options, precision)


@lru_cache(maxsize=8)
def _cost_of(model_cfg: str, options: ModelConfig, precision: str) -> ModelCost:
    dtype = _dtype(precision)
    with FakeTensorMode():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # fake parameters cannot be converted
        try:
            model = build_for_training(json.loads(model_cfg), options)
        finally:
            torch.set_default_dtype(before)
        small, large = (_activations(model, pairs, dtype) for pairs in _PAIRS)
        per_pair = (large - small) // (_PAIRS[1] - _PAIRS[0])
        return _cost(model, int(json.loads(model_cfg)["embed_dim"]), max(0, small - _PAIRS[0] * per_pair), per_pair)


def bound_of(model_cfg: Mapping[str, Any], options: ModelConfig, precision: str) -> ModelCost:
    """Returns a cost that is too high, in a sixth of the time of `cost_of`: enough to see that a model is far from any limit.

    Activations are twice all that the forward pass makes, kept or not: the backward pass holds no more than that at once.
    """
    with torch.device("meta"):
        model = build_for_training(model_cfg, options).to(_dtype(precision))
        size = image_size_of(model)
        images = torch.empty(_ROUGH_PAIRS, 3, size, size, dtype=_dtype(precision))
        tokens = torch.zeros(_ROUGH_PAIRS, int(model.context_length), dtype=torch.int64)  # type: ignore[arg-type]
    model.train()
    with torch.no_grad(), _Peak() as peak:
        model(images, tokens)
    return _cost(model, int(model_cfg["embed_dim"]), 0, 2 * peak.made // _ROUGH_PAIRS)


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _cost(model: torch.nn.Module, width: int, fixed: int, per_pair: int) -> ModelCost:
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(number for number, is_trained in numbers if is_trained)
    frozen = sum(number for number, is_trained in numbers if not is_trained)
    return ModelCost(trained, frozen, image_size_of(model), width, fixed, per_pair)


def _activations(model: torch.nn.Module, pairs: int, dtype: torch.dtype) -> int:
    """Returns the largest number of bytes at once beside weights and gradients, forward and backward. In a FakeTensorMode."""
    size = image_size_of(model)
    images = torch.empty(pairs, 3, size, size, dtype=dtype)
    tokens = torch.zeros(pairs, int(model.context_length), dtype=torch.int64)  # type: ignore[arg-type]
    # Gradients leave as they come: DeepSpeed takes them into buffers of its own.
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in model.parameters() if p.requires_grad]
    model.train()
    with _Peak() as peak:
        image_features, text_features, *scalars = model(images, tokens)
        sum(value.sum() for value in (image_features, text_features, *scalars)).backward()
    for hook in hooks:
        hook.remove()
    return peak.bytes


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Peak(TorchDispatchMode):
    """Counts the memory that operations make while it is there: `bytes` is the most at once, `made` all together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.made = 0
        self._now = 0
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            del self._known[key]
            self._now -= size

        self._known[key] = (weakref.ref(storage, freed), size)
        self._now += size
        self.made += size
        self.bytes = max(self.bytes, self._now)


def estimate_memory(
    cost: ModelCost,
    engine: EngineConfig,
    local_batch_size: int,
    world_size: int,
    device: str,
    has_average: bool = False,
) -> MemoryEstimate:
    """Returns what a rank needs at the peak of a step. `device`: "cpu" or "cuda".

    `cost` must be of the engine's precision. `has_average`: a moving average of the weights is kept.
    """
    trained, ranks, stage = cost.trained, world_size, engine.zero_stage
    size = 2 if engine.precision == "bf16" else 4  # of a weight while computing
    states = 4 * (2 + has_average)  # bytes a weight: the moments and the average
    bucket = BUCKET_ELEMENTS if device == "cuda" else min(BUCKET_ELEMENTS, trained)
    if stage == 0:
        weights, optimizer = 4 * trained, states * trained
        gradients = 2 * 4 * trained  # and flattened, while they are averaged
    elif stage < 3:
        # DeepSpeed 0.19 keeps the weights twice, flat and as they were given to it.
        weights = 2 * size * trained + 4 * trained // ranks
        optimizer = states * trained // ranks
        # While they are reduced, or flattened and converted for the step.
        gradients = max(size * (trained + bucket), (2 * size + 4) * trained // ranks)
    else:
        # Weights that are fetched while they are used; gloo copies what it sends and what comes.
        whole = (4 if device == "cpu" else 2) * size * trained if ranks > 1 else 0
        weights = (size + 4) * trained // ranks
        optimizer = states * trained // ranks
        gradients = size * trained // ranks + size * bucket + max(whole, (size + 4) * trained // ranks)
    weights += size * cost.frozen // (ranks if stage == 3 else 1)
    weights += 4 * cost.frozen if device == "cpu" else 0  # the engine's copy, which stays on the CPU
    pixels = 3 * cost.image_size**2
    activations = cost.activations(local_batch_size // engine.accumulation)
    return MemoryEstimate(
        weights,
        gradients,
        optimizer,
        activations,
        _loss_bytes(local_batch_size, world_size * local_batch_size, cost.width, size, device),
        local_batch_size * pixels * (1 + 4 + (2 if size == 2 else 0)),  # as read, normalised, and rounded
        activations // _ALLOWANCE,
    )


def _loss_bytes(local: int, pairs: int, width: int, size: int, device: str) -> int:
    """Returns the bytes of the loss: features of all ranks with their products, blocks of logits, targets."""
    rows, columns = SHAPES[device]
    blocks = _BLOCKS * 4 * min(rows, local) * min(columns, pairs)
    of_all = 2 * (size + 4) * pairs * width  # gathered features; their products with the softmax and with the targets
    of_rank = 4 * (size + 4) * local * width
    return blocks + of_all + of_rank + _TARGET_BYTES * pairs


def fitting_accumulation(
    cost: ModelCost,
    engine: EngineConfig,
    local_batch_size: int,
    world_size: int,
    device: str,
    limit: float,
    has_average: bool = False,
) -> tuple[int, MemoryEstimate] | None:
    """Returns the fewest micro-batches with which a rank needs at most `limit` bytes, and what it needs; None: none do."""
    for number in range(1, local_batch_size + 1):
        if local_batch_size % number == 0:
            changed = replace(engine, accumulation=number)
            found = estimate_memory(cost, changed, local_batch_size, world_size, device, has_average)
            if found.total <= limit:
                return number, found
    return None

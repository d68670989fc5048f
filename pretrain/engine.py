"""The DeepSpeed engine around a CLIP model: initialise, step, and nothing that is not DeepSpeed's.

Any ZeRO stage, fp32 or bf16, GPUs or CPUs; torch's AdamW is passed in (naming "AdamW" in DeepSpeed's configuration
would compile its own for minutes). `pretrain.state` takes the state out and puts it back. Used by pretrain.
"""

import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.feature_cache import FeatureCache, Features
from pretrain.model_options import locked_norms, patch_dropout_of
from pretrain.optim import OptimConfig, parameter_groups
from setclip.distributed import World
from setclip.errors import InputError

# DeepSpeed logs its whole configuration at INFO, and looks for compilers when it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed

deepspeed.utils.logger.setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations while computing; master weights and AdamW's moments are fp32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    compile: bool = False
    """Compile the model with torch.compile: a minute or so before the first step, then faster ones. Not at ZeRO 3."""
    accumulation: int = 1
    """Micro-batches in which a rank encodes its pairs of a step, to save memory; they are one batch to the loss."""

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, found {self.accumulation}")
        if self.compile and self.zero_stage == 3:
            # Each module's weights come and go by hooks, which torch.compile neither sees nor keeps in order.
            raise ValueError("compile needs --engine.zero-stage 0, 1 or 2; found 3")
        if self.precision == "bf16" and self.zero_stage == 0:
            # At stage 0 DeepSpeed's bf16 optimizer runs a real step while it is built.
            raise ValueError("precision bf16 needs --engine.zero-stage 1, 2 or 3; found 0")


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step; the same on every rank."""

    grad_norm: float
    """L2 norm of the gradient over all parameters before clipping; not finite where the step was skipped."""
    is_applied: bool
    """False where loss or gradient were not finite on some rank: weights, moments and buffers are then as before."""


class Engine:
    """A model, its optimizer and the collectives between ranks."""

    def __init__(
        self, model: torch.nn.Module, config: EngineConfig, optim: OptimConfig, local_batch_size: int, world: World
    ):
        self.config, self.optim, self.world = config, optim, world
        if world.device.type == "cpu":
            # Skips a compilation of a minute whose lock file would hang every later run if it were killed.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it even of a single process
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
        # DeepSpeed keeps a copy of the world's group, which is gone where a run before this one has left it.
        deepspeed.utils.groups._WORLD_GROUP = None
        self.model = model.to(world.device)
        if getattr(model, "logit_bias", None) is not None:
            model.register_forward_hook(_with_own_bias)
        self._cache: FeatureCache | None = None
        self._patch_dropout = patch_dropout_of(model)
        self._memory_format = _memory_format(model)
        self._locked_norms = locked_norms(model)
        self.locked = {
            name: p.detach().float().cpu().clone() for name, p in model.named_parameters() if not p.requires_grad
        }
        """Parameters that are not trained, fp32 on the CPU: DeepSpeed rounds them to bf16, and partitions them at ZeRO 3."""
        # Batch norm's statistics take in a batch while it is encoded, also one whose step is skipped.
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        self._buffers = [buffer for module in norms for buffer in module.buffers()]
        self._buffers_before: list[Tensor] = []
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, optim.weight_decay),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,  # one pass over memory: 4 ms instead of 45 for 7 M parameters on two CPU cores
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": local_batch_size,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": optim.clip_grad_norm,
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": config.precision == "bf16"},
                "steps_per_print": 10**9,
                "wall_clock_breakdown": False,
            },
        )
        if self.deepspeed.world_size != world.size:
            raise InputError(
                f"expected {world.size} ranks, found {self.deepspeed.world_size} in DeepSpeed; check the launcher"
            )

        if config.compile:
            # In place: names of parameters stay, and so do DeepSpeed's hooks. Random draws are those of the plain model.
            self.model.compile(dynamic=False, options={"fallback_random": True})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the towers compute."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def forward(self, images: Tensor, tokens: Tensor, draws: Tensor | None = None) -> Features:
        """Returns the features of B pairs, with exp(logit_scale) capped. `step` takes a loss that is made of them.

        `draws`, (B,) int64, decides which patches each picture keeps where there is patch dropout.
        """
        images = images.to(self.dtype, memory_format=self._memory_format)
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        inputs = (images, tokens) if draws is None or self._patch_dropout is None else (images, tokens, draws)
        if self.config.accumulation == 1:
            return self._encode(*inputs)
        self._cache = FeatureCache(self._encode, self.model, inputs, self.config.accumulation)
        return self._cache.features

    def step(self, loss: Tensor, lr: float) -> StepOutcome:
        """Averages the gradients of `loss` over ranks, clips, and steps at `lr` unless something is not finite."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        # An infinite loss may have a finite gradient; as NaN it reaches every rank.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        if self._cache is None:
            self.deepspeed.backward(loss)
        else:
            self._cache.backward(loss, self._backward_part)
            self._cache = None
        outcome = self._step_plain() if self.config.zero_stage == 0 else self._step_sharded()
        if not outcome.is_applied:
            for buffer, value in zip(self._buffers, self._buffers_before, strict=True):
                buffer.copy_(value)
        return outcome

    def _step_plain(self) -> StepOutcome:
        # At stage 0 DeepSpeed clips without keeping the norm, and steps whatever it is.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if math.isfinite(norm):
            self.deepspeed.step()
            return StepOutcome(float(norm), True)
        self.deepspeed.zero_grad()
        self.deepspeed.micro_steps += 1
        self.deepspeed.global_steps += 1
        self.deepspeed.skipped_steps += 1
        return StepOutcome(float(norm), False)

    def _step_sharded(self) -> StepOutcome:
        self.deepspeed.step()
        if self.deepspeed.was_step_applied():
            return StepOutcome(float(self.deepspeed.get_global_grad_norm()), True)
        return StepOutcome(math.inf, False)

    def _encode(self, images: Tensor, tokens: Tensor, draws: Tensor | None = None) -> Features:
        if draws is not None and self._patch_dropout is not None:
            self._patch_dropout.draw(draws)
        output: Any = self.deepspeed(images, tokens)
        return Features(output[0], output[1], _Capped.apply(output[2], self.optim.max_logit_scale), *output[3:])

    def _backward_part(self, loss: Tensor, is_last: bool) -> None:
        # DeepSpeed knows of one micro-batch a step, or it would divide by their number; it is told where a step ends.
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss)

    def set_step(self, step: int) -> None:
        """Sets the counters of a resumed run."""
        self.deepspeed.global_steps = self.deepspeed.micro_steps = step

    def train(self, mode: bool = True) -> None:
        """Switches dropout and batch norm, but for norms that are locked: their statistics stay."""
        self.deepspeed.train(mode)
        for norm in self._locked_norms:
            norm.eval()

    def close(self) -> None:
        """Frees what DeepSpeed holds."""
        self.deepspeed.destroy()


def _with_own_bias(model: torch.nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies the bias, which open_clip hands out as it is: ZeRO 3 takes parameters away after the forward pass."""
    return *output[:3], output[3].clone()


class _Capped(torch.autograd.Function):
    """min(scale, cap), whose gradient vanishes only where it would raise a scale that is at the cap.

    CLIP clamps the parameter itself after each step; ZeRO keeps master copies elsewhere that would undo that, and a
    plain clamp has no gradient above the cap, so that the scale could never come down again.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, cap: float) -> Tensor:
        ctx.is_at_cap = scale >= cap
        return scale.clamp(max=cap)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.is_at_cap & (gradient < 0), 0.0, gradient), None


def _memory_format(model: Any) -> torch.memory_format:
    """Returns how pictures lie in memory: with channels last before a tower of convolutions, which keep that layout.

    It takes less time (docs/results.md). The one convolution of a plain transformer would gain nothing.
    """
    convolutions = [m for m in model.visual.modules() if isinstance(m, torch.nn.Conv2d)]
    return torch.channels_last if len(convolutions) > 1 else torch.preserve_format

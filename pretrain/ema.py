"""The exponential moving average of the weights, in fp32, updated after each optimizer step. Used by the loop.

It lies beside AdamW's moments and is shared out among ranks as they are: by parameter at ZeRO 0, a rank's part of it at 1, 2 and
3. So it leaves and enters an engine as they do, on any number of ranks and at any stage. Batch norm's statistics are averaged
likewise; locked weights are as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.engine import Engine
from pretrain.state import begin_states, gather_states, gather_weights, restore_states, set_states, stepped_tensors

KIND = "ema"


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """A moving average of the weights, kept and saved beside them."""

    decay: float = 0.0
    """What is left of the average after a step, for example 0.9998; 0: no average."""
    warmup: bool = True
    """Let the average forget the first weights soon: after t steps the decay is at most (1 + t)/(10 + t)."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), found {self.decay}")

    def decay_at(self, applied_steps: int) -> float:
        """Returns the decay of the optimizer step that is the `applied_steps`-th (from 1)."""
        return min(self.decay, (1 + applied_steps) / (10 + applied_steps)) if self.warmup else self.decay

    def in_words(self, global_batch_size: int, samples_per_epoch: int) -> str:
        """Returns what the decay means in samples, as that depends on the batch."""
        half = global_batch_size * math.log(0.5) / math.log(self.decay)
        return (
            f"moving average of the weights: decay {self.decay:g} a step of {global_batch_size:,} pairs, so half of it is of the "
            f"last {half:,.0f} samples ({half / samples_per_epoch:.2f} epochs); with another batch size b the same window has "
            f"the decay {self.decay:g}^(b/{global_batch_size})"
        )


class Ema:
    """The average of an engine's weights. All ranks hold one."""

    def __init__(self, config: EmaConfig, engine: Engine, applied_steps: int):
        """Begins with the weights as they are. `engine` is new, or has been given the state after `applied_steps` steps."""
        self._config, self._engine = config, engine
        if not applied_steps:
            begin_states(engine, 0)  # AdamW makes its moments in the first step only where there is no state at all
        self._pairs = [(tensor, torch.empty_like(tensor)) for tensor in stepped_tensors(engine)]
        for weight, average in self._pairs:
            average.copy_(weight.detach())
        set_states(engine, KIND, [average for _, average in self._pairs])
        persistent = engine.model.state_dict().keys()
        self._buffers = {
            name: buffer.detach().float().clone()
            for name, buffer in engine.model.named_buffers()
            if name in persistent and buffer.is_floating_point()
        }

    def update(self, applied_steps: int) -> None:
        """Takes in the weights after the `applied_steps`-th optimizer step. No collective."""
        share = 1 - self._config.decay_at(applied_steps)
        with torch.no_grad():
            for weight, average in self._pairs:
                average.lerp_(weight.detach(), share)
            now = dict(self._engine.model.named_buffers())
            for name, average in self._buffers.items():
                average.lerp_(now[name].detach().float(), share)

    def weights(self) -> dict[str, Tensor]:
        """Returns a whole model's weights by name, averaged, fp32 on the CPU, on every rank. Collective."""
        weights = gather_weights(self._engine)
        weights |= gather_states(self._engine, KIND)
        return weights | {name: average.cpu().clone() for name, average in self._buffers.items()}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Puts in what `weights` gave, on whatever ranks. Collective."""
        restore_states(self._engine, KIND, weights)
        for name, average in self._buffers.items():
            average.copy_(weights[name])

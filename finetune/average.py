"""The exponential moving average of a model's weights, in fp32. Pretraining's (`pretrain.ema`) lies in DeepSpeed's engine; the
settings are the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.ema import EmaConfig
from setclip.models.set_model import SetModel


class Average:
    """Begins with the weights as they are. Frozen weights are as they are, and cost nothing."""

    def __init__(self, config: EmaConfig, model: SetModel):
        self._config, self._model = config, model
        self._values = {name: value.detach().clone() for name, value in self._moving().items()}

    def _moving(self) -> dict[str, Tensor]:
        """Returns what can move: floating-point buffers that are saved, and parameters that learn."""
        frozen = {name for name, parameter in self._model.named_parameters() if not parameter.requires_grad}
        state = self._model.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point() and name not in frozen}

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """Takes in the weights after the `applied_steps`-th optimizer step."""
        share = 1 - self._config.decay_at(applied_steps)
        for name, value in self._moving().items():
            if name in self._values:
                self._values[name].lerp_(value.float(), share)
            else:  # a tower that has just begun to learn
                self._values[name] = value.clone()

    def weights(self) -> dict[str, Tensor]:
        """Returns a whole model's weights, averaged."""
        return {**self._model.state_dict(), **self._values}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Puts in what `weights` gave."""
        for name, value in self._values.items():
            value.copy_(weights[name])

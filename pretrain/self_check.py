"""After the first real step: have the weights moved, and do the engine's counters agree? Used by the loop.

A run whose weights never change looks healthy in every log but for its loss.
"""

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from pretrain.engine import Engine
from pretrain.model_options import SCALARS
from setclip.log import say

_PROBED = 3  # parameters of each tower


class SelfCheck:
    """Keeps a few parameters as they are, and looks at them again after the first step at a learning rate above 0."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._before: dict[str, Tensor] | None = self._probe()

    def after_step(self, step: int, lr: float) -> None:
        """Checks once. Collective. Raises RuntimeError that says what did not happen."""
        counted = self._engine.deepspeed.global_steps
        if counted != step:
            raise RuntimeError(
                f"expected the engine to have counted {step:,} steps, found {counted:,}: it does not step"
            )
        before = self._before
        if before is None or lr == 0:
            return
        self._before, after = None, self._probe()
        for tower in ("image", "text"):
            names = [name for name in before if name.startswith("visual.") == (tower == "image")]
            if names and all(torch.equal(before[name], after[name]) for name in names):
                raise RuntimeError(
                    f"expected the {tower} tower's weights to have moved at step {step:,} (learning rate {lr:.2e}), found "
                    f"{', '.join(names)} as they were: the run would learn nothing"
                )
        moved = sum(not torch.equal(before[name], after[name]) for name in before)
        say(f"self-check: {moved} of {len(before)} parameters probed have moved, steps counted: {step:,}")

    def _probe(self) -> dict[str, Tensor]:
        """Returns some trainable parameters by name, fp32 on the CPU. Collective."""
        # A scale that begins at its cap may stay there.
        trainable = [(n, p) for n, p in self._engine.model.named_parameters() if p.requires_grad and n not in SCALARS]
        chosen = []
        for is_image in (True, False):
            of_tower = [item for item in trainable if item[0].startswith("visual.") == is_image]
            chosen += of_tower[:: max(1, len(of_tower) // _PROBED)][:_PROBED]
        stage = self._engine.config.zero_stage
        return {
            name: (safe_get_full_fp32_param(p) if stage else p).detach().float().cpu().clone() for name, p in chosen
        }

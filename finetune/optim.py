"""AdamW's parameter groups and learning rates of fine-tuning: pretraining's schedule or steps, factors for towers and heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pretrain.optim import OptimConfig, learning_rate
from setclip.models.set_model import SetModel


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW with warm-up, then a cosine or steps."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    warmup_share: float = 0.0
    clip_grad_norm: float = 2.0
    schedule: Literal["cosine", "steps"] = "cosine"
    """steps: the rate is multiplied by --optim.decay after each of --optim.decay-epochs."""
    decay_epochs: tuple[float, ...] = ()
    """Of steps."""
    decay: float = 0.1
    """Of steps."""

    def rate(self, samples_seen: int, total_samples: int, epoch: float) -> float:
        """Returns the learning rate of the step that begins after so many pictures and epochs."""
        if self.schedule == "cosine":
            return learning_rate(self, samples_seen, total_samples)
        warmup = self.warmup_samples or round(self.warmup_share * total_samples)
        rising = samples_seen / warmup if samples_seen < warmup else 1.0
        return self.lr * rising * self.decay ** sum(epoch >= end for end in self.decay_epochs)


def parameter_groups(
    model: SetModel, others: Mapping[str, nn.Parameter], config: FinetuneOptimConfig, tower_factor: float
) -> list[dict[str, Any]]:
    """Returns AdamW groups with a "factor" of the common rate each: towers, heads, and what the heads name themselves.

    `others`: numbers of losses. Parameters that are frozen now are in them too, as they may be unfrozen.
    """
    factors: dict[str, float] = {}
    plain: set[str] = set()
    for side in ("image", "text"):
        head = getattr(model.pair, side)
        factors |= {f"pair.{side}.{name}": factor for name, factor in head.learning_rate_factors().items()}
        plain |= {f"pair.{side}.{name}" for name in head.without_weight_decay()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in (*model.named_parameters(), *others.items()):
        factor = tower_factor if name.startswith("backbone.") else factors.get(name, 1.0)
        decay = config.weight_decay if parameter.ndim >= 2 and name not in plain else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (factor, decay), parameters in groups.items()
    ]

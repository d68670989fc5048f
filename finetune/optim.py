"""AdamW's parameter groups and learning rates of fine-tuning: a cosine, steps or plateau, and factors for towers and heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pretrain.optim import OptimConfig, learning_rate
from setclip.models.set_model import SetModel

_BETTER_BY = 1e-4  # torch's ReduceLROnPlateau: a share of the best


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW with warm-up, then a cosine, steps, or steps that validation decides."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    warmup_share: float = 0.0
    clip_grad_norm: float = 2.0
    schedule: Literal["cosine", "steps", "plateau"] = "cosine"
    """steps: the rate is multiplied by --optim.decay after each of --optim.decay-epochs. plateau: it is where validation's RSUM
    has not grown in more than --optim.patience validations."""
    decay_epochs: tuple[float, ...] = ()
    """Of steps."""
    decay: float = 0.1
    """Of steps and plateau."""
    rates: tuple[float, ...] = ()
    """Of steps: the rate from each of --optim.decay-epochs on, in place of --optim.decay."""
    patience: int = 10
    """Of plateau."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates and (len(self.rates) != len(self.decay_epochs) or min(self.rates) <= 0):
            raise ValueError(
                f"expected one rate above 0 for each of the {len(self.decay_epochs)} --optim.decay-epochs, found "
                f"--optim.rates {' '.join(map(str, self.rates))}"
            )
        if list(self.decay_epochs) != sorted(self.decay_epochs):
            raise ValueError(f"expected --optim.decay-epochs in order, found {' '.join(map(str, self.decay_epochs))}")
        if self.decay <= 0 or self.patience < 0:
            raise ValueError(f"decay must be above 0 and patience not negative, found {self.decay} and {self.patience}")

    def rate(self, samples_seen: int, total_samples: int, epoch: float, validations: Sequence[float] = ()) -> float:
        """Returns the learning rate of the step that begins after so many pictures and epochs.

        `validations`: what validation has found so far, in order, for plateau.
        """
        if self.schedule == "cosine":
            return learning_rate(self, samples_seen, total_samples)
        warmup = self.warmup_samples or round(self.warmup_share * total_samples)
        rising = samples_seen / warmup if samples_seen < warmup else 1.0
        if self.schedule == "plateau":
            return self.lr * rising * self.decay ** plateaus(validations, self.patience)
        passed = sum(epoch >= end for end in self.decay_epochs)
        if self.rates:
            return rising * (self.lr, *self.rates)[passed]
        return self.lr * rising * self.decay**passed


def plateaus(values: Sequence[float], patience: int) -> int:
    """Returns how often a figure that is to grow has stood still: for more than `patience` values in a row, counted anew after
    each time. It is torch's ReduceLROnPlateau in mode "max", as a function of the figures.
    """
    best, waited, times = float("-inf"), 0, 0
    for value in values:
        if value > best * (1 + _BETTER_BY) or best == float("-inf"):
            best, waited = value, 0
        else:
            waited += 1
        if waited > patience:
            waited, times = 0, times + 1
    return times


def parameter_groups(
    model: SetModel,
    others: Mapping[str, nn.Parameter],
    config: FinetuneOptimConfig,
    tower_factors: tuple[float, float],
) -> list[dict[str, Any]]:
    """Returns AdamW groups with a "factor" of the common rate each: towers, heads, and what the heads name themselves.

    `others`: numbers of losses. `tower_factors`: of the image and the text tower. Parameters that are frozen now are in them
    too, as they may be unfrozen.
    """
    factors: dict[str, float] = {}
    plain: set[str] = set()
    for side in ("image", "text"):
        head = getattr(model.pair, side)
        factors |= {f"pair.{side}.{name}": factor for name, factor in head.learning_rate_factors().items()}
        plain |= {f"pair.{side}.{name}" for name in head.without_weight_decay()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in (*model.named_parameters(), *others.items()):
        if name.startswith("backbone."):
            side = model.backbone.side_of(name.removeprefix("backbone."))
            factor = tower_factors[0] if side == "image" else tower_factors[1]
        else:
            factor = factors.get(name, 1.0)
        decay = config.weight_decay if parameter.ndim >= 2 and name not in plain else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (factor, decay), parameters in groups.items()
    ]

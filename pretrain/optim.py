"""AdamW parameter groups and the learning-rate schedule, counted in samples. Used by pretrain and finetune."""

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay."""

    lr: float = 1e-3
    """Peak learning rate, for the global batch size as it is (no scaling rule is applied)."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's β₁, β₂ (SLIP, LaCLIP and DeCLIP use these)."""
    eps: float = 1e-8
    """AdamW's ε."""
    weight_decay: float = 0.1
    """On weights of two and more dimensions; none on norms, biases and logit_scale."""
    warmup_samples: int = 0
    """Samples over which the learning rate rises from 0; 0 takes --optim.warmup-share."""
    warmup_share: float = 0.05
    """Share of the run for the warm-up, where --optim.warmup-samples is 0."""
    final_lr_share: float = 0.0
    """The cosine ends at this share of lr."""
    clip_grad_norm: float = 1.0
    """Largest L2 norm of the gradient over all parameters; 0 turns clipping off."""
    max_logit_scale: float = 100.0
    """exp(logit_scale) is capped at this (CLIP; open_clip does so for siglip too, SigLIP itself states no cap)."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, found {self.lr}")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share must lie in [0, 1), found {self.warmup_share}")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two AdamW groups of the trainable parameters: with weight decay, and without (fewer than 2 dimensions)."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in trainable if p.ndim >= 2]
    plain = [p for _, p in trainable if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(config: OptimConfig, samples_seen: int, total_samples: int) -> float:
    """Returns the learning rate of the step that begins after `samples_seen` samples: linear warm-up, then cosine."""
    warmup = config.warmup_samples or round(config.warmup_share * total_samples)
    if samples_seen < warmup:
        return config.lr * samples_seen / warmup
    progress = min(1.0, (samples_seen - warmup) / max(1, total_samples - warmup))
    final = config.lr * config.final_lr_share
    return final + (config.lr - final) * 0.5 * (1 + math.cos(math.pi * progress))

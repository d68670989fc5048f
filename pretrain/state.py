"""The training state by parameter name, free of ranks: taken out of a DeepSpeed engine and put into another one.

Any number of ranks and any ZeRO stage resumes from the same files, without an offline conversion. DeepSpeed 0.19's
public helpers are not enough for that; what each work-around is for stands beside it. Collective: all ranks call.
Used by pretrain (checkpoints).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from pretrain.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Returns name → fp32 master weight (or buffer, or frozen parameter), on the CPU; complete on every rank.

    Buffers (batch norm's running statistics) are rank 0's own: ranks do not share them.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:  # has no master copy, and may be rounded or partitioned by now
            weights[name] = engine.locked[name].clone()
            continue
        value = safe_get_full_fp32_param(parameter) if engine.config.zero_stage else parameter
        weights[name] = value.detach().float().cpu().clone().reshape(_shape(parameter))
    persistent = engine.model.state_dict().keys()
    for name, buffer in engine.model.named_buffers():
        if name in persistent:
            weights[name] = buffer.detach().cpu().clone()
    return weights


def gather_moments(engine: Engine, step: int) -> dict[str, Tensor]:
    """Returns "exp_avg.NAME" and "exp_avg_sq.NAME" → fp32, on the CPU; complete on every rank. Zeros before step 1."""
    if step:
        return {f"{kind}.{name}": value for kind in MOMENTS for name, value in gather_states(engine, kind).items()}
    # There may be no states yet: asking for them raises on some ranks and hangs the others.
    return {f"{kind}.{name}": torch.zeros(_shape(p)) for kind in MOMENTS for name, p in _trained(engine)}


def gather_states(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Returns name → the optimizer's state of a kind, fp32 on the CPU, of all trained parameters; complete on every rank."""
    if engine.config.zero_stage in (1, 2):
        _link_optimizer_states(engine)
    states: dict[str, Tensor] = {}
    for name, parameter in _trained(engine):
        if engine.config.zero_stage:
            value = safe_get_full_optimizer_state(parameter, kind)
        else:
            value = _plain_optimizer(engine).state[parameter][kind]
        states[name] = value.detach().float().cpu().clone().reshape(_shape(parameter))
    return states


def stepped_tensors(engine: Engine) -> list[Tensor]:
    """Returns what AdamW steps on: fp32 master weights, at ZeRO 1, 2 and 3 this rank's part of them, flat."""
    if engine.config.zero_stage == 3:  # AdamW sees one flat partition at a time, only while it steps
        return list(engine.deepspeed.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in _plain_optimizer(engine).param_groups for tensor in group["params"]]


def begin_states(engine: Engine, step: int) -> None:
    """Makes the optimizer's states as AdamW would in its first step, moments of 0, after `step` steps."""
    optimizer = _plain_optimizer(engine)
    for tensor in stepped_tensors(engine):
        optimizer.state[tensor] = {
            # One tensor each: a shared one would advance once per group. The fused kernel wants it beside the values.
            "step": torch.tensor(float(step), device=tensor.device),
            **{kind: torch.zeros_like(tensor, dtype=torch.float32) for kind in MOMENTS},
        }


def set_states(engine: Engine, kind: str, values: Sequence[Tensor]) -> None:
    """Adds a state of a kind of one's own, one value for each of `stepped_tensors`; AdamW leaves it alone."""
    for tensor, value in zip(stepped_tensors(engine), values, strict=True):
        _plain_optimizer(engine).state[tensor][kind] = value


def restore_states(engine: Engine, kind: str, values: Mapping[str, Tensor]) -> None:
    """Puts what `gather_states` gave into the states of a kind, which are there."""
    if engine.config.zero_stage in (1, 2):
        _link_optimizer_states(engine)
    for name, parameter in _trained(engine):
        value = values[name].to(engine.world.device).reshape(_shape(parameter))
        if engine.config.zero_stage == 0:
            _plain_optimizer(engine).state[parameter][kind].copy_(value)
        elif engine.config.zero_stage == 3:
            safe_set_local_optimizer_state(parameter, _partition(parameter, value), kind)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


def restore(engine: Engine, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int) -> None:
    """Puts master weights and AdamW's moments into an engine that has taken no step.

    `step`: the steps at which AdamW stepped. The model must have been given `weights` before the engine was made: that
    fills buffers and frozen parameters.
    """
    begin_states(engine, step)
    for name, parameter in _trained(engine):
        master = weights[name].to(engine.world.device).reshape(_shape(parameter))
        if engine.config.zero_stage == 0:
            parameter.data.copy_(master)
        elif engine.config.zero_stage == 3:
            safe_set_local_fp32_param(parameter, _partition(parameter, master))
        else:
            safe_set_full_fp32_param(parameter, master)
    for kind in MOMENTS:
        restore_states(engine, kind, {name: moments[f"{kind}.{name}"] for name, _ in _trained(engine)})
    if engine.config.zero_stage in (1, 2):
        engine.deepspeed.optimizer.update_lp_params()  # set_fp32 leaves the model's own weights stale


def _trained(engine: Engine) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in engine.model.named_parameters() if parameter.requires_grad]


def _plain_optimizer(engine: Engine) -> Any:
    """Returns torch's AdamW inside DeepSpeed's wrapper."""
    optimizer = engine.deepspeed.basic_optimizer if engine.config.zero_stage == 0 else engine.deepspeed.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def _link_optimizer_states(engine: Engine) -> None:
    """Ties AdamW's states to the parameters; done once by DeepSpeed, too early where there are two parameter groups."""
    optimizer = engine.deepspeed.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _shape(parameter: Tensor) -> torch.Size:
    """Returns a parameter's own shape, which ZeRO 3 hides while it is partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _partition(parameter: Any, full: Tensor) -> Tensor:
    """Returns this rank's part of a full value at ZeRO 3; the last one is padded with zeros (as DeepSpeed's is)."""
    size = parameter.ds_tensor.ds_numel
    padded = torch.nn.functional.pad(full.flatten(), (0, size * dist.get_world_size() - full.numel()))
    return padded[dist.get_rank() * size : (dist.get_rank() + 1) * size]

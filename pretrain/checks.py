"""What is checked before the first step, beyond a plan: that shards can be read and that memory suffices.

Used by pretrain.run, on all ranks, and by pretrain.doctor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.blocks import BlockShard
from pretrain.config import PretrainConfig, local_batch_size
from pretrain.machine import available_memory, share_of_machine
from pretrain.memory import (
    MARGIN,
    MemoryEstimate,
    ModelCost,
    bound_of,
    cost_of,
    estimate_memory,
    fitting_accumulation,
    in_units,
)
from pretrain.plan import Plan, open_shards
from setclip import distributed
from setclip.distributed import World
from setclip.errors import InputError
from setclip.hashing import hash_u64
from setclip.log import say

_SHARDS_READ, _FROM_SERVERS = 64, 4  # by each rank, at most; of a server a sample takes a block of them with it

_FAR = 0.5  # of what there is: a bound below it needs no closer look

_NAMED = 10  # faults that a message lists


def check_start(config: PretrainConfig, plan: Plan, world: World) -> None:
    """Checks what a plan does not, and says what is close to a limit. Collective; takes seconds, of a small run half a second.

    Raises InputError on all ranks, with everything that is wrong on any of them.
    """
    faults: list[str] = []
    notes: list[str] = []
    try:
        check_readable(plan, world)
    except InputError as error:
        faults.append(str(error))
    available = available_memory(world.device, share_of_machine().ranks)
    for is_exact in (False, True):
        # Alike on all ranks: one of them counts.
        cost = distributed.broadcast(cost_or_reason(config, plan, is_exact) if world.rank == 0 else None)
        if not isinstance(cost, ModelCost):
            if is_exact:
                notes.append(str(cost))
                break
            continue
        found = examine_memory(config, cost, world.size, world.device.type, available)
        if max(distributed.gather_objects(found.share)) <= _FAR:
            break
    else:
        verdict = judge_memory(found, str(world.device))
        (faults if found.share > 1 and config.check_memory else notes).append(verdict)
    of_ranks = distributed.gather_objects((faults, notes))
    for note in merged([notes for _, notes in of_ranks]):
        say(f"note: {note}")
    if wrong := merged([faults for faults, _ in of_ranks]):
        raise InputError("\n".join(wrong))


def merged(of_ranks: Sequence[Sequence[str]]) -> list[str]:
    """Returns the distinct lines of all ranks; where there are several ranks, with those that say each."""
    by_line: dict[str, list[int]] = {}
    for rank, lines in enumerate(of_ranks):
        for line in filter(None, lines):
            by_line.setdefault(line, []).append(rank)
    if len(of_ranks) == 1:
        return list(by_line)
    return [
        line if len(ranks) == len(of_ranks) else f"rank {', '.join(map(str, ranks[:_NAMED]))}: {line}"
        for line, ranks in by_line.items()
    ]


def check_batches(config: PretrainConfig, ranks: int) -> int:
    """Returns the pairs a rank. Raises InputError where ranks, micro-batches, groups or lanes do not divide."""
    local = local_batch_size(config.global_batch_size, ranks, config.engine.accumulation, config.loss.group_size)
    lanes = config.data.num_lanes
    if lanes % ranks:
        raise InputError(
            f"expected a number of ranks that divides the {lanes} lanes of the data order, found {ranks}; use "
            f"{max(n for n in range(1, ranks) if lanes % n == 0)} ranks, or --data.num-lanes {-(-lanes // ranks) * ranks}"
        )
    return local


def shards_read(plan: Plan) -> int:
    """Returns how many shards `check_readable` reads on each rank."""
    return min(len(plan.shards), _SHARDS_READ if plan.sources.cache is None else _FROM_SERVERS)


def check_readable(plan: Plan, world: World) -> None:
    """Reads one sample of each shard, or of 64 that are spread over them (4 on servers), other ones on each rank.

    Raises InputError that names each shard that cannot be read on this machine.
    """
    shards, sizes = open_shards(plan), plan.order.shard_sizes
    most = shards_read(plan)
    chosen = [((i * len(shards) + world.rank) // most) % len(shards) for i in range(most)]
    faults = []
    for number in chosen:
        row = int(hash_u64(world.rank, number) % max(1, sizes[number]))
        try:
            _read_one(shards[number], row)
        except InputError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{shards[number].path}: {error}")
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise InputError(
            f"expected to read a sample of each of {most} shards, found {len(faults)} where that fails: "
            f"{'; '.join(faults[:_NAMED])}{more}. Mend or copy them again; `python -m data_prep.verify DIR` reads all"
        )


def _read_one(shard: BlockShard, row: int) -> None:
    key, _, image, encoded = shard.read_raw(row)
    try:
        found = json.loads(encoded)["key"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != key or not image:
        raise InputError(f"{shard.path}, sample {key}: the tar does not fit its index")


@dataclass(frozen=True)
class MemoryCheck:
    """What a rank needs, and what there is."""

    estimate: MemoryEstimate
    available: int
    """Bytes"""
    advice: str
    """What to do where it does not fit; empty where it does"""

    @property
    def share(self) -> float:
        """Of what is available; over 1 does not fit."""
        return self.estimate.total / max(1, self.available)


def cost_or_reason(config: PretrainConfig, plan: Plan, is_exact: bool = True) -> ModelCost | str:
    """Returns what the plan's model costs (not `is_exact`: at most), or why memory cannot be estimated."""
    try:
        return (cost_of if is_exact else bound_of)(plan.model_cfg, config.model, config.engine.precision)
    except Exception as error:  # a model that cannot be built fails for real in a moment, on all ranks
        return (
            f"memory is not estimated: the activations of this model cannot be counted ({str(error).splitlines()[0]})"
        )


def examine_memory(config: PretrainConfig, cost: ModelCost, ranks: int, device: str, available: int) -> MemoryCheck:
    """Returns the estimate for a rank of so many, against `available` bytes. `device`: "cpu" or "cuda"."""
    engine, local = config.engine, config.global_batch_size // ranks
    has_average = bool(config.ema.decay)
    estimate = estimate_memory(cost, engine, local, ranks, device, has_average)
    advice = ""
    if estimate.total > available:
        fit = fitting_accumulation(cost, engine, local, ranks, device, MARGIN * available, has_average)
        if fit is not None:
            number, smaller = fit
            advice = (
                f"--engine.accumulation {number} (micro-batches of {local // number}) needs {in_units(smaller.total)}"
            )
        else:
            advice = (
                f"no number of micro-batches fits (weights, gradients and optimizer take "
                f"{in_units(estimate.weights + estimate.gradients + estimate.optimizer)}): take more ranks, a higher "
                "--engine.zero-stage, --engine.precision bf16, a smaller --global-batch-size or a smaller model"
            )
    return MemoryCheck(estimate, available, advice)


def judge_memory(found: MemoryCheck, where: str) -> str:
    """Returns what is to be said of the memory: empty where the estimate is well below what there is."""
    what = f"{in_units(found.available)} of memory on {where}"
    if found.share > 1:
        return (
            f"expected to need at most {what}, found an estimate of {found.estimate}; {found.advice}. "
            "--check-memory False starts in spite of it"
        )
    if found.share > MARGIN:
        return f"the run is expected to need {found.estimate}, {found.share:.0%} of {what}: it may not fit"
    return ""

"""Looks at a run before it is begun: is everything there, does it fit, what will limit it, and how long will it take?

    python -m pretrain.doctor tiny --data.shards data/scenes
    torchrun --nproc-per-node 8 -m pretrain.doctor cc12m
    python -m pretrain.doctor cc12m --ranks 32 --gpu H100 --mfu 0.35        # where there is no such machine

Takes the flags of pretrain.run, and some of its own. Nothing is trained and no run folder is touched: shards are read, samples
are loaded and a few steps are taken on weights that are thrown away, in under a minute for most recipes. Exit status 2 where the
run could not begin. docs/pretraining.md tells what the lines mean.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pretrain.checkpoints import check_space
from pretrain.checks import (
    MemoryCheck,
    check_batches,
    check_readable,
    cost_or_reason,
    examine_memory,
    judge_memory,
    merged,
    shards_read,
)
from pretrain.config import RECIPES, PretrainConfig
from pretrain.diagnosis import Check, Diagnosis, Loading, MemoryRow, to_json, to_text
from pretrain.forecast import Costs, forecast
from pretrain.loader import SamplePipeline, automatic_workers
from pretrain.machine import available_memory, share_of_machine
from pretrain.memory import ModelCost, estimate_memory
from pretrain.model_options import build_for_training
from pretrain.plan import Plan, check_folder, make_pipeline, make_plan
from pretrain.rates import StepRate, measure_loader, measure_stages, measure_steps, places_of
from pretrain.throughput import peak_flops, training_flops
from setclip import config as configuration
from setclip import distributed
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import is_speaker, say
from setclip.models.clip import image_size_of

_BUSY = 0.8  # of a core: a step on a CPU that gets less has waited for one
_CUTS = 5  # micro-batches of the table of memory
_MOST_PER_MACHINE = 8  # GPUs that a machine is taken to have where it is not said


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PretrainConfig):
    """The run, and how it is looked at."""

    json: Path | None = None
    """Write what was found into this file, too."""
    ranks: int | None = None
    """Ranks of the run; None: as many as are started now. What is measured here is then one of them."""
    ranks_per_machine: int | None = None
    """Ranks that share a machine, its cores and memory; None: as started, with --ranks all of them but 8 at most."""
    gpu: str | None = None
    """Foresee steps of such a GPU (H100, A100, ...) from the model's FLOPs and --mfu instead of measuring them here."""
    mfu: float = 0.35
    """With --gpu: the share of its peak that steps reach."""
    gpu_memory: float | None = None
    """With --gpu: its memory in GB; None: what is needed is told, not whether it fits."""
    seconds: float = 4.0
    """About as long each stage of loading is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ranks", "ranks_per_machine", "gpu_memory"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        if self.seconds <= 0:
            raise ValueError(f"seconds must be above 0, found {self.seconds}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must lie in (0, 1], found {self.mfu}")
        if self.gpu is not None and self.gpu_peak is None:
            raise ValueError(f"gpu {self.gpu!r} has no peak that is known; give it with --log.peak-tflops")

    @property
    def gpu_peak(self) -> float | None:
        """FLOPs a second of --gpu; None where they are not known."""
        if self.log.peak_tflops is not None:
            return 1e12 * self.log.peak_tflops
        return None if self.gpu is None else peak_flops(self.gpu)


def diagnose(recipe: str, config: DoctorConfig) -> Diagnosis:
    """Returns what was found, the same on all ranks. Collective.

    Raises InputError where settings and data do not fit together, so that there is nothing to measure.
    """
    world = distributed.start(config.engine.device)
    ranks = config.ranks or world.size
    if ranks % world.size:
        raise InputError(
            f"expected --ranks to be a multiple of the {world.size} ranks that are started, found {ranks}; start one alone"
        )
    local = check_batches(config, ranks)
    plan = make_plan(recipe, config, replace(world, size=ranks), is_to_begin=False)
    device = "cuda" if config.gpu is not None else world.device.type
    cost = distributed.broadcast(cost_or_reason(config, plan) if world.rank == 0 else None)
    assert cost is not None
    memory = None if isinstance(cost, str) else _memory_check(config, cost, ranks, device, world)
    with torch.device("meta"):
        model = build_for_training(plan.model_cfg, config.model)
    checks = [
        Check(
            "shards",
            *_outcome(partial(check_readable, plan, world), f"one sample of each of {_read_of(plan)} was read"),
        ),
        Check("run folder", *_outcome(partial(check_folder, plan.out, config), f"{plan.out} is free for the run")),
        Check(
            "disk",
            *_outcome(
                partial(check_space, plan.out, model, config.save, bool(config.ema.decay)), "the checkpoints have room"
            ),
        ),
        _memory_line(config, cost, memory, device, world),
    ]
    found = Diagnosis(
        recipe=recipe,
        config=config,
        ranks=ranks,
        device=config.gpu or str(world.device.type),
        is_gpu=device == "cuda",
        local_batch_size=local,
        plan=plan,
        parameters=sum(p.numel() for p in model.parameters()),
        checks=checks,
        memory=memory,
        table=[] if isinstance(cost, str) else _table(config, plan, local, ranks, device, world),
    )
    if not checks[0].is_ok:
        return found
    return _measured(found, config, model, None if isinstance(cost, str) else cost, world)


def _outcome(check: Callable[[], object], text: str) -> tuple[bool, str]:
    """Returns whether `check` passes on all ranks, and what to say. Collective."""
    fault = ""
    try:
        check()
    except InputError as error:
        fault = str(error)
    faults = merged([[line] for line in distributed.gather_objects(fault)])
    return not faults, "; ".join(faults) or text


def _read_of(plan: Plan) -> str:
    count, read = len(plan.shards), shards_read(plan)
    return f"{count:,} shard{'s' * (count != 1)}" if count == read else f"{read} of {count:,} shards on each rank"


def _memory_check(config: DoctorConfig, cost: ModelCost, ranks: int, device: str, world: World) -> MemoryCheck:
    available = 0
    if config.gpu_memory is not None:
        available = int(config.gpu_memory * 1e9)
    elif config.gpu is None:
        here = _ranks_here(config, world)
        available = min(distributed.gather_objects(available_memory(world.device, here)))
    return examine_memory(config, cost, ranks, device, available)


def _ranks_here(config: DoctorConfig, world: World) -> int:
    """Returns how many ranks of the run share a machine."""
    if config.ranks_per_machine is not None:
        return config.ranks_per_machine
    if config.ranks is None or config.ranks == world.size:
        return share_of_machine().ranks
    if config.gpu is not None:
        return min(config.ranks, _MOST_PER_MACHINE)
    return min(config.ranks, torch.cuda.device_count()) if world.device.type == "cuda" else config.ranks


def _memory_line(
    config: DoctorConfig, cost: ModelCost | str, memory: MemoryCheck | None, device: str, world: World
) -> Check:
    if memory is None:
        return Check("memory", True, str(cost))
    where = config.gpu or str(world.device)
    if not memory.available:
        return Check(
            "memory", True, f"{memory.estimate.total / 1e9:.2f} GB are needed; --gpu-memory says what there is"
        )
    verdict = judge_memory(memory, where)
    share = f"{memory.estimate.total / 1e9:.2f} GB of the {memory.available / 1e9:.1f} GB that a rank has on {where}"
    return Check("memory", memory.share <= 1 or not config.check_memory, verdict or share)


def _table(config: DoctorConfig, plan: Plan, local: int, ranks: int, device: str, world: World) -> list[MemoryRow]:
    """Returns the memory of each precision and ZeRO stage, in several micro-batches. Collective."""
    cuts = [n for n in (2**i for i in range(local.bit_length())) if local % n == 0][:_CUTS]
    numbers = sorted({*cuts, config.engine.accumulation})
    rows = []
    for precision in ("fp32", "bf16"):
        changed = replace(config, engine=replace(config.engine, precision=precision, zero_stage=2, compile=False))
        cost = distributed.broadcast(cost_or_reason(changed, plan) if world.rank == 0 else None)
        if not isinstance(cost, ModelCost):
            continue
        for stage in (0, 1, 2, 3) if precision == "fp32" else (1, 2, 3):
            for number in numbers:
                engine = replace(changed.engine, zero_stage=stage, accumulation=number)
                total = estimate_memory(cost, engine, local, ranks, device, bool(config.ema.decay)).total
                rows.append(MemoryRow(precision, stage, number, local // number, total))
    return rows


def _measured(
    found: Diagnosis, config: DoctorConfig, model: torch.nn.Module, cost: ModelCost | None, world: World
) -> Diagnosis:
    """Returns `found` with rates and what follows of them. Collective."""
    plan, share, here = found.plan, share_of_machine(), _ranks_here(config, world)
    cores = share.cores if here == share.ranks else max(1, share.cores * share.ranks // here)
    workers = automatic_workers(cores) if config.data.workers is None else config.data.workers
    pipeline = make_pipeline(config, plan, image_size_of(model))
    say("measuring how samples are loaded ...")
    stages = measure_stages(pipeline, places_of(plan.order, world.rank, world.size), config.seconds)
    alone, of_core = measure_loader(plan.order, pipeline, world, 0, config.seconds)
    waits = max(0.0, stages.read_elapsed - stages.seconds["read"])
    rate, hand_over = measure_loader(plan.order, pipeline, world, workers, config.seconds) if workers else (alone, 0.0)
    loading_of = distributed.gather_objects(Loading(stages, of_core, waits, workers, rate, hand_over, cores))
    slowest = max(range(len(loading_of)), key=lambda rank: loading_of[rank].of_core + loading_of[rank].waits)
    loading = loading_of[slowest]
    flops = _flops(model)
    say("measuring steps ...")
    step, notes = _step(found, config, pipeline, flops, cost, share.ranks, world)
    found = replace(
        found,
        loading=loading,
        slowest_rank=slowest if world.size > 1 else None,
        step=step,
        is_step_measured=config.gpu is None,
        flops_per_pair=flops,
        notes=notes,
    )
    if step is None:
        return found
    costs = Costs(
        step=step.seconds / step.pairs,
        step_cores=step.core_seconds / step.pairs,
        load=loading.of_core + loading.waits,
        load_cores=loading.of_core,
        hand_over=loading.hand_over,
    )
    lanes = plan.order.num_lanes // found.ranks
    return replace(found, forecast=forecast(costs, workers, lanes, cores, found.ranks, found.pairs))


def _flops(model: torch.nn.Module) -> float | None:
    try:
        return training_flops(model)
    except (NotImplementedError, RuntimeError):  # the peak of FLOPs is a remark
        return None


def _step(
    found: Diagnosis,
    config: DoctorConfig,
    pipeline: SamplePipeline,
    flops: float | None,
    cost: ModelCost | None,
    ranks_here: int,
    world: World,
) -> tuple[StepRate | None, list[str]]:
    """Returns how fast steps are, and what to know of that figure. Collective."""
    pairs = found.local_batch_size
    if config.gpu is not None:
        if flops is None or config.gpu_peak is None:
            raise InputError(
                f"expected a model whose FLOPs can be counted for --gpu {config.gpu}, found {config.model.name}; measure its "
                "steps on such a GPU (leave out --gpu)"
            )
        seconds = pairs * flops / (config.gpu_peak * config.mfu)
        note = f"{config.mfu:.0%} of the {config.gpu_peak / 1e12:,.0f} TFLOPs/s of one {config.gpu} are an assumption (--mfu)"
        return StepRate(pairs, seconds, seconds, True), [note]
    available = min(distributed.gather_objects(available_memory(world.device, ranks_here)))
    step = measure_steps(config, found.plan, pipeline, cost, available, world, pairs)
    notes = []
    if step is not None and not step.is_whole:
        notes.append(
            f"{step.pairs:,} pairs stand for the run's {pairs:,} a rank, which would take too long or too much here"
        )
    if found.ranks > world.size:
        notes.append(
            f"measured on {world.size} of {found.ranks} ranks: exchange between the others"
            + (", and the loss's larger batch, come on top" if config.loss.group_size is None else " comes on top")
        )
    if world.device.type == "cpu" and step is not None and step.core_seconds < _BUSY * step.seconds:
        notes.append(
            f"other programs had the cores: in {step.seconds:.2f} s a step got {step.core_seconds:.2f} s of one; look again later"
        )
    if world.device.type == "cpu" and config.engine.precision == "bf16":
        notes.append("bf16 on a CPU says nothing of a GPU; --gpu H100, for example, foresees one")
    return step, notes


def read_arguments(args: Sequence[str] | None = None) -> tuple[str, DoctorConfig]:
    """Returns (recipe name, config) of what was typed."""
    recipes = {name: partial(_with_own_flags, recipe) for name, recipe in RECIPES.items()}
    return configuration.parse_recipe(recipes, args, __doc__ or "")


def main() -> None:
    """The command."""
    name, config = read_arguments()
    try:
        found = diagnose(name, config)
        say(to_text(found))
        if config.json is not None and is_speaker():
            write_json(config.json, to_json(found))
    finally:
        distributed.stop()
    if found.faults:
        raise InputError("the run cannot begin: " + "\n".join(found.faults))


def _with_own_flags(recipe: Callable[[], PretrainConfig]) -> DoctorConfig:
    values = recipe()
    return DoctorConfig(**{entry.name: getattr(values, entry.name) for entry in dataclasses.fields(values)})


if __name__ == "__main__":
    configuration.command(main)

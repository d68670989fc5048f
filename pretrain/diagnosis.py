"""What pretrain.doctor found, as text for a terminal and as JSON."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.checks import MemoryCheck
from pretrain.config import PretrainConfig
from pretrain.forecast import IN_WORDS, Forecast
from pretrain.memory import in_units
from pretrain.plan import Plan
from pretrain.rates import STAGES, StageRates, StepRate
from setclip.log import duration
from setclip.provenance import describe

_ADVICE = {
    "step": "as it should be: data is ready before it is needed",
    "loader": "give more loader processes (--data.workers {workers_needed})",
    "cores": "too few cores: take fewer ranks a machine or more cores a rank, or store smaller pictures "
    "(data_prep.run --short-side)",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    is_ok: bool
    text: str
    """What is there, or what is wrong"""


@dataclass(frozen=True)
class MemoryRow:
    """What a rank would need with other settings of the engine."""

    precision: str
    zero_stage: int
    accumulation: int
    micro_batch: int
    bytes: int


@dataclass(frozen=True)
class Loading:
    """How a rank loads."""

    stages: StageRates
    of_core: float
    """Seconds of a core a sample, all together"""
    waits: float
    """Seconds a sample that reading waits"""
    workers: int
    """Loader processes of the run on this rank"""
    rate: float
    """Samples a second by the clock with these processes, nothing else going on in this one"""
    hand_over: float
    """Seconds of a core a sample that this process spends on what those have made"""
    cores: int
    """Of the rank"""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    recipe: str
    config: PretrainConfig
    ranks: int
    device: str
    is_gpu: bool
    local_batch_size: int
    plan: Plan
    parameters: int
    checks: list[Check]
    memory: MemoryCheck | None
    """None where it cannot be estimated"""
    table: list[MemoryRow]
    loading: Loading | None = None
    """Of the slowest rank that was started; None where nothing was measured"""
    slowest_rank: int | None = None
    """Whose loading it is; None where one rank alone was started"""
    step: StepRate | None = None
    is_step_measured: bool = True
    """False: foreseen from FLOPs"""
    flops_per_pair: float | None = None
    forecast: Forecast | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        """Of the whole run."""
        return self.plan.total_steps * self.config.global_batch_size

    @property
    def faults(self) -> list[str]:
        """Why the run cannot begin; empty where it can."""
        return [f"{check.name}: {check.text}" for check in self.checks if not check.is_ok]

    @property
    def epochs(self) -> float:
        """Of the whole run."""
        return self.pairs / self.plan.order.num_samples


def to_text(found: Diagnosis) -> str:
    """Returns the report for a terminal, about 120 columns wide."""
    parts = [_title(found), _checks(found), _memory(found), _loading(found), _step(found), _forecast(found)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _title(found: Diagnosis) -> list[str]:
    return [f"doctor: recipe {found.recipe}, {_ranks(found.ranks)} on {found.device}"]


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def _groups(config: PretrainConfig) -> str:
    size = config.loss.group_size
    return "" if size is None else f" in groups of {size:,}"


def _checks(found: Diagnosis) -> list[str]:
    config, plan = found.config, found.plan
    number = config.engine.accumulation
    cut = f"{found.local_batch_size}" if number == 1 else f"{number} × {found.local_batch_size // number}"
    checks = [
        Check(
            "configuration",
            True,
            f"model {config.model.name} ({found.parameters / 1e6:.2f} M weights), loss {config.loss.full_name}, "
            f"{config.engine.precision}, ZeRO {config.engine.zero_stage}",
        ),
        Check(
            "batches",
            True,
            f"{_ranks(found.ranks)} × {cut} = {config.global_batch_size:,} pairs a step{_groups(config)}; "
            f"{plan.total_steps:,} steps = "
            f"{found.pairs:,} pairs = {found.epochs:.2f} epochs",
        ),
        Check(
            "data",
            True,
            f"{plan.sources.name}, split {config.data.split!r}: {plan.order.num_samples:,} samples in {len(plan.shards):,} "
            f"shards; {plan.manifest.pairs_present:,} of {plan.manifest.pairs_listed:,} pairs present",
        ),
        *found.checks,
    ]
    return [f"  {'ok' if check.is_ok else 'FAULT':<6} {check.name:<14} {check.text}" for check in checks]


def _memory(found: Diagnosis) -> list[str]:
    if found.memory is None or not found.table:
        return []
    parts = ", ".join(f"{name} {in_units(value)}" for name, value in found.memory.estimate.parts.items())
    engine = found.config.engine
    cuts = sorted({row.micro_batch for row in found.table}, reverse=True)
    lines = [f"memory a rank: {parts}", _row("GB a rank, micro-batch of", [f"{cut:,}" for cut in cuts])]
    for precision, stage in dict.fromkeys((row.precision, row.zero_stage) for row in found.table):
        cells = {}
        for row in found.table:
            if (row.precision, row.zero_stage) == (precision, stage):
                is_own = (precision, stage, row.accumulation) == (
                    engine.precision,
                    engine.zero_stage,
                    engine.accumulation,
                )
                is_over = 0 < found.memory.available < row.bytes
                cells[row.micro_batch] = f"{row.bytes / 1e9:.2f}{'!' * is_over}{'*' * is_own}"
        lines.append(_row(f"  {precision}, ZeRO {stage}", [cells[cut] for cut in cuts]))
    legend = ["* this run", "! more than there is"]
    shown = [entry for entry in legend if any(entry[0] in line for line in lines[2:])]
    return [*lines, f"  {', '.join(shown)}"] if shown else lines


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<34}" + "".join(f"{cell:>10}" for cell in cells)


def _loading(found: Diagnosis) -> list[str]:
    loading = found.loading
    if loading is None:
        return []
    stages = loading.stages
    where = f", rank {found.slowest_rank} (the slowest)" if found.slowest_rank is not None else ""
    lines = [
        f"loading a sample on one core{where}: {stages.samples:,} samples of {stages.bytes_per_sample / 1e3:.1f} kB, "
        f"{stages.bad:,} bad"
    ]
    times = {name: stages.seconds[name] for name in STAGES}
    times["the rest (order, texts, batch)"] = max(0.0, loading.of_core - sum(times.values()))
    times["waiting for reads"] = loading.waits
    whole = sum(times.values())
    lines += [_row(f"  {name}", [f"{1e3 * value:.3f} ms", f"{value / whole:.0%}"]) for name, value in times.items()]
    lines.append(_row("  all", [f"{1e3 * whole:.3f} ms", f"{1 / whole:,.0f}/s"]))
    what = (
        f"{loading.workers} loader process{'es' * (loading.workers != 1)}"
        if loading.workers
        else "the training process"
    )
    return [*lines, f"  {what} of this rank: {loading.rate:,.0f} samples/s by the clock, nothing else going on"]


def _step(found: Diagnosis) -> list[str]:
    step = found.step
    if step is None:
        return ["steps: not measured, as not even a small one fits into memory here"] if found.loading else []
    how = "measured" if found.is_step_measured else "foreseen from the model's FLOPs"
    line = f"a step of {step.pairs:,} pairs on a rank, {how}: {step.seconds:.3f} s, {step.rate:,.0f} pairs/s"
    lines = [line]
    if found.flops_per_pair is not None:
        lines.append(
            f"  {found.flops_per_pair / 1e9:.2f} GFLOPs a pair, {step.rate * found.flops_per_pair / 1e12:.2f} TFLOPs/s a rank"
        )
    return [*lines, *(f"  note: {note}" for note in found.notes)]


def _forecast(found: Diagnosis) -> list[str]:
    outlook = found.forecast
    if outlook is None:
        return []
    limits = ", ".join(f"{name} {value:,.0f}" for name, value in outlook.limits.items())
    name = outlook.bottleneck
    has_cores = outlook.cores_needed <= outlook.cores
    advice = _ADVICE["cores" if name == "loader" and not has_cores else name].format(
        workers_needed=outlook.workers_needed
    )
    lines = ["the run"]
    per_epoch = outlook.seconds / found.epochs
    entries = {
        "bottleneck": f"{IN_WORDS[name]}, {outlook.rate:,.0f} pairs/s a rank ({limits}); {advice}",
        "loader": f"{outlook.workers_needed} process{'es' * (outlook.workers_needed != 1)} a rank needed to keep up with the "
        f"steps, {outlook.workers} set (--data.workers); cores that are busy then: {outlook.cores_needed} of {outlook.cores}",
        "time": f"{_time(outlook.seconds)} for {found.plan.total_steps:,} steps ({_time(per_epoch)} an epoch), without start, "
        "evaluation and checkpoints",
    }
    if found.is_gpu:
        entries["GPU-hours"] = f"{outlook.device_hours:,.1f} ({_ranks(outlook.ranks)})"
    return [*lines, *(f"  {key:<12} {text}" for key, text in entries.items())]


def _time(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds >= 2 * 86400 else duration(seconds)


def to_json(found: Diagnosis) -> dict[str, Any]:
    """Returns the same for programs: seconds, bytes, pairs a second on one rank."""
    memory, loading, outlook = found.memory, found.loading, found.forecast
    return {
        "recipe": found.recipe,
        "model": found.config.model.name,
        "loss": found.config.loss.full_name,
        "precision": found.config.engine.precision,
        "zero_stage": found.config.engine.zero_stage,
        "accumulation": found.config.engine.accumulation,
        "ranks": found.ranks,
        "device": found.device,
        "group_size": found.config.loss.group_size,
        "global_batch_size": found.config.global_batch_size,
        "local_batch_size": found.local_batch_size,
        "total_steps": found.plan.total_steps,
        "pairs": found.pairs,
        "epochs": found.epochs,
        "parameters": found.parameters,
        "data": found.plan.manifest.identity(),
        "checks": [dataclasses.asdict(check) for check in found.checks],
        "memory": None
        if memory is None
        else {
            "bytes": memory.estimate.total,
            "parts": memory.estimate.parts,
            "available": memory.available or None,
            "table": [dataclasses.asdict(row) for row in found.table],
        },
        "loading": None if loading is None else dataclasses.asdict(loading),
        "step": None
        if found.step is None
        else {**dataclasses.asdict(found.step), "is_measured": found.is_step_measured, "notes": found.notes},
        "flops_per_pair": found.flops_per_pair,
        "forecast": None
        if outlook is None
        else {
            **dataclasses.asdict(outlook),
            "bottleneck": outlook.bottleneck,
            "rate": outlook.rate,
            "seconds": outlook.seconds,
            "gpu_hours": outlook.device_hours if found.is_gpu else None,
        },
        "provenance": describe(),
    }

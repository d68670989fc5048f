"""Our training loop against open_clip's own trainer on a CPU: speed with data loading on, and equal losses.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.train [--quick] [--json FILE]

1. Speed. `torchrun -m pretrain.run` and `torchrun -m open_clip_train.main` (its own environment: `python -m
   benchmarks.open_clip_environment` makes it), two gloo processes each with one loader process, on the same tars, model,
   global batch, steps, augmentation and optimizer, turn by turn. Counted is what lies between two lines of each log, after
   warm-up steps: samples a second by the clock, and samples per CPU second of all processes together (launcher, ranks,
   loaders), which another load on the machine disturbs far less. A ratio is of two runs in a row; the median counts.
2. Losses. A run of ours keeps its batches, and open_clip's trainer takes the same steps on them from the same weights: its
   model, its AdamW, its schedule, its loss and its step, two processes, fp32, the hard loss. No warm-up: open_clip's
   begins one step later. How far open_clip's own losses lie from each other on one and two processes is measured too.

The pictures are the photographs of DIR/photos_open (up to 256 pixels), repeated; without DIR enlarged scenes.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import open_clip_environment
from benchmarks.train_material import write_shards
from benchmarks.trainers import (
    Measured,
    Side,
    Task,
    last_words,
    launch,
    open_clip_flags,
    our_flags,
    run_trainer,
    write_model,
)
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say

GOAL_TIMES_FASTER = 1.2
GOAL_LOSS_DIFFERENCE = 1e-4  # AdamW turns rounding of the smallest gradients into steps of the learning rate
COMPARED_BATCH_SIZE = 64  # pairs a step where losses are compared

MODELS: dict[str, dict[str, Any]] = {
    "vit-128": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 128, "layers": 3, "head_width": 64},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
    },
    "vit-32": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "patch_size": 32, "width": 32, "layers": 1, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    },
}
"""Name to configuration."""

SIDES: tuple[Side, Side] = ("ours", "open_clip")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compares our training with open_clip's."""

    quick: bool = False
    """A very small model, few steps, one repeat, in under a minute: figures are not those of the goals."""
    model: str = "vit-128"
    """vit-128 (224 pixels; encoding costs some five times what loading does) or vit-32 (64 pixels)."""
    global_batch_size: int = 128
    """Pairs a step over both processes."""
    steps: int = 51
    """Steps of each timed run."""
    warmup: int = 20
    """Steps of them before counting."""
    repeats: int = 5
    """Timed runs of each side."""
    compared_steps: int = 50
    """Steps whose losses are compared."""
    samples: int = 4_096
    """In the shards; pictures are repeated."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, found {self.repeats}")


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    if config.quick:
        config = replace(
            config, model="vit-32", global_batch_size=32, steps=31, warmup=10, repeats=1, compared_steps=10, samples=512
        )
    open_clip_environment.python_of()
    with tempfile.TemporaryDirectory() as folder:
        measure(config, Path(folder))


def measure(config: BenchmarkConfig, folder: Path) -> None:
    """Measures both parts, and writes the file after each."""
    source = write_shards(folder / "shards", config.samples, 8)
    say(f"{config.samples:,} samples: {source}; model {config.model}, {config.global_batch_size} pairs a step")
    task = Task(
        shards=folder / "shards",
        model=write_model(folder / "model", MODELS[config.model]),
        global_batch_size=config.global_batch_size,
        steps=config.steps,
    )
    figures: dict[str, Any] = {
        "goals": {"times_faster": GOAL_TIMES_FASTER, "loss_difference": GOAL_LOSS_DIFFERENCE},
        "material": source,
        "model": MODELS[config.model],
        "task": {name: value for name, value in asdict(task).items() if name not in ("shards", "model")},
        "torch": torch.__version__,
    }
    size = min(COMPARED_BATCH_SIZE, config.global_batch_size)
    compared = replace(task, global_batch_size=size, steps=config.compared_steps, log_every=1)
    for part, work in (
        ("speed", partial(measure_speed, task, folder / "speed", config.warmup, config.repeats)),
        ("losses", partial(compare_losses, compared, folder / "losses", config.quick)),
    ):
        figures[part] = work()
        if config.json is not None:
            write_json(config.json, figures)


# --- 1. speed


def measure_speed(task: Task, folder: Path, warmup: int, repeats: int) -> dict[str, Any]:
    """Returns what each run took, and the median ratios."""
    runs: dict[Side, list[Measured]] = {side: [] for side in SIDES}
    say("\n                    samples/s   per CPU second   data wait")
    for repeat in range(repeats):
        # In turn also who is first, so that what changes slowly hits both alike.
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            found = run_trainer(side, task, folder / f"{side}-{repeat}", warmup)
            runs[side].append(found)
            say(
                f"  {side:16}{found.samples_per_second:11,.0f}{found.samples_per_cpu_second:17,.0f}{found.data_wait:12.0%}"
            )
    of_pairs = list(zip(*(runs[side] for side in SIDES), strict=True))
    by_clock = [a.samples_per_second / b.samples_per_second for a, b in of_pairs]
    by_cpu = [a.samples_per_cpu_second / b.samples_per_cpu_second for a, b in of_pairs]
    figures = {
        "runs": {side: [_entry(run) for run in found] for side, found in runs.items()},
        "times_faster": statistics.median(by_clock),
        "times_faster_each": by_clock,
        "times_faster_per_cpu_second": statistics.median(by_cpu),
        "times_faster_per_cpu_second_each": by_cpu,
    }
    for what, name in (("samples/s", "times_faster"), ("samples per CPU second", "times_faster_per_cpu_second")):
        value, each = figures[name], figures[f"{name}_each"]
        verdict = "reached" if value >= GOAL_TIMES_FASTER else "MISSED"
        say(
            f"  times faster in {what}: {value:.2f} ({min(each):.2f} to {max(each):.2f}; goal {GOAL_TIMES_FASTER}: {verdict})"
        )
    return figures


def _entry(run: Measured) -> dict[str, float]:
    rates = {name: getattr(run, name) for name in ("samples_per_second", "samples_per_cpu_second")}
    return {**asdict(run), **rates}


# --- 2. losses


def compare_losses(task: Task, folder: Path, is_quick: bool = False) -> dict[str, Any]:
    """Returns the losses of our steps and of open_clip's on the same batches, and how far they lie apart.

    Unless `is_quick`, also those of open_clip on one process instead of two.
    """
    folder.mkdir()
    ours = record_ours(task, folder)
    theirs = replay_open_clip(task, folder)
    difference = _largest_difference(ours, theirs)
    figures: dict[str, Any] = {
        "steps": task.steps,
        "global_batch_size": task.global_batch_size,
        "ours": ours,
        "open_clip": theirs,
        "largest_difference": difference,
    }
    verdict = "reached" if difference <= GOAL_LOSS_DIFFERENCE else "MISSED"
    say(f"\nlosses of {task.steps} equal steps: {ours[0]:.5f} to {ours[-1]:.5f} ours, {theirs[-1]:.5f} open_clip's")
    say(f"  largest difference {difference:.1e} (goal {GOAL_LOSS_DIFFERENCE:g}: {verdict})")
    if not is_quick:
        alone = folder / "alone"
        alone.mkdir()
        join_batches(folder, alone, task.ranks)
        of_one = replay_open_clip(replace(task, ranks=1), alone)
        itself = _largest_difference(of_one, theirs)
        figures["open_clip_one_process"] = of_one
        figures["largest_difference_of_open_clip_on_one_and_two_processes"] = itself
        say(f"  open_clip's own, one process against two: {itself:.1e}")
    return figures


def _largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def record_ours(task: Task, folder: Path) -> list[float]:
    """Runs ours, which keeps its batches in `folder`; returns the losses of its steps."""
    flags = our_flags(task, folder / "run")
    _run([*launch(sys.executable, task.ranks), "benchmarks.recorded_run", str(folder), *flags])
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def replay_open_clip(task: Task, folder: Path) -> list[float]:
    """Runs open_clip's trainer on the batches in `folder`; returns the losses of its steps over all ranks."""
    python = str(open_clip_environment.python_of())
    flags = open_clip_flags(task, folder / "logs")
    _run([*launch(python, task.ranks), "benchmarks.open_clip_trainer", "--replay", str(folder), *flags])
    of_ranks = [json.loads((folder / f"open_clip-{rank}.json").read_text()) for rank in range(task.ranks)]
    return [statistics.mean(losses) for losses in zip(*of_ranks, strict=True)]


def join_batches(source: Path, out: Path, ranks: int) -> None:
    """Writes the batches of all ranks as those of a single one."""
    of_ranks = [torch.load(source / f"batches-{rank}.pt") for rank in range(ranks)]
    joined = [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*of_ranks, strict=True)
    ]
    torch.save(joined, out / "batches-0.pt")


def _run(arguments: Sequence[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        last = last_words((done.stdout + done.stderr).splitlines(keepends=True))
        raise InputError(
            f"expected `{' '.join(arguments)}` to train, found that it ended with {done.returncode}:\n{last}"
        )


if __name__ == "__main__":
    command(main)

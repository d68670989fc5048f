"""Two trainers on the same task, as their users start them: ours and open_clip's. Used by benchmarks.train and train_gpu.

Both get the same tars, model configuration with the same weights, global batch, workers, optimizer and schedule. What is
measured is what their logs show: time passes, and processes use the CPU, between two of their lines.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

import setclip  # noqa: F401 (before torchvision, which setclip.models.clip imports)

# isort: split
from benchmarks import open_clip_environment
from setclip.checkpoint import save_checkpoint
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.models.clip import build_clip

BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 1e-8, 0.1, 1.0

Side = Literal["ours", "open_clip"]

_STEP_OF_OURS = re.compile(r"^step +([\d,]+) +samples ")
_STEP_OF_OPEN_CLIP = re.compile(
    r"Train Epoch: 0 \[ *(\d+)/.*Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+),.*Loss: ([\d.]+)"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both trainers do."""

    shards: Path
    """Folder of shards with a manifest; open_clip reads the same tars."""
    model: Path
    """Checkpoint folder: configuration and first weights."""
    global_batch_size: int
    steps: int
    ranks: int = 2
    workers: int = 1
    """Loader processes a rank."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    lr: float = 5e-4
    log_every: int = 10
    """Steps between lines."""
    compile: bool = False
    """By torch.compile."""
    repeated: Path | None = None
    """Folder for one batch that is given at every step, so that no data are read; ours writes it, open_clip takes it."""


@dataclass(frozen=True)
class Measured:
    """What one run took between two lines of its log."""

    samples: int
    seconds: float
    cpu_seconds: float
    """Of all its processes together: launcher, ranks and loaders."""
    data_wait: float
    """Share of the time that its first rank waited for data, by its own log."""
    loss: float
    """Of the last line; open_clip's is the first rank's, ours is the mean."""

    @property
    def samples_per_second(self) -> float:
        """By the clock."""
        return self.samples / self.seconds

    @property
    def samples_per_cpu_second(self) -> float:
        """Of one core, as it were alone on the machine."""
        return self.samples / self.cpu_seconds


def write_model(folder: Path, model_cfg: Mapping[str, Any]) -> Path:
    """Writes configuration and random weights as a checkpoint that both trainers start from; returns its folder."""
    torch.manual_seed(0)
    place = folder / "checkpoints" / "step-00000001"
    save_checkpoint(place, build_clip(model_cfg).state_dict(), model_cfg, {"step": 0, "recipe": "none"})
    (folder / "model.json").write_text(json.dumps(dict(model_cfg)), encoding="utf-8")
    return place


def our_flags(task: Task, out: Path, extra: Sequence[str] = ()) -> list[str]:
    """Returns the recipe and flags of pretrain.run."""
    return [
        "cc12m",
        *("--data.shards", str(task.shards), "--data.workers", str(task.workers), "--out", str(out)),
        *("--model.name", str(task.model.parents[1] / "model.json"), "--model.pretrained", f"local-dir:{task.model}"),
        *("--global-batch-size", str(task.global_batch_size), "--steps", str(task.steps)),
        *("--engine.device", task.device, "--engine.precision", task.precision),
        *("--engine.zero-stage", "0" if task.precision == "fp32" else "1"),
        *("--optim.lr", str(task.lr), "--optim.warmup-share", "0", "--optim.weight-decay", str(WEIGHT_DECAY)),
        *("--optim.betas", *map(str, BETAS), "--optim.eps", str(EPS), "--optim.clip-grad-norm", str(CLIP)),
        *("--log-every-steps", str(task.log_every), "--loss.name", "hard"),
        *("--loss.equal-texts", "negatives"),  # as open_clip takes them
        *(("--engine.compile", "True") if task.compile else ()),
        *extra,
    ]


def open_clip_flags(task: Task, logs: Path, extra: Sequence[str] = ()) -> list[str]:
    """Returns the flags of open_clip_train.main. Its loss is the recommended one for several ranks, its gradient exact."""
    return [
        *("--model", f"local-dir:{task.model}", "--logs", str(logs), "--name", "run", "--seed", "0"),
        *("--batch-size", str(task.global_batch_size // task.ranks), "--epochs", "1", "--workers", str(task.workers)),
        *("--train-num-samples", str(task.steps * task.global_batch_size), "--device", task.device),
        *("--precision", "fp32" if task.precision == "fp32" else "amp_bf16", "--local-loss", "--gather-with-grad"),
        *("--lr", str(task.lr), "--warmup", "0", "--wd", str(WEIGHT_DECAY), "--grad-clip-norm", str(CLIP)),
        *("--beta1", str(BETAS[0]), "--beta2", str(BETAS[1]), "--eps", str(EPS)),
        *("--log-every-n-steps", str(task.log_every)),
        *(("--torchcompile",) if task.compile else ()),
        *extra,
    ]


def tars_of(shards: Path) -> str:
    """Returns the tars of a manifest's training split as open_clip wants them."""
    names = [shard.name for shard in Manifest.load(shards).of_split("train")]
    return "::".join(str(shards / name) for name in names)


def command_of(side: Side, task: Task, folder: Path, extra: Sequence[str] = ()) -> list[str]:
    """Returns what a user of a trainer types."""
    if side == "ours":
        flags = our_flags(task, folder / "run", extra)
        if task.repeated is None:
            return [*launch(sys.executable, task.ranks), "pretrain.run", *flags]
        return [*launch(sys.executable, task.ranks), "benchmarks.recorded_run", str(task.repeated), "--repeat", *flags]
    start = [*launch(str(open_clip_environment.python_of()), task.ranks), "benchmarks.open_clip_trainer"]
    if task.repeated is None:
        data = ["--train-data", tars_of(task.shards), "--dataset-type", "webdataset"]
        return [*start, *open_clip_flags(task, folder / "logs", (*data, *extra))]
    replayed = ["--replay", str(task.repeated), "--times", str(task.steps)]
    return [*start, *replayed, *open_clip_flags(task, folder / "logs", extra)]


def launch(python: str, ranks: int) -> list[str]:
    """Returns torchrun, up to the module. Without the "--" it would take open_clip's `--logs` for a flag of its own."""
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "--"]


def run_trainer(side: Side, task: Task, folder: Path, first: int, extra: Sequence[str] = ()) -> Measured:
    """Runs a trainer to its end; returns what it took from its line after about `first` steps to its last whole interval.

    Raises InputError with its last lines where it fails.
    """
    folder.mkdir(parents=True)
    command, seen, said = command_of(side, task, folder, extra), [], []
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        root = psutil.Process(process.pid)
        for line in process.stdout:
            said.append(line)
            step = step_of(side, line, task.global_batch_size)
            if step is not None:
                seen.append((step, time.monotonic(), cpu_seconds(root)))
    if process.returncode:
        raise InputError(
            f"expected {side} to train, found that it ended with {process.returncode}:\n{last_words(said)}\n"
            f"`{' '.join(command)}` shows it alone"
        )
    (folder / "log.txt").write_text("".join(said), encoding="utf-8")
    # Lines stand at whole intervals: ours after them, open_clip's after the first step of each.
    whole = [entry for entry in seen if entry[0] >= first and (entry[0] - seen[0][0]) % task.log_every == 0]
    if len(whole) < 2:
        raise InputError(
            f"expected two lines of {side} at least after {first} steps, found those of {[s for s, *_ in seen]}"
        )
    (begin, start, cpu_start), (end, stop, cpu_stop) = whole[0], whole[-1]
    wait, loss = own_figures(side, said, begin, end, folder, task.global_batch_size)
    return Measured((end - begin) * task.global_batch_size, stop - start, cpu_stop - cpu_start, wait, loss)


def last_words(said: Sequence[str]) -> str:
    """Returns the last lines before torchrun's own account of a failure."""
    ends = (number for number, line in enumerate(said) if "failed (exitcode: " in line)
    return "".join(said[: next(ends, len(said))][-25:]).rstrip()


def step_of(side: Side, line: str, global_batch_size: int) -> int | None:
    """Returns the step of which a line of a trainer's log tells; None where it tells of something else."""
    if side == "ours":
        found = _STEP_OF_OURS.search(line)
        return None if found is None else int(found[1].replace(",", ""))
    found = _STEP_OF_OPEN_CLIP.search(line)
    return None if found is None else int(found[1]) // global_batch_size


def own_figures(
    side: Side, said: Sequence[str], begin: int, end: int, folder: Path, global_batch_size: int
) -> tuple[float, float]:
    """Returns (share of waiting for data, last loss) of the steps after `begin` up to `end`, by the trainer's own log."""
    if side == "ours":
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [entry for entry in map(json.loads, lines) if "loss" in entry and begin < entry["step"] <= end]
        return statistics.mean(entry["data_wait_share"] for entry in entries), entries[-1]["loss"]
    found = [match for match in map(_STEP_OF_OPEN_CLIP.search, said) if match is not None]
    within = [match for match in found if begin < int(match[1]) // global_batch_size <= end]
    waited, taken = (sum(float(match[i]) for match in within) for i in (2, 3))
    return waited / taken, float(within[-1][4])


def cpu_seconds(root: psutil.Process) -> float:
    """Returns the CPU time of a process and all below it, in user and kernel mode, those that have ended included."""
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has just ended: its parent has its time
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total

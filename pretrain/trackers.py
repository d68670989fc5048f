"""The figures of a run in TensorBoard and Weights & Biases beside metrics.jsonl, where they are asked for.

Used by the loops of pretraining and fine-tuning. Each is given every entry of metrics.jsonl. A resumed run goes on in
the same curves: what was written after the checkpoint is taken back in TensorBoard; Weights & Biases keeps what it has
seen of a step, which an exact resume would only repeat.
"""

import importlib.util
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from setclip.errors import InputError
from setclip.log import say, warn

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_NAME = "wandb_id.txt"

_GROUPS = {
    "train": (
        "loss",
        "kl",
        "lr",
        "logit_scale",
        "logit_bias",
        "grad_norm",
        "true_pair_mass",
        "similar_pairs",
        "equal_pairs",
    ),
    "speed": ("samples_per_second", "samples_per_second_per_rank", "seconds_per_step", "data_wait_share", "mfu"),
    "memory": ("gpu_memory_bytes", "cpu_memory_bytes", "loader_memory_bytes"),
    "data": ("bad_samples", "epoch"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_NO_CURVES = ("step", "samples_seen", "time", "elapsed_seconds")


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where the figures go beside the terminal and metrics.jsonl."""

    tensorboard: bool = False
    """Write them for TensorBoard as well, into the run folder (pip install tensorboard)."""
    wandb: str | None = None
    """Project of Weights & Biases to which they go as well (pip install wandb; WANDB_MODE=offline keeps them here)."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(TrackerConfig):
    """Where the figures go beside the terminal and metrics.jsonl."""

    report: bool = True
    """Write report.html into the run folder when the run ends or stops, where it took more than twenty seconds."""
    peak_tflops: float | None = None
    """Peak of one device in 10^12 FLOPs a second, for MFU. Default: the bf16 peak of the GPU, where it is known."""

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"--log.peak-tflops must be above 0, found {self.peak_tflops}")


class Tracker(Protocol):
    """What is given the entries of metrics.jsonl."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Takes one entry, which has a step."""

    def close(self) -> None:
        """Writes what waits."""


def check_trackers(config: TrackerConfig) -> None:
    """Raises InputError where a package that is asked for is not installed."""
    for wanted, package, flag in (
        (config.tensorboard, "tensorboard", "--log.tensorboard False"),
        (config.wandb is not None, "wandb", "no --log.wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(
                f"expected the package {package}, found none in this environment; `pip install {package}`, or give "
                f"{flag}"
            )


def open_trackers(config: TrackerConfig, run: Path, step: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """Returns the trackers that are asked for. Call on rank 0 alone.

    `step`: after which the run goes on; `settings`: the run's configuration, which Weights & Biases shows.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(run, step))
    if config.wandb is not None:
        trackers.append(WeightsAndBiases(config.wandb, run, settings))
    return [Careful(tracker) for tracker in trackers]


def curves_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """Returns the curves ("train/loss", "eval/zeroshot_top1") that an entry has a value for."""
    found = {}
    for name, value in entry.items():
        if name in _NO_CURVES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group = _GROUP_OF.get(name) or ("train" if "loss" in entry else "eval")
        found[f"{group}/{name}"] = float(value)
    return found


class TensorBoard:
    """RUN/tensorboard/, which `tensorboard --logdir runs` reads."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard, which is optional

        # What was written for later steps, before a kill or a return to a checkpoint, is no longer shown.
        self._writer = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1 if step else None)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Writes an entry, in a thread of TensorBoard's."""
        for name, value in curves_of(entry).items():
            self._writer.add_scalar(name, value, entry["step"], walltime=entry.get("time"))

    def close(self) -> None:
        """Writes what waits."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; its id lies in the run folder, so that a resume goes on in it."""

    def __init__(self, project: str, run: Path, settings: Mapping[str, Any]):
        import wandb  # optional

        path = run / WANDB_ID_NAME
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=run.name,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run),
                config=dict(settings),
            )
        except wandb.Error as error:
            raise InputError(
                f"expected to begin a run of Weights & Biases in project {project!r}, found: {error}; `wandb login`, "
                "set WANDB_MODE=offline, or leave --log.wandb out"
            ) from error
        self._steps = int(self._run.step)
        if self._steps:
            say(f"Weights & Biases has steps before {self._steps:,} of this run and goes on there")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Hands an entry to the process of Weights & Biases, unless it has that step already."""
        step = int(entry["step"])
        if step >= self._steps:
            self._run.log(curves_of(entry), step=step)

    def close(self) -> None:
        """Waits until what was handed over is written."""
        self._run.finish()


class Careful:
    """A tracker whose failure is said, and ends the tracker, not the run."""

    def __init__(self, tracker: Tracker):
        self._tracker: Tracker | None = tracker

    def write(self, entry: Mapping[str, Any]) -> None:
        """Hands an entry on."""
        finite = {k: v for k, v in entry.items() if not isinstance(v, float) or math.isfinite(v)}
        self._do("write", finite)

    def close(self) -> None:
        """Closes the tracker."""
        self._do("close")

    def _do(self, what: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, what)(*arguments)
        except Exception as error:
            warn(f"{type(self._tracker).__name__} failed ({error}) and gets nothing more; metrics.jsonl has all of it")
            self._tracker = None

"""What a run tells: lines and metrics.jsonl, averaged over the steps between two lines. Used by the loop and the report."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain.loader import Skip
from pretrain.throughput import Utilisation, gpu_memory, host_memory
from pretrain.trackers import Tracker
from setclip.errors import InputError
from setclip.files import replacing
from setclip.log import Meter, duration, is_speaker
from setclip.objects import GROUPS

METRICS_NAME = "metrics.jsonl"
_SAID = (
    "zeroshot_top1",
    *(f"zeroshot_top1_{group}" for group in GROUPS),
    "i2t_r1",
    "i2t_r5",
    "t2i_r1",
    "t2i_r5",
    "rsum",
)
SECONDS_OF_SILENCE = 60.0  # after which a job's log is told that the run goes on


class RunLog:
    """Sums up steps, prints one line per interval and appends it to metrics.jsonl. Only rank 0 writes."""

    def __init__(
        self,
        path: Path,
        total_samples: int,
        samples_seen: int,
        step: int,
        device: torch.device | None = None,
        world_size: int = 1,
        utilisation: Utilisation | None = None,
        trackers: Sequence[Tracker] = (),
    ):
        """`utilisation`: what MFU is computed from; `trackers`: who gets each entry beside metrics.jsonl (rank 0)."""
        self.path, self.device, self.world_size = path, device or torch.device("cpu"), world_size
        self.total_samples, self.first_samples = total_samples, samples_seen
        self.utilisation, self.trackers = utilisation, list(trackers)
        self.meter = Meter(total_samples, "pretraining", "samples", initial=samples_seen)
        self._is_live = sys.stderr.isatty()
        self._start = self._last_said = time.monotonic()
        self._uncounted = 0
        if is_speaker():
            for written in (path, *path.parent.glob("skipped-*.jsonl")):
                _keep_until(written, step)
        self._reset()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time of the block to `what` ("data" or "step")."""
        start = time.monotonic()
        yield
        self._seconds[what] += time.monotonic() - start

    def add(self, samples: int, **values: float) -> None:
        """Counts one step with its values."""
        self._samples += samples
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._uncounted += samples
        # A terminal has a bar; a job's log has the lines of `line`, and words between them where they are far apart.
        if self._is_live or time.monotonic() - self._last_said >= SECONDS_OF_SILENCE:
            self._tell_meter(f"loss {values['loss']:.3f}")

    def of_this_rank(self, bad_samples: int) -> dict[str, float | None]:
        """Returns what differs between ranks of the interval, for `line`. `bad_samples`: this rank's so far."""
        own, loaders = host_memory()
        return {
            "data_wait_share": self._seconds["data"] / max(self._busy, 1e-9),
            "bad_samples": bad_samples,
            "gpu_memory_bytes": gpu_memory(self.device),
            "cpu_memory_bytes": own,
            "loader_memory_bytes": loaders,
        }

    def line(self, of_ranks: Sequence[Mapping[str, float | None]], **now: Any) -> dict[str, Any]:
        """Writes and returns the interval's averages, with the values of `now` (step, samples_seen, …) as they are.

        `of_ranks`: `of_this_rank` of all ranks; shares and memory are those of the rank that has most. Writes nothing
        where all of the interval's steps were skipped.
        """
        if not self._steps:
            return {}
        rate = self._samples / max(self._busy, 1e-9)
        entry = {
            **now,
            **{name: total / self._steps for name, total in self._sums.items()},
            "samples_per_second": rate,
            "samples_per_second_per_rank": rate / self.world_size,
            "seconds_per_step": self._busy / self._steps,
            **({} if self.utilisation is None else {"mfu": self.utilisation.mfu(rate / self.world_size)}),
            **_over_ranks(of_ranks),
        }
        self._reset()
        if is_speaker():
            if self._is_live:
                self._tell_meter()
            self.meter.print_above(line_text(entry, self._seconds_left(entry["samples_seen"])))
            self._last_said = time.monotonic()
            self.write(entry)
        return entry

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends one entry to metrics.jsonl, with the time, and gives it to the trackers (rank 0)."""
        if is_speaker():
            entry = {
                **entry,
                "time": round(time.time(), 3),
                "elapsed_seconds": round(time.monotonic() - self._start, 3),
            }
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            for tracker in self.trackers:
                tracker.write(entry)

    def skipped(self, rank: int, step: int, skips: Sequence[Skip]) -> None:
        """Appends samples that could not be used to this rank's skip list, skipped-RANK.jsonl in the run folder."""
        with open(skip_list(self.path.parent, rank), "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **asdict(skip)}) + "\n" for skip in skips)

    def close(self) -> None:
        """Ends the progress bar and the trackers."""
        self._tell_meter()
        self.meter.close()
        for tracker in self.trackers:
            tracker.close()

    @property
    def _busy(self) -> float:
        return sum(self._seconds.values())

    def _tell_meter(self, note: str = "") -> None:
        """Gives the meter the samples since it got some; in a pipe it says a line if its last is ten seconds old."""
        if self._uncounted:
            self.meter.update(self._uncounted, note)
            self._uncounted, self._last_said = 0, time.monotonic()

    def _seconds_left(self, samples_seen: float) -> float | None:
        """Returns the time to the end of the run at the pace since this start, evaluations and checkpoints included."""
        done = samples_seen - self.first_samples
        return (time.monotonic() - self._start) / done * (self.total_samples - samples_seen) if done > 0 else None

    def _reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._seconds = {"data": 0.0, "step": 0.0}
        self._samples = self._steps = 0


def line_text(entry: Mapping[str, Any], seconds_left: float | None) -> str:
    """Returns a training entry as one line of a job's log, below 200 characters."""
    parts = [
        f"step {entry['step']:>7,}",
        f"samples {entry['samples_seen']:>11,}",
        f"loss {entry['loss']:7.4f}",
        f"kl {entry['kl']:7.4f}",
        f"scale {entry['logit_scale']:6.2f}",
        f"lr {entry['lr']:.2e}",
        f"grad {entry['grad_norm']:6.2f}",
        *([f"similar {entry['similar_pairs']:5.1%}"] if "similar_pairs" in entry else []),
        f"{entry['samples_per_second']:8,.0f} samples/s",
        f"data wait {entry['data_wait_share']:4.0%}",
        *([f"MFU {entry['mfu']:4.0%}"] if "mfu" in entry else []),
        f"{(entry.get('gpu_memory_bytes') or entry['cpu_memory_bytes']) / 1e9:.1f} GB",
        f"bad {entry['bad_samples']:,}",
        *([] if not seconds_left else [f"{duration(seconds_left)} left"]),
    ]
    return "  ".join(parts)


def evaluation_text(step: int, found: Mapping[str, float]) -> str:
    """Returns the main figures of an evaluation along the way as one line; metrics.jsonl has all of them."""
    return "  ".join([f"step {step:>7,}", *(f"{name} {found[name]:.2f}" for name in _SAID if name in found)])


def _over_ranks(of_ranks: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    merged = {}
    for name in of_ranks[0]:
        values = [value for of_rank in of_ranks if (value := of_rank[name]) is not None]
        if values:
            merged[name] = sum(values) if name == "bad_samples" else max(values)
    return merged


def _keep_until(path: Path, step: int) -> None:
    """Drops what a run wrote after the checkpoint that it is resumed from, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    with replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def skip_list(run: Path, rank: int) -> Path:
    """Returns where a rank writes the samples that it could not use."""
    return run / f"skipped-{rank:05d}.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a file of JSON lines, without a last one that is being written or was cut short.

    Raises InputError that names a line before it which is no JSON object.
    """
    entries: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path}, line {number}: expected a JSON object, found {line[:60]!r} ({error}); remove the line"
            ) from error
        entries.append(entry)
    return entries


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a metrics.jsonl; older runs have fewer figures in them. Raises InputError as `read_lines`."""
    return read_lines(path)

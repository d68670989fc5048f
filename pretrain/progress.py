"""What a run tells: lines and metrics.jsonl, averaged over the steps between two lines. Used by the loop."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.loader import Skip
from setclip.log import Meter, is_speaker


class RunLog:
    """Sums up steps, prints one line per interval and appends it to metrics.jsonl. Only rank 0 writes."""

    def __init__(self, path: Path, total_samples: int, samples_seen: int, step: int):
        self.path = path
        self.meter = Meter(total_samples, "pretraining", "samples", initial=samples_seen)
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
        self.meter.update(samples, note=f"loss {values['loss']:.3f}")

    def line(self, **now: Any) -> dict[str, Any]:
        """Writes and returns the interval's averages, with the values of `now` (step, samples_seen, …) as they are.

        Writes nothing where all of its steps were skipped.
        """
        if not self._steps:
            return {}
        busy = sum(self._seconds.values())
        entry = {
            **now,
            **{name: total / self._steps for name, total in self._sums.items()},
            "samples_per_second": self._samples / max(busy, 1e-9),
            "data_wait_share": self._seconds["data"] / max(busy, 1e-9),
        }
        self._reset()
        if is_speaker():
            self.meter.print_above(
                f"step {entry['step']:>7,}  samples {entry['samples_seen']:>11,}  loss {entry['loss']:7.4f}  "
                f"kl {entry['kl']:7.4f}  scale {entry['logit_scale']:6.2f}  lr {entry['lr']:.2e}  "
                f"grad {entry['grad_norm']:6.2f}  {entry['samples_per_second']:8,.0f} samples/s  "
                f"data wait {entry['data_wait_share']:4.0%}  bad {entry['bad_samples']}"
            )
            self.write(entry)
        return entry

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one entry to metrics.jsonl (rank 0)."""
        if is_speaker():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def skipped(self, rank: int, step: int, skips: Sequence[Skip]) -> None:
        """Appends samples that could not be used to this rank's skip list, skipped-RANK.jsonl in the run folder."""
        with open(skip_list(self.path.parent, rank), "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **asdict(skip)}) + "\n" for skip in skips)

    def close(self) -> None:
        """Ends the progress bar."""
        self.meter.close()

    def _reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._seconds = {"data": 0.0, "step": 0.0}
        self._samples = self._steps = 0


def _keep_until(path: Path, step: int) -> None:
    """Drops what a run wrote after the checkpoint that it is resumed from, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def skip_list(run: Path, rank: int) -> Path:
    """Returns where a rank writes the samples that it could not use."""
    return run / f"skipped-{rank:05d}.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

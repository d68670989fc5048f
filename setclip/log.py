"""What people see while things run: lines, progress bars in a terminal, plain progress lines in a job log.

Rank 0 speaks; the other ranks are silent. Used by every stage.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def is_speaker() -> bool:
    """Whether this process is the one that prints (rank 0, by the launcher's variables)."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) or 0) == 0


def say(text: str = "") -> None:
    """Prints a line on rank 0, at once even into a pipe."""
    if is_speaker():
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a line that starts with "warning:" to standard error on rank 0."""
    if is_speaker():
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Meter:
    """Progress of one long piece of work: `update(n)` after each step; rate and time left are shown.

    A live bar where standard error is a terminal; otherwise a plain line every ten seconds, and one at the end of
    anything that took longer than that.
    """

    def __init__(self, total: int | None, description: str, unit: str = "samples", initial: int = 0):
        self.total, self.description, self.unit = total, description, unit
        self.done = self._initial = initial
        self._said = -1
        self.note = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if is_speaker() and sys.stderr.isatty():
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(description, total=total, completed=initial, rate="", note="")
            self._bar.start()

    def update(self, n: int = 1, note: str = "") -> None:
        """Counts `n` more; `note` (loss, accuracy, …) is shown behind."""
        self.done += n
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate_text(), note=self.note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def print_above(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            say(text)

    def close(self) -> None:
        """Ends the bar; long work leaves one last line behind."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if time.monotonic() - self._start >= SECONDS_BETWEEN_LINES and self.done != self._said:
            self._line()

    def _rate(self) -> float:
        return (self.done - self._initial) / max(time.monotonic() - self._start, 1e-9)

    def _rate_text(self) -> str:
        rate = self._rate()
        return f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"

    def _line(self) -> None:
        self._last_line, self._said = time.monotonic(), self.done
        parts = [f"{self.description}: {self.done:,}" + (f"/{self.total:,}" if self.total else "") + f" {self.unit}"]
        parts.append(self._rate_text())
        if self.total and self.done < self.total and self._rate() > 0:
            parts.append(f"{duration((self.total - self.done) / self._rate())} left")
        if self.note:
            parts.append(self.note)
        say(", ".join(parts))


def progress(
    iterable: Iterable[T], total: int | None = None, description: str = "", unit: str = "samples"
) -> Iterator[T]:
    """Yields the items of `iterable` while a Meter counts them."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    meter = Meter(total, description, unit)
    try:
        for item in iterable:
            yield item
            meter.update()
    finally:
        meter.close()


def duration(seconds: float) -> str:
    """Returns "41 s", "12 min 05 s" or "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

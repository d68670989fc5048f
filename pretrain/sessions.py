"""sessions.jsonl in the run folder: each start of a run and how it ended. Written by the loop, read by the report.

A start without an end was killed, or is going on.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.bad_steps import RollBack
from pretrain.progress import read_lines
from pretrain.stopping import Stopped
from setclip.log import is_speaker

SESSIONS_NAME = "sessions.jsonl"


@dataclass(frozen=True)
class Session:
    """One start of a run."""

    started: float
    """Wall time, seconds since 1970."""
    step: int
    """The step after which it went on; 0 for a new run."""
    facts: dict[str, Any]
    """What ran on what: recipe, model, ranks, device, steps in all, data, provenance, …"""
    ended: float | None = None
    """None where it did not say that it ended."""
    end_step: int | None = None
    how: str | None = None
    """"finished", "stopped", "rolled back", "interrupted" or "failed"."""
    reason: str = ""


class SessionLog:
    """Writes one start and its end. All ranks may hold one; rank 0 writes."""

    def __init__(self, run: Path):
        self._path = run / SESSIONS_NAME
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start

    @contextmanager
    def recorded(self, step: Callable[[], int], facts: dict[str, Any]) -> Iterator[None]:
        """Writes the start, and how the block ended. `step` returns the step at which the run is."""
        self._write({"event": "start", "step": step(), **facts})
        try:
            yield
        except BaseException as error:
            self._write({"event": "end", "step": step(), "how": _how(error), "reason": _reason(error)})
            raise
        self._write({"event": "end", "step": step(), "how": "finished"})

    def _write(self, entry: dict[str, Any]) -> None:
        if not is_speaker():
            return
        if self._path.exists():  # what a kill cut short would make the lines after it unreadable
            written = self._path.read_bytes()
            if not written.endswith(b"\n"):
                self._path.write_bytes(written[: written.rfind(b"\n") + 1])
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "time": round(time.time(), 3)}) + "\n")


def read_sessions(run: Path) -> list[Session]:
    """Returns the starts of a run in their order; none for a run of before there was such a file. Raises InputError."""
    path = run / SESSIONS_NAME
    found: list[Session] = []
    for entry in read_lines(path) if path.exists() else []:
        if entry["event"] == "start":
            facts = {name: value for name, value in entry.items() if name not in ("event", "step", "time")}
            found.append(Session(entry["time"], entry["step"], facts))
        elif found and found[-1].ended is None:
            last = found[-1]
            found[-1] = Session(
                last.started, last.step, last.facts, entry["time"], entry["step"], entry["how"], entry.get("reason", "")
            )
    return found


def _how(error: BaseException) -> str:
    for kind, how in ((Stopped, "stopped"), (RollBack, "rolled back"), (KeyboardInterrupt, "interrupted")):
        if isinstance(error, kind):
            return how
    return "failed"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if _how(error) == "failed" else str(error)

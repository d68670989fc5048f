"""Steps whose loss or gradient is not finite: skipped by all ranks, written down, and too many of them end the run.

The engine skips them (`Engine.step`). Here they are counted; more than a number of them in a window of steps send the run
back to its last checkpoint, with their batches left out, and when that does not help it stops. Used by the loop.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setclip import distributed
from setclip.log import is_speaker, warn

NAME = "bad_steps.jsonl"


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does by itself when something goes wrong."""

    max_bad_steps: int = 3
    """Skipped steps (loss or gradient not finite) within --guard.window; one more sends the run back to its last checkpoint."""
    window: int = 100
    """Steps in which they are counted."""
    rollbacks: int = 1
    """Times that a run goes back; then it stops with an error."""
    hang_minutes: float = 30.0
    """Minutes without progress on a rank after which the job names it, writes all stacks to hang/ and ends; 0: never."""
    collapse_steps: int = 500
    """Steps with the loss at ln(pairs contrasted), as if all features were equal, after which that is said."""

    def __post_init__(self) -> None:
        for name in ("max_bad_steps", "window", "rollbacks", "hang_minutes", "collapse_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")


class RollBack(Exception):
    """Too many steps were bad; all ranks raise it at the same step."""

    def __init__(self, steps: Sequence[int]):
        super().__init__(f"steps {', '.join(map(str, steps))} were skipped: their loss or gradient was not finite")
        self.steps = tuple(steps)


class BadSteps:
    """The bad steps of a run. All ranks hold the same."""

    def __init__(self, config: GuardConfig, folder: Path):
        self._config, self._path = config, folder / NAME
        self._recent: list[int] = []

    def add(self, step: int, loss: float, grad_norm: float, keys: Sequence[str]) -> None:
        """Writes a skipped step down: this rank's loss and samples, and the others'. Collective.

        `step` counts from 1. Raises RollBack on all ranks where it is one too many.
        """
        by_rank = distributed.gather_objects((loss, list(keys)))
        if is_speaker():
            ranks = [{"loss": _number(value), "keys": of_rank} for value, of_rank in by_rank]
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "grad_norm": _number(grad_norm), "ranks": ranks}) + "\n")
            bad = [str(rank) for rank, (value, _) in enumerate(by_rank) if not math.isfinite(value)]
            where = f"the loss on rank {', '.join(bad)}" if bad else "the gradient"
            warn(f"step {step:,} is skipped: {where} is not finite; its samples are in {self._path}")
        self._recent = [s for s in self._recent if s > step - self._config.window] + [step]
        if len(self._recent) > self._config.max_bad_steps:
            raise RollBack(self._recent)


class CollapseWatch:
    """Says once when the loss stays at ln(pairs contrasted): each is as likely as every other, and nothing is learnt."""

    def __init__(self, config: GuardConfig, contrasted: int):
        """`contrasted`: the pairs of a batch, or of a group where it has several."""
        self._limit, self._level, self._steps = config.collapse_steps, math.log(contrasted), 0

    def add(self, loss: float) -> str | None:
        """Counts a step; returns what to say, once."""
        if abs(loss - self._level) > 0.005 * self._level:
            self._steps = 0
            return None
        self._steps += 1
        if self._steps != self._limit:
            return None
        return (
            f"the loss has been at ln(pairs contrasted) = {self._level:.3f} for {self._limit} steps: all features are alike "
            "(a collapse); "
            "lower --optim.lr or lengthen the warm-up, and look at the captions"
        )


def _number(value: float) -> float | str:
    """Returns what JSON can hold."""
    return value if math.isfinite(value) else str(value)

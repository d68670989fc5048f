"""From measured rates to what limits a run, how many loader processes it wants, and how long it takes.

Used by pretrain.doctor.
"""

import math
from dataclasses import dataclass
from typing import Literal

HEADROOM = 1.1  # loader processes are to be this much faster than the steps: their speed varies, and one may lag

Limit = Literal["step", "loader", "cores"]

IN_WORDS: dict[str, str] = {
    "step": "the step",
    "loader": "the loader: too few processes",
    "cores": "the cores: training and loading together",
}


@dataclass(frozen=True)
class Costs:
    """What a pair costs on one rank, in seconds."""

    step: float
    """By the clock, forward, loss, backward and update"""
    step_cores: float
    """Of a core, for the same: above `step` where several cores compute, below it where a GPU does"""
    load: float
    """Of a core, all stages of loading, and waiting for reads"""
    load_cores: float
    """Of a core, without the waiting"""
    hand_over: float = 0.0
    """In the training process, to take it from a loader process"""


@dataclass(frozen=True)
class Forecast:
    """A run as it is set up, from what was measured."""

    limits: dict[Limit, float]
    """Pairs a second on one rank that each of them allows; the lowest decides"""
    workers: int
    """Loader processes a rank"""
    workers_needed: int
    """With which loading keeps up with the steps; 1 at least"""
    cores: int
    """Of this rank"""
    cores_needed: int
    """That the rank keeps busy when nothing but the step limits it"""
    ranks: int
    pairs: int
    """Of the whole run"""

    @property
    def rate(self) -> float:
        """Pairs a second on one rank."""
        return min(self.limits.values())

    @property
    def bottleneck(self) -> Limit:
        """What decides the rate."""
        return min(self.limits, key=lambda name: self.limits[name])

    @property
    def seconds(self) -> float:
        """Of the run, without start, evaluation and checkpoints."""
        return self.pairs / (self.rate * self.ranks)

    @property
    def device_hours(self) -> float:
        """Hours of all ranks together."""
        return self.seconds * self.ranks / 3600


def forecast(costs: Costs, workers: int, lanes: int, cores: int, ranks: int, pairs: int) -> Forecast:
    """Returns what to expect of a run.

    `workers`: loader processes a rank (0: the training process loads); `lanes` of a rank, as no process has less than one;
    `cores` of a rank; `pairs` of the whole run.
    """
    in_training = costs.step + costs.hand_over
    limits: dict[Limit, float] = {"step": 1 / in_training}
    if workers:
        limits["loader"] = min(workers, lanes) / costs.load
    else:
        limits["loader"] = 1 / (costs.step + costs.load)
    limits["cores"] = cores / (costs.step_cores + costs.hand_over + costs.load_cores)
    needed = max(1, min(lanes, math.ceil(HEADROOM * costs.load / in_training)))
    busy = (costs.step_cores + costs.hand_over + HEADROOM * costs.load_cores) / in_training
    return Forecast(limits, workers, needed, cores, math.ceil(busy), ranks, pairs)

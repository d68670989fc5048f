"""Whether a claim holds: a paired t test over seeds, its 95 % interval against a margin that was set before, and one
of a few words.

Runs of two arms with the same seed share data, order and first weights as far as the arms do, so differences are taken seed by
seed. Used by the pages of `benchmarks.claims`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

Verdict = Literal[
    "holds here",
    "holds, but not after adjusting",
    "less than would matter",
    "no difference seen",
    "contradicted",
    "contradicted, but not after adjusting",
    "inconclusive",
]
LEVEL = 0.05
"""Of the p value below which a claim stands"""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences of pairs, first less second."""

    count: int
    mean: float
    deviation: float | None
    """Sample standard deviation (n − 1); None of fewer than two."""
    interval_95: tuple[float, float] | None
    """Student's t."""
    p_value: float | None
    """Two-sided; None of fewer than two, or where all differences are the same."""


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Returns the paired comparison of values that belong together by their places."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return Paired(count=count, mean=mean, deviation=None, interval_95=None, p_value=None)
    deviation = statistics.stdev(differences)
    if deviation <= _ROUNDING * max(map(abs, (*first, *second))):
        deviation = 0.0
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    p_value = None
    if deviation > 0:
        p_value = 2 * float(stats.t.sf(abs(mean) / (deviation / math.sqrt(count)), count - 1))
    return Paired(count=count, mean=mean, deviation=deviation, interval_95=(mean - half, mean + half), p_value=p_value)


def verdict(
    found: Paired,
    kind: Literal["more", "less", "equal"],
    margin: float,
    adjusted: float | None = None,
    *,
    is_chance: bool = False,
    is_one_arm: bool = False,
) -> Verdict:
    """Returns what the comparison of `better` (first) with `worse` (second) says of a claim.

    "more": the interval lies within ± margin: no difference seen where it holds 0, else less than would matter; above 0:
    holds here; below: contradicted; both only with `adjusted`, the p value adjusted for the number of claims (None: it
    is not one of several), below 0.05; else inconclusive. "less" is the same the other way round. "equal": the interval
    within ± margin: holds here; wholly outside: contradicted; else inconclusive. Inconclusive are one seed, `is_chance`
    (an arm that chance explains), and the same difference with every seed, except of two rows that are one arm.
    """
    if found.interval_95 is None or is_chance or (found.deviation == 0 and not is_one_arm):
        return "inconclusive"
    low, high = found.interval_95
    if kind == "less":
        low, high = -high, -low
    is_within = -margin <= low and high <= margin
    if kind == "equal":
        if is_within:
            return "holds here"
        return "contradicted" if low > margin or high < -margin else "inconclusive"
    if low <= 0 <= high:
        return "no difference seen" if is_within else "inconclusive"
    if is_within:
        return "less than would matter"
    stands = adjusted is None or adjusted < LEVEL
    if low > 0:
        return "holds here" if stands else "holds, but not after adjusting"
    return "contradicted" if stands else "contradicted, but not after adjusting"


def holds_chance(values: Sequence[float], chance: float | None) -> bool:
    """Whether the 95 % interval of a mean over seeds holds the level of chance; True of one seed below twice chance."""
    if chance is None:
        return False
    if len(values) < 2:
        return values[0] < 2 * chance
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half <= chance


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns p values adjusted for their number (Holm 1979); None stays None and does not count."""
    there = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(there):
        largest = max(largest, min(1.0, (len(there) - rank) * p))
        adjusted[place] = largest
    return adjusted

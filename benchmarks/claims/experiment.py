"""What an experiment is: arms that are trained, rows that are reported, claims that are judged. All of it is data.

Used by the runner (`benchmarks.claims.units`), which knows nothing of any experiment, and by each experiment's module.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was told that an experiment must know."""

    quick: bool
    """Tiny data and models: shows that it runs, and is no evidence of anything."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is trained once a seed."""

    what: str
    """One line for the reader."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the experiment's `run` makes a run of: JSON."""
    candidates: tuple[Mapping[str, Any], ...] = ()
    """Settings tried with the first seed, of which the best on held-out data is taken for all; (): none are tried."""
    comes_last: bool = False
    """Run after all seeds of the other arms."""
    is_fixed: bool = False
    """Nothing of it is drawn, so that one run stands for all seeds."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: an arm, or one of several ways to evaluate it."""

    arm: str
    prefix: str = ""
    """In front of the names of its values."""
    minus: str | None = None
    """An arm whose values are taken away, seed by seed; chance is then asked of both arms' values."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column of the table."""

    heading: str
    digits: int = 1


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That one row is better than another in a measure, or as good."""

    text: str
    """The claim in words."""
    source: str
    """Whose it is, with the published figures where there are any."""
    better: str
    worse: str
    """Rows; with kind "equal" in any order."""
    measure: str
    margin: float
    """The smallest difference that would matter, in the measure's unit; set before the claim's runs, unless post hoc."""
    kind: Literal["more", "less", "equal"] = "more"
    """Whether `better` is to have more of the measure, less, or as much within the margin."""
    post_hoc: bool = False
    """Asked after figures had been seen: said so, and not one of those that p values are adjusted for."""


@dataclass(frozen=True, kw_only=True)
class Default:
    """A default of the code, which held-out data may change."""

    what: str
    """The settings, by their flags."""
    row: str
    """That of today."""
    others: tuple[str, ...]
    """What may take its place."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run measured."""

    values: Mapping[str, float | None]
    """On the data that are reported, by measure (with a row's prefix); None: there is no such number."""
    held_out: Mapping[str, float]
    """On the data that choose."""
    chance: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % over the queries of this run alone."""
    steps: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """For the experiment's own figures and tables: JSON."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A further table of a page."""

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines, or with `is_bars` points with their deviations by name, of which the page's figure is made."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Sequence[float]]]
    """Name to [x, y] or [x, y, deviation]"""
    is_bars: bool = False
    log_x: bool = False


Unit = Mapping[str, Any]
"""The content of a finished unit's file: `benchmarks.claims.units`"""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One named experiment. `prepare` and `run` are given folders, in which they go on from what is there."""

    title: str
    question: str
    """A paragraph: what is compared and what for."""
    about: Mapping[str, str]
    """Heading to a sentence: data, model, training, choice."""
    limits: Sequence[str]
    """What a reader must not conclude."""
    arms: Mapping[str, Arm]
    rows: Mapping[str, Row]
    measures: Mapping[str, Measure]
    claims: Sequence[Claim]
    chosen_by: str
    """Name of the held-out value, the higher the better, that chooses among candidates."""
    seeds: int
    prepare: Callable[[Path, Path, Options], Any]
    """(folder of its own, folder of data that experiments share, …) → what `run` takes; makes what is not there."""
    run: Callable[[Any, Mapping[str, Any], int, Path], Found]
    """(what `prepare` returned, settings, seed, folder of its own) → what it measured."""
    tables: Callable[[Sequence[Unit]], Sequence[Table]] = lambda units: ()
    default: Default | None = None
    """What its held-out figures decide of the code; None: nothing."""
    plot: Callable[[Sequence[Unit]], Plot | None] | None = None
    """None: the measure that chooses, of each row."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What all runs have in common beside their data: JSON. Runs of other settings are refused."""
    made_of: Callable[[Any], Mapping[str, Any]] = lambda prepared: {}
    """(what `prepare` returned) → what data, "shards", and weights it is: JSON. Runs of others are refused."""
    history: Sequence[str] = ()
    """How the runs came about: what was begun and given up, what was not measured."""
    units_of: str | None = None
    """Name of another experiment whose runs this one looks at, too."""

"""Compares evaluations: prints one Markdown table per data set from results files.

    python -m eval_suite.results runs/a/results/zeroshot_scenes.json runs/b/results/zeroshot_scenes.json

A results file holds every number with its protocol, sample count, 95 % interval, chance, checkpoint, configuration and
commit, so tables and reports are made from it and nothing is copied by hand. Written by the commands of this package.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from setclip.config import command
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say
from setclip.provenance import describe

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number and all that is needed to read it."""

    value: float
    unit: str
    """"%", "rank" (1-based), or "sum of %"."""
    protocol: str
    """One sentence that says how the number comes about."""
    samples: int
    """What the value is a mean or median over: queries, images or classes, as the protocol says."""
    chance: float | None = None
    """The expected value of a random order or guess."""
    interval_95: tuple[float, float] | None = None
    interval_method: str | None = None
    tie_variants: dict[str, float] = field(default_factory=dict)
    """The value under the other rules for equal scores."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation of one model on one data set: the content of a results file."""

    evaluation: str
    """"zeroshot" or "retrieval"."""
    dataset: dict[str, Any]
    """name, place and counts; split where there is one."""
    metrics: dict[str, Metric]
    headline: list[str]
    """Names of the metrics for a narrow table, in its order."""
    checkpoint: dict[str, Any]
    """Identity of the model as its checkpoint tells it."""
    config: dict[str, Any]
    is_partial: bool = False
    """Whether samples that the protocol asks for were missing."""
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    """Wall time of encoding and scoring."""
    provenance: dict[str, Any] = field(default_factory=describe)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format_version: int = FORMAT_VERSION

    @property
    def training_pairs(self) -> dict[str, int] | None:
        """Pairs listed and present in the training data, where the checkpoint tells."""
        data = self.checkpoint.get("data")
        if not isinstance(data, dict) or "pairs_present" not in data:
            return None
        return {"present": data["pairs_present"], "listed": data.get("pairs_listed", data["pairs_present"])}

    def save(self, path: str | Path) -> None:
        """Writes the file, beside and renamed; the folder is made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**dataclasses.asdict(self), "training_pairs": self.training_pairs})

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Reads a results file. Raises InputError where it is missing or something else."""
        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"expected a results file at {path}, found none; make one with `python -m eval_suite.zeroshot NAME` "
                "or `python -m eval_suite.retrieval NAME`, which say where they write"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path}: expected format_version {FORMAT_VERSION}, found {content['format_version']!r}; "
                    "evaluate again"
                )
            content.pop("training_pairs", None)
            content["metrics"] = {name: _metric(values) for name, values in content["metrics"].items()}
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: expected a results file of Setclip, found {error!r}; evaluate again") from error


def default_out(evaluation: str, dataset: str, identity: dict[str, Any], runs_dir: Path = Path("runs")) -> Path:
    """Returns where a command writes without --out: RUN/results/ for a run's checkpoint, else `runs_dir`/results/."""
    where = Path(str(identity.get("where", "model")))
    folder = where.parent.parent if where.parent.name == "checkpoints" else runs_dir
    # `:` and `/` of open_clip names have no place in a file name
    name = re.sub(r"[^\w.-]+", "-", f"{evaluation}_{dataset}_{where.name}")
    return folder / "results" / f"{name}.json"


def markdown_table(results: Sequence[Results], names: Sequence[str] | None = None) -> str:
    """Returns Markdown: for each evaluation and data set a table with one row a run and a row for chance.

    Values stand with their 95 % interval. `names` chooses metrics; by default the headline ones. Metrics that are
    better when low ("rank") say so. Partial evaluations are marked.
    """
    groups: dict[tuple[str, ...], list[Results]] = {}
    for result in results:
        dataset = result.dataset
        key = (result.evaluation, str(dataset.get("name")), str(dataset.get("split") or ""), _counts_text(dataset))
        groups.setdefault(key, []).append(result)
    return "\n".join(_table(key, group, names) for key, group in groups.items())


def _table(key: tuple[str, ...], group: Sequence[Results], names: Sequence[str] | None) -> str:
    evaluation, dataset, split, counts = key
    columns = list(names or dict.fromkeys(name for result in group for name in result.headline))
    first = {c: next((r.metrics[c] for r in group if c in r.metrics), None) for c in columns}
    columns = [c for c in columns if first[c] is not None]
    title = f"{evaluation}, {dataset}" + (f" {split}" if split else "") + f" ({counts})"
    rows = [["model", *(_heading(c, first[c]) for c in columns)], ["---", *["---:"] * len(columns)]]
    for result, model in zip(group, _model_names(group), strict=True):
        cells = [_cell(result.metrics.get(c)) for c in columns]
        rows.append([model + (" (partial)" if result.is_partial else ""), *cells])
    rows.append(["*chance*", *(_number(first[c].chance, first[c].unit) for c in columns)])  # type: ignore[union-attr]
    return f"**{title}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _model_names(group: Sequence[Results]) -> list[str]:
    """Returns short names: the run and the step, or the last part of the place; the whole place where two are alike."""
    places = [str(result.checkpoint.get("where", "model")) for result in group]
    short = []
    for place, result in zip(places, group, strict=True):
        path, step = Path(place), result.checkpoint.get("step")
        name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
        short.append(name + (f", step {step:,}" if isinstance(step, int) else ""))
    return [place if short.count(name) > 1 else name for name, place in zip(short, places, strict=True)]


def _counts_text(dataset: dict[str, Any]) -> str:
    named = [(name, dataset[name]) for name in ("images", "captions", "classes") if isinstance(dataset.get(name), int)]
    return ", ".join(f"{number:,} {name}" for name, number in named)


def _heading(name: str, metric: Metric | None) -> str:
    notes = {"rank": " ↓", "sum of %": ""}
    return name.replace("_", " ") + (notes.get(metric.unit, " %") if metric else "")


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    value = _number(metric.value, metric.unit)
    if metric.interval_95 is None:
        return value
    return f"{value} [{_number(metric.interval_95[0], metric.unit)}, {_number(metric.interval_95[1], metric.unit)}]"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "rank":
        return f"{value:.0f}"
    return f"{value:.2f}" if 0 < abs(value) < 1 else f"{value:.1f}"


def _metric(values: dict[str, Any]) -> Metric:
    interval = values.pop("interval_95", None)
    return Metric(**values, interval_95=None if interval is None else (float(interval[0]), float(interval[1])))


def main() -> None:
    """Runs the command."""
    paths = sys.argv[1:]
    if paths in (["-h"], ["--help"]):
        return say((__doc__ or "").strip())
    if not paths:
        raise InputError("expected results files, found no argument; `python -m eval_suite.results FILE [FILE …]`")
    return say(markdown_table([Results.load(path) for path in paths]).rstrip())


if __name__ == "__main__":
    command(main)

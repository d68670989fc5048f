"""Compares evaluations: prints Markdown tables from results files, one for each data set and protocol.

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
from setclip.metric_text import number_text, with_interval
from setclip.provenance import describe

FORMAT_VERSION = 1

RUN_RESULTS_NAME = "results.json"
"""What a fine-tuning leaves in its folder."""

LIBRARIES = ("numpy", "pillow", "scikit-learn", "faiss-cpu", "eccv-caption")
"""Whose versions stand in results, beside those of all our files."""

PROTOCOL_WORDS: dict[str, str] = {
    "5k": "5K",
    "1k_5fold": "1K, mean of 5 folds",
    "eccv": "ECCV Caption",
    "cxc": "CxC",
    "class_match": "class match",
    "descriptions": "appearance descriptions",
    "both": "templates and descriptions",
    "both_for_tail": "templates, for the tail descriptions too",
}
"""What stands before the name of a metric of a further protocol, in words; others are shown as they are."""

_NO_SETTINGS = ("out", "checkpoint", "device", "workers", "batch_size")  # they say where and how fast, not what

_MEASURE = r"(?:i2t|t2i)_\w+|rsum\w*|(?:top\d+|mean_per_class)\w*"


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
    provenance: dict[str, Any] = field(default_factory=lambda: describe(LIBRARIES))
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


GroupKey = tuple[str, str, str, str]
"""Evaluation, data set, split and counts: what results have in common that may stand side by side."""


def grouped(results: Sequence[Results]) -> dict[GroupKey, list[int]]:
    """Returns the places in `results` of those that may be compared, in their order."""
    groups: dict[GroupKey, list[int]] = {}
    for place, result in enumerate(results):
        dataset = result.dataset
        key = (result.evaluation, str(dataset.get("name")), str(dataset.get("split") or ""), _counts_text(dataset))
        groups.setdefault(key, []).append(place)
    return groups


def split_protocol(name: str) -> tuple[str, str]:
    """Returns (protocol, measure): ("cxc", "i2t_r1") of "cxc_i2t_r1"; the protocol of "i2t_r1" is ""."""
    if re.fullmatch(_MEASURE, name):
        return "", name
    found = re.fullmatch(rf"(\w+?)_({_MEASURE})", name)
    return (found[1], found[2]) if found else ("", name)


def protocol_words(protocol: str, group: Sequence[Results] = ()) -> str:
    """Returns a protocol's name in words; that of metrics without prefix ("") only where `group` tells it."""
    if not protocol and all("5k" in result.details.get("protocols", ()) for result in group):
        protocol = "5k" if group else ""
    return PROTOCOL_WORDS.get(protocol, protocol.replace("_", " "))


def by_protocol(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the names of metrics under their protocols, each in its order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split_protocol(name)[0], []).append(name)
    return found


def markdown_table(results: Sequence[Results], names: Sequence[str] | None = None) -> str:
    """Returns Markdown: for each evaluation, data set and protocol a table with one row a run and a row for chance.

    Values stand with their 95 % interval. `names` chooses metrics; by default the headline ones. Metrics that are
    better when low ("rank") say so. Partial evaluations are marked. Each protocol has a table of its own, so that none
    is wider than one protocol's metrics and no number stands without saying which it is.
    """
    tables = []
    for key, places in grouped(results).items():
        group = [results[place] for place in places]
        chosen = list(names or dict.fromkeys(name for result in group for name in result.headline))
        known = [name for name in chosen if any(name in result.metrics for result in group)]
        tables += [_table(key, group, protocol, columns) for protocol, columns in by_protocol(known).items()]
    return "\n".join(tables)


def _table(key: GroupKey, group: Sequence[Results], protocol: str, columns: Sequence[str]) -> str:
    evaluation, dataset, split, counts = key
    first = [next(r.metrics[c] for r in group if c in r.metrics) for c in columns]
    title = f"{evaluation}, {dataset}" + (f" {split}" if split else "") + (f" ({counts})" if counts else "")
    words = protocol_words(protocol, group)
    title += f": {words}" if words else ""
    headings = [_heading(split_protocol(c)[1], metric) for c, metric in zip(columns, first, strict=True)]
    rows = [["model", *headings], ["---", *["---:"] * len(columns)]]
    for result, model in zip(group, model_names(group), strict=True):
        cells = [_cell(result.metrics.get(c)) for c in columns]
        rows.append([model + (" (partial)" if result.is_partial else ""), *cells])
    if any(metric.chance is not None for metric in first):
        rows.append(["*chance*", *(number_text(metric.chance, metric.unit) for metric in first)])
    return f"**{title}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def model_names(group: Sequence[Results]) -> list[str]:
    """Returns short names: the run and the step, or the last part of the place; the whole place where two are alike.

    Of evaluations of one checkpoint the settings that differ stand behind it.
    """
    places = [str(result.checkpoint.get("where", "model")) for result in group]
    short = []
    for place, result in zip(places, group, strict=True):
        path, step = Path(place), result.checkpoint.get("step")
        name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
        short.append(name + (f", step {step:,}" if isinstance(step, int) else ""))
    names = [
        place if any(other != place for other, n in zip(places, short, strict=True) if n == name) else name
        for name, place in zip(short, places, strict=True)
    ]
    return [_told_apart(place, names, group) for place in range(len(group))]


def _told_apart(place: int, names: Sequence[str], group: Sequence[Results]) -> str:
    alike = [result for name, result in zip(names, group, strict=True) if name == names[place]]
    own = group[place].config
    differing = {
        setting: value
        for setting, value in own.items()
        if setting not in _NO_SETTINGS and any(other.config.get(setting) != value for other in alike)
    }
    notes = [f"{setting.replace('_', ' ')} {value}" for setting, value in differing.items()]
    if len(alike) > 1 and not notes:
        notes = [f"evaluated {group[place].created}"]
    return ", ".join([names[place], *notes])


def _counts_text(dataset: dict[str, Any]) -> str:
    named = [(name, dataset[name]) for name in ("images", "captions", "classes") if isinstance(dataset.get(name), int)]
    return ", ".join(f"{number:,} {name}" for name, number in named)


def _heading(measure: str, metric: Metric) -> str:
    return measure.replace("_", " ") + {"rank": " ↓", "%": " %"}.get(metric.unit, "")


def _cell(metric: Metric | None) -> str:
    return "–" if metric is None else with_interval(metric.value, metric.unit, metric.interval_95)


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

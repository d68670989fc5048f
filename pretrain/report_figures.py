"""The numbers of a run report: the sentence that it opens with, headline numbers, tables. Used by pretrain.report."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from pretrain.report_runs import Run
from pretrain.report_trouble import when
from setclip import report
from setclip.log import duration
from setclip.metric_text import metric_words, number_text

_SPACE = "\N{NO-BREAK SPACE}"
_ENDINGS = {
    "finished": "finished",
    "stopped": "stopped when asked to, and can go on,",
    "failed": "failed",
    "interrupted": "was interrupted",
    "running": "has been going on",
    "ended without a word": "ended without a word",
    "unfinished": "is not finished",
}
_EVALUATION = "Evaluation along the way"
_MOST_FIGURES = 6
_MOST_STEPS = 6  # columns that fit beside each other


def sentence(run: Run) -> str:
    """Returns what ran, on what, how far it came, how it ended."""
    facts, settings = run.facts, run.settings
    model = facts.get("model") or settings.get("model.name") or "a model"
    model = Path(model).stem if str(model).endswith(".json") else model
    loss = facts.get("loss")
    loss = loss.get("name") if isinstance(loss, dict) else loss
    data = (facts.get("data") or {}).get("source") or settings.get("dataset") or settings.get("data.shards")
    batch = settings.get("global_batch_size")
    parts = [f"{model}" + (f" with the loss {loss}" if loss else "") + (f" on {data}" if data else "")]
    if batch:
        group = settings.get("loss.group_size")
        parts.append(f"{batch:,} pairs a step" + (f" in groups of {group:,}" if group else ""))
    if facts.get("ranks"):
        parts.append(f"{facts['ranks']} × {facts.get('device', 'one device')}")
    told = f"{', '.join(parts)}. "
    epoch = f", epoch {run.last['epoch']:.2f}" if "epoch" in run.last else ""
    starts = f" in {len(run.sessions)} starts" if len(run.sessions) > 1 else ""
    took = "" if run.seconds is None else f" {'for' if run.state == 'running' else 'after'} {duration(run.seconds)}"
    told += f"{_of(run.step, run.total_steps)} steps{epoch}: the run {_ENDINGS[run.state]}{took}{starts}."
    if run.state == "running" and (left := seconds_left(run)) is not None:
        told += f" About {duration(left)} are left."
    if run.training and run.state == "running" and "time" in run.last:
        told += f" Its last line is of {when(run.last['time'])}."
    return told


def seconds_left(run: Run) -> float | None:
    """Returns the time to the end at the pace of the last start; None where that is not known."""
    if not run.sessions or run.total_steps is None or "time" not in run.last:
        return None
    start = run.sessions[-1]
    done = run.last["step"] - start.step
    return (run.last["time"] - start.started) / done * (run.total_steps - run.last["step"]) if done > 0 else None


@dataclass(frozen=True)
class Row:
    """A number of a run."""

    title: str
    text: Callable[[Run], str | None]


def rows_of(runs: Sequence[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """Returns table to (title, a text for each run) of all numbers that some run has."""
    found = {}
    for name, rows in {
        **_TABLES,
        _EVALUATION: [Row(_title(n), _with_best(n)) for n in _evaluation_names(runs)],
    }.items():
        texts = [(row.title, [row.text(run) for run in runs]) for row in rows]
        there = [(title, [text or "–" for text in of_row]) for title, of_row in texts if any(of_row)]
        if there:
            found[name] = there
    return found


def tables(runs: Sequence[Run]) -> list[Markup]:
    """All numbers of several runs in columns; those of one run's training in two tables beside each other."""
    is_alone = len(runs) == 1
    found = [
        report.table(
            report.Table(
                name,
                ["", *(("value",) if is_alone else (run.name for run in runs))],
                [[title, *of] for title, of in rows],
            )
        )
        for name, rows in rows_of(runs).items()
        if not (is_alone and name == _EVALUATION)
    ]
    return [report.row(*found)] if is_alone and found else found


def evaluations(run: Run) -> list[Markup]:
    """All figures of the evaluations of a run, a column a step; of many evaluations some, the first and last among them."""
    steps = [entry["step"] for entry in run.evaluations]
    if not steps:
        return []
    some = steps
    if len(steps) > _MOST_STEPS:
        some = [steps[place * (len(steps) - 1) // (_MOST_STEPS - 1)] for place in range(_MOST_STEPS)]
    rows: list[list[str | Markup]] = []
    for name in _evaluation_names([run]):
        unit, best_of = _unit_and_best(name)
        values = run.values(name)
        by_step, best = dict(values), best_of(values, key=lambda point: point[1])
        texts = [number_text(by_step.get(step), unit) for step in some]
        shown = [
            Markup("<strong>{}</strong>").format(t) if s == best[0] else t for s, t in zip(some, texts, strict=True)
        ]
        rows.append([_title(name), *shown, f"{number_text(best[1], unit)} at {best[0]:,}"])
    title = f"All figures, {len(some)} of {len(steps)} evaluations" if len(some) < len(steps) else "All figures"
    return [report.table(report.Table(title, ["step", *(f"{step:,}" for step in some), "best"], rows))] if rows else []


def markdown(runs: Sequence[Run]) -> str:
    """Returns the same as a Markdown table, with a sentence a run above."""
    lines = [f"- **{run.name}**: {sentence(run)}" for run in runs]
    lines += ["", f"| | {' | '.join(run.name for run in runs)} |", f"|---|{'---:|' * len(runs)}"]
    lines += [f"| {title} | {' | '.join(texts)} |" for rows in rows_of(runs).values() for title, texts in rows]
    return "\n".join(line.replace(_SPACE, " ") for line in lines)


def key_figures(runs: Sequence[Run]) -> list[report.KeyFigure]:
    """Progress and what stands for the quality and the speed of a run, each with every run."""
    figures = [
        report.KeyFigure("Steps", [_progress(number, run, len(runs) == 1) for number, run in enumerate(runs, 1)])
    ]
    for title, name, write, most in _HEADLINES:
        found = [(number, run) for number, run in enumerate(runs, 1) if run.values(name)]
        if found:
            highest = max(value for _, run in found for _, value in run.values(name))
            values = [_headline(number, run, name, write, most or highest, len(runs) == 1) for number, run in found]
            figures.append(report.KeyFigure(title, values))
    return figures[:_MOST_FIGURES]


def _headline(
    number: int, run: Run, name: str, write: Callable[[float], str], most: float, is_alone: bool
) -> report.Value:
    """The last value of a figure, or the median where one of the last step says little."""
    values = run.values(name)
    if name in _SPEEDS:
        value, label = statistics.median(v for _, v in values), "median"
        detail = f"from {write(min(v for _, v in values))} to {write(max(v for _, v in values))}"
    else:
        value, label = values[-1][1], f"step {values[-1][0]:,}"
        step, best = (min if name == "kl" else max)(values, key=lambda point: point[1])
        detail = f"best {write(best)}, step {step:,}" if best != value else "its best so far"
    return report.Value(
        label if is_alone else run.name, write(value), value / max(most, 1e-9), f"series-{number}", detail
    )


def _progress(number: int, run: Run, is_alone: bool) -> report.Value:
    total = run.total_steps
    part = "all" if total and run.step >= total else _percents(100 * run.step / total) if total else ""
    detail = f"{part} of {total:,}, {run.state}" if total else run.state
    share = run.step / total if total else 0.0
    return report.Value("done" if is_alone else run.name, f"{run.step:,}", share, f"series-{number}", detail)


def _percents(value: float) -> str:
    return f"{number_text(value, '%')}{_SPACE}%"


def _of(number: int, total: int | None) -> str:
    return f"{number:,} of {total:,}" if total else f"{number:,}"


def _last(name: str, write: Callable[[float], str]) -> Callable[[Run], str | None]:
    return lambda run: write(run.values(name)[-1][1]) if run.values(name) else None


def _median(name: str, write: Callable[[float], str]) -> Callable[[Run], str | None]:
    return lambda run: write(statistics.median(v for _, v in run.values(name))) if run.values(name) else None


def _most(name: str, write: Callable[[float], str]) -> Callable[[Run], str | None]:
    return lambda run: write(max(v for _, v in run.values(name))) if run.values(name) else None


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f}{_SPACE}GB"


def _shares(value: float) -> str:
    return _percents(100 * value)


_HEADLINES: tuple[tuple[str, str, Callable[[float], str], float | None], ...] = (
    ("Zero-shot top-1", "zeroshot_top1", _percents, 100.0),
    ("Zero-shot top-1 of the tail", "zeroshot_top1_tail", _percents, 100.0),
    ("Picture finds its caption, R@5", "i2t_r5", _percents, 100.0),
    ("KL from the labels", "kl", lambda value: f"{value:.3f}", None),
    ("Samples a second", "samples_per_second", lambda value: f"{value:,.0f}", None),
    ("Waiting for data", "data_wait_share", _shares, 1.0),
)
"""Title, figure, how it is written, and what a full bar stands for (None: the highest value)."""
_SPEEDS = ("samples_per_second", "data_wait_share")

_TABLES = {
    "The course": (
        Row("steps", lambda run: _of(run.step, run.total_steps)),
        Row("samples seen", _last("samples_seen", lambda v: f"{v:,.0f}")),
        Row("epochs", _last("epoch", lambda v: f"{v:.2f}")),
        Row("ended", lambda run: run.state),
        Row("time", lambda run: duration(run.seconds) if run.seconds is not None else None),
        Row("starts", lambda run: str(len(run.sessions)) if run.sessions else None),
        Row("loss, last", _last("loss", lambda v: f"{v:.4f}")),
        Row("KL from the labels, last", _last("kl", lambda v: f"{v:.4f}")),
        Row("logit scale, last", _last("logit_scale", lambda v: f"{v:.2f}")),
        Row("gradient norm, median", _median("grad_norm", lambda v: f"{v:.3g}")),
        Row("similar pairs, median", _median("similar_pairs", _shares)),
        Row("bad samples", _last("bad_samples", lambda v: f"{v:,.0f}")),
        Row("skipped steps", lambda run: f"{len(run.bad_steps):,}" if run.training else None),
    ),
    "Speed and memory": (
        Row("samples/s, median", _median("samples_per_second", lambda v: f"{v:,.0f}")),
        Row("samples/s a rank, median", _median("samples_per_second_per_rank", lambda v: f"{v:,.0f}")),
        Row("seconds a step, median", _median("seconds_per_step", lambda v: f"{v:.3g}")),
        Row("waiting for data, median", _median("data_wait_share", _shares)),
        Row("MFU, median", lambda run: _median("mfu", _shares)(run) or ("not counted" if run.training else None)),
        Row("GPU memory, most", _most("gpu_memory_bytes", _bytes)),
        Row("memory of a process, most", _most("cpu_memory_bytes", _bytes)),
        Row("memory of its loaders, most", _most("loader_memory_bytes", _bytes)),
    ),
}


def _evaluation_names(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for entry in run.evaluations for name in entry)
    return [
        name
        for name in names
        if name.startswith(("zeroshot_", "i2t_", "t2i_", "rsum")) and any(run.values(name) for run in runs)
    ]


def _unit_and_best(name: str) -> tuple[str, Callable[..., tuple[int, float]]]:
    return ("rank", min) if name.endswith("medr") else ("%", max)


def _title(name: str) -> str:
    measure = name.removeprefix("zeroshot_")
    is_rank = measure.endswith("medr")
    words = metric_words(measure, "rank" if is_rank else "" if measure == "rsum" else "%")
    return f"zero-shot {words}" if name != measure else words


def _with_best(name: str) -> Callable[[Run], str | None]:
    """The last value, and the best where that was another step's."""
    unit, best_of = _unit_and_best(name)

    def text(run: Run) -> str | None:
        values = run.values(name)
        if not values:
            return None
        last = values[-1][1]
        best_step, best = best_of(values, key=lambda point: point[1])
        words = number_text(last, unit)
        return words if best == last else f"{words} (best {number_text(best, unit)}, step {best_step:,})"

    return text

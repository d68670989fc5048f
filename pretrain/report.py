"""One page from a run folder, while the run goes on or when it is over; of several runs, side by side.

    python -m pretrain.report                       # the newest run under runs/
    python -m pretrain.report runs/cc12m            # or its name: cc12m; writes runs/cc12m/report.html
    python -m pretrain.report cc12m cc12m-hard --out comparison.html

The page is one file that loads nothing from anywhere: curves, throughput, evaluation along the way, bad samples with
their pictures, starts, settings and their difference to the recipe. A summary in Markdown is printed. A run writes its
page itself when it ends or stops.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from markupsafe import Markup

from pretrain import report_curves as curves
from pretrain import report_figures as figures
from pretrain import report_settings as settings
from pretrain import report_trouble as trouble
from pretrain.report_remarks import remarks
from pretrain.report_retrieved import retrieved
from pretrain.report_runs import RUNS_DIR, Run, find_run, newest_run_folder, read_runs
from setclip import report
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.log import say
from setclip.plots import MOST_TIMELINES

REPORT_NAME = "report.html"
COMPARISON_NAME = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class RunReportConfig:
    """Which runs the page shows, and where it goes."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders, or names of runs under runs/. Default: the newest run there."""
    out: Path | None = None
    """Default: report.html in the run folder; of several runs, comparison.html beside the first."""


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of some run folders; returns its path. Raises InputError on what is no run folder."""
    return _write(_read(folders), out)


def _read(folders: Sequence[Path]) -> list[Run]:
    if len(folders) > MOST_TIMELINES:
        raise InputError(
            f"expected at most {MOST_TIMELINES} runs in one report, found {len(folders)}: more lines cannot be told "
            "apart; leave some out"
        )
    return read_runs(folders)


def _write(runs: Sequence[Run], out: Path | None) -> Path:
    first = runs[0].folder
    out = out or (first / REPORT_NAME if len(runs) == 1 else first.parent / COMPARISON_NAME)
    page = compose(runs, out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write_page(out, page)
    return out


def compose(runs: Sequence[Run], place: Path) -> report.Page:
    """Returns the whole page. `place`: the folder that it will lie in, from which its links lead."""
    several = len(runs) > 1
    notes = _notes(runs)
    opening = [report.key_figures(figures.key_figures(runs))]
    if several:
        rows: list[list[str | Markup]] = [[run.name, figures.sentence(run)] for run in runs]
        opening.append(report.table(report.Table("What ran", ["run", "what, and how far"], rows, "words")))
    if notes:
        opening.append(report.caveats("Worth a look", notes))
    sections = [
        _section("training", "Training", _plots(curves.TRAINING, runs), "Figures of the steps, from metrics.jsonl."),
        _section(
            "evaluation",
            "Evaluation along the way",
            [*_plots(curves.EVALUATION, runs), *([] if several else figures.evaluations(runs[0]))],
        ),
        _section("speed", "Speed and memory", _plots(curves.SPEED, runs)),
        _section("numbers", "Numbers", figures.tables(runs)),
        _section("retrieved", "Retrieved, to look at", retrieved(runs, place)),
        _section(
            "bad-samples", "Bad samples", _of_each(runs, trouble.bad_samples), "What could not be decoded or read."
        ),
        _section(
            "bad-steps",
            "Skipped steps",
            _of_each(runs, trouble.bad_steps),
            "Loss or gradient was not finite; all ranks left the step out.",
        ),
        _section("starts", "Starts", [block for run in runs for block in trouble.starts(run)]),
        _section(
            "settings",
            "Settings",
            [
                *(settings.between_runs(runs) if several else []),
                *(block for run in runs for block in settings.against_recipe(run)),
                *(settings.all_settings(run) for run in runs if run.settings),
                *(block for run in runs for block in settings.provenance(run)),
            ],
            "The recipe is that of the version of Setclip which made this page.",
        ),
    ]
    return report.Page(
        title=f"{len(runs)} runs: {', '.join(run.name for run in runs)}" if several else f"Run {runs[0].name}",
        kicker="Setclip pretraining",
        lead=_lead(runs) if several else figures.sentence(runs[0]),
        opening=opening,
        sections=[section for section in sections if section is not None],
        credits=_credits(runs),
    )


def _lead(runs: Sequence[Run]) -> str:
    states = Counter(run.state for run in runs)
    told = ", ".join(f"{number} {state}" for state, number in states.most_common())
    return (
        f"{len(runs)} runs side by side ({told}): their curves lie on top of each other, each in its colour and dashes."
    )


def _notes(runs: Sequence[Run]) -> list[str | Markup]:
    """Returns what is worth a look, with the runs that it is true of, where there are several."""
    of: dict[str, list[str]] = {}
    for run in runs:
        for text in remarks(run):
            of.setdefault(text, []).append(run.name)
    notes: list[str | Markup] = []
    for text, names in of.items():
        parts = text.split("`")  # every second one is a command
        words = Markup("").join(
            Markup("<code>{}</code>").format(p) if n % 2 else Markup.escape(p) for n, p in enumerate(parts)
        )
        notes.append(words if len(runs) == 1 else Markup("<strong>{}:</strong> {}").format(", ".join(names), words))
    return notes


def _section(anchor: str, title: str, blocks: Sequence[Markup], intro: str = "") -> report.Section | None:
    return report.Section(anchor, title, blocks, intro) if blocks else None


def _plots(charts: Sequence[curves.Chart], runs: Sequence[Run]) -> list[Markup]:
    """Returns the figures of charts in rows of three, without one that is left alone: then rows of two come first."""
    found = curves.figures(charts, runs)
    rows = []
    while found:
        size = 3 if len(found) % 3 == 0 else 2
        rows.append(report.row(*found[:size]))
        found = found[size:]
    return rows


def _of_each(runs: Sequence[Run], part: Callable[[Run], list[Markup]]) -> list[Markup]:
    """Returns the blocks of a part for each run, under its name where there are several."""
    blocks: list[Markup] = []
    for run in runs:
        of_run = part(run)
        blocks += [*([report.subtitle(run.name)] if of_run and len(runs) > 1 else []), *of_run]
    return blocks


def _credits(runs: Sequence[Run]) -> list[str | Markup]:
    found: dict[str, None] = {}
    for run in runs:
        found |= dict.fromkeys((run.facts.get("data") or {}).get("credits") or ())
    return [*found, "This file loads nothing from anywhere; it can be kept and sent as it is."]


def main() -> None:
    """Runs the command."""
    config: RunReportConfig = parse(RunReportConfig, description=__doc__)
    if config.runs:
        folders = [find_run(run) for run in config.runs]
    else:
        folders = [newest_run_folder()]
        say(f"no run given: taking the newest, {folders[0]} (of {RUNS_DIR}/)")
    runs = _read(folders)
    out = _write(runs, config.out)
    say(figures.markdown(runs))
    for run in runs:
        for text in remarks(run):
            say(f"- {run.name}: {text}")
    say(f"\nreport: {out}")


if __name__ == "__main__":
    command(main)

"""One page from results files: numbers with intervals, comparison of models, confusions, and retrieved pictures.

    python -m eval_suite.report                                     # the newest results under runs/
    python -m eval_suite.report runs/a/results                      # all results files of a folder
    python -m eval_suite.report a/zeroshot_scenes.json b/zeroshot_scenes.json --out report.html   # b against a

The page is one file that loads nothing from anywhere. Evaluations of one kind on the same data stand side by side; the
first file is what the others are compared with.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from markupsafe import Markup

from eval_suite import report_classes as classes
from eval_suite import report_sections as sections
from eval_suite.model import RUNS_DIR
from eval_suite.report_data import Group, Pictures, newest_results_folder, read_groups, results_files
from setclip import report
from setclip.config import command, parse
from setclip.log import say
from setclip.metric_text import interval_text

REPORT_NAME = "report.html"
_MOST_FIGURES = 6
_MOST_SENTENCES = 3
_MOST_NAMED = 3
_SHORT = {"zeroshot": "Zero-shot"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page shows, and where it goes."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Results files, or folders of them. Default: the folder of the newest results file under runs/."""
    out: Path | None = None
    """Default: report.html beside the first results file."""
    queries: int = 6
    """Retrieval queries of each kind."""
    draws: int = 2000
    """Of the paired comparison of models; p is at least 1/(draws + 1)."""
    data: Path | None = None
    """Shards or images, for pictures that the results hold no copy of. Default: where the evaluation found them."""

    def __post_init__(self) -> None:
        if self.queries < 0:
            raise ValueError(f"queries must be at least 0, found {self.queries}")
        if self.draws < 100:
            raise ValueError(f"draws must be at least 100, found {self.draws}")


def write_report(
    files: Sequence[Path], out: Path, queries: int = 6, draws: int = 2000, data: Path | None = None
) -> report.Page:
    """Writes the page of some results files to `out`; returns what stands in it. Raises InputError on what is no
    results file. The arguments are those of ReportConfig.
    """
    page = compose(read_groups(files), queries, draws, data)
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write_page(out, page)
    return page


def compose(groups: Sequence[Group], queries: int = 6, draws: int = 2000, data: Path | None = None) -> report.Page:
    """The whole page."""
    items = caveats(groups)
    opening = [report.key_figures(key_figures(groups))]
    if items:
        opening.append(report.caveats("Keep in mind", items))
    made: list[report.Section] = []
    for group in groups:
        made.append(section(group, queries, draws, data, {s.anchor for s in made}))
    return report.Page(
        title=title(groups),
        kicker="Setclip evaluation",
        lead=lead(groups),
        opening=opening,
        sections=[*made, settings_section(groups)],
        credits=credits(groups),
    )


def title(groups: Sequence[Group]) -> str:
    """Whom the page is about."""
    names = models(groups)
    if len(names) <= 2:
        return f"Evaluation of {' and '.join(names)}"
    return f"Evaluation of {len(names):,} models"


def lead(groups: Sequence[Group]) -> str:
    """What was evaluated and what came out, each main number beside chance."""
    names = models(groups)
    who = names[0] if len(names) == 1 else f"{len(names):,} models side by side"
    where = [
        f"{sections.evaluation_words(group.evaluation).lower()} on {sections.place_of(group)}"
        + (f" ({group.counts})" if group.counts and len(groups) <= 2 else "")
        for group in groups
    ]
    sentences = [f"{who}: {_listed(where)}."]
    for group in groups[:_MOST_SENTENCES]:
        for name in sections.main_metrics(group, 1):
            sentences.append(_result_sentence(group, name, len(groups) > 1))
    more = len(groups) - _MOST_SENTENCES
    if more > 0:
        sentences.append(f"{more} more {'evaluation' if more == 1 else 'evaluations'} below.")
    return " ".join(sentences)


def _result_sentence(group: Group, name: str, says_where: bool) -> str:
    metrics = [(e.name, e.results.metrics[name]) for e in group.entries if name in e.results.metrics]
    first = metrics[0][1]
    if len(metrics) == 1:
        values = sections.with_chance(first)
    else:
        shown = [f"{sections.percent(m.value, m.unit)} for {model}" for model, m in metrics[:_MOST_NAMED]]
        values = _listed(shown) + (f" and {len(metrics) - _MOST_NAMED} more" if len(metrics) > _MOST_NAMED else "")
        values += f" (chance {sections.percent(first.chance, first.unit)})" if first.chance is not None else ""
    title = sections.metric_title(name)
    return f"{_where(group)}, {title}: {values}." if says_where else f"{_capital(title)}: {values}."


def _where(group: Group) -> str:
    return f"{_SHORT.get(group.evaluation, sections.evaluation_words(group.evaluation))}, {sections.place_of(group)}"


def key_figures(groups: Sequence[Group]) -> list[report.KeyFigure]:
    """The metrics that stand for each evaluation, every model beside chance."""
    each = 2 if len(groups) * 2 <= _MOST_FIGURES else 1
    chosen = [(group, name) for group in groups for name in sections.main_metrics(group, each)]
    return [_key_figure(group, name) for group, name in chosen[:_MOST_FIGURES]]


def _key_figure(group: Group, name: str) -> report.KeyFigure:
    metrics = [(e, e.results.metrics[name]) for e in group.entries if name in e.results.metrics]
    chance = metrics[0][1].chance
    ends = [abs(m.interval_95[1]) if m.interval_95 else abs(m.value) for _, m in metrics]
    most = max([*ends, chance or 0.0, 1e-9])
    values = [
        report.Value(
            entry.name + (" (partial)" if entry.results.is_partial else ""),
            sections.percent(metric.value, metric.unit),
            abs(metric.value) / most,
            f"series-{entry.series if entry.series <= sections.MAX_SERIES else 1}",
            f"95 % interval {interval_text(metric.interval_95, metric.unit, ' to ')}" if metric.interval_95 else "",
        )
        for entry, metric in metrics
    ]
    if chance is not None:
        values.append(report.Value("chance", sections.percent(chance, metrics[0][1].unit), chance / most, "chance"))
    return report.KeyFigure(f"{_where(group)}: {sections.metric_title(name)}", values)


def caveats(groups: Sequence[Group]) -> list[str | Markup]:
    """What a reader must know before believing the numbers."""
    items: list[str | Markup] = []
    for group in groups:
        place = sections.title_of(group)
        partial = [entry.name for entry in group.entries if entry.results.is_partial]
        if partial:
            items.append(
                Markup("<strong>Partial:</strong> {}, {}: samples that the protocol asks for were missing.").format(
                    place, ", ".join(partial)
                )
            )
        span = sections.tie_span(group)
        if span > 1:
            items.append(
                f"{place}: the rule for equal scores moves a percentage by {span:.1f}, so many scores are equal; look at "
                "the features."
            )
        items += [f"{place}: {text}" for text in (*_unlike(group), *group.warnings)]
        items += [f"{place}, {e.name}: {note}." for e in group.entries for note in e.results.details.get("notes") or ()]
    return items


def _unlike(group: Group) -> list[str]:
    """Returns in what the evaluations of a group were not the same, so that their numbers do not compare."""
    found = []
    for what in ("templates", "place"):
        values = list(dict.fromkeys(str(e.results.dataset.get(what)) for e in group.entries))
        if len(values) > 1:
            found.append(f"the models were evaluated with different {what}: {', '.join(values)}.")
    names = dict.fromkeys(name for entry in group.entries for name in entry.results.metrics)
    for name in names:
        protocols = {e.results.metrics[name].protocol for e in group.entries if name in e.results.metrics}
        if len(protocols) > 1:
            found.append(f"the protocol of {name} differs between the models: {' / '.join(sorted(protocols))}")
            break
    return found


def section(group: Group, queries: int, draws: int, data: Path | None, taken: set[str]) -> report.Section:
    """All of one evaluation; its parts are in the menu."""
    anchor = _unique(_anchor(f"{group.evaluation}-{sections.place_of(group)}"), taken)
    pictures = {entry.name: Pictures(entry, data) for entry in group.entries}
    parts = [
        ("numbers", "Numbers", sections.tables(group)),
        ("comparison", "Comparison", sections.comparison(group, draws) if len(group.entries) > 1 else []),
        ("sweep", "Penalty", classes.sweep(group)),
        ("frequency", "Head to tail", classes.groups_of_classes(group)),
        ("classes", "Classes", classes.classes(group)),
        ("confusions", "Confusions", classes.confusions(group, pictures)),
        ("retrieved", "Retrieved, to look at", sections.retrieved(group, pictures, queries) if queries else []),
    ]
    there = [(f"{anchor}-{name}", words, blocks) for name, words, blocks in parts if blocks]
    blocks = [block for at, words, inner in there for block in (report.subtitle(words, at), *inner)]
    models_text = f" {len(group.entries)} models." if len(group.entries) > 1 else f" {group.entries[0].name}."
    return report.Section(
        anchor,
        sections.title_of(group),
        blocks,
        f"{_capital(group.counts)}.{models_text}" if group.counts else models_text.strip(),
        parts=[(at, words) for at, words, _ in there],
    )


def settings_section(groups: Sequence[Group]) -> report.Section:
    """Configuration and provenance of every results file."""
    blocks = [
        block
        for group in groups
        for block in (report.subtitle(sections.evaluation_words(group.evaluation)), *sections.settings(group))
    ]
    return report.Section("settings", "What was run", blocks, "As the results files tell it.", menu="Settings")


def credits(groups: Sequence[Group]) -> list[str | Markup]:
    """Whose pictures the models have seen, where their checkpoints tell, and what this file is."""
    found: dict[str, None] = {}
    for group in groups:
        for entry in group.entries:
            data = entry.results.checkpoint.get("data")
            found |= dict.fromkeys(data.get("credits") or () if isinstance(data, dict) else ())
    return [*found, "This file loads nothing from anywhere; it can be kept and sent as it is."]


def models(groups: Sequence[Group]) -> list[str]:
    """Returns the names of all models, each once."""
    return list(dict.fromkeys(entry.name for group in groups for entry in group.entries))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(texts: Sequence[str]) -> str:
    """Returns "a, b and c"."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _unique(anchor: str, taken: set[str]) -> str:
    number, found = 2, anchor
    while found in taken or found == "settings":
        found, number = f"{anchor}-{number}", number + 1
    return found


def main() -> None:
    """Runs the command."""
    config: ReportConfig = parse(ReportConfig, description=__doc__)
    places = config.results
    if not places:
        places = (newest_results_folder(RUNS_DIR),)
        say(f"no results files given: taking the newest, {places[0]}")
    files = results_files(places)
    out = config.out or files[0].with_name(REPORT_NAME)
    write_report(files, out, config.queries, config.draws, config.data)
    say(f"report of {len(files)} results {'file' if len(files) == 1 else 'files'}: {out}")


if __name__ == "__main__":
    command(main)

"""What queries found in evaluations along the way, as a section of a run report: the same queries at the first evaluation and
at the newest, or of several runs beside each other. Used by pretrain.report.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eval_suite import report_sections
from eval_suite.report_data import Pictures, read_groups
from pretrain.report_runs import Run
from pretrain.retrieved import Gallery
from setclip import report

_QUERIES = 4  # of each kind
_QUERIES_BESIDE = 3  # where each is shown twice or more
_CHOSEN = {"t2i": "Captions look for pictures", "i2t": "Pictures look for captions"}
_WORST = {"t2i": "Captions that fail worst", "i2t": "Pictures that fail worst"}


@dataclass(frozen=True)
class _Column:
    """The answers of one run at one step."""

    name: str
    gallery: Gallery

    def queries(self, direction: str, which: str) -> dict[str, dict[str, Any]]:
        """Returns what tells a query from others → the query with its answers."""
        return {_identity(entry): entry for entry in self.gallery[direction][which]}


def retrieved(runs: Sequence[Run], place: Path) -> list[Markup]:
    """Returns queries with their answers, and links to the reports of evaluations. `place`: the page's folder."""
    blocks = _links(runs, place)
    columns = _columns(runs)
    if not columns:
        return [*blocks, *(block for run in runs for block in _of_results(run))]
    found = []
    for direction, title in _CHOSEN.items():
        found += _beside(title, direction, "chosen", columns)
    if len(runs) == 1:
        for direction, title in _WORST.items():
            found += _beside(title, direction, "worst", columns[-1:])
    what = (
        f"The same queries for each run at its newest evaluation ({'; '.join(column.name for column in columns)})."
        if len(runs) > 1
        else "The same queries at the first evaluation and at the newest."
        if len(columns) > 1
        else f"Queries of the only evaluation so far, at {columns[0].name}."
    )
    told = (
        f"{what} They are spread evenly over the data, not picked. Right answers are marked; another answer may fit as "
    )
    return [*blocks, report.paragraph(f"{told}well and still counts as wrong."), *found]


def _columns(runs: Sequence[Run]) -> list[_Column]:
    if len(runs) == 1:
        return [_Column(f"step {found.step:,}", found.gallery) for found in runs[0].retrieved]
    return [
        _Column(f"{run.name}, step {run.retrieved[-1].step:,}", run.retrieved[-1].gallery)
        for run in runs
        if run.retrieved
    ]


def _beside(title: str, direction: str, which: str, columns: Sequence[_Column]) -> list[Markup]:
    """Returns some queries, the answers of each column side by side."""
    queries = [column.queries(direction, which) for column in columns]
    chosen = list(queries[-1])[: _QUERIES if len(columns) == 1 else _QUERIES_BESIDE]
    rows = [
        [_card(of[query], direction, column) for column, of in zip(columns, queries, strict=True) if query in of]
        for query in chosen
    ]
    if len(columns) == 1:
        rows = [[card for row in rows for card in row]]
    return [report.subtitle(title), *(report.gallery(row) for row in rows)] if chosen else []


def _card(entry: Mapping[str, Any], direction: str, column: _Column) -> report.Query:
    query, pictures = entry["query"], column.gallery.get("pictures", {})
    is_found = any(answer["is_right"] for answer in entry["answers"])
    total = column.gallery["images" if direction == "t2i" else "captions"]
    note = (
        f"{column.name}: right {'picture' if direction == 't2i' else 'caption'} at rank {entry['rank']:,} of {total:,}"
    )
    if direction == "t2i":
        answers = [
            report.Answer(answer["is_right"], answer["score"], _picture(pictures, answer["key"], f"answer {place}"))
            for place, answer in enumerate(entry["answers"], 1)
        ]
        right = report.Answer(True, 0.0, _picture(pictures, query["key"], "right picture"), "← the right picture")
        return report.Query(f"“{query['caption']}”", note, answers, wanted=None if is_found else right)
    own = f"“{query['captions'][0]}”"
    answers = [
        report.Answer(answer["is_right"], answer["score"], text=answer["caption"]) for answer in entry["answers"]
    ]
    wanted = None if is_found else report.Answer(True, 0.0, text=f"Right caption: {own}")
    shown = _picture(pictures, query["key"], f"query picture, captioned: {query['captions'][0]}")
    return report.Query("Best captions", note, answers, shown, wanted)


def _picture(pictures: Mapping[str, str], key: str, alt: str) -> report.Picture:
    if key not in pictures:
        return report.missing_picture(f"no picture ({key}): {alt}", ("cannot be", "decoded"))
    return report.Picture(f"data:image/jpeg;base64,{pictures[key]}", alt)


def _identity(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry["query"]["key"], entry["query"].get("caption")])


def _links(runs: Sequence[Run], place: Path) -> list[Markup]:
    pages = [(run, run.folder / "results" / "report.html") for run in runs]
    return [
        Markup('<p class="intro"><a href="{}">{}: report of its evaluations</a></p>').format(
            Path(os.path.relpath(page, place)).as_posix(), run.name
        )
        for run, page in pages
        if page.exists()
    ]


def _of_results(run: Run) -> list[Markup]:
    """Returns what the newest evaluation by the command retrieved, for a run that did not evaluate on its way."""
    galleries = sorted((run.folder / "results").glob("*.gallery.json"), key=lambda path: path.stat().st_mtime)
    files = [path.with_name(path.name.removesuffix(".gallery.json") + ".json") for path in galleries]
    file = next((file for file in reversed(files) if file.exists()), None)
    blocks: list[Markup] = []
    for group in read_groups([file]) if file is not None else []:
        pictures = {entry.name: Pictures(entry) for entry in group.entries}
        found = report_sections.retrieved(group, pictures, _QUERIES)
        if found:
            title = f"{run.name}: {report_sections.place_of(group)}, {group.entries[0].path.name}"
            blocks += [report.subtitle(title), *found]
    return blocks

"""The page of a search: each query with the pictures that it found, in one HTML file. Used by `eval_suite.index`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eval_suite.indexed_pictures import FoundPicture
from setclip import report


@dataclass(frozen=True)
class SearchHit:
    """One picture that a query found."""

    path: str
    """Below the place of the pictures; of shards the shard and the key."""
    score: float
    picture: FoundPicture


@dataclass(frozen=True)
class SearchQuery:
    """A query and what it found, best first."""

    text: str
    """The words, or the file name of a picture."""
    hits: Sequence[SearchHit]
    picture: bytes | None = None
    """Of a query by picture."""


def write_search_page(path: Path, queries: Sequence[SearchQuery], description: dict[str, Any], place: str) -> None:
    """Writes the page; `description` is the content of index.json, `place` where the pictures lie."""
    sections = [
        report.Section(
            anchor=f"query-{number}",
            title=f"“{query.text}”" if query.picture is None else query.text,
            menu=_shortened(query.text),
            intro=_intro(query),
            blocks=_blocks(query),
        )
        for number, query in enumerate(queries, 1)
    ]
    title = f"Search: {_shortened(queries[0].text)}" if len(queries) == 1 else f"Search: {len(queries)} queries"
    model = description["model"].get("where", "a model")
    kind = "sets of vectors" if description["kind"] == "sets" else "vectors"
    lead = f"{description['pictures']:,} pictures of {place}, as {kind}, ranked by {description['similarity'].replace('_', ' ')}."
    note = f"Model: {model}. {_search_words(description)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_page(path, report.Page(title=title, lead=lead, sections=sections, credits=[note]))


def _blocks(query: SearchQuery) -> list[Markup]:
    cards = [
        report.SampleCard(
            picture=_tile(hit),
            caption=hit.picture.captions[0] if hit.picture.captions else hit.path,
            pills=[report.Pill(hit.picture.problem, "tail")] if hit.picture.problem else [],
            note=f"{place}. {hit.score:.3f}" + (f" · {hit.path}" if hit.picture.captions else ""),
        )
        for place, hit in enumerate(query.hits, 1)
    ]
    blocks = [report.sample_cards(cards)]
    if query.picture is not None:
        asked = report.SampleCard(report.thumbnail(query.picture, f"the query: {query.text}", 320), "the query", [])
        blocks = [report.sample_cards([asked]), report.subtitle("What it finds"), *blocks]
    return blocks


def _tile(hit: SearchHit) -> report.Picture:
    if hit.picture.data is None:
        return report.missing_picture(f"no picture (missing): {hit.path}", ("no longer", "there"))
    return report.thumbnail(hit.picture.data, (hit.picture.captions or [hit.path])[0], 320)


def _intro(query: SearchQuery) -> str:
    problems = [hit.picture.problem for hit in query.hits if hit.picture.problem]
    if not problems:
        return ""
    counts = ", ".join(f"{problems.count(name)} {name}" for name in dict.fromkeys(problems))
    return f"Of these {len(query.hits)} pictures, {counts} since the index was built."


def _search_words(description: dict[str, Any]) -> str:
    if "recall" not in description:
        return "The search is exact."
    recall = description["recall"]
    parts = [f"{recall[kind]:.1f} % for {kind}" for kind in ("pictures", "texts") if recall[kind] is not None]
    return f"The search is approximate ({description['kind']}); of the exact top {recall['k']} it finds {', '.join(parts)}."


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"

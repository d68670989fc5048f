"""The right answers of ECCV Caption and CrissCrossed Captions (CxC), which judged COCO's test split anew.

They come with the package `eccv-caption` (MIT): ECCV Caption, Chun et al. 2022, arXiv 2204.03359; CxC, Parekh et al. 2021,
arXiv 2004.15020. Both name images and captions by the ids of COCO's annotations. Used by the protocols of retrieval.
"""

import importlib.util
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from setclip.errors import InputError

Direction = Literal["i2t", "t2i"]

COUNTS: dict[str, dict[Direction, tuple[int, int]]] = {
    "eccv": {"i2t": (1_261, 22_550), "t2i": (1_332, 11_279)},
    "cxc": {"i2t": (5_000, 35_585), "t2i": (24_972, 35_585)},
}
"""Queries and right pairs of each."""

_FILES: dict[Direction, str] = {"i2t": "image_to_caption", "t2i": "caption_to_image"}


@dataclass(frozen=True)
class Judged:
    """Right answers of one direction, in rows of the data that is evaluated."""

    queries: list[int]
    answers: list[list[int]]
    num_right: list[int]
    """R of each query: its answers, and those that are in no gallery of the test split (ECCV Caption lists two captions
    beyond the fifth of an image, which its authors' own functions count in R)."""
    missing_queries: list[int]
    """Ids of judged queries that the data does not have."""
    missing_answers: list[int]
    """Ids of right answers that the data does not have."""


@cache
def judgements(name: str, direction: Direction) -> Mapping[int, Sequence[int]]:
    """Returns query id to the ids of its right answers. `name`: "eccv", "cxc", or "original" (COCO's own pairs)."""
    path = _data_folder() / f"{name}_{_FILES[direction]}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {int(query): [int(answer) for answer in answers] for query, answers in content.items()}
    if name in COUNTS:
        counts = (len(found), sum(map(len, found.values())))
        if counts != COUNTS[name][direction]:
            raise InputError(
                f"{path}: expected {COUNTS[name][direction]} queries and right pairs, found {counts}; install "
                "eccv-caption 0.1.0"
            )
    return found


def in_rows(
    judged: Mapping[int, Sequence[int]], query_ids: Sequence[int], answer_ids: Sequence[int], gallery: Container[int]
) -> Judged:
    """Returns judgements by row of the data.

    `query_ids` and `answer_ids` are the ids of its rows, `gallery` the ids of answers that a whole gallery has.
    """
    row_of_query = {each: row for row, each in enumerate(query_ids)}
    row_of_answer = {each: row for row, each in enumerate(answer_ids)}
    queries, answers, num_right = [], [], []
    missing_answers: set[int] = set()
    for query, right in judged.items():
        missing = {each for each in right if each not in row_of_answer and each in gallery}
        missing_answers |= missing
        rows = [row_of_answer[each] for each in right if each in row_of_answer]
        if query in row_of_query and rows:
            queries.append(row_of_query[query])
            answers.append(rows)
            num_right.append(len(right) - len(missing))
    return Judged(queries, answers, num_right, sorted(set(judged) - row_of_query.keys()), sorted(missing_answers))


def _data_folder() -> Path:
    # Importing the package would only bring warnings about what it would like to have.
    spec = importlib.util.find_spec("eccv_caption")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "expected the package eccv-caption with the judgements of ECCV Caption and CxC, found none; install it: "
            "pip install eccv-caption==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "data"

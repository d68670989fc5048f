"""retrieved/ in the run folder: what some queries found when the run was evaluated on its way, with small pictures.

The first evaluation and the newest stay, so that a report can show what training changed. Written by the loop, read by
pretrain.report.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_suite.gallery import gallery
from eval_suite.retrieval import RetrievalOutcome
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import warn
from setclip.report import PictureBook
from setclip.shards import Shard

FOLDER = "retrieved"
QUERIES = 4
"""Of each kind: captions and pictures, those spread evenly over the data and those ranked worst."""

Gallery = dict[str, Any]


@dataclass(frozen=True)
class Retrieved:
    """The answers at one step."""

    step: int
    gallery: Gallery
    """As of `eval_suite.gallery`, with the numbers of "images" and "captions" and the place of the "data"."""


class QueryBook:
    """Makes galleries of the same data again and again."""

    def __init__(self, shards: list[Shard], keys: list[str], captions: list[list[str]], data: Path):
        """`data`: where the shards lie."""
        self._keys, self._captions, self._data = keys, captions, data
        self._pictures = PictureBook(shards)

    def gallery(self, outcome: RetrievalOutcome) -> Gallery:
        """Returns what the queries found, with its pictures. Not collective."""
        found = gallery(
            outcome.score,
            outcome.i2t,
            outcome.t2i,
            outcome.image_of_text,
            self._keys,
            self._captions,
            QUERIES,
            read_image=self._pictures.image,
        )
        counts = {"images": len(self._keys), "captions": sum(map(len, self._captions))}
        return {"data": str(self._data), **counts, **found}


def write_retrieved(run: Path, step: int, found: Gallery) -> None:
    """Writes the answers at a step and removes those between it and the first (rank 0).

    What cannot be written is said, and ends nothing: a run does not need it.
    """
    folder = run / FOLDER
    path = folder / f"step-{step:08d}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        first = min((other for other in folder.glob("step-*.json") if other.name < path.name), default=None)
        write_json(path, {"step": step, **found})
        for other in folder.glob("step-*.json"):
            if other not in (first, path):
                other.unlink()
    except OSError as error:
        warn(f"what was retrieved at step {step:,} could not be written ({error}); the report will not show it")


def read_retrieved(run: Path) -> list[Retrieved]:
    """Returns the answers of the first evaluation and of the newest, as far as there are any. Raises InputError."""
    found = []
    for path in sorted((run / FOLDER).glob("step-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(Retrieved(int(content["step"]), content))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: expected a gallery of retrieval, found {error!r}; remove the file") from error
    return found

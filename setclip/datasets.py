"""Shards by name: where a dataset lies when only its name is typed, and the command that makes it.

Used by pretrain and eval_suite (retrieval); the zero-shot sets, which have prompts and counts, are in eval_suite.datasets.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from setclip.errors import InputError
from setclip.lookup import look_up


@dataclass(frozen=True, kw_only=True)
class DatasetPlace:
    """Where a dataset lies under the data folder."""

    folder: str
    how_to_get: str
    """The command that makes it, or where it comes from."""


DATASETS: dict[str, DatasetPlace] = {
    "scenes": DatasetPlace(folder="scenes", how_to_get="python -m data_prep.run scenes --out {folder}"),
    "cc3m": DatasetPlace(
        folder="cc3m", how_to_get="python -m data_prep.run folder --images DIR --captions FILE.jsonl --out {folder}"
    ),
    "cc12m": DatasetPlace(
        folder="cc12m", how_to_get="python -m data_prep.run folder --images DIR --captions FILE.jsonl --out {folder}"
    ),
    "yfcc15m": DatasetPlace(
        folder="yfcc15m", how_to_get="python -m data_prep.run folder --images DIR --captions FILE.jsonl --out {folder}"
    ),
}


def data_root() -> Path:
    """Returns $SETCLIP_DATA, or `data` in the working directory."""
    return Path(os.environ.get("SETCLIP_DATA", "data"))


def locate(name: str) -> Path:
    """Returns the folder of a named dataset. Raises InputError that names the place looked at and what makes it."""
    place = look_up(DATASETS, name, "dataset")
    folder = data_root() / place.folder
    if not folder.exists():
        how = place.how_to_get.format(folder=folder)
        raise InputError(
            f"expected {name} at {folder}, found nothing there; make it: {how} (or give its place with --data)"
        )
    return folder

"""Shards by name: where a dataset lies when only its name is typed, and the command that makes it.

Used by pretrain and eval_suite (retrieval); the zero-shot sets, which have prompts and counts, are in eval_suite.datasets.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.manifest import MANIFEST_NAME


@dataclass(frozen=True, kw_only=True)
class DatasetPlace:
    """Where a dataset lies under the data folder."""

    folder: str
    how_to_get: str
    """The command that makes it, or where it comes from."""


def _prepared(name: str, inputs: str) -> DatasetPlace:
    return DatasetPlace(folder=name, how_to_get=f"python -m data_prep.run {name} {inputs} --out {{folder}}")


DATASETS: dict[str, DatasetPlace] = {
    "scenes": DatasetPlace(folder="scenes", how_to_get="python -m data_prep.run scenes --out {folder}"),
    "cc3m": _prepared("cc3m", "--tars DIR"),
    "cc12m": _prepared("cc12m", "--tars DIR"),
    "yfcc15m-clip": _prepared("yfcc15m-clip", "--tars DIR"),
    "yfcc15m-declip": _prepared("yfcc15m-declip", "--tars DIR"),
    "flickr30k": _prepared("flickr30k", "--images DIR --annotations dataset_flickr30k.json"),
    "coco": _prepared("coco", "--images DIR --annotations dataset_coco.json"),
    "cub": _prepared("cub", "--images DIR --captions DIR --lists DIR"),
}


def data_root() -> Path:
    """Returns $SETCLIP_DATA, or `data` in the working directory."""
    return Path(os.environ.get("SETCLIP_DATA", "data"))


def prepared_or_located(name: str) -> Path:
    """Returns the folder of shards of that name under the data root, else that of a named dataset. Raises as `locate`."""
    folder = data_root() / name
    return folder if (folder / MANIFEST_NAME).exists() else locate(name)


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

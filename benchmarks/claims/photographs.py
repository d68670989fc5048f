"""Flickr8k's photographs as shards: train without the 1,000 pictures that choose, these, and dev, on which is reported.

$SETCLIP_REAL_DATA/flickr8k holds {train,dev}.tar of JPEGs and {train,dev}.jsonl of {"file_name", "captions"}.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from data_prep.run import prepare
from data_prep.sources.folder import FolderConfig
from setclip.errors import InputError
from setclip.manifest import MANIFEST_NAME

HELD_OUT = 1_000


@dataclass(frozen=True)
class Photographs:
    """Folders of shards."""

    train: Path
    """Splits train (5,000 pictures) and val (1,000)"""
    dev: Path
    """Split dev (1,000)"""


def prepare_photographs(shared: Path) -> Photographs:
    """Returns the shards under `shared`, and makes those that are not there. Raises InputError without the photographs."""
    found = Photographs(shared / "flickr8k", shared / "flickr8k-dev")
    if all((folder / MANIFEST_NAME).exists() for folder in (found.train, found.dev)):
        return found
    source = source_folder() / "flickr8k"
    for folder, split, held_out in ((found.train, "train", HELD_OUT), (found.dev, "dev", 0)):
        prepare(
            "folder",
            FolderConfig(
                out=folder,
                images=source / f"{split}.tar",
                captions=source / f"{split}.jsonl",
                split=split,
                hold_out=held_out,
                processes=1,
            ),
        )
    return found


def source_folder() -> Path:
    """Returns $SETCLIP_REAL_DATA. Raises InputError where Flickr8k is not in it."""
    root = os.environ.get("SETCLIP_REAL_DATA")
    if not root or not (Path(root) / "flickr8k" / "train.tar").exists():
        raise InputError(
            f"expected flickr8k/train.tar under $SETCLIP_REAL_DATA, found {root or 'the variable unset'}; set it to the folder "
            "that holds flickr8k/ ({train,dev}.tar of JPEGs and {train,dev}.jsonl with file_name and captions)"
        )
    return Path(root)

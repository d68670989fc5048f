"""The data sets of retrieval by name: where their shards lie. Used by the command of retrieval."""

from pathlib import Path

from setclip.datasets import data_root, locate
from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.manifest import MANIFEST_NAME

RETRIEVAL_DATASETS = ("scenes",)
"""Names in `setclip.datasets.DATASETS` that are shards with captions held out for retrieval."""


def retrieval_place(name: str | None, data: Path | None) -> tuple[str, Path]:
    """Returns (name, folder of shards): of a known name, of any folder of shards under the data root, or of `data`."""
    if data is not None:
        return name or data.resolve().name, data
    if name is None:
        raise InputError(
            f"expected the name of a data set ({', '.join(RETRIEVAL_DATASETS)}) or a folder of shards given by --data, "
            "found neither"
        )
    root = data_root()
    prepared = [path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}")]
    look_up(dict.fromkeys((*RETRIEVAL_DATASETS, *prepared)), name, "dataset")
    return name, root / name if name in prepared else locate(name)

"""What became of each query of an evaluation: a compact file beside the results, for paired tests and error analysis.

`FILE.queries.npz` lies beside `FILE.json`, is written beside and renamed, and holds plain arrays (no pickle):

    format        JSON as text: format_version, kind, about
    keys          (U,) the images, in the order of the data
    zeroshot:     correct (U,) bool, labels and predictions (U,) int; further (U,) arrays may stand beside them
    retrieval:    for each protocol P and direction D (i2t, t2i), one entry per query:
                  P.D.image   (Q,) int, the image (row of `keys`) that the query is or belongs to
                  P.D.rank    (Q,) int, 0-based rank of its best right answer, equal scores against us
                  P.D.fold, P.D.r_precision, P.D.map_at_r   (Q,), where the protocol has them

Written by the commands of zero-shot classification and retrieval, read by `eval_suite.significance`. Letters: U images,
Q queries.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from setclip.errors import InputError
from setclip.files import replacing

FORMAT_VERSION = 1
NEEDED: dict[str, tuple[str, ...]] = {"zeroshot": ("correct", "labels", "predictions"), "retrieval": ()}
"""Kind of evaluation to the arrays that it must have, one entry an image."""

_OF_QUERIES = ("image", "rank")
_MAY_HAVE = ("fold", "r_precision", "map_at_r")


@dataclass(frozen=True, kw_only=True)
class PerQuery:
    """The content of such a file."""

    kind: str
    """"zeroshot" or "retrieval"."""
    keys: np.ndarray
    """(U,) str, the images."""
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]
    """What else a comparison looks at: `captions_sha256`, `protocols` (name to sentence), …"""

    def protocols(self) -> list[str]:
        """Returns the protocols of a retrieval, in the order in which they were written."""
        return list(dict.fromkeys(name.split(".")[0] for name in self.arrays if name.count(".") == 2))


def per_query_path(results_path: str | Path) -> Path:
    """Returns the place of the file that belongs to a results file: `a.json` has `a.queries.npz`."""
    path = Path(results_path)
    return path.with_name(f"{path.stem}.queries.npz")


def save_per_query(
    path: str | Path, *, kind: str, keys: Sequence[str], about: Mapping[str, Any] | None = None, **arrays: Any
) -> None:
    """Writes the file, beside and renamed; the folder is made. Names with a dot are given as `**{"5k.i2t.rank": …}`.

    `arrays`: what numpy can read (tensors of the CPU too). Raises ValueError where a needed one is missing or lengths do
    not fit.
    """
    content = {name: np.asarray(values) for name, values in arrays.items()}
    faults = _faults(kind, len(keys), content)
    if faults:
        raise ValueError(f"expected arrays of {kind!r} for {len(keys):,} images, found {'; '.join(faults)}")
    about_text = json.dumps(
        {"format_version": FORMAT_VERSION, "kind": kind, "about": dict(about or {})}, sort_keys=True
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    compact = {name: _smallest(values) for name, values in content.items()}
    with replacing(path) as temporary:
        # ASCII keys as bytes take a quarter of the space that numpy's text takes.
        encoded = np.array([key.encode() for key in keys], dtype=np.bytes_)
        np.savez_compressed(temporary, format=np.array(about_text), keys=encoded, **compact)  # type: ignore[arg-type]


def load_per_query(path: str | Path) -> PerQuery:
    """Reads the file. Raises InputError where it is missing or something else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"expected what became of each query at {path}, found no file; evaluate again: the commands of zero-shot "
            "classification and retrieval write it beside their results"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            described = json.loads(str(file["format"]))
            arrays = {name: file[name] for name in file.files if name not in ("format", "keys")}
            keys = np.array([key.decode() for key in file["keys"].tolist()], dtype=str)
        version, kind = described["format_version"], described["kind"]
        about = described["about"]
    except (ValueError, KeyError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected a file of queries of Setclip, found {error!r}; evaluate again") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; evaluate again")
    faults = _faults(kind, len(keys), arrays)
    if faults:
        raise InputError(f"{path}: expected arrays for {len(keys):,} images, found {'; '.join(faults)}; evaluate again")
    return PerQuery(kind=kind, keys=keys, arrays=arrays, about=about)


def _faults(kind: str, num_images: int, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Returns what is wrong with the arrays of one kind."""
    if kind not in NEEDED:
        return [f"kind {kind!r} (known: {', '.join(NEEDED)})"]
    faults = [f"no {name!r}" for name in NEEDED[kind] if name not in arrays]
    for name, values in arrays.items():
        protocol, _, rest = name.partition(".")
        direction, _, field = rest.partition(".")
        if not rest:
            if values.shape != (num_images,):
                faults.append(f"{name!r} of shape {values.shape}")
            continue
        if field not in (*_OF_QUERIES, *_MAY_HAVE):
            faults.append(f"{name!r}, whose last part is none of {', '.join((*_OF_QUERIES, *_MAY_HAVE))}")
            continue
        owner = arrays.get(f"{protocol}.{direction}.image")
        if owner is None or f"{protocol}.{direction}.rank" not in arrays:
            faults.append(f"{name!r} without {protocol}.{direction}.image and .rank")
        elif values.ndim != 1 or values.shape != owner.shape:
            faults.append(f"{name!r} of shape {values.shape} for {len(owner)} queries")
        elif field in (*_OF_QUERIES, "fold") and values.dtype.kind not in "iu":
            faults.append(f"{name!r} of {values.dtype} instead of whole numbers")
        elif field == "image" and len(values) and (values.min() < 0 or values.max() >= num_images):
            faults.append(f"{name!r} with images {values.min()} to {values.max()}")
    return faults


def _smallest(values: np.ndarray) -> np.ndarray:
    """Returns whole numbers in the smallest type that holds them; other arrays as they are."""
    if values.dtype.kind not in "iu" or values.size == 0:
        return values
    return values.astype(np.promote_types(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))

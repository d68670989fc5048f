"""Features of regions in the layout of SCAN's release: what a detector found in each picture, and the captions of each.

    DIR/train_ims.npy     (pictures, regions, width) floats, as (29000, 36, 2048); dev, test and testall often hold each picture's
                          row once for each caption
    DIR/train_caps.txt    a caption a line, those of one picture together (5, or as many as is said)
    DIR/train_ids.txt     an id a line, of each picture or of each caption; need not be there

Arrays are read from the file as they are wanted, never as a whole. Used by retrieval, and by finetune, which trains on them.
Letters: B pictures of a batch, N regions, E their width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval_suite.retrieval_data import RETRIEVAL_DATASETS, RetrievalData
from setclip.checkpoint import LoadedModel
from setclip.errors import InputError
from setclip.log import say

CAPTIONS_OF_PICTURE = 5
"""In SCAN's release of Flickr30K and COCO"""
WHERE = (
    "SCAN's release has Flickr30K's and COCO's (the projects of SCAN, github.com/kuanghuei/SCAN, and VSE∞, "
    "github.com/woodfrog/vse_infty, say where), or a detector of yours makes them"
)
IMAGES: dict[str, dict[str, tuple[int, ...]]] = {
    "flickr30k": {"train": (29_000,), "dev": (1_014,), "test": (1_000,)},
    "coco": {"train": (113_287,), "dev": (5_000, 1_000), "test": (1_000, 5_000), "testall": (5_000,)},
}
"""Pictures of the splits in the releases, `val` as `dev`; `dev` and `test` of COCO are there whole and cut"""
_MAGIC = b"\x93NUMPY"
_COMPARED = 32  # pictures whose rows are compared with one another
_SPLITS = ("train", "dev", "val", "test", "testall")


@dataclass(frozen=True)
class Regions:
    """Regions of pictures of one split, some or all: rows of a file that stays on the disk."""

    path: Path
    array: np.ndarray
    """(rows of the file, N, E), mapped into memory"""
    rows: np.ndarray
    """(pictures,) int64: the row of each"""
    repeats: int = 1
    """How often the file holds each picture"""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """E."""
        return int(self.array.shape[2])

    def of(self, pictures: Any) -> Tensor:
        """Returns (B, N, E) float32 of some pictures. Raises InputError where a value is not finite."""
        values = np.array(self.array[self.rows[np.asarray(pictures)]], np.float32)
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values).all((1, 2)))[0])
            row = int(self.rows[np.asarray(pictures)][bad])
            raise InputError(
                f"{self.path}, row {row}: expected finite features, found NaN or infinite ones; make the file anew"
            )
        return torch.from_numpy(values)

    @property
    def has_ids(self) -> bool:
        """Whether the pictures' keys are ids of a file, not their places."""
        return self.path.with_name(self.path.name.removesuffix("_ims.npy") + "_ids.txt").exists()

    def take(self, pictures: Sequence[int]) -> "Regions":
        """Returns those of some pictures alone."""
        return Regions(self.path, self.array, self.rows[np.asarray(pictures, np.int64)], self.repeats)


@dataclass(frozen=True)
class RegionSplit:
    """One split: its pictures' regions, and what is ranked."""

    place: Path
    split: str
    regions: Regions
    data: RetrievalData
    protocols: tuple[str, ...]
    is_partial: bool = False

    @cached_property
    def digest(self) -> str:
        """Of captions and ids, the array's shape and type, and its first and last picture: another file has another one."""
        own = self.regions
        digest = sha256(f"{self.data.captions_sha256} {own.array.dtype} {own.array.shape}".encode())
        for row in (own.rows[0], own.rows[-1]):
            digest.update(np.ascontiguousarray(own.array[row]).tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the data that it was trained on."""
        return {
            "source": "regions",
            "place": str(self.place),
            "split": self.split,
            "images": len(self.regions),
            "regions": list(self.regions.array.shape[1:]),
            "digest": self.digest,
        }


def splits_of(place: Path) -> list[str]:
    """Returns the splits that a folder has features of, in SCAN's order."""
    found = [path.name.removesuffix("_ims.npy") for path in sorted(place.glob("*_ims.npy"))]
    return sorted(found, key=lambda name: (_SPLITS.index(name) if name in _SPLITS else len(_SPLITS), name))


def usual_split(place: Path) -> str:
    """Returns the split that is evaluated where none is named: testall, test, dev or val, whichever is there."""
    return next((name for name in ("testall", "test", "dev", "val") if name in splits_of(place)), "test")


def open_regions(
    place: Path,
    split: str,
    dataset: str | None = None,
    allow_partial: bool = False,
    captions_of_picture: int = CAPTIONS_OF_PICTURE,
) -> RegionSplit:
    """Opens one split, within seconds. Raises InputError that names what is missing or does not fit.

    `dataset`: flickr30k or coco, whose counts are checked; None or another: as many pictures as are there, each with
    `captions_of_picture` captions.
    """
    if not place.is_dir() or not splits_of(place):
        have = "a folder without *_ims.npy" if place.is_dir() else "no such folder"
        raise InputError(
            f"expected region features in {place} (train_ims.npy, train_caps.txt, dev_…, test_…), found {have}; {WHERE}"
        )
    array = _open_array(place, split)
    captions = _lines(place, split, "caps", "captions")
    wanted = CAPTIONS_OF_PICTURE if dataset in IMAGES else captions_of_picture
    each, repeats = _layout(place, split, array, len(captions), wanted)
    number = len(captions) // each
    rows = np.arange(number, dtype=np.int64) * repeats
    keys, ids = _keys(place, split, number, each)
    data = RetrievalData(
        keys=keys,
        captions=[captions[i : i + each] for i in range(0, len(captions), each)],
        image_ids=ids if dataset == "coco" else [None] * number,
        caption_ids=[None] * number,
        class_ids=[None] * number,
    )
    expected = IMAGES.get(dataset or "", {}).get("dev" if split == "val" else split, ())
    is_partial = bool(expected) and number not in expected
    if is_partial and not allow_partial:
        raise InputError(
            f"{dataset}, {place}, split {split}: expected {' or '.join(f'{n:,}' for n in expected)} pictures, found {number:,}; "
            "take the whole files, or what is there with --allow-partial True"
        )
    held = f", each in {repeats} rows" if repeats > 1 else ""
    _, places, width = array.shape
    say(
        f"{place}, {split}: {number:,} pictures{held}, {places} regions × {width} {array.dtype}, {len(captions):,} captions"
    )
    # COCO's test data of 5,000 pictures have protocols of their own
    protocols = RETRIEVAL_DATASETS["coco"].splits["val"].protocols if dataset == "coco" and number == 5_000 else None
    return RegionSplit(
        place,
        split,
        Regions(place / f"{split}_ims.npy", array, rows, repeats),
        data,
        protocols or ("full",),
        is_partial,
    )


def _open_array(place: Path, split: str) -> np.ndarray:
    path = place / f"{split}_ims.npy"
    if not path.exists():
        raise InputError(
            f"expected {path} with features of regions (pictures, regions, width), found no such file; splits there: "
            f"{', '.join(splits_of(place)) or 'none'}; {WHERE}"
        )
    try:
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("it does not begin as one")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"expected a whole array of numpy at {path}, found one that cannot be read ({error}); it may have been cut off: copy "
            "it again"
        ) from error
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating) or 0 in array.shape:
        raise InputError(
            f"expected floats of shape (pictures, regions, width), as (29000, 36, 2048), at {path}, found {array.dtype} "
            f"{array.shape}; features of whole pictures are no regions"
        )
    return array


def _lines(place: Path, split: str, name: str, what: str) -> list[str]:
    path = place / f"{split}_{name}.txt"
    if not path.exists():
        raise InputError(
            f"expected {path} with {what}, one a line, beside {split}_ims.npy, found no such file; {WHERE}"
        )
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 in {path}, found something else ({error}); convert it with iconv") from error
    while lines and not lines[-1]:
        lines.pop()
    blank = [number for number, line in enumerate(lines, 1) if not line]
    if blank or not lines:
        raise InputError(
            f"expected {what} in {path}, one a line, found {f'line {blank[0]} empty' if blank else 'an empty file'}; take the "
            "whole file"
        )
    return lines


def _layout(place: Path, split: str, array: np.ndarray, captions: int, each: int) -> tuple[int, int]:
    """Returns (captions of each picture, rows of the array of each)."""
    rows = len(array)
    path = place / f"{split}_ims.npy"
    if captions % rows:
        raise InputError(
            f"expected {each} captions a picture ({rows * each:,} of {rows:,} rows of {path}, or {rows:,} where each picture is "
            f"there {each} times), found {captions:,} in {split}_caps.txt; take the two files of one release"
        )
    repeats = 1
    if captions == rows:
        repeats = _repeats(array, path)
    found = captions // rows * repeats
    if found != each:
        raise InputError(
            f"expected {each} captions of each picture, found {captions:,} captions in {split}_caps.txt for {rows:,} rows of "
            f"{path}, of which {repeats} in a row are equal: {found} a picture; take the two files of one release, or say "
            "how many captions a picture of other data has (--region-captions)"
        )
    return found, repeats


def _repeats(array: np.ndarray, path: Path) -> int:
    """Returns how many rows in a row hold the same picture, as the first ones do; raises InputError where others differ."""
    rows = len(array)
    repeats = 1
    while repeats < rows and np.array_equal(array[repeats], array[0], equal_nan=True):
        repeats += 1
    if repeats == 1:
        return 1
    groups = sorted({int(i) for i in np.linspace(0, rows // repeats - 1, min(_COMPARED, rows // repeats))})
    uneven = rows % repeats != 0
    for group in groups if not uneven else ():
        own = array[group * repeats : (group + 1) * repeats]
        last = group == rows // repeats - 1
        if not all(np.array_equal(row, own[0], equal_nan=True) for row in own[1:]) or (
            not last and np.array_equal(array[(group + 1) * repeats], own[0], equal_nan=True)
        ):
            uneven = True
            break
    if uneven:
        raise InputError(
            f"expected each picture in {repeats} equal rows of {path}, as the first one is, found others at another place (of "
            f"{rows:,} rows); take the file as it was released, with its captions"
        )
    return repeats


def _keys(place: Path, split: str, number: int, each: int) -> tuple[list[str], list[int | None]]:
    """Returns (the pictures' keys, their ids as whole numbers)."""
    path = place / f"{split}_ids.txt"
    if not path.exists():
        return [f"{split}-{i:06d}" for i in range(number)], [None] * number
    lines = _lines(place, split, "ids", "ids")
    if len(lines) == number * each and each > 1:
        # a release may number captions of a picture: 123#0, 123#1, …
        groups = [sorted({line.split("#")[0] for line in lines[i : i + each]}) for i in range(0, len(lines), each)]
        for picture, group in enumerate(groups):
            if len(group) > 1:
                raise InputError(
                    f"expected one id for the {each} captions of each picture in {path}, found {' and '.join(group[:2])} of "
                    f"picture {picture} (from line {picture * each + 1}); take the files of one release"
                )
        lines = [group[0] for group in groups]
    if len(lines) != number:
        raise InputError(
            f"expected an id of each of {number:,} pictures or of each of {number * each:,} captions in {path}, found "
            f"{len(lines):,}; take the files of one release"
        )
    return lines, [int(line) if line.isdigit() else None for line in lines]


# --- of a model


def check_width(loaded: LoadedModel, regions: Regions) -> None:
    """Raises InputError where a model takes no regions, or regions of another width."""
    if not loaded.takes_regions:
        raise InputError(
            f"expected a model that takes features of regions, found {loaded.identity.get('where')}, which takes pictures; give "
            "pictures (--data), or a model that was fine-tuned with --backbone.image regions"
        )
    width = loaded.model.backbone.image_widths.local  # type: ignore[union-attr]
    if width != regions.width:
        raise InputError(
            f"expected regions {width} wide, as the model was trained with, found {regions.width} in {regions.path}; give "
            "features of the same detector"
        )


class RegionBatches(Sequence[Tensor]):
    """Batches of regions of all pictures, in order, read as they are asked for."""

    def __init__(self, regions: Regions, batch_size: int, batches: range | None = None):
        self.regions, self.batch_size = regions, batch_size
        self._batches = batches if batches is not None else range(-(-len(regions) // batch_size))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return RegionBatches(self.regions, self.batch_size, self._batches[number])
        start = self._batches[number] * self.batch_size
        return self.regions.of(np.arange(start, min(start + self.batch_size, len(self.regions))))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

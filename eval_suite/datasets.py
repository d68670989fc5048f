"""The data sets of zero-shot classification, as data: where they lie, how many samples they have, their prompts.

A new data set is one entry. Used by the command of zero-shot classification. By name they lie under
`$SETCLIP_DATA` (default `data/`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import open_clip

from eval_suite.images import ClassFolders, find_class_folders
from setclip.datasets import data_root
from setclip.errors import InputError
from setclip.lookup import look_up
from setclip.objects import OBJECTS_NAME

TEMPLATES: dict[str, tuple[str, ...]] = {
    # open_clip has them as functions; as text they can be written into results
    "imagenet": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "picture": ("a {}.", "a picture of a {}.", "a small picture of a {}.", "there is a {}."),
    "name": ("{}",),
}
"""Prompt templates; `{}` stands for the class name. "imagenet" are the 80 and "simple" the 7 of OpenAI."""


def imagenet_wnids() -> tuple[str, ...]:
    """Returns the 1,000 WordNet ids of ImageNet-1k; sorted, they are in the order of the class indices."""
    text = (resources.files("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text(encoding="utf-8")
    return tuple(sorted(text.split()))


@dataclass(frozen=True, kw_only=True)
class ZeroShotDataset:
    """Class folders with prompts."""

    place: str
    """Folder under the data root."""
    subfolders: tuple[str, ...] = ("",)
    """Where in it the class folders may lie; the first that is there counts."""
    make: str
    """What to do where it is not there."""
    templates: str = "simple"
    """Key of TEMPLATES."""
    classes: tuple[str, ...] | None = None
    """Folder names in the order of the labels; None: all folders, sorted."""
    class_names: tuple[str, ...] | None = None
    """Names for the prompts, one a class; None: folder names with spaces for underscores."""
    images_per_class: int | None = None
    """None: not fixed."""
    metric: Literal["top1", "mean_per_class"] = "top1"
    """The number that is usually reported."""
    has_objects: bool = False
    """Whether objects.parquet lies in `place`: accuracy is then reported for head, middle and tail classes too."""


ZERO_SHOT_DATASETS: dict[str, ZeroShotDataset] = {
    "imagenet": ZeroShotDataset(
        place="imagenet",
        subfolders=("val", ""),
        make="get ILSVRC2012_img_val.tar from image-net.org and sort its images into 1,000 folders named by WordNet id",
        templates="imagenet",
        classes=imagenet_wnids(),
        class_names=tuple(open_clip.IMAGENET_CLASSNAMES),
        images_per_class=50,
    ),
    "scenes": ZeroShotDataset(
        place="scenes",
        subfolders=("zeroshot", ""),
        make="make it with `python -m data_prep.run scenes --out {place}`",
        templates="picture",
        has_objects=True,
    ),
    "scenes-openmoji": ZeroShotDataset(  # the same nouns in another drawing style, never seen in training
        place="scenes",
        subfolders=("zeroshot_openmoji",),
        make="make it with `python -m data_prep.run scenes --openmoji True --out {place}`",
        templates="picture",
        has_objects=True,
    ),
}


def open_zero_shot(
    name: str | None, data: Path | None = None, allow_partial: bool = False
) -> tuple[ZeroShotDataset, ClassFolders, bool]:
    """Returns (data set, its images, whether it is partial).

    `name` alone looks under the data root, `data` alone takes any class folders, both take the named data set at that
    place. Raises InputError where it is not there, and, without `allow_partial`, where counts are not as expected.
    """
    if name is None:
        if data is None:
            raise InputError(
                f"expected the name of a data set ({', '.join(ZERO_SHOT_DATASETS)}) or class folders given by --data, "
                "found neither"
            )
        return ZeroShotDataset(place=str(data), make=""), find_class_folders(data), False
    dataset = look_up(ZERO_SHOT_DATASETS, name, "dataset")
    place = data or data_root() / dataset.place
    folder = next((place / sub for sub in dataset.subfolders if (place / sub).is_dir()), None)
    if folder is None:
        raise InputError(
            f"expected {name} at {place}, found no such folder; {dataset.make.format(place=place)}, or give another "
            "place with --data"
        )
    found = find_class_folders(folder, dataset.classes)
    faults = count_faults(found, dataset.images_per_class)
    if faults and not allow_partial:
        classes, each = len(found.classes), dataset.images_per_class
        more = f" and {len(faults) - 5:,} more" if len(faults) > 5 else ""
        raise InputError(
            f"{name} at {folder}: expected {classes * (each or 0):,} images, {each} in each of {classes:,} class "
            f"folders; found {len(found.paths):,}: {'; '.join(faults[:5])}{more}. Complete the folder, or evaluate "
            "what is there with --allow-partial True (the result is then marked partial)"
        )
    return dataset, found, bool(faults)


def count_faults(found: ClassFolders, images_per_class: int | None) -> list[str]:
    """Returns what is wrong with the numbers of images, one entry a class; empty where no number is fixed."""
    if images_per_class is None:
        return []
    counts = found.labels.bincount(minlength=len(found.classes)).tolist()
    return [
        f"{name}: {count} images" if count else f"{name}: missing"
        for name, count in zip(found.classes, counts, strict=True)
        if count != images_per_class
    ]


def class_names_of(dataset: ZeroShotDataset, classes: Sequence[str], path: Path | None = None) -> list[str]:
    """Returns the names for the prompts, one a class.

    `path`: a JSON file that overrides them, a list in the order of the folders or a mapping of folder to name.
    """
    if path is None:
        return list(dataset.class_names or (name.replace("_", " ") for name in classes))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"expected a JSON file of class names at {path}, found {error}") from error
    if isinstance(content, dict):
        without = [name for name in classes if name not in content]
        if without:
            raise InputError(
                f"{path}: expected a name for each of {len(classes):,} class folders, found none for "
                f"{', '.join(without[:5])}; add them"
            )
        content = [content[name] for name in classes]
    if not isinstance(content, list) or not all(isinstance(name, str) and name for name in content):
        raise InputError(f"{path}: expected a list of names or a mapping of folder to name, found other values")
    if len(content) != len(classes):
        raise InputError(f"{path}: expected {len(classes):,} names, one a class folder, found {len(content):,}")
    return content


def objects_of(dataset: ZeroShotDataset, found: ClassFolders) -> Path | None:
    """Returns the place of the data set's objects.parquet, beside the class folders or in them; None if it has none."""
    if not dataset.has_objects:
        return None
    inside, beside = found.folder / OBJECTS_NAME, found.folder.parent / OBJECTS_NAME
    return inside if inside.exists() else beside

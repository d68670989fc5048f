"""The data sets of zero-shot classification, as data: where they lie, how many images they have, their classes and prompts.

A new data set is one entry. By name they lie under `$SETCLIP_DATA` (default `data/`). Class names and prompts are those of
CLIP's paper (`class_names/`, with their source); how images are found is in `eval_suite.layouts`. Used by the command of
zero-shot classification and by training.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import open_clip

from eval_suite.class_lists import class_list, imagenet_wnids, published_templates
from eval_suite.image_sources import FoundImages
from eval_suite.layouts import find_images
from eval_suite.own_layouts import OWN_LAYOUTS, tiny_imagenet_names
from eval_suite.wds_tars import CLASSES_NAME
from setclip.datasets import data_root
from setclip.errors import InputError
from setclip.log import warn
from setclip.lookup import look_up
from setclip.objects import OBJECTS_NAME

__all__ = [
    "TEMPLATES",
    "ZERO_SHOT_DATASETS",
    "ZeroShotDataset",
    "class_names_of",
    "count_faults",
    "imagenet_wnids",
    "objects_of",
    "open_zero_shot",
    "templates_of",
]

TEMPLATES: dict[str, tuple[str, ...]] = {
    # open_clip has them as functions; as text they can be written into results
    "imagenet": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "picture": ("a {}.", "a picture of a {}.", "a small picture of a {}.", "there is a {}."),
    "name": ("{}",),
    **published_templates(),
}
"""Prompt templates; `{}` stands for the class name. "imagenet" are the 80 and "simple" the 7 of OpenAI."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotDataset:
    """What is known of a data set before it is seen."""

    place: str
    """Folder under the data root."""
    make: str
    """How to get it."""
    classes: str | None = None
    """Key of `class_list`; None: the folders are the classes, sorted, and their names those of the prompts."""
    num_classes: int | None = None
    """Where `classes` does not tell; None: not fixed."""
    images: tuple[int, ...] = ()
    """How many images it has; several where versions differ. Empty: not fixed."""
    images_per_class: int | None = None
    """None: they differ, or are not fixed."""
    templates: str = "simple"
    """Key of TEMPLATES."""
    metric: Literal["top1", "mean_per_class"] = "top1"
    """The number that is usually reported."""
    subfolders: tuple[str, ...] = ("test", "val", "")
    """Where in `place` class folders may lie; the first that is there counts."""
    splits: tuple[str, ...] = ("test", "val")
    """Where in `place` CLIP_benchmark's tars may lie."""
    own_layout: str | None = None
    """Key of OWN_LAYOUTS: torchvision's layout, or the one in which it is distributed."""
    has_objects: bool = False
    """Whether objects.parquet lies in `place`: accuracy is then reported for head, middle and tail classes too."""
    classes_are_wnids: bool = False
    """Whether folders are WordNet ids that this entry does not list; they get OpenAI's ImageNet names."""


_ANY = "get its test images ({images}) in one of the layouts of docs/evaluation.md"

ZERO_SHOT_DATASETS: dict[str, ZeroShotDataset] = {
    "imagenet": ZeroShotDataset(
        place="imagenet",
        make="get ILSVRC2012_img_val.tar from image-net.org and sort its images into 1,000 folders named by WordNet id",
        classes="imagenet",
        images=(50_000,),
        images_per_class=50,
        templates="imagenet",
        subfolders=("val", ""),
    ),
    "imagenet-v2": ZeroShotDataset(
        place="imagenet-v2",
        make="get the variant matched-frequency of ImageNetV2 (folders 0 to 999)",
        classes="imagenet-v2",
        images=(10_000,),
        images_per_class=10,
        templates="imagenet",
        subfolders=("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency", "test", ""),
    ),
    "imagenet-a": ZeroShotDataset(
        place="imagenet-a",
        make="get imagenet-a.tar (200 folders named by WordNet id)",
        classes="imagenet-a",
        images=(7_500,),
        templates="imagenet",
        subfolders=("imagenet-a", "test", ""),
    ),
    "imagenet-r": ZeroShotDataset(
        place="imagenet-r",
        make="get imagenet-r.tar (200 folders named by WordNet id)",
        classes="imagenet-r",
        images=(30_000,),
        templates="imagenet",
        subfolders=("imagenet-r", "test", ""),
    ),
    "imagenet-sketch": ZeroShotDataset(
        place="imagenet-sketch",
        make="get ImageNet-Sketch.zip (1,000 folders named by WordNet id)",
        classes="imagenet",
        images=(50_889,),
        templates="imagenet",
        subfolders=("sketch", "test", ""),
    ),
    "cifar10": ZeroShotDataset(
        place="cifar10",
        make=_ANY,
        classes="cifar10",
        images=(10_000,),
        images_per_class=1_000,
        templates="cifar",
        own_layout="cifar10",
    ),
    "cifar100": ZeroShotDataset(
        place="cifar100",
        make=_ANY,
        classes="cifar100",
        images=(10_000,),
        images_per_class=100,
        templates="cifar",
        own_layout="cifar100",
    ),
    "food101": ZeroShotDataset(
        place="food101",
        make=_ANY,
        classes="food101",
        images=(25_250,),
        images_per_class=250,
        templates="food101",
        own_layout="food101",
    ),
    "pets": ZeroShotDataset(
        place="pets",
        make=_ANY,
        classes="pets",
        images=(3_669,),
        templates="pets",
        metric="mean_per_class",
        own_layout="pets",
    ),
    "flowers102": ZeroShotDataset(
        place="flowers102",
        make=_ANY,
        classes="flowers102",
        images=(6_149,),
        templates="flowers102",
        metric="mean_per_class",
        own_layout="flowers102",
    ),
    "sun397": ZeroShotDataset(  # all images, as CLIP_benchmark and DataComp count
        place="sun397", make=_ANY, classes="sun397", images=(108_754,), templates="sun397", own_layout="sun397"
    ),
    "sun397-split1": ZeroShotDataset(  # the test half of the first of the authors' ten splits, as in CLIP's paper
        place="sun397",
        make="get SUN397.tar.gz and, into its folder, Testing_01.txt of Partitions.zip",
        classes="sun397",
        images=(19_850,),
        images_per_class=50,
        templates="sun397",
        subfolders=("test",),
        own_layout="sun397-split1",
    ),
    "cars": ZeroShotDataset(
        place="cars", make=_ANY, classes="cars", images=(8_041,), templates="cars", own_layout="cars"
    ),
    "dtd": ZeroShotDataset(  # the test images of the first of the authors' ten splits
        place="dtd",
        make=_ANY,
        classes="dtd",
        images=(1_880,),
        images_per_class=40,
        templates="dtd",
        own_layout="dtd",
    ),
    "caltech101": ZeroShotDataset(  # all images of all 102 folders, BACKGROUND_Google included: there is no official split
        place="caltech101",
        make="get 101_ObjectCategories (102 folders, BACKGROUND_Google is one of them)",
        classes="caltech101",
        images=(9_144,),
        templates="caltech101",
        metric="mean_per_class",
        subfolders=("caltech101/101_ObjectCategories", "101_ObjectCategories", ""),
    ),
    "caltech101-vtab": ZeroShotDataset(  # VTAB's random test part (30 training images a class), which only tars can tell
        place="caltech101-vtab",
        make="get CLIP_benchmark's tars of vtab/caltech101",
        classes="caltech101",
        images=(6_084, 6_085),
        templates="caltech101",
        metric="mean_per_class",
        subfolders=("test",),
    ),
    "aircraft": ZeroShotDataset(
        place="aircraft",
        make=_ANY,
        classes="aircraft",
        images=(3_333,),
        templates="aircraft",
        metric="mean_per_class",
        own_layout="aircraft",
    ),
    "tiny-imagenet": ZeroShotDataset(  # the test images' labels were never published: val is what is evaluated
        place="tiny-imagenet",
        make="get tiny-imagenet-200.zip and unpack it there",
        num_classes=200,
        images=(10_000,),
        images_per_class=50,
        templates="imagenet",
        subfolders=("val", ""),
        splits=("val", "valid", "test"),
        own_layout="tiny-imagenet",
        classes_are_wnids=True,
    ),
    "scenes": ZeroShotDataset(
        place="scenes",
        make="make it with `python -m data_prep.run scenes --out {place}`",
        templates="picture",
        subfolders=("zeroshot", ""),
        splits=(),
        has_objects=True,
    ),
    "scenes-openmoji": ZeroShotDataset(  # the same nouns in another drawing style, never seen in training
        place="scenes",
        make="make it with `python -m data_prep.run scenes --openmoji True --out {place}`",
        templates="picture",
        subfolders=("zeroshot_openmoji",),
        splits=(),
        has_objects=True,
    ),
}


def open_zero_shot(
    name: str | None, data: Path | None = None, allow_partial: bool = False
) -> tuple[ZeroShotDataset, FoundImages, bool]:
    """Returns (data set, its images, whether it is partial).

    `name` alone looks under the data root, `data` alone takes any class folders or tars of CLIP_benchmark, both take the
    named data set at that place. Raises InputError where it is not there, and, without `allow_partial`, where counts are
    not as expected.
    """
    if name is None:
        if data is None:
            raise InputError(
                f"expected the name of a data set ({', '.join(ZERO_SHOT_DATASETS)}) or class folders given by --data, "
                "found neither"
            )
        dataset = ZeroShotDataset(place=str(data), make="")
        found = find_images(data, "class folders", "make them")
    else:
        dataset = look_up(ZERO_SHOT_DATASETS, name, "dataset")
        place = data or data_root() / dataset.place
        found = find_images(
            place,
            name,
            dataset.make.format(place=place, images=f"{dataset.images[0]:,}" if dataset.images else ""),
            class_list(dataset.classes) if dataset.classes else None,
            dataset.subfolders,
            dataset.splits,
            OWN_LAYOUTS[dataset.own_layout] if dataset.own_layout else None,
        )
    found = _with_classes(dataset, found)
    faults = count_faults(dataset, found)
    if faults and not allow_partial:
        raise InputError(
            f"{name or 'data'} at {found.folder} ({found.layout}): expected {_expected_text(dataset, found)}; found "
            f"{len(found.labels):,} images: {_some(faults)}. Complete the folder, or evaluate what is there with "
            "--allow-partial True (the result is then marked partial)"
        )
    return dataset, found, bool(faults)


def _with_classes(dataset: ZeroShotDataset, found: FoundImages) -> FoundImages:
    """Returns tars without class names with those of the data set. Raises InputError where it has none."""
    if found.layout != "tars" or found.names is not None:
        return found
    place = found.folder.parent / CLASSES_NAME
    if dataset.classes is None:
        raise InputError(
            f"expected names of the classes at {place}, found no such file; write one name a line, by label"
        )
    classes = class_list(dataset.classes).folders
    if len(found.classes) > len(classes):
        raise InputError(
            f"{found.folder}: expected labels below {len(classes)}, found {len(found.classes) - 1}; this is another data set"
        )
    warn(f"no {place}: labels are taken to be in the order of the published classes ({', '.join(classes[:3])}, …)")
    return dataclasses.replace(found, classes=classes)


def count_faults(dataset: ZeroShotDataset, found: FoundImages) -> list[str]:
    """Returns what is missing or too much, in words; empty where all is there or no number is fixed."""
    faults = list(found.faults)
    num_classes = _num_classes(dataset)
    if num_classes is not None and len(found.classes) != num_classes:
        faults.append(f"{len(found.classes):,} classes instead of {num_classes:,}")
    counts = found.labels.bincount(minlength=len(found.classes)).tolist()
    pairs = list(zip(found.classes, counts, strict=True))
    if dataset.images_per_class is not None:
        wanted = dataset.images_per_class
        wrong = [(name, count) for name, count in pairs if count != wanted]
    elif num_classes is not None:
        wrong = [(name, count) for name, count in pairs if not count]
    else:
        wrong = []
    faults += [f"{name}: {count:,} images" if count else f"{name}: missing" for name, count in wrong]
    if not faults and dataset.images and len(found.labels) not in dataset.images:
        counted = ", ".join(f"{name} {count:,}" for name, count in sorted(pairs, key=lambda pair: pair[1])[:3])
        difference = len(found.labels) - min(dataset.images, key=lambda number: abs(number - len(found.labels)))
        faults.append(
            f"{abs(difference):,} images too {'many' if difference > 0 else 'few'} (fewest: {counted}); "
            + ("is this more than the test images?" if difference > 0 else "is it unpacked to its end?")
        )
    return faults


def class_names_of(dataset: ZeroShotDataset, found: FoundImages | Sequence[str], path: Path | None = None) -> list[str]:
    """Returns the names for the prompts, one a class.

    Tars of CLIP_benchmark bring their own, which are taken, and said where they differ from the published ones. `found`
    may be the folders' names alone. `path`: a JSON file that overrides all, a list in the order of the classes or a
    mapping of folder to name.
    """
    classes = found.classes if isinstance(found, FoundImages) else tuple(found)
    if path is not None:
        return _names_in_file(path, classes)
    published = class_list(dataset.classes).names if dataset.classes else None
    if isinstance(found, FoundImages):
        if dataset.classes_are_wnids and found.names is None:
            return tiny_imagenet_names(classes, found.place)
        if found.names is not None:
            differing = [n for n in found.names if published is not None and n not in published]
            if differing:
                warn(
                    f"{len(differing):,} of {len(found.names):,} class names in {found.folder} are not the published ones "
                    f"({', '.join(differing[:5])}); its own are taken, as CLIP_benchmark does"
                )
            return list(found.names)
    return list(published or (name.replace("_", " ") for name in classes))


def templates_of(dataset: ZeroShotDataset, found: FoundImages, name: str | None) -> tuple[str, tuple[str, ...]]:
    """Returns (name, prompts): those asked for, those that the data bring, or those of the data set."""
    if name is None and found.templates is not None:
        known = next((key for key, prompts in TEMPLATES.items() if prompts == found.templates), None)
        return known or "of the data", found.templates
    key = name or dataset.templates
    return key, look_up(TEMPLATES, key, "templates")


def objects_of(dataset: ZeroShotDataset, found: FoundImages) -> Path | None:
    """Returns the place of the data set's objects.parquet, beside the class folders or in them; None if it has none."""
    if not dataset.has_objects:
        return None
    inside, beside = found.folder / OBJECTS_NAME, found.folder.parent / OBJECTS_NAME
    return inside if inside.exists() else beside


def _num_classes(dataset: ZeroShotDataset) -> int | None:
    return len(class_list(dataset.classes).names) if dataset.classes else dataset.num_classes


def _expected_text(dataset: ZeroShotDataset, found: FoundImages) -> str:
    if not dataset.images:
        return "what its own lists say"
    text = f"{' or '.join(f'{number:,}' for number in dataset.images)} images"
    classes = f"{_num_classes(dataset) or len(found.classes):,} classes"
    each = dataset.images_per_class
    return f"{text} of {classes}" if each is None else f"{text}, {each:,} in each of {classes}"


def _some(faults: Sequence[str]) -> str:
    more = f" and {len(faults) - 5:,} more" if len(faults) > 5 else ""
    return "; ".join(faults[:5]) + more


def _names_in_file(path: Path, classes: Sequence[str]) -> list[str]:
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

"""Reads data sets as torchvision keeps them after a download, and Tiny ImageNet and SUN397's splits as distributed.

Each reader takes the folder that torchvision calls `root` and returns what the data set's own lists say: pictures, labels
and class names. Reading the lists is torchvision's work, the pictures are decoded by ours. Used by the data sets of
zero-shot classification.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from eval_suite.class_lists import imagenet_names
from eval_suite.image_sources import ArraySource
from setclip.errors import InputError


@dataclass(frozen=True)
class Listed:
    """What a data set's own lists say."""

    pictures: list[Path] | ArraySource
    labels: list[int]
    classes: list[str] | None
    """Names by label; None: the labels are in the order of the published class list."""
    names: list[str] | None = None
    """Names for the prompts, where they are not those of the published class list."""


@dataclass(frozen=True)
class OwnLayout:
    """One layout and where to look for it."""

    name: str
    """As results have it."""
    marker: str
    """Path below `root` that is there in this layout."""
    read: Callable[[Path], Listed]
    """Raises OSError, ValueError, KeyError, RuntimeError or InputError where something is wrong with it."""


def _cifar10(root: Path) -> Listed:
    return _cifar(datasets.CIFAR10(root, train=False))


def _cifar100(root: Path) -> Listed:
    return _cifar(datasets.CIFAR100(root, train=False))


def _cifar(dataset: datasets.CIFAR10) -> Listed:
    return Listed(ArraySource(np.asarray(dataset.data)), list(dataset.targets), list(dataset.classes))


def _food101(root: Path) -> Listed:
    dataset = datasets.Food101(root, split="test", loader=_path)
    return _of_paths(dataset, dataset.classes)


def _flowers102(root: Path) -> Listed:
    return _of_paths(datasets.Flowers102(root, split="test", loader=_path), None)  # Oxford numbers its classes


def _sun397(root: Path) -> Listed:
    dataset = datasets.SUN397(root, loader=_path)
    return _of_paths(dataset, dataset.classes)


def _cars(root: Path) -> Listed:
    dataset = datasets.StanfordCars(root, split="test", loader=_path)
    return _of_paths(dataset, dataset.classes)


def _dtd(root: Path) -> Listed:
    dataset = datasets.DTD(root, split="test", partition=1, loader=_path)
    return _of_paths(dataset, dataset.classes)


def _aircraft(root: Path) -> Listed:
    dataset = datasets.FGVCAircraft(root, split="test", annotation_level="variant", loader=_path)
    return _of_paths(dataset, dataset.classes)


def _pets(root: Path) -> Listed:
    dataset = datasets.OxfordIIITPet(root, split="test")  # checks; its pictures cannot be had without decoding them
    folder = root / "oxford-iiit-pet"
    lines = [line.split() for line in (folder / "annotations" / "test.txt").read_text(encoding="utf-8").splitlines()]
    paths = [folder / "images" / f"{line[0]}.jpg" for line in lines]
    return Listed(paths, [int(line[1]) - 1 for line in lines], list(dataset.classes))


def _sun397_split(root: Path) -> Listed:
    folder = root / "SUN397"
    lists = [place / "Testing_01.txt" for place in (folder, folder / "Partitions", root / "Partitions", root)]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise InputError(
            f"expected the list of the first split's test pictures, Testing_01.txt, in one of "
            f"{', '.join(str(path.parent) for path in lists)}, found none; get Partitions.zip where SUN397 is distributed"
        )
    lines = found.read_text(encoding="utf-8").split()
    classes = [_sun_class(line) for line in (folder / "ClassName.txt").read_text(encoding="utf-8").split()]
    places = {name: label for label, name in enumerate(classes)}
    return Listed(
        [folder / line.lstrip("/") for line in lines],
        [places[_sun_class(line.rpartition("/")[0])] for line in lines],
        classes,
    )


def _sun_class(path: str) -> str:
    """Returns "abbey" of "/a/abbey"."""
    return path.lstrip("/").partition("/")[2]


def _tiny_imagenet(root: Path) -> Listed:
    folder = root / "tiny-imagenet-200"
    wnids = sorted((folder / "wnids.txt").read_text(encoding="utf-8").split())
    places = {wnid: label for label, wnid in enumerate(wnids)}
    lines = (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    fields = [line.split("\t") for line in lines if line]
    paths = [folder / "val" / "images" / name for name, *_ in fields]
    return Listed(paths, [places[wnid] for _, wnid, *_ in fields], wnids, tiny_imagenet_names(wnids, folder))


def tiny_imagenet_names(wnids: Sequence[str], folder: Path) -> list[str]:
    """Returns OpenAI's ImageNet names of WordNet ids, and the first word of words.txt for those that have none."""
    found = imagenet_names(wnids)
    words = folder / "words.txt"
    if None in found and words.is_file():
        lines = (line.split("\t") for line in words.read_text(encoding="utf-8").splitlines() if "\t" in line)
        of_wnid = {wnid: text.split(",")[0].strip() for wnid, text, *_ in lines}
        found = [name or of_wnid.get(wnid) for name, wnid in zip(found, wnids, strict=True)]
    without = [wnid for name, wnid in zip(found, wnids, strict=True) if name is None]
    if without:
        raise InputError(
            f"expected names of {len(wnids)} WordNet ids, found none for {len(without)} ({', '.join(without[:5])}), which are "
            f"not in ImageNet-1k; put Tiny ImageNet's words.txt at {words}, or give --class-names"
        )
    return [name for name in found if name is not None]


OWN_LAYOUTS: dict[str, OwnLayout] = {
    "cifar10": OwnLayout("torchvision", "cifar-10-batches-py", _cifar10),
    "cifar100": OwnLayout("torchvision", "cifar-100-python", _cifar100),
    "food101": OwnLayout("torchvision", "food-101/meta", _food101),
    "pets": OwnLayout("torchvision", "oxford-iiit-pet/annotations", _pets),
    "flowers102": OwnLayout("torchvision", "flowers-102/setid.mat", _flowers102),
    "sun397": OwnLayout("torchvision", "SUN397/ClassName.txt", _sun397),
    "sun397-split1": OwnLayout("as distributed", "SUN397/ClassName.txt", _sun397_split),
    "cars": OwnLayout("torchvision", "stanford_cars/devkit", _cars),
    "dtd": OwnLayout("torchvision", "dtd/dtd/labels", _dtd),
    "aircraft": OwnLayout("torchvision", "fgvc-aircraft-2013b/data", _aircraft),
    "tiny-imagenet": OwnLayout("as distributed", "tiny-imagenet-200/wnids.txt", _tiny_imagenet),
}
"""Data set to its layout. Caltech101 is class folders for torchvision as well, and so are ImageNet and its relatives."""


def find_root(place: Path, layout: OwnLayout) -> Path | None:
    """Returns `root`: `place`, or one of its parents where `place` is the data set's folder itself; None if neither."""
    depth = layout.marker.count("/")
    return next((root for root in (place, *place.parents[: depth + 1]) if (root / layout.marker).exists()), None)


def _path(path: str | Path) -> Path:
    """What takes the place of torchvision's loaders."""
    return Path(path)


def _of_paths(dataset: Iterable[Any], classes: Sequence[str] | None) -> Listed:
    """Returns the pictures in the order of their paths: torchvision's order may be that of the file system."""
    pairs = sorted((path, int(label)) for path, label in _each(dataset))
    return Listed(
        [path for path, _ in pairs], [label for _, label in pairs], None if classes is None else list(classes)
    )


def _each(dataset: Any) -> Iterable[tuple[Path, int]]:
    return (dataset[row] for row in range(len(dataset)))

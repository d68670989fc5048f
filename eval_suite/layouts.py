"""Finds a data set's images in the layouts in which people have it, and says what is missing.

Three kinds: CLIP_benchmark's tars (`wds_tars`), the data set's own or torchvision's folders (`own_layouts`), and class
folders (here). The first that is there counts, in this order. Used by the data sets of zero-shot classification.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from eval_suite.class_lists import ClassList, label_of_each, simplified
from eval_suite.image_sources import FileSource, FoundImages
from eval_suite.images import find_class_folders
from eval_suite.own_layouts import OwnLayout, find_root
from eval_suite.wds_tars import SHARDS_NAME, read_tars, split_folder
from setclip.errors import InputError
from setclip.log import warn

LAYOUTS = ("tars", "torchvision", "as distributed", "folders")


def find_images(
    place: Path,
    what: str,
    how_to_get: str,
    classes: ClassList | None = None,
    subfolders: Sequence[str] = ("",),
    splits: tuple[str, ...] = ("test", "val"),
    own: OwnLayout | None = None,
) -> FoundImages:
    """Returns the images below `place`. Raises InputError that names the layouts looked for where none is there.

    `what`: the data set's name, for messages; `how_to_get`: what to do where it is not there. `subfolders`: where class
    folders may lie, the first that is there counts; `splits`: folders of tars.
    """
    if (tars := split_folder(place, splits)) is not None:
        return read_tars(place, tars)
    if own is not None and (root := find_root(place, own)) is not None:
        return read_own(place, root, own, what, classes)
    folder = next((place / sub for sub in subfolders if (place / sub).is_dir()), None)
    if folder is None:
        raise InputError(
            f"expected {what} at {place} as {_kinds(place, splits, own, subfolders)}; found "
            f"{'no such folder' if not place.is_dir() else 'none of these'}; {how_to_get}, or give another place with --data"
        )
    return read_class_folders(place, folder, classes)


def read_class_folders(place: Path, folder: Path, classes: ClassList | None) -> FoundImages:
    """Returns the images of class folders, by class and then by path.

    With `classes` the folders' names are matched with those of the data set, whatever their case and punctuation;
    without, all folders, sorted by name, are classes. Folders that are no classes are said.
    """
    names: tuple[str, ...] | None = None
    if classes is not None and folder.is_dir():
        there = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        names = _folder_of_each(there, classes)
        others = sorted(there - set(names))
        if others and len(others) < len(there):
            warn(f"{folder}: {len(others):,} folders are no classes and left out ({', '.join(others[:5])})")
    found = find_class_folders(folder, names)
    return FoundImages(
        layout="folders",
        place=place,
        folder=folder,
        classes=found.classes,
        labels=found.labels,
        source=FileSource(found.paths, place),
    )


def read_own(place: Path, root: Path, own: OwnLayout, what: str, classes: ClassList | None) -> FoundImages:
    """Returns the images that a data set's own lists name; those that are not there are faults of the result."""
    try:
        listed = own.read(root)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"expected {what} complete in {root / own.marker.partition('/')[0]} ({own.name}), found: {reason}; unpack the "
            "data set again"
        ) from error
    folder = root / own.marker.partition("/")[0]
    labels, class_names = list(listed.labels), listed.classes
    if classes is not None:
        if class_names is not None:
            labels = _relabelled(labels, class_names, classes, folder)
        class_names = list(classes.folders)
    assert class_names is not None
    faults: list[str] = []
    if isinstance(listed.pictures, list):
        is_there = [path.is_file() for path in listed.pictures]
        gone = [path for path, there in zip(listed.pictures, is_there, strict=True) if not there]
        faults = [f"{len(gone):,} listed files missing (first: {gone[0]})"] if gone else []
        paths = [path for path, there in zip(listed.pictures, is_there, strict=True) if there]
        labels = [label for label, there in zip(labels, is_there, strict=True) if there]
        if not paths:
            raise InputError(f"expected the pictures of {what} below {folder}, found none; unpack the data set again")
        # Keys are paths below `place`, or below `root` where `place` lies in it
        place = place if all(path.is_relative_to(place) for path in paths) else root
    return FoundImages(
        layout=own.name,
        place=place,
        folder=folder,
        classes=tuple(class_names),
        labels=torch.tensor(labels),
        source=FileSource(paths, place) if isinstance(listed.pictures, list) else listed.pictures,
        names=None if listed.names is None else tuple(listed.names),
        faults=tuple(faults),
    )


def _folder_of_each(there: set[str], classes: ClassList) -> tuple[str, ...]:
    """Returns for each class its folder, by the naming that fits most of those that are there."""
    by_simplified = {simplified(name): name for name in sorted(there)}
    best = max(classes.namings, key=lambda naming: sum(name in by_simplified for name in naming))
    own = zip(best, classes.folders, strict=True)
    is_first = best == classes.namings[0]
    return tuple(by_simplified.get(name, canonical if is_first else name) for name, canonical in own)


def _relabelled(labels: list[int], class_names: Sequence[str], classes: ClassList, folder: Path) -> list[int]:
    label_of = label_of_each(class_names, classes)
    unknown = [name for name, label in zip(class_names, label_of, strict=True) if label is None]
    if unknown or len(set(label_of)) != len(classes.names):
        raise InputError(
            f"{folder}: expected the {len(classes.names)} classes of the published data set, found {len(class_names)}"
            + (f", of which {', '.join(unknown[:5])} are not among them" if unknown else "")
            + "; another version? Give its class folders with --data and no name"
        )
    return [int(label_of[label]) for label in labels]  # type: ignore[arg-type]


def _kinds(place: Path, splits: Sequence[str], own: OwnLayout | None, subfolders: Sequence[str]) -> str:
    kinds = [f"CLIP_benchmark's tars ({splits[0]}/{SHARDS_NAME})"] if splits else []
    if own is not None:
        kinds.append(f"{'torchvision keeps it' if own.name == 'torchvision' else 'it is distributed'} ({own.marker})")
    wanted = ", ".join(sub or "." for sub in subfolders)
    return " or ".join([*kinds, f"class folders (in {wanted})"])

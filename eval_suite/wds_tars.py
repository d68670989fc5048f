"""Reads CLIP_benchmark's WebDataset tars: all shards that nshards.txt promises, with classes and prompts beside.

    PLACE/
      test/nshards.txt, test/0.tar, test/1.tar, …       members KEY.jpg|jpeg|png|webp and KEY.cls (the label, from 0)
      classnames.txt                                    one name a line, by label
      zeroshot_classification_templates.txt             one prompt a line, {c} for the name

Only headers and labels are read here, pictures when their turn comes. Used by the data sets of zero-shot classification.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from eval_suite.image_sources import FoundImages, TarPlace, TarSource
from setclip.errors import InputError
from setclip.tar_reader import Member, TarReader

SHARDS_NAME = "nshards.txt"
CLASSES_NAME = "classnames.txt"
TEMPLATES_NAME = "zeroshot_classification_templates.txt"
_EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # where a sample has several, the first counts, as for CLIP_benchmark
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # key and extension as webdataset cuts them
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_NUMBERED = re.compile(r"(0|[1-9]\d*)\.tar")


def split_folder(place: Path, splits: tuple[str, ...]) -> Path | None:
    """Returns the folder of the tars, `place/SPLIT` or `place` itself; None where there are no such tars."""
    candidates = [*(place / split for split in splits), place]
    return next((folder for folder in candidates if (folder / SHARDS_NAME).is_file() or _numbered(folder)), None)


def read_tars(place: Path, folder: Path) -> FoundImages:
    """Returns the images of the tars in `folder`, in their order.

    Shards that nshards.txt promises and that are not there, or are there and not promised, are faults of the result.
    Raises InputError on a missing nshards.txt, and on samples without picture or label.
    """
    promised, there = _promised(folder), _numbered(folder)
    faults = [f"{number}.tar: missing" for number in range(promised) if number not in there]
    faults += [f"{path.name}: there, and not counted by {SHARDS_NAME}" for n, path in there.items() if n >= promised]
    places: list[TarPlace] = []
    labels: list[int] = []
    for number in range(promised):
        for sample, label in _samples(there[number]) if number in there else ():
            places.append(sample)
            labels.append(label)
    if not places:
        raise InputError(
            f"expected samples in the {promised} shards of {folder}, found none ({'; '.join(faults[:5]) or 'empty tars'}); "
            "fetch them again"
        )
    root = folder.parent if any((folder.parent / name).is_file() for name in (CLASSES_NAME, TEMPLATES_NAME)) else folder
    names, templates = _lines(root / CLASSES_NAME), _lines(root / TEMPLATES_NAME)
    if wrong := [line for line in templates or () if "{c}" not in line]:
        raise InputError(
            f"{root / TEMPLATES_NAME}: expected prompts with {{c}} for the class name, found {wrong[0]!r}; mend the file"
        )
    if names is not None and not all(names):
        raise InputError(f"{root / CLASSES_NAME}: expected a name on each line, found an empty line; mend the file")
    highest = max(labels)
    if names is not None and highest >= len(names):
        sample = places[labels.index(highest)]
        raise InputError(
            f"{sample.path}, sample {sample.key}: expected a label below {len(names)}, the number of names in "
            f"{root / CLASSES_NAME}, found {highest}; the tars and the names belong to different data sets"
        )
    return FoundImages(
        layout="tars",
        place=place,
        folder=folder,
        classes=names if names is not None else tuple(map(str, range(highest + 1))),
        labels=torch.tensor(labels),
        source=TarSource(places),
        names=names,
        templates=None if templates is None else tuple(line.replace("{c}", "{}") for line in templates),
        faults=tuple(faults),
    )


def _numbered(folder: Path) -> dict[int, Path]:
    """Returns the tars that are named by number, in the order of numbers."""
    found = [(path, _NUMBERED.fullmatch(path.name)) for path in folder.glob("*.tar")]
    return dict(sorted((int(match[1]), path) for path, match in found if match))


def _promised(folder: Path) -> int:
    """Returns the number in nshards.txt."""
    path = folder / SHARDS_NAME
    there = _numbered(folder)
    advice = "fetch it again"
    if there:
        advice = f"write the number of all its shards into it (the last that is there is {max(there)}.tar)"
    if not path.is_file():
        raise InputError(
            f"expected the number of shards in {path}, found no such file, so that a missing shard would go unnoticed; "
            f"{advice}"
        )
    text = path.read_text(encoding="utf-8").strip()
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"{path}: expected the number of shards, found {text[:40]!r}; {advice}")
    return int(text)


def _samples(path: Path) -> Iterator[tuple[TarPlace, int]]:
    """Yields (place of the picture, label) of each sample of a tar. Raises InputError where it is not whole."""
    key = ""
    parts: dict[str, Member] = {}
    with TarReader(path) as tar:
        for member in tar:
            match = _NAME.fullmatch(member.name)
            if match is None or _SKIPPED.match(member.name):
                continue
            if match[1] != key and parts:
                yield _sample(tar, key, parts)
                parts = {}
            key, extension = match[1], match[2].lower()
            if extension in parts:
                raise InputError(f"{path}, sample {key}: expected one .{extension}, found two; pack the tar again")
            parts[extension] = member
        if parts:
            yield _sample(tar, key, parts)


def _sample(tar: TarReader, key: str, parts: dict[str, Member]) -> tuple[TarPlace, int]:
    extension = next((extension for extension in _EXTENSIONS if extension in parts), None)
    if extension is None or "cls" not in parts:
        hint = " (.npy: several labels a picture)" if "npy" in parts else ""
        raise InputError(
            f"{tar.path}, sample {key}: expected a picture ({', '.join(_EXTENSIONS)}) and its label (.cls), found "
            f"{', '.join(f'.{name}' for name in parts)}{hint}; only data sets with one label a picture are evaluated"
        )
    text = tar.read(parts["cls"]).decode("utf-8", "replace").strip()
    if not text.isdecimal():
        raise InputError(f"{tar.path}, {key}.cls: expected a label, 0 or more, found {text[:40]!r}; pack the tar again")
    return TarPlace(tar.path, key, parts[extension].offset, parts[extension].size), int(text)


def _lines(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())

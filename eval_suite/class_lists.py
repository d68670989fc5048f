"""The classes and prompts of published data sets, as data: names for the prompts, and how folders are named.

`class_names/*.json` hold them with their source; those of the ImageNet family come with open_clip and timm. Used by the
data sets of zero-shot classification.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import open_clip

_FOLDER = resources.files("eval_suite") / "class_names"


@dataclass(frozen=True)
class ClassList:
    """The classes of one data set in the order of their labels."""

    names: tuple[str, ...]
    """For the prompts."""
    folders: tuple[str, ...]
    """What the data set calls them: the names of its folders, or WordNet ids."""
    namings: tuple[tuple[str, ...], ...]
    """All ways in which folders are named, `folders` first; as `simplified` has them."""


def simplified(name: str) -> str:
    """Returns a name in which only letters and digits count: "Aquarium_Fish" and "aquarium fish" are the same."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@functools.cache
def class_list(key: str) -> ClassList:
    """Returns the classes of "imagenet", "imagenet-a", "imagenet-r", "imagenet-v2", or of a file of `class_names`."""
    if key.startswith("imagenet"):
        return _imagenet(key)
    content = _read(key)
    names = tuple(content["names"])
    numbers_from = content.get("numbers_from")
    numbers = () if numbers_from is None else tuple(str(numbers_from + label) for label in range(len(names)))
    return _made(names, tuple(content.get("folders", names)), numbers)


def label_of_each(raw_names: Sequence[str], classes: ClassList) -> list[int | None]:
    """Returns for each of a data set's own class names the label in `classes`; None where it is none of them."""
    places: dict[str, int] = {}
    for naming in classes.namings:
        places = {name: label for label, name in enumerate(naming)} | places
    return [places.get(simplified(name)) for name in raw_names]


def imagenet_wnids(part: str = "imagenet") -> tuple[str, ...]:
    """Returns the 1,000 WordNet ids of ImageNet-1k; sorted, they are in the order of the class indices.

    `part`: "imagenet_a" or "imagenet_r" for the 200 of ImageNet-A or -R.
    """
    text = (resources.files("timm") / "data" / "_info" / f"{part}_synsets.txt").read_text(encoding="utf-8")
    return tuple(sorted(text.split()))


def published_templates() -> dict[str, tuple[str, ...]]:
    """Returns the prompts that CLIP used for each data set but ImageNet; `{}` stands for the class name."""
    return {key: tuple(templates) for key, templates in _read("templates")["templates"].items()}


def imagenet_names(wnids: Sequence[str]) -> list[str | None]:
    """Returns OpenAI's names of WordNet ids; None of those that are not in ImageNet-1k."""
    names = dict(zip(imagenet_wnids(), open_clip.IMAGENET_CLASSNAMES, strict=True))
    return [names.get(wnid) for wnid in wnids]


def _imagenet(key: str) -> ClassList:
    part = {"imagenet-a": "imagenet_a", "imagenet-r": "imagenet_r"}.get(key, "imagenet")
    wnids = imagenet_wnids(part)
    names = tuple(name for name in imagenet_names(wnids) if name is not None)
    assert len(names) == len(wnids)
    numbers = tuple(map(str, range(len(wnids)))) if key == "imagenet-v2" else ()
    return ClassList(names, wnids, tuple(filter(None, (wnids, numbers))))


def _made(names: tuple[str, ...], folders: tuple[str, ...], numbers: tuple[str, ...]) -> ClassList:
    namings = dict.fromkeys((tuple(map(simplified, folders)), tuple(map(simplified, names)), numbers))
    return ClassList(names, folders, tuple(naming for naming in namings if naming))


@functools.cache
def _read(key: str) -> dict[str, Any]:
    return json.loads((_FOLDER / f"{key}.json").read_text(encoding="utf-8"))

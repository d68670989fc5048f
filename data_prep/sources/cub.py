"""CUB-200-2011 with the ten captions of Reed et al., in the splits that PCME set: unseen classes, and held-out images.

    python -m data_prep.run cub --images CUB_200_2011 --captions text_c10 --lists pcme/datasets/annotations/cub \\
        --out data/cub

Of the 200 classes of birds 150 are for training and 50, which training never sees, are `test` (2,967 images). A list of
1,764 images holds out some of the 150 classes. Ten images of it are of unseen classes and stay in `test`; the other
1,754 are `val_in`, so `train` has 7,067.

Images: Wah et al. 2011, https://www.vision.caltech.edu/datasets/cub_200_2011/. Captions: Reed et al. 2016,
https://arxiv.org/abs/1605.05395. Classes: Xian et al. 2017, https://arxiv.org/abs/1703.04394. Protocol: Chun et al. 2021
(PCME), https://arxiv.org/abs/2101.05068, whose matches are of classes: a sample's JSON has `class_id` and `class_name`.
"""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.plan import Plan
from data_prep.sources.benchmark import BenchmarkConfig, Entry, Fact, check_version, digest_of, make_plan, one_line
from setclip.errors import InputError
from setclip.hashing import hash_text

SPLITS = ("train", "val", "val_in", "test")
CAPTIONS_PER_IMAGE = 10

CREDITS = [
    "CUB-200-2011: Wah et al. 2011, California Institute of Technology; images belong to their owners, for research only",
    "Bird captions: Reed et al. 2016, Learning Deep Representations of Fine-Grained Visual Descriptions",
    "Splits: Xian et al. 2017 (classes), Chun et al. 2021 (PCME)",
]

IMAGES = {"train": 7_067, "val_in": 1_754, "test": 2_967}
"""Of the final split: --fold 0, --val-in listed."""

LABELS = "499f9f4de5c043bf9012e5269c06758f2e3de996d9933bc903a5c2c280fef3d3"
"""`digest_of` the classes' numbers in the order of images.txt, from a copy of image_class_labels.txt."""

LISTS = {
    "testclasses.txt": "ecb9706eac01ddbabe91344bd9a860c660427dbf89ab0182b93aace8073e24b4",
    "trainvalclasses.txt": "fa00ee0835603d2ba617d50f5958e8fd69305c28d58d7eb9911799475ca627a9",
    "seen_test_images.txt": "13b37e9af47d4bb3fd19a97409b8eaa04d1bff3531a7d535197e633c9a38164d",
    "trainclasses1.txt": "41958a2d6660f363f947b737d042e00da85e50859f1e7e5549f0d5c6993e203f",
    "valclasses1.txt": "fefb1b4092f7c243b40cd05ccebf762d2bf604fe9875fb21ba1963a6e823678a",
    "trainclasses2.txt": "f96c5fe8c8019d80a6883f4cd2d4a328d7220864e59044d8c925bbe00ee9076d",
    "valclasses2.txt": "5acc10821b0dd0b6397969b38dbf93d8c46386ac3a249201be6c2d9727835a45",
    "trainclasses3.txt": "670417c0b4288a3e3e8c4a347c2fd00fac51dae4bd3879834bd9de2997ce1ec7",
    "valclasses3.txt": "644f9224562c2e93a22e17c108f1a0dab2d90e201bd659d4078a930338918df5",
}
"""`digest_of` the sorted lines of each list, from the files of PCME's repository."""

_HELD_OUT = "seen_test_images.txt"
_RECONSTRUCTED_SHARE = 5  # one image of five; the published list holds out 19.9 % of the seen classes' images


@dataclass(frozen=True, kw_only=True)
class CubConfig(BenchmarkConfig):
    """Packs CUB-200-2011 with Reed et al.'s captions (train, val_in, test; with --fold also val)."""

    images: Path
    """The folder CUB_200_2011, with images.txt, classes.txt, image_class_labels.txt and the folder images."""
    captions: Path
    """The folder text_c10, with CLASS/IMAGE.txt, ten captions each."""
    lists: Path
    """The folder datasets/annotations/cub of PCME's repository: trainvalclasses.txt, testclasses.txt and
    seen_test_images.txt; with --fold K also trainclassesK.txt and valclassesK.txt."""
    fold: Literal[0, 1, 2, 3] = 0
    """0: the final split. 1 to 3: one to tune settings with, where 50 of the 150 training classes are `val`."""
    val_in: Literal["listed", "reconstruction", "train"] = "listed"
    """Held-out images of training classes: those of seen_test_images.txt; or, without that file, the fifth of every
    class whose names have the lowest hashes, which is NOT the published choice; or none, so that all train."""


@dataclass(frozen=True, kw_only=True)
class Bird:
    """One image of images.txt."""

    number: int
    file_name: str
    """CLASS/NAME.jpg"""
    class_id: int
    """From 1, as in classes.txt."""
    folder: str
    """The class as its folder is called: "001.Black_footed_Albatross"."""


def plan(config: CubConfig) -> Plan:
    """Checks images, classes, captions and lists against what is known of them, and returns the units."""
    birds = read_birds(config.images)
    roles, classes = _roles(config)
    unknown = sorted({bird.folder for bird in birds} - roles.keys())
    if unknown:
        raise InputError(
            f"expected every class of {config.images / 'classes.txt'} in the lists of {config.lists}, found none for "
            f"{len(unknown)}, the first {unknown[0]}; give the lists of the same data set with --lists"
        )
    warnings: list[str] = []
    held_out = _held_out(config, birds, roles, warnings)
    split_of = {b.file_name: "val_in" if b.file_name in held_out else roles[b.folder] for b in birds}
    if not config.captions.is_dir():
        raise InputError(
            f"expected the folder text_c10 at {config.captions}, found none; give its place with --captions"
        )
    captions = {bird.file_name: read_captions(config.captions, bird.file_name) for bird in birds}
    facts = _facts(config, birds, classes, held_out, split_of, captions)
    warnings += check_version(config.images, facts, config.allow_other_version)
    entries = [
        Entry(
            name=bird.file_name,
            split=split_of[bird.file_name],
            captions=captions[bird.file_name] or (),
            extra={
                "file_name": bird.file_name,
                "image_id": bird.number,
                "class_id": bird.class_id,
                "class_name": bird.folder.partition(".")[2].replace("_", " "),
            },
        )
        for bird in birds
    ]
    return make_plan(config, entries, config.images / "images", SPLITS, CREDITS, warnings)


def read_birds(folder: Path) -> list[Bird]:
    """Returns the images of CUB_200_2011 in the order of images.txt. Raises InputError where its lists do not fit."""
    classes = dict(_numbered(folder / "classes.txt"))
    labels = {number: int(label) for number, label in _numbered(folder / "image_class_labels.txt") if label.isdigit()}
    birds = []
    for number, file_name in _numbered(folder / "images.txt"):
        class_id = labels.get(number)
        name = classes.get(class_id) if class_id is not None else None
        if class_id is None or name != file_name.partition("/")[0]:
            raise InputError(
                f"{folder}: expected image {number}, {file_name}, in a class of the same folder, found class {class_id} "
                f"({name}); images.txt, classes.txt and image_class_labels.txt must be of one data set"
            )
        birds.append(Bird(number=number, file_name=file_name, class_id=class_id, folder=name))
    return birds


def read_captions(folder: Path, file_name: str) -> tuple[str, ...] | None:
    """Returns an image's captions, one a line; None if it has no file.

    Some captions have two replacement characters (U+FFFD) in place of every space: runs of them are read as a space.
    """
    try:
        text = (folder / file_name).with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    lines = (one_line(line.replace("\ufffd", " ")) for line in text.split("\n"))
    return tuple(line for line in lines if line)


def _roles(config: CubConfig) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns (class to its split, name of each list of classes to its lines)."""
    if not config.lists.is_dir():
        raise InputError(
            f"expected the folder datasets/annotations/cub of PCME's repository at {config.lists}, found none; give its "
            "place with --lists"
        )
    split_of_list = {"testclasses.txt": "test"}
    if config.fold:
        split_of_list |= {f"trainclasses{config.fold}.txt": "train", f"valclasses{config.fold}.txt": "val"}
    else:
        split_of_list |= {"trainvalclasses.txt": "train"}
    lists = {name: _lines(config.lists / name) for name in split_of_list}
    roles: dict[str, str] = {}
    for name, split in split_of_list.items():
        for line in lists[name]:
            if roles.setdefault(line, split) != split:
                raise InputError(
                    f"{config.lists / name}: expected each class in one list, found {line} in {roles[line]!r} and "
                    f"{split!r}; take the lists as they were published"
                )
    return roles, lists


def _held_out(config: CubConfig, birds: Sequence[Bird], roles: dict[str, str], warnings: list[str]) -> AbstractSet[str]:
    """Returns the file names that make `val_in`; adds to `warnings` what is odd about them."""
    of_training = [bird for bird in birds if roles[bird.folder] == "train"]
    if config.val_in == "train":
        warnings.append("no image of the training classes is held out: there is no val_in, and train is larger")
        return frozenset()
    if config.val_in == "reconstruction":
        warnings.append("val_in is a reconstruction: not the images of the published list")
        chosen: set[str] = set()
        for folder in dict.fromkeys(bird.folder for bird in of_training):
            names = [bird.file_name for bird in of_training if bird.folder == folder]
            chosen |= set(sorted(names, key=lambda name: (hash_text(name), name))[: len(names) // _RECONSTRUCTED_SHARE])
        return chosen
    listed = _lines(config.lists / _HELD_OUT)
    if strange := sorted(set(listed) - {bird.file_name for bird in birds}):
        raise InputError(
            f"{config.lists / _HELD_OUT}: expected names of images.txt, found {len(strange):,} others, the first "
            f"{strange[0]}; give the list of the same data set with --lists"
        )
    held_out = set(listed) & {bird.file_name for bird in of_training}
    if len(held_out) < len(set(listed)):
        warnings.append(
            f"{len(set(listed)) - len(held_out)} of {len(set(listed)):,} images of {_HELD_OUT} are of classes that are "
            "not trained on and stay with these"
        )
    return held_out


def _facts(
    config: CubConfig,
    birds: Sequence[Bird],
    classes: dict[str, list[str]],
    held_out: AbstractSet[str],
    split_of: dict[str, str],
    captions: dict[str, tuple[str, ...] | None],
) -> Iterator[Fact]:
    yield Fact("images", 11_788, len(birds))
    yield Fact("classes", 200, len({bird.class_id for bird in birds}))
    yield Fact("SHA-256 of the classes in the order of images.txt", LABELS, digest_of(b.class_id for b in birds))
    for name, lines in classes.items():
        yield Fact(f"{name}, SHA-256 of its sorted lines", LISTS[name], digest_of(sorted(lines)))
    if config.val_in == "listed":
        found = digest_of(sorted(_lines(config.lists / _HELD_OUT)))
        yield Fact(f"{_HELD_OUT}, SHA-256 of its sorted lines", LISTS[_HELD_OUT], found)
        if not config.fold:
            counts = list(split_of.values())
            for split, number in IMAGES.items():
                yield Fact(f"{split}, images", number, counts.count(split))
    yield Fact("files of captions", len(birds), sum(each is not None for each in captions.values()))
    odd = sum(each is not None and len(each) != CAPTIONS_PER_IMAGE for each in captions.values())
    # Ten was seen in 543 files of a copy, and is what the owners say of all.
    yield Fact(f"images whose number of captions is not {CAPTIONS_PER_IMAGE}", 0, odd, is_confirmed=False)


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number, text) of lines such as "1 001.Black_footed_Albatross"."""
    for line in _lines(path):
        number, _, text = line.partition(" ")
        if not number.isdigit() or not text:
            raise InputError(f"{path}: expected lines of a number and a name, found {line[:60]!r}; get the file again")
        yield int(number), text.strip()


def _lines(path: Path) -> list[str]:
    """Returns the lines of a text file without their ends; blank ones are passed over."""
    if not path.is_file():
        raise InputError(f"expected {path.name} in {path.parent}, found none; take the folder as its owners publish it")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

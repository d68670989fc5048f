"""CUB-200-2011 with captions: seen and unseen classes, held-out images, folds, and lists that do not fit."""

import pytest
from material import picture

from data_prep.plan import Dropped, Record
from data_prep.sources import cub
from data_prep.sources.benchmark import NOT_FOUND
from data_prep.sources.cub import CubConfig
from setclip.errors import InputError

CLASSES = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani"]
PER_CLASS = 6


def names_of(folder: str) -> list[str]:
    bird = folder.partition(".")[2]
    return [f"{folder}/{bird}_{90 - i:04d}_{i}.jpg" for i in range(PER_CLASS)]


NAMES = [name for folder in CLASSES for name in names_of(folder)]


def lines(path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def write(tmp_path, **settings) -> CubConfig:
    """Lays out images, captions and lists as their owners do; classes 2 and 4 are never trained on."""
    images, captions, lists = tmp_path / "CUB_200_2011", tmp_path / "text_c10", tmp_path / "lists"
    lines(images / "classes.txt", *(f"{i} {name}" for i, name in enumerate(CLASSES, 1)))
    lines(images / "images.txt", *(f"{i} {name}" for i, name in enumerate(NAMES, 1)))
    labels = (f"{i} {CLASSES.index(name.partition('/')[0]) + 1}" for i, name in enumerate(NAMES, 1))
    lines(images / "image_class_labels.txt", *labels)
    for number, name in enumerate(NAMES):
        path = images / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        lines((captions / name).with_suffix(".txt"), *(f"caption {i} of bird {number}." for i in range(10)))
    lines(lists / "trainvalclasses.txt", CLASSES[2], CLASSES[0])
    lines(lists / "testclasses.txt", CLASSES[3], CLASSES[1])
    lines(lists / "trainclasses1.txt", CLASSES[0])
    lines(lists / "valclasses1.txt", CLASSES[2])
    # Like the published list, one image of an unseen class is in it.
    lines(lists / "seen_test_images.txt", names_of(CLASSES[2])[4], names_of(CLASSES[0])[1], names_of(CLASSES[3])[0])
    values = {
        "out": tmp_path / "out",
        "images": images,
        "captions": captions,
        "lists": lists,
        "allow_other_version": True,
        "processes": 1,
    }
    return CubConfig(**{**values, **settings})


def by_split(config: CubConfig) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for unit in cub.plan(config).units:
        found.setdefault(unit.split, []).extend(item for item in unit.read() if isinstance(item, Record))
    return found


def test_unseen_classes_test_and_listed_images_of_seen_classes_are_held_out_in_the_order_of_the_list(tmp_path):
    found = by_split(write(tmp_path))
    held_out = [names_of(CLASSES[0])[1], names_of(CLASSES[2])[4]]
    assert list(found) == ["train", "val_in", "test"]
    assert [record.name for record in found["val_in"]] == held_out
    assert [r.name for r in found["train"]] == [
        name for name in names_of(CLASSES[0]) + names_of(CLASSES[2]) if name not in held_out
    ]
    assert [record.name for record in found["test"]] == names_of(CLASSES[1]) + names_of(CLASSES[3])


def test_a_record_has_ten_captions_its_bytes_and_its_class(tmp_path):
    config = write(tmp_path)
    record = by_split(config)["test"][0]
    assert record.image == (config.images / "images" / record.name).read_bytes()
    assert record.captions == [f"caption {i} of bird 6." for i in range(10)]
    assert record.extra == {
        "file_name": NAMES[6],
        "image_id": 7,
        "class_id": 2,
        "class_name": "Laysan Albatross",
    }


def test_listed_images_of_unseen_classes_stay_in_test_and_are_announced(tmp_path):
    warnings = cub.plan(write(tmp_path)).warnings
    assert any(
        text.startswith("1 of 3 images of seen_test_images.txt are of classes that are not") for text in warnings
    )


def test_a_fold_validates_on_fifty_of_the_training_classes(tmp_path):
    found = by_split(write(tmp_path, fold=1))
    assert [record.name for record in found["val"]] == names_of(CLASSES[2])
    assert [record.name for record in found["val_in"]] == [names_of(CLASSES[0])[1]]
    assert len(found["train"]) == PER_CLASS - 1
    assert len(found["test"]) == 2 * PER_CLASS


def test_held_out_images_can_train(tmp_path):
    config = write(tmp_path, val_in="train")
    assert {split: len(found) for split, found in by_split(config).items()} == {"train": 12, "test": 12}
    assert (
        "no image of the training classes is held out: there is no val_in, and train is larger"
        in cub.plan(config).warnings
    )


def test_a_reconstruction_holds_out_a_fifth_of_each_seen_class_and_says_that_it_is_none_of_the_list(tmp_path):
    config = write(tmp_path, val_in="reconstruction")
    (config.lists / "seen_test_images.txt").unlink()
    found = by_split(config)
    assert sorted(record.extra["class_id"] for record in found["val_in"]) == [1, 3]  # 6 // 5 of each
    assert len(found["train"]) == 10
    assert by_split(config) == found
    assert "val_in is a reconstruction: not the images of the published list" in cub.plan(config).warnings
    with pytest.raises(InputError, match=r"expected seen_test_images.txt in .*lists, found none"):
        cub.plan(CubConfig(**{**vars(config), "val_in": "listed"}))


def test_replacement_characters_between_words_are_read_as_spaces(tmp_path):
    config = write(tmp_path)
    path = (config.captions / NAMES[0]).with_suffix(".txt")
    path.write_bytes("this\ufffd\ufffdbird\ufffd\ufffdis  grey. \r\n\n".encode() + b"caf\xe9 bird\n")
    record = by_split(config)["train"][0]
    assert record.captions == ["this bird is grey.", "caf bird"]
    assert any("images whose number of captions is not 10: expected 0, found 1" in t for t in cub.plan(config).warnings)


def test_counts_and_lists_that_are_not_the_published_ones_are_named(tmp_path):
    with pytest.raises(InputError) as caught:
        cub.plan(write(tmp_path, allow_other_version=False))
    message = str(caught.value)
    for text in (
        "images: expected 11,788, found 24",
        "classes: expected 200, found 4",
        "testclasses.txt, SHA-256 of its sorted lines: expected ecb9706eac01ddba",
        "seen_test_images.txt, SHA-256 of its sorted lines",
        "train, images: expected 7,067, found 10",
        "val_in, images: expected 1,754, found 2",
        "test, images: expected 2,967, found 12",
    ):
        assert text in message


def test_missing_images_and_captions_stop_or_are_counted(tmp_path):
    config = write(tmp_path)
    (config.images / "images" / NAMES[0]).unlink()
    assert next(iter(cub.plan(config).units[0].read())) == Dropped(NOT_FOUND, "absent", pairs=10)
    (config.images / "images" / names_of(CLASSES[0])[1]).unlink()
    with pytest.raises(InputError, match=r"did not find train: 1 of 10 .*; val_in: 1 of 2 "):
        cub.plan(config)
    (config.captions / NAMES[3]).with_suffix(".txt").unlink()
    with pytest.raises(InputError, match="files of captions: expected 24, found 23"):
        cub.plan(CubConfig(**{**vars(config), "allow_other_version": False}))


def test_lists_that_do_not_fit_each_other_are_named(tmp_path):
    config = write(tmp_path)
    lines(config.lists / "testclasses.txt", CLASSES[1])
    with pytest.raises(InputError, match=r"found none for 1, the first 004.Groove_billed_Ani"):
        cub.plan(config)
    lines(config.lists / "testclasses.txt", CLASSES[1], CLASSES[2])
    with pytest.raises(
        InputError, match=r"expected each class in one list, found 003.Sooty_Albatross in 'test' and 'train'"
    ):
        cub.plan(config)
    config = write(tmp_path)
    lines(config.lists / "seen_test_images.txt", "005.Crested_Auklet/a.jpg")
    with pytest.raises(InputError, match=r"found 1 others, the first 005.Crested_Auklet/a.jpg"):
        cub.plan(config)
    lines(config.images / "image_class_labels.txt", *(f"{i} 1" for i in range(1, 25)))
    with pytest.raises(InputError, match=r"expected image 7, 002.Laysan_Albatross.*found class 1 "):
        cub.plan(config)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("images", "expected classes.txt in .*elsewhere, found none"),
        ("captions", "expected the folder text_c10 at .*--captions"),
        ("lists", "expected the folder datasets/annotations/cub of PCME's repository at .*--lists"),
    ],
)
def test_places_where_nothing_is_are_named_with_their_flag(tmp_path, place, message):
    config = write(tmp_path)
    with pytest.raises(InputError, match=message):
        cub.plan(CubConfig(**{**vars(config), place: tmp_path / "elsewhere"}))


def test_a_line_without_a_number_is_shown(tmp_path):
    config = write(tmp_path)
    lines(config.images / "images.txt", "one 001.Black_footed_Albatross/a.jpg")
    with pytest.raises(InputError, match=r"images.txt: expected lines of a number and a name, found 'one 001"):
        cub.plan(config)

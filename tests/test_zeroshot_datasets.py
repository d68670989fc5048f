"""The data sets of zero-shot classification: their published facts, the layouts in which they lie, and wrong counts.

The originals are too large for tests: small trees of each layout are written with real JPEGs, and the expected counts are
those of the tree. CIFAR-10's 10,000 test images are the originals.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from evaluation_samples import jpeg, write_class_folders, write_run
from scipy.io import savemat
from torchvision import datasets as torchvision_datasets

from eval_suite.class_lists import class_list, imagenet_wnids, simplified
from eval_suite.datasets import (
    TEMPLATES,
    ZERO_SHOT_DATASETS,
    ZeroShotDataset,
    class_names_of,
    open_zero_shot,
    templates_of,
)
from eval_suite.image_sources import FileSource
from eval_suite.images import find_class_folders
from eval_suite.zeroshot import ZeroShotConfig, evaluate
from setclip.errors import InputError

PICTURE = jpeg((9, 99, 9), 0)


@pytest.fixture
def small(monkeypatch):
    """Returns a function that sets the expected counts of a data set to those of a small tree."""

    def set_counts(name: str, images: int, images_per_class: int | None = None):
        entry = dataclasses.replace(ZERO_SHOT_DATASETS[name], images=(images,), images_per_class=images_per_class)
        monkeypatch.setitem(ZERO_SHOT_DATASETS, name, entry)

    return set_counts


def write(path: Path, content: bytes | str = PICTURE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- published facts


PEER = Path(importlib.util.find_spec("clip_benchmark").origin).parent / "datasets"
OF_PEER = {"cifar": "cifar10", "flowers102": "flowers", "aircraft": "fgvc_aircraft"}  # where it has another name


def peer_file(name: str):
    return json.loads((PEER / name).read_text())


@pytest.mark.parametrize(
    "key", ["imagenet", "cifar", "food101", "pets", "flowers102", "sun397", "cars", "dtd", "caltech101", "aircraft"]
)
def test_prompts_are_those_of_clip_benchmark(key):
    theirs = peer_file("en_zeroshot_classification_templates.json")
    of_key = theirs["imagenet1k" if key == "imagenet" else OF_PEER.get(key, key)]
    assert [template.replace("{c}", "{}") for template in of_key] == list(TEMPLATES[key])


def test_the_prompts_of_both_cifars_are_the_same():
    theirs = peer_file("en_zeroshot_classification_templates.json")
    assert theirs["cifar10"] == theirs["cifar100"]
    assert ZERO_SHOT_DATASETS["cifar100"].templates == ZERO_SHOT_DATASETS["cifar10"].templates == "cifar"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("imagenet", "imagenet1k"), ("pets", "pets"), ("flowers102", "flowers"), ("caltech101", "caltech101")],
)
def test_class_names_are_those_of_clip_benchmark(ours, theirs):
    assert list(class_list(ours).names) == peer_file("en_classnames.json")[theirs]


def test_class_names_that_clip_benchmark_takes_from_torchvision_are_those_of_the_folders():
    for key in ("food101", "dtd", "sun397"):
        classes = class_list(key)
        assert [folder.replace("_", " ").replace("/", " ") for folder in classes.folders] == list(classes.names)


def test_imagenet_a_and_r_have_200_of_the_names_of_imagenet():
    whole = dict(zip(imagenet_wnids(), open_clip.IMAGENET_CLASSNAMES, strict=True))
    for key in ("imagenet-a", "imagenet-r"):
        classes = class_list(key)
        assert len(classes.names) == 200
        assert [whole[wnid] for wnid in classes.folders] == list(classes.names)
        source = (PEER / "builder.py").read_text()
        listed = source.split(f"{key.replace('-', '_')}_wnids = ")[1].splitlines()[0]
        assert set(classes.folders) == set(ast.literal_eval(listed))
    assert class_list("imagenet-a").folders != class_list("imagenet-r").folders


def test_imagenet_has_the_names_and_prompts_of_openai_in_the_order_of_sorted_wordnet_ids():
    wnids, names = imagenet_wnids(), class_list("imagenet").names
    assert (len(wnids), len(set(wnids)), wnids[0], wnids[-1]) == (1000, 1000, "n01440764", "n15075141")
    assert len(names) == 1000
    assert names[:2] == ("tench", "goldfish")
    assert names[wnids.index("n03000247")] == "chain mail"  # n03000247 is chain mail, index 490
    assert len(TEMPLATES["imagenet"]) == 80
    assert TEMPLATES["imagenet"][0] == "a bad photo of a {}."
    assert TEMPLATES["imagenet"][-1] == "a tattoo of the {}."


COUNTS = {  # classes and images as published
    "imagenet": (1000, 50_000),
    "imagenet-v2": (1000, 10_000),
    "imagenet-a": (200, 7_500),
    "imagenet-r": (200, 30_000),
    "imagenet-sketch": (1000, 50_889),
    "cifar10": (10, 10_000),
    "cifar100": (100, 10_000),
    "food101": (101, 25_250),
    "pets": (37, 3_669),
    "flowers102": (102, 6_149),
    "sun397": (397, 108_754),
    "sun397-split1": (397, 19_850),
    "cars": (196, 8_041),
    "dtd": (47, 1_880),
    "caltech101": (102, 9_144),
    "aircraft": (100, 3_333),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_class_lists_fit(name):
    dataset, (num_classes, num_images) = ZERO_SHOT_DATASETS[name], COUNTS[name]
    classes = class_list(dataset.classes)
    assert len(classes.names) == len(set(classes.folders)) == num_classes
    assert dataset.images == (num_images,)
    assert dataset.images_per_class in (None, num_images // num_classes)
    assert dataset.templates in TEMPLATES
    for naming in classes.namings:  # no two folders may be taken for each other
        assert len(set(naming)) == num_classes


def test_pets_flowers_aircraft_and_caltech_report_the_mean_over_classes():
    by_class = {name for name, dataset in ZERO_SHOT_DATASETS.items() if dataset.metric == "mean_per_class"}
    assert by_class == {"pets", "flowers102", "aircraft", "caltech101", "caltech101-vtab"}


# --- class folders


@pytest.mark.parametrize("name", ["cifar100", "pets", "cars", "sun397", "caltech101", "aircraft", "imagenet-r"])
def test_class_folders_are_matched_whatever_their_case_and_punctuation(name, tmp_path, small):
    classes = class_list(ZERO_SHOT_DATASETS[name].classes)
    folders = [folder.replace("/", "_").replace(" ", "_").upper() for folder in classes.folders]
    for folder in folders:
        write(tmp_path / folder / "1.JPG")
    small(name, len(folders))
    dataset, found, is_partial = open_zero_shot(name, tmp_path)
    assert (found.layout, is_partial) == ("folders", False)
    assert list(found.classes) == folders
    assert [Path(found.source.keys[row]).parent.name for row in range(len(folders))] == folders
    assert found.labels.tolist() == list(range(len(folders)))
    assert class_names_of(dataset, found) == list(classes.names)


def test_folders_of_imagenet_v2_are_numbers_and_not_in_the_order_of_text(tmp_path, small):
    small("imagenet-v2", 1_000)
    for number in range(1_000):
        write(tmp_path / "imagenetv2-matched-frequency-format-val" / str(number) / "a.jpeg")
    _, found, _ = open_zero_shot("imagenet-v2", tmp_path)
    assert found.source.keys[2] == "imagenetv2-matched-frequency-format-val/2/a.jpeg"
    assert found.labels.tolist() == list(range(1_000))


def test_numbered_folders_of_flowers_count_from_one(tmp_path, small):
    small("flowers102", 102)
    for number in range(1, 103):
        write(tmp_path / "test" / str(number) / "a.jpg")
    dataset, found, _ = open_zero_shot("flowers102", tmp_path)
    assert found.classes[:2] == ("1", "2")
    assert class_names_of(dataset, found)[0] == "pink primrose"


def test_folders_that_are_no_classes_are_said(tmp_path, small, capsys):
    small("cifar10", 10)
    for name in (*class_list("cifar10").names, "unsorted"):
        write(tmp_path / name / "a.jpg")
    assert len(open_zero_shot("cifar10", tmp_path)[1].labels) == 10
    assert "1 folders are no classes and left out (unsorted)" in capsys.readouterr().err


def small_imagenet(root: Path, counts: dict[int, int]) -> Path:
    for index, count in counts.items():
        for i in range(count):
            write(root / "val" / imagenet_wnids()[index] / f"ILSVRC2012_val_{i:08d}.JPEG")
    return root


def test_a_wrong_count_names_what_is_missing_and_partial_evaluates_over_all_names(tmp_path):
    root = small_imagenet(tmp_path / "imagenet", {0: 2, 999: 3})
    with pytest.raises(InputError) as caught:
        open_zero_shot("imagenet", root)
    message = str(caught.value)
    assert "expected 50,000 images, 50 in each of 1,000 classes; found 5 images" in message
    assert "n01440764: 2 images; n01443537: missing" in message
    assert "and 995 more" in message
    assert "--allow-partial True" in message
    dataset, found, is_partial = open_zero_shot("imagenet", root, allow_partial=True)
    assert is_partial
    assert found.labels.tolist() == [0, 0, 999, 999, 999]
    assert len(class_names_of(dataset, found)) == 1000


def test_a_full_count_is_no_fault_and_one_image_too_many_is(tmp_path, small):
    small("cifar10", 30, 3)
    folder = write_class_folders(tmp_path / "cifar10", 3, class_list("cifar10").names)
    assert open_zero_shot("cifar10", folder)[2] is False
    write(folder / "bird" / "extra.png")
    with pytest.raises(
        InputError, match="expected 30 images, 3 in each of 10 classes; found 31 images: bird: 4 images"
    ):
        open_zero_shot("cifar10", folder)


def test_a_wrong_sum_over_classes_of_no_fixed_size_names_the_smallest(tmp_path, small):
    small("pets", 80)
    folder = write_class_folders(tmp_path / "pets", 2, class_list("pets").names)
    with pytest.raises(
        InputError, match=r"expected 80 images of 37 classes; found 74 images: 6 images too few \(fewest:"
    ):
        open_zero_shot("pets", folder)
    small("pets", 70)
    with pytest.raises(InputError, match=r"4 images too many .* is this more than the test images"):
        open_zero_shot("pets", folder)
    small("pets", 74)
    (folder / "Pug" / "0.jpg").unlink()
    (folder / "Pug" / "1.jpg").unlink()
    with pytest.raises(InputError, match="found 72 images: Pug: missing"):
        open_zero_shot("pets", folder)


def test_an_unknown_data_set_suggests_the_nearest_and_a_missing_one_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SETCLIP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="unknown dataset 'imagnet', perhaps 'imagenet'"):
        open_zero_shot("imagnet")
    with pytest.raises(InputError, match=r"expected scenes at .*nowhere/scenes.*`python -m data_prep.run scenes --out"):
        open_zero_shot("scenes")
    with pytest.raises(InputError) as caught:
        open_zero_shot("food101")
    message = str(caught.value)
    for part in ("CLIP_benchmark's tars (test/nshards.txt)", "torchvision keeps it (food-101/meta)", "class folders"):
        assert part in message
    assert "found no such folder; get its test images (25,250)" in message
    with pytest.raises(InputError, match=r"name of a data set \(imagenet, imagenet-v2, "):
        open_zero_shot(None)


def test_images_beside_class_folders_are_explained(tmp_path):
    write(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(InputError, match="found 1 images outside of class folders"):
        find_class_folders(tmp_path)
    with pytest.raises(InputError, match="found 1 images outside of class folders"):
        open_zero_shot("imagenet", tmp_path)


def test_class_names_come_from_folders_or_from_a_file_as_list_or_mapping(tmp_path):
    dataset, classes = ZeroShotDataset(place="", make=""), ("hot_dog", "n1")
    assert class_names_of(dataset, classes) == ["hot dog", "n1"]
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"n1": "fish", "hot_dog": "sausage"}))
    assert class_names_of(dataset, classes, path) == ["sausage", "fish"]
    path.write_text(json.dumps(["a"]))
    with pytest.raises(InputError, match="expected 2 names, one a class folder, found 1"):
        class_names_of(dataset, classes, path)
    path.write_text(json.dumps({"n1": "fish"}))
    with pytest.raises(InputError, match="found none for hot_dog"):
        class_names_of(dataset, classes, path)
    path.write_text("{")
    with pytest.raises(InputError, match="expected a JSON file of class names"):
        class_names_of(dataset, classes, path)


# --- torchvision's layouts, and as distributed


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, name: str, monkeypatch) -> list[str]:
    """Writes python batches with a picture a class, filled with its number; returns the classes in the data's order."""
    kind = {"cifar10": torchvision_datasets.CIFAR10, "cifar100": torchvision_datasets.CIFAR100}[name]
    classes = sorted(class_list(name).names, reverse=True)  # another order than the published one
    data = np.repeat(np.arange(len(classes), dtype=np.uint8)[:, None], 3072, 1)
    labels = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    folder, batch = root / kind.base_folder, kind.test_list[0][0]
    write(folder / batch, pickle.dumps({"data": data, labels: list(range(len(classes)))}))
    raw = [name.replace(" ", "_") for name in classes]
    meta = write(folder / kind.meta["filename"], pickle.dumps({kind.meta["key"]: raw}))
    # torchvision compares with the checksums of the originals, which a small tree cannot have
    monkeypatch.setattr(kind, "train_list", [])
    monkeypatch.setattr(kind, "test_list", [[batch, md5(folder / batch)]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    return classes


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifars_python_batches_are_read(name, tmp_path, monkeypatch, small):
    classes = write_cifar(tmp_path, name, monkeypatch)
    small(name, len(classes), 1)
    _, found, _ = open_zero_shot(name, tmp_path)
    assert found.layout == "torchvision"
    published = list(class_list(name).names)
    assert [published[label] for label in found.labels] == classes
    assert [int(picture[0, 0, 0]) for picture in found.source.decoded(range(len(classes)))] == list(range(len(classes)))


def test_a_damaged_cifar_batch_is_one_error(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    write(tmp_path / "cifar-10-batches-py" / "test_batch", "oops")
    with pytest.raises(
        InputError, match=r"expected cifar10 complete in .*cifar-10-batches-py \(torchvision\), found: Dataset"
    ):
        open_zero_shot("cifar10", tmp_path)


def write_food101(root: Path, monkeypatch) -> None:
    folders = class_list("food101").folders
    write(root / "food-101/meta/test.json", json.dumps({f: [f"{f}/1", f"{f}/2"] for f in reversed(folders)}))
    for folder in folders:
        for number in (1, 2, 3):  # the third is a training image
            write(root / "food-101/images" / folder / f"{number}.jpg")


def write_pets(root: Path, monkeypatch) -> None:
    names = [name.replace(" ", "_") for name in class_list("pets").names]
    lines = [f"{name}_{i} {label + 1} 1 1" for label, name in enumerate(names) for i in (1, 2)]
    write(root / "oxford-iiit-pet/annotations/test.txt", "\n".join(lines) + "\n")
    for line in lines:
        write(root / "oxford-iiit-pet/images" / f"{line.split()[0]}.jpg")


def write_flowers102(root: Path, monkeypatch) -> None:
    folder = root / "flowers-102"
    numbers = np.arange(1, 205)
    for number in numbers:
        write(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    savemat(folder / "setid.mat", {"tstid": numbers, "trnid": [], "valid": []})
    files = {key: (name, md5(folder / name)) for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(torchvision_datasets.Flowers102, "_file_dict", files)


def sun_folder(name: str) -> str:
    return f"/{name[0]}/{name}"


def write_sun397(root: Path, monkeypatch) -> None:
    folders = sorted(class_list("sun397").folders)
    write(root / "SUN397/ClassName.txt", "\n".join(map(sun_folder, folders)) + "\n")
    for number, folder in enumerate(folders):
        for i in (1, 2):
            write(root / f"SUN397{sun_folder(folder)}/sun_{number}_{i}.jpg")


def write_sun397_split1(root: Path, monkeypatch) -> None:
    write_sun397(root, monkeypatch)
    lines = [
        f"{sun_folder(f)}/sun_{n}_{i}.jpg" for n, f in enumerate(sorted(class_list("sun397").folders)) for i in (1, 2)
    ]
    write(root / "SUN397/Partitions/Testing_01.txt", "\n".join(lines) + "\n")


def write_cars(root: Path, monkeypatch) -> None:
    names = list(reversed(class_list("cars").names))
    kinds = [("fname", "O"), ("class", "O")]
    rows = [(f"{label}_{i}.jpg", label + 1) for label in range(len(names)) for i in (1, 2)]
    for file, _ in rows:
        write(root / "stanford_cars/cars_test" / file)
    (root / "stanford_cars/devkit").mkdir()
    savemat(root / "stanford_cars/devkit/cars_meta.mat", {"class_names": np.array(names, object)})
    savemat(root / "stanford_cars/cars_test_annos_withlabels.mat", {"annotations": np.array(rows, kinds)})


def write_dtd(root: Path, monkeypatch) -> None:
    lines = [f"{name}/{name}_{i}.jpg" for name in class_list("dtd").folders for i in (1, 2)]
    write(root / "dtd/dtd/labels/test1.txt", "\n".join(lines) + "\n")
    for line in lines:
        write(root / "dtd/dtd/images" / line)


def write_aircraft(root: Path, monkeypatch) -> None:
    names = list(reversed(class_list("aircraft").names))
    folder = root / "fgvc-aircraft-2013b/data"
    write(folder / "variants.txt", "\n".join(names) + "\n")
    lines = [f"{label}_{i} {name}" for label, name in enumerate(names) for i in (1, 2)]
    write(folder / "images_variant_test.txt", "\n".join(lines) + "\n")
    for line in lines:
        write(folder / "images" / f"{line.split()[0]}.jpg")


OWN = {
    "food101": (write_food101, "torchvision"),
    "pets": (write_pets, "torchvision"),
    "flowers102": (write_flowers102, "torchvision"),
    "sun397": (write_sun397, "torchvision"),
    "sun397-split1": (write_sun397_split1, "as distributed"),
    "cars": (write_cars, "torchvision"),
    "dtd": (write_dtd, "torchvision"),
    "aircraft": (write_aircraft, "torchvision"),
}


def class_of_path(name: str, path: str) -> int:
    """Returns the label that the published list gives a file of the trees above."""
    stem = Path(path).stem
    classes = class_list(ZERO_SHOT_DATASETS[name].classes)
    if name in ("cars", "aircraft"):  # written in reversed order
        return len(classes.names) - 1 - int(stem.split("_")[0])
    if name == "flowers102":
        return (int(stem.split("_")[1]) - 1) % 102
    if name.startswith("sun397"):
        return classes.folders.index(sorted(classes.folders)[int(stem.split("_")[1])])
    raw = Path(path).parent.name if name in ("food101", "dtd") else stem.rpartition("_")[0]
    return [simplified(folder) for folder in classes.folders].index(simplified(raw))


@pytest.mark.parametrize("name", OWN)
def test_the_layouts_of_torchvision_are_read_with_the_published_labels(name, tmp_path, monkeypatch, small):
    writer, layout = OWN[name]
    writer(tmp_path, monkeypatch)
    num_classes = len(class_list(ZERO_SHOT_DATASETS[name].classes).names)
    small(name, 2 * num_classes, 2)
    dataset, found, is_partial = open_zero_shot(name, tmp_path)
    assert (found.layout, is_partial) == (layout, False)
    assert isinstance(found.source, FileSource)
    assert found.labels.tolist() == [class_of_path(name, key) for key in found.source.keys]
    assert class_names_of(dataset, found) == list(class_list(dataset.classes).names)
    assert len(next(iter(found.source.decoded([0])))) == 3
    # the same where the data set's own folder is given, and twice the same order
    again = open_zero_shot(name, tmp_path / next(tmp_path.iterdir()).name)[1]
    assert [path.name for path in again.paths] == [path.name for path in found.paths]


def test_listed_files_that_are_not_there_are_counted_and_named(tmp_path, monkeypatch, small):
    write_dtd(tmp_path, monkeypatch)
    small("dtd", 94, 2)
    (tmp_path / "dtd/dtd/images/banded/banded_1.jpg").unlink()
    with pytest.raises(InputError) as caught:
        open_zero_shot("dtd", tmp_path)
    assert "1 listed files missing (first: " in str(caught.value)
    assert "banded_1.jpg); banded: 1 images" in str(caught.value)
    _, found, is_partial = open_zero_shot("dtd", tmp_path, allow_partial=True)
    assert (len(found.labels), is_partial) == (93, True)


def test_another_version_of_the_classes_is_an_error(tmp_path, monkeypatch):
    write_dtd(tmp_path, monkeypatch)
    path = tmp_path / "dtd/dtd/labels/test1.txt"
    path.write_text(path.read_text().replace("banded/", "bended/"))
    with pytest.raises(
        InputError, match=r"expected the 47 classes .* of which bended are not among them; another version"
    ):
        open_zero_shot("dtd", tmp_path)


def test_split_one_of_sun397_needs_its_list(tmp_path, monkeypatch):
    write_sun397(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"expected the list of the first split's test pictures, Testing_01.txt"):
        open_zero_shot("sun397-split1", tmp_path)


def test_caltech101_takes_all_folders_the_background_included(tmp_path, small):
    folders = class_list("caltech101").folders
    for folder in folders:
        write(tmp_path / "caltech101/101_ObjectCategories" / folder / "image_0001.jpg")
    small("caltech101", 102)
    dataset, found, _ = open_zero_shot("caltech101", tmp_path)
    names = class_names_of(dataset, found)
    assert (found.classes[0], names[0]) == ("BACKGROUND_Google", "background")
    assert (found.classes[2], names[2]) == ("Faces_easy", "centered face")
    assert (found.classes[-1], names[-1]) == ("yin_yang", "yin and yang symbol")


def write_tiny_imagenet(root: Path, wnids: list[str]) -> Path:
    folder = root / "tiny-imagenet-200"
    write(folder / "wnids.txt", "\n".join(reversed(wnids)) + "\n")
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62" for i, wnid in enumerate(wnids)]
    write(folder / "val/val_annotations.txt", "\n".join(lines) + "\n")
    for i in range(len(wnids)):
        write(folder / "val/images" / f"val_{i}.JPEG")
    return folder


def test_tiny_imagenet_is_read_as_distributed_and_named_as_imagenet_is(tmp_path, small):
    wnids = list(imagenet_wnids()[:200])
    write_tiny_imagenet(tmp_path, wnids)
    small("tiny-imagenet", 200, 1)
    dataset, found, _ = open_zero_shot("tiny-imagenet", tmp_path)
    assert found.layout == "as distributed"
    assert found.labels.tolist() == list(range(200))
    assert class_names_of(dataset, found)[:2] == ["tench", "goldfish"]


def test_tiny_imagenet_in_class_folders_is_named_by_wordnet_id(tmp_path, small):
    for wnid in imagenet_wnids()[:199]:
        write(tmp_path / "val" / wnid / "a.JPEG")
    write(tmp_path / "val" / "n99999999" / "a.JPEG")
    small("tiny-imagenet", 200, 1)
    dataset, found, _ = open_zero_shot("tiny-imagenet", tmp_path)
    with pytest.raises(InputError, match=r"found none for 1 \(n99999999\).*words.txt"):
        class_names_of(dataset, found)
    write(tmp_path / "words.txt", "n99999999\tfrobnicator, frobber\n")
    assert class_names_of(dataset, found)[-1] == "frobnicator"
    (tmp_path / "val" / "n99999999" / "a.JPEG").unlink()
    (tmp_path / "val" / "n99999999").rmdir()
    with pytest.raises(
        InputError, match="expected 200 images, 1 in each of 200 classes; found 199 images: 199 classes inst"
    ):
        open_zero_shot("tiny-imagenet", tmp_path)


# --- CLIP_benchmark's tars


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_wds(root: Path, labels: list[list[int]], names: list[str] | None = None) -> Path:
    """Writes a tar for each list of labels."""
    for number, of_shard in enumerate(labels):
        members = {}
        for i, label in enumerate(of_shard):
            members[f"s{number}{i:04d}.{('jpg', 'jpeg')[i % 2]}"] = PICTURE
            members[f"s{number}{i:04d}.cls"] = str(label).encode()
        write_tar(root / "test" / f"{number}.tar", members)
    write(root / "test" / "nshards.txt", f"{len(labels)}\n")
    if names is not None:
        write(root / "classnames.txt", "\n".join(names) + "\n")
        write(root / "zeroshot_classification_templates.txt", "a photo of {c}.\n{c}\n")
    return root


def test_tars_are_read_with_their_own_names_and_prompts(tmp_path, small, capsys):
    names = [f"the {name}" if name == "cat" else name for name in class_list("cifar10").names]
    write_wds(tmp_path, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], names)
    small("cifar10", 10, 1)
    dataset, found, _ = open_zero_shot("cifar10", tmp_path)
    assert found.layout == "tars"
    assert found.labels.tolist() == list(range(10))
    assert found.source.keys[5] == "1.tar/s10000"
    assert class_names_of(dataset, found) == names
    assert "1 of 10 class names in" in capsys.readouterr().err
    assert templates_of(dataset, found, None) == ("of the data", ("a photo of {}.", "{}"))
    assert templates_of(dataset, found, "cifar") == ("cifar", TEMPLATES["cifar"])
    assert [tuple(picture.shape) for picture in found.source.decoded([9, 0])] == [(3, 36, 40)] * 2
    assert open_zero_shot(None, tmp_path / "test")[1].names == tuple(names)  # the folder of the tars does as well


def test_a_missing_or_uncounted_shard_is_an_error_that_names_it(tmp_path, small):
    write_wds(tmp_path, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], list(class_list("cifar10").names))
    small("cifar10", 10, 1)
    shard = (tmp_path / "test/1.tar").read_bytes()
    (tmp_path / "test/1.tar").unlink()
    with pytest.raises(InputError, match=r"\(tars\).*found 5 images: 1.tar: missing; dog: missing"):
        open_zero_shot("cifar10", tmp_path)
    with pytest.raises(InputError, match=r"expected what its own lists say; found 5 images: 1.tar: missing"):
        open_zero_shot(None, tmp_path)
    assert open_zero_shot("cifar10", tmp_path, allow_partial=True)[2] is True
    write(tmp_path / "test/1.tar", shard)
    write(tmp_path / "test/nshards.txt", "1")
    with pytest.raises(InputError, match=r"1.tar: there, and not counted by nshards.txt"):
        open_zero_shot("cifar10", tmp_path)
    (tmp_path / "test/nshards.txt").unlink()  # CLIP_benchmark once took one shard then, and gave wrong numbers
    with pytest.raises(
        InputError, match=r"a missing shard would go unnoticed; write the number .* \(the last that is there is 1.tar\)"
    ):
        open_zero_shot("cifar10", tmp_path)
    write(tmp_path / "test/nshards.txt", "two")
    with pytest.raises(InputError, match="expected the number of shards, found 'two'"):
        open_zero_shot("cifar10", tmp_path)


def test_a_tar_that_is_cut_short_is_an_error(tmp_path):
    write_wds(tmp_path, [[0, 1, 0, 1]], ["a", "b"])
    path = tmp_path / "test/0.tar"
    for length in (512 * 10, 512 * 10 + 100):
        whole = path.read_bytes()
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"expected a whole tar at .*0.tar, found"):
            open_zero_shot(None, tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"a.jpg": PICTURE},
            r"sample a: expected a picture \(webp, png, jpg, jpeg\) and its label \(.cls\), found .jpg",
        ),
        ({"a.cls": b"0"}, "found .cls"),
        ({"a.jpg": PICTURE, "a.npy": b"x"}, r"found .jpg, .npy \(.npy: several labels a picture\)"),
        ({"a.jpg": PICTURE, "a.cls": b"cat"}, "expected a label, 0 or more, found 'cat'"),
        (
            {"a.jpg": PICTURE, "a.cls": b"2"},
            "sample a: expected a label below 2, .* found 2; the tars and the names belong",
        ),
        ({"__meta__/info.json": b"{}"}, "expected samples in the 1 shards of .* found none"),
    ],
)
def test_samples_that_do_not_fit_are_named(members, message, tmp_path):
    write_wds(tmp_path, [[0]], ["a", "b"])
    write_tar(tmp_path / "test/0.tar", members)
    with pytest.raises(InputError, match=message):
        open_zero_shot(None, tmp_path)


def test_tars_without_names_take_those_of_the_data_set_or_none(tmp_path, small, capsys):
    write_wds(tmp_path, [list(range(10))])
    small("cifar10", 10, 1)
    dataset, found, _ = open_zero_shot("cifar10", tmp_path)
    assert class_names_of(dataset, found) == list(class_list("cifar10").names)
    assert "labels are taken to be in the order of the published classes (airplane," in capsys.readouterr().err
    assert templates_of(dataset, found, None)[0] == "cifar"
    with pytest.raises(InputError, match=r"expected names of the classes at .*classnames.txt, found no such file"):
        open_zero_shot(None, tmp_path)
    write_wds(tmp_path, [list(range(11))])
    with pytest.raises(InputError, match="expected labels below 10, found 10; this is another data set"):
        open_zero_shot("cifar10", tmp_path)


def test_prompts_of_tars_without_a_place_for_the_name_are_an_error(tmp_path):
    write_wds(tmp_path, [[0]], ["a"])
    write(tmp_path / "zeroshot_classification_templates.txt", "a photo\n")
    with pytest.raises(InputError, match=r"expected prompts with \{c\} for the class name, found 'a photo'"):
        open_zero_shot(None, tmp_path)


def test_the_command_evaluates_tars_and_keeps_small_pictures_of_mistakes(tmp_path):
    run = write_run(tmp_path / "runs", "first")
    write_wds(tmp_path / "wds", [[0, 1, 0], [1, 1, 0]], ["dog", "cat"])
    results = evaluate(ZeroShotConfig(data=tmp_path / "wds", checkpoint=str(run), workers=0)).results
    assert results.dataset["layout"] == "tars"
    assert results.dataset["prompts"] == ["a photo of {}.", "{}"]
    keys = {key for entry in results.details["confusions"] for key in entry["examples"]}
    assert keys
    assert set(results.details["pictures"]) == keys
    assert {key.split("/")[0] for key in keys} <= {"0.tar", "1.tar"}


class _Exported(torch.utils.data.Dataset):
    """What CLIP_benchmark's exporter takes: encoded pictures, labels, names and prompts."""

    classes = ("red", "green")
    templates = ("a {c} thing.", "{c}")

    def __len__(self) -> int:
        return 7

    def __getitem__(self, row):
        return jpeg((200, 9, 9) if row % 2 else (9, 200, 9), row), 1 - row % 2


@pytest.mark.slow
def test_what_clip_benchmarks_exporter_writes_is_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of webdataset, and of more workers than cores
        from clip_benchmark.webdataset_builder import convert_dataset

        convert_dataset(_Exported(), "test", str(tmp_path), image_format="jpg", max_count=4, verbose=False)
    _, found, _ = open_zero_shot(None, tmp_path)
    assert found.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert (found.names, found.templates) == (("red", "green"), ("a {} thing.", "{}"))
    assert sorted({key.split("/")[0] for key in found.source.keys}) == ["0.tar", "1.tar"]
    assert [found.source.encoded(row) for row in range(7)] == [_Exported()[row][0] for row in range(7)]


# --- originals


@pytest.mark.slow
@pytest.mark.skipif("SETCLIP_REAL_DATA" not in os.environ, reason="SETCLIP_REAL_DATA is not set")
def test_cifar10_test_images_are_all_counted_and_a_random_model_is_near_chance(tmp_path):
    with tarfile.open(Path(os.environ["SETCLIP_REAL_DATA"]) / "cifar10" / "test.tar.gz") as tar:
        tar.extractall(tmp_path / "cifar10", filter="data")
    run = write_run(tmp_path / "runs", "random")
    config = ZeroShotConfig(name="cifar10", data=tmp_path / "cifar10", checkpoint=str(run), templates="name")
    results = evaluate(config).results
    assert (results.dataset["images"], results.dataset["classes"]) == (10_000, 10)
    assert results.dataset["layout"] == "folders"
    assert results.is_partial is False
    assert results.metrics["top1"].value == pytest.approx(10, abs=8)
    assert results.metrics["top1"].value == pytest.approx(results.metrics["mean_per_class"].value)  # 1,000 a class

"""Zero-shot classification: the function against a plain formula, the data sets' counts, and the command."""

import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_samples import color_of_image, color_of_text, jpeg, small_model, write_class_folders, write_run

from eval_suite import zeroshot
from eval_suite.datasets import (
    TEMPLATES,
    ZERO_SHOT_DATASETS,
    ZeroShotDataset,
    class_names_of,
    imagenet_wnids,
    open_zero_shot,
)
from eval_suite.encode import encode_functions, encode_images, encode_texts
from eval_suite.images import FolderImages, find_class_folders, image_batches
from eval_suite.results import Results
from eval_suite.zeroshot import ZeroShotConfig, class_prototypes, evaluate, zero_shot
from setclip.config import command
from setclip.errors import InputError
from setclip.images import eval_transform
from setclip.objects import ObjectTable, write_objects


@pytest.fixture
def folders(tmp_path):
    return write_class_folders(tmp_path / "colors")


def batches_of(found, size=5):
    return image_batches(FolderImages(found.paths, eval_transform(32)), size, workers=0)


# --- the function


def test_a_perfect_encoder_is_always_right_and_chance_stands_beside(folders):
    found = find_class_folders(folders)
    outcome = zero_shot(
        color_of_image, color_of_text, batches_of(found), found.labels, found.classes, ("a {}.", "the {} one.")
    )
    assert outcome.metrics["top1"].value == 100.0
    assert outcome.metrics["top1"].chance == 25.0
    assert outcome.metrics["top1"].samples == 12
    assert outcome.predictions.tolist() == found.labels.tolist()
    assert "top5" not in outcome.metrics  # of four classes it says nothing


def test_a_small_model_gives_what_the_plain_float64_formula_gives(folders, tmp_path):
    loaded = small_model(tmp_path)
    encode_image, encode_text = encode_functions(loaded)
    found = find_class_folders(folders)
    templates = ("a {}.", "a photo of a {}.", "{}")
    outcome = zero_shot(encode_image, encode_text, batches_of(found), found.labels, found.classes, templates)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    with torch.no_grad():
        pixels = torch.stack(list(FolderImages(found.paths, eval_transform(32))))
        images = (
            loaded.model.encode_image(
                (pixels / 255 - torch.tensor(loaded.mean)[:, None, None]) / torch.tensor(loaded.std)[:, None, None]
            )
            .double()
            .numpy()
        )
        texts = [
            loaded.model.encode_text(loaded.tokenizer([t.format(name) for t in templates])).double().numpy()
            for name in found.classes
        ]
    classifier = unit(np.stack([unit(t).mean(0) for t in texts]))
    expected = (unit(images) @ classifier.T).argmax(1)
    assert outcome.predictions.tolist() == expected.tolist()
    assert outcome.metrics["top1"].value == pytest.approx(100 * (expected == found.labels.numpy()).mean())
    assert np.allclose(class_prototypes(encode_text, found.classes, templates).numpy(), classifier, atol=1e-6)


def test_groups_split_the_images_and_their_mean_is_the_whole(folders):
    found = find_class_folders(folders)

    def encode_text(texts):  # takes green for blue and blue for green
        return color_of_text([t.replace("green", "?").replace("blue", "green").replace("?", "blue") for t in texts])

    groups = ["tail", "head", "tail", "middle"]  # blue, green, grey, red: folders are sorted
    outcome = zero_shot(
        color_of_image, encode_text, batches_of(found), found.labels, found.classes, ("{}",), group_of_class=groups
    )
    values = {name: metric.value for name, metric in outcome.metrics.items()}
    assert values["top1_head"] == 0.0
    assert values["top1_tail"] == 50.0
    assert values["top1_middle"] == 100.0
    assert values["top1"] == pytest.approx((0 + 2 * 50 + 100) / 4)
    assert outcome.metrics["top1_tail"].samples == 6


def test_a_model_that_sees_no_difference_reports_the_pessimistic_variant_beside(folders):
    found = find_class_folders(folders)
    metric = zero_shot(
        lambda x: torch.ones(len(x), 3),
        lambda t: torch.ones(len(t), 3),
        batches_of(found),
        found.labels,
        found.classes,
        ("{}",),
    ).metrics["top1"]
    assert metric.value == 25.0  # everything is the first class, as argmax has it
    assert metric.tie_variants == {"pessimistic": 0.0, "optimistic": 100.0}


def test_counts_are_enforced(folders):
    found = find_class_folders(folders)
    with pytest.raises(InputError, match="expected features of 12 images, found 10"):
        encode_images(color_of_image, list(batches_of(found))[:2], 12)
    with pytest.raises(InputError, match="expected encode_image to give 5 features for 5 images, found 4"):
        encode_images(lambda x: color_of_image(x)[1:], batches_of(found), 12)
    with pytest.raises(InputError, match="expected encode_text to give 2 features for 2 texts, found 1"):
        encode_texts(lambda t: torch.ones(1, 3), ["a", "b"])


def test_features_that_are_not_finite_are_an_error(folders):
    found = find_class_folders(folders)
    with pytest.raises(InputError, match=r"NaN or infinite ones for 12 of 12 images \(first: number 0\)"):
        encode_images(lambda x: color_of_image(x) * float("nan"), batches_of(found), 12)


def test_templates_need_a_place_for_the_name():
    with pytest.raises(InputError, match=r"expected templates with \{\} for the class name, found \['a picture'"):
        class_prototypes(color_of_text, ["red"], ("a {}", "a picture"))


def test_worker_processes_give_the_same_batches(folders):
    images = FolderImages(find_class_folders(folders).paths, eval_transform(32))
    here, there = (list(image_batches(images, 5, workers)) for workers in (0, 1))
    assert [len(batch) for batch in here] == [5, 5, 2]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_an_image_that_cannot_be_decoded_is_an_error_that_names_the_file(folders):
    (folders / "green" / "1.jpg").write_bytes(jpeg((0, 0, 0), 1)[:200])
    with pytest.raises(InputError, match=r"green/1.jpg: expected an image, found one that cannot be decoded \("):
        list(batches_of(find_class_folders(folders)))


# --- data sets


def test_imagenet_has_the_names_and_prompts_of_openai_in_the_order_of_sorted_wordnet_ids():
    dataset = ZERO_SHOT_DATASETS["imagenet"]
    wnids = imagenet_wnids()
    assert (len(wnids), len(set(wnids)), wnids[0], wnids[-1]) == (1000, 1000, "n01440764", "n15075141")
    assert len(dataset.class_names) == 1000
    assert dataset.class_names[:2] == ("tench", "goldfish")
    assert dataset.class_names[wnids.index("n03000247")] == "chain mail"  # n03000247 is chain mail, index 490
    assert len(TEMPLATES["imagenet"]) == 80
    assert TEMPLATES["imagenet"][0] == "a bad photo of a {}."
    assert TEMPLATES["imagenet"][-1] == "a tattoo of the {}."


def small_imagenet(root: Path, counts: dict[int, int]) -> Path:
    for index, count in counts.items():
        folder = root / "val" / imagenet_wnids()[index]
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(jpeg((9, 9, 9), 10 * index + i))
    return root


def test_a_wrong_count_names_what_is_missing_and_partial_evaluates_over_all_names(tmp_path):
    root = small_imagenet(tmp_path / "imagenet", {0: 2, 999: 3})
    with pytest.raises(InputError) as caught:
        open_zero_shot("imagenet", root)
    message = str(caught.value)
    assert "expected 50,000 images, 50 in each of 1,000 class folders; found 5" in message
    assert "n01440764: 2 images; n01443537: missing" in message
    assert "and 995 more" in message
    assert "--allow-partial True" in message
    dataset, found, is_partial = open_zero_shot("imagenet", root, allow_partial=True)
    assert is_partial
    assert found.labels.tolist() == [0, 0, 999, 999, 999]
    assert len(class_names_of(dataset, found.classes)) == 1000


def test_a_full_count_is_no_fault_and_one_image_too_many_is(tmp_path, monkeypatch):
    entry = ZeroShotDataset(place="p", make="", classes=("a", "b"), class_names=("A", "B"), images_per_class=3)
    monkeypatch.setitem(ZERO_SHOT_DATASETS, "pair", entry)
    folder = write_class_folders(tmp_path / "pair", 3, ("a", "b"))
    assert open_zero_shot("pair", folder)[2] is False
    (folder / "b" / "extra.png").write_bytes(b"x")
    with pytest.raises(InputError, match="expected 6 images, 3 in each of 2 class folders; found 7: b: 4 images"):
        open_zero_shot("pair", folder)


def test_an_unknown_data_set_suggests_the_nearest_and_a_missing_one_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SETCLIP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="unknown dataset 'imagnet', perhaps 'imagenet'"):
        open_zero_shot("imagnet")
    with pytest.raises(InputError, match=r"expected scenes at .*nowhere/scenes.*`python -m data_prep.run scenes --out"):
        open_zero_shot("scenes")
    with pytest.raises(InputError, match=r"name of a data set \(imagenet, scenes, "):
        open_zero_shot(None)


def test_images_beside_class_folders_are_explained(tmp_path):
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg((1, 2, 3), 0))
    with pytest.raises(InputError, match="found 1 images outside of class folders"):
        find_class_folders(tmp_path)


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


# --- the command


def test_the_bare_command_takes_the_newest_run_says_so_and_writes_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SETCLIP_DATA", raising=False)
    write_class_folders(tmp_path / "data" / "scenes" / "zeroshot")
    counts = {"red": 50, "green": 20, "blue": 9, "grey": 3}
    write_objects(tmp_path / "data" / "scenes" / "objects.parquet", [ObjectTable.from_counts(counts, "pos", 99)])
    write_run(tmp_path / "runs", "first")
    monkeypatch.setattr(sys, "argv", ["zeroshot", "scenes"])
    zeroshot.main()
    printed = capsys.readouterr().out
    assert "no --checkpoint given: taking the newest run, runs/first" in printed
    assert "| first, step 3 |" in printed
    results = Results.load(tmp_path / "runs" / "first" / "results" / "zeroshot_scenes_step-00000003.json")
    assert results.dataset["images"] == 12
    assert results.metrics["top1_tail"].samples == 3
    assert results.details["groups"] == {"tail": 1, "middle": 3}  # floor(0.3 · 4) = 1, floor(0.2 · 4) = 0
    assert results.training_pairs == {"present": 90, "listed": 100}
    assert results.is_partial is False


def test_a_folder_alone_is_evaluated_by_its_folder_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs", "first")
    folder = write_class_folders(tmp_path / "own", 2, ("red_car", "green_tree"))
    results = evaluate(ZeroShotConfig(data=folder, checkpoint=str(run), templates="imagenet"))
    assert results.dataset["name"] == "own"
    assert len(results.dataset["prompts"]) == 80
    assert results.metrics["top1"].samples == 4


def test_a_partial_imagenet_is_marked(tmp_path, capsys):
    run = write_run(tmp_path / "runs", "first")
    root = small_imagenet(tmp_path / "imagenet", {7: 1, 8: 1})
    config = ZeroShotConfig(name="imagenet", data=root, checkpoint=str(run), allow_partial=True, templates="name")
    results = evaluate(config)
    assert results.is_partial
    assert results.dataset["classes"] == 1000
    assert results.metrics["top5"].chance == pytest.approx(0.5)
    assert "partial: 2 images of 2 classes; all 1,000 names compete" in capsys.readouterr().err


def test_wrong_names_give_one_line_with_the_nearest(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", "budget")
    for flags, message in (
        (["--checkpoint", "budgte"], "unknown checkpoint 'budgte', perhaps 'runs/budget'"),
        (["--checkpoint", "ViT-B-23"], "perhaps 'ViT-B-32'"),
        (["--checkpoint", "budget", "--templates", "simpel"], "unknown templates 'simpel', perhaps 'simple'"),
        (["--checkpoint", "budget", "--objects", "none.parquet"], "expected none.parquet, found no such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["zeroshot", "--data", str(folders), *flags])
        with pytest.raises(SystemExit) as caught:
            command(zeroshot.main)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_without_any_run_the_error_names_the_place_and_the_command(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"expected a run under runs/, found none; make one with `python -m pretrain.run"
    ):
        evaluate(ZeroShotConfig(data=folders))


@pytest.mark.slow
@pytest.mark.skipif("SETCLIP_REAL_DATA" not in os.environ, reason="SETCLIP_REAL_DATA is not set")
def test_cifar10_test_images_are_all_counted_and_a_random_model_is_near_chance(tmp_path):
    with tarfile.open(Path(os.environ["SETCLIP_REAL_DATA"]) / "cifar10" / "test.tar.gz") as tar:
        tar.extractall(tmp_path / "cifar10", filter="data")
    run = write_run(tmp_path / "runs", "random")
    results = evaluate(ZeroShotConfig(data=tmp_path / "cifar10", checkpoint=str(run)))
    assert (results.dataset["images"], results.dataset["classes"]) == (10_000, 10)
    assert results.metrics["top1"].value == pytest.approx(10, abs=8)
    assert results.metrics["top1"].value == pytest.approx(results.metrics["mean_per_class"].value)  # 1,000 a class

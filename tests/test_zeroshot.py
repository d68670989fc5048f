"""Zero-shot classification: the function against a plain formula, prototypes, what is told of mistakes, and the command."""

import io
import json
import sys

import numpy as np
import open_clip
import pytest
import torch
from evaluation_samples import color_of_image, color_of_text, jpeg, small_model, write_class_folders, write_run
from material import MODEL_CFG
from PIL import Image
from ranks import on_ranks
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from eval_suite import zeroshot
from eval_suite.datasets import imagenet_wnids
from eval_suite.encode import encode_functions, encode_images, encode_texts
from eval_suite.image_sources import ArraySource, FileSource, TransformedImages
from eval_suite.images import FolderImages, find_class_folders, image_batches
from eval_suite.mistakes import NUM_CONFUSIONS, class_table, confusions
from eval_suite.per_query import load_per_query
from eval_suite.preprocess import RESIZERS, pillow_transform, resizer_for
from eval_suite.prototypes import all_prototypes, check_descriptions, described
from eval_suite.results import Results, split_protocol
from eval_suite.sharing import join
from eval_suite.zeroshot import ZeroShotConfig, class_prototypes, evaluate, zero_shot
from setclip.checkpoint import load_model, save_checkpoint
from setclip.config import command
from setclip.descriptions import Description, DescriptionTable, write_descriptions
from setclip.errors import InputError
from setclip.images import eval_transform
from setclip.models.clip import build_clip
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


# --- pictures


def noise(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(32, 32), (100, 75), (75, 101), (48, 48), (48, 60), (300, 301)])
def test_pillow_gives_the_pixels_of_open_clips_transform(shape):
    image = noise(*shape)
    peer = Compose([Resize(48, InterpolationMode.BICUBIC), CenterCrop(48)])
    expected = np.asarray(peer(Image.fromarray(image.permute(1, 2, 0).numpy())))
    assert np.array_equal(RESIZERS["pillow"].make(48)(image).permute(1, 2, 0).numpy(), expected)
    apart = RESIZERS["torch"].make(48)(image).permute(1, 2, 0).int() - torch.from_numpy(expected.copy()).int()
    assert apart.abs().max() <= 2


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_models_own_preprocessing_gives_the_pixels_of_open_clips(tmp_path, interpolation, mode):
    folder = tmp_path / "model"
    weights = build_clip(MODEL_CFG).state_dict()
    save_checkpoint(folder, weights, MODEL_CFG, {})
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"] |= {"interpolation": interpolation, "resize_mode": mode}
    path.write_text(json.dumps(config))
    loaded = load_model(folder)
    peer = open_clip.image_transform(
        loaded.image_size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=mode
    )
    image = noise(75, 101)
    expected = peer(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert torch.equal(resizer_for(loaded).make(loaded.image_size)(image).float().div(255), expected)
    if (interpolation, mode) != ("bicubic", "shortest"):
        with pytest.raises(InputError, match="use --resize pillow"):
            resizer_for(loaded, "torch")


def test_preprocessing_that_is_not_built_is_an_error():
    with pytest.raises(InputError, match=r"found 'bicubic' and 'longest' in its preprocess_cfg"):
        pillow_transform(32, "bicubic", "longest")


@pytest.mark.parametrize("resize", RESIZERS)
def test_pictures_that_are_resized_together_are_those_that_are_resized_alone(resize, tmp_path):
    for number, shape in enumerate([(40, 30), (32, 32), (40, 30), (300, 280), (30, 40), (32, 32)]):
        Image.fromarray(noise(*shape, number).permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    source = FileSource(sorted(tmp_path.glob("*.png")), tmp_path)
    images = TransformedImages(source, RESIZERS[resize], 48)
    assert source.keys[3] == "3.png"
    assert torch.equal(torch.cat(list(image_batches(images, 4, workers=0))), torch.stack([images[i] for i in range(6)]))


def test_pictures_in_memory_are_those_that_are_given():
    pictures = noise(8, 6).permute(1, 2, 0).numpy()[None].repeat(3, 0)
    source = ArraySource(pictures)
    assert [np.array_equal(p.permute(1, 2, 0), pictures[0]) for p in source.decoded([2, 0])] == [True, True]
    assert Image.open(io.BytesIO(source.encoded(1))).size == (6, 8)


# --- prototypes


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def test_prototypes_of_each_kind_are_what_their_sentence_says(tmp_path):
    _, encode_text = encode_functions(small_model(tmp_path))
    names, templates, groups = ["red car", "Tree", "sky"], ("a {}.", "the {}."), ["head", "tail", "tail"]
    texts = {"red car": "It has wheels.", "tree": "It is green and tall."}
    with torch.no_grad():
        prompts = unit(torch.stack([unit(encode_text([t.format(n) for t in templates])).mean(0) for n in names]))
        described_by_hand = unit(encode_text(["red car. It has wheels.", "Tree. It is green and tall."]))
    found = all_prototypes(
        ("templates", "descriptions", "both", "tail"),
        class_prototypes(encode_text, names, templates),
        encode_text,
        described(names, texts),
        groups,
    )
    both = unit(prompts[:2] + described_by_hand)
    expected = {
        "templates": prompts,
        "descriptions": torch.stack([*described_by_hand, prompts[2]]),  # the sky has none and keeps its prompts
        "both": torch.stack([*both, prompts[2]]),
        "tail": torch.stack([prompts[0], both[1], prompts[2]]),
    }
    assert list(found) == list(expected)
    for kind, vectors in expected.items():
        assert torch.allclose(found[kind], vectors, atol=1e-6), kind


def test_missing_descriptions_are_counted_and_named_and_only_those_that_are_needed():
    names, groups = ["ant", "bee", "cat", "dog"], ["head", "tail", "tail", "head"]
    some = described(names, {"ant": "small", "bee": "striped"})
    with pytest.raises(
        InputError, match=r"each of 4 classes in D, found none for 2 \(cat, dog\); .* --allow-undescribed"
    ):
        check_descriptions(("both",), some, groups, False, "D")
    with pytest.raises(InputError, match=r"each of 2 classes in D, found none for 1 \(cat\)"):
        check_descriptions(("tail",), some, groups, False, "D")
    assert check_descriptions(("both",), some, groups, True, "D") == ["cat", "dog"]
    assert check_descriptions(("tail",), some, groups, True, "D") == ["cat"]
    assert check_descriptions(("templates",), some, None, False, "") == []
    assert check_descriptions(("tail",), described(names, {"bee": "b", "cat": "c"}), groups, False, "D") == []
    with pytest.raises(InputError) as caught:  # descriptions of other classes: nothing would be measured
        check_descriptions(("descriptions",), described(names, {"cow": "large"}), groups, True, "D")
    assert "found none for 4" in str(caught.value)
    assert "--allow-undescribed" not in str(caught.value)
    with pytest.raises(InputError, match=r"found no objects.parquet that tells which they are"):
        check_descriptions(("tail",), some, None, True, "D")
    with pytest.raises(InputError, match="found none among the groups"):
        check_descriptions(("tail",), some, ["unseen"] * 4, True, "D")


# --- what is told of mistakes


def test_classes_and_confusions_of_a_case_by_hand():
    names, keys = ["ant", "bee", "cat"], [f"{i}.jpg" for i in range(9)]
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
    predicted = torch.tensor([1, 1, 0, 1, 1, 1, 2, 0, 2])
    assert class_table(predicted, labels, names, ["head", "tail", "tail"], [9, 1, 0]) == [
        {"name": "ant", "images": 5, "correct": 1, "group": "head", "count": 9},
        {"name": "bee", "images": 4, "correct": 1, "group": "tail", "count": 1},
        {"name": "cat", "images": 0, "correct": 0, "group": "tail", "count": 0},
    ]
    assert confusions(predicted, labels, names, keys) == [
        {"true": "ant", "predicted": "bee", "count": 4, "examples": ["0.jpg", "1.jpg", "3.jpg"]},
        {"true": "bee", "predicted": "cat", "count": 2, "examples": ["6.jpg", "8.jpg"]},
        {"true": "bee", "predicted": "ant", "count": 1, "examples": ["7.jpg"]},
    ]
    assert confusions(labels, labels, names, keys) == []


def test_only_the_most_frequent_confusions_are_listed():
    labels = torch.arange(60).repeat(2)
    found = confusions((labels + 1) % 60, labels, [str(i) for i in range(60)], [str(i) for i in range(120)])
    assert len(found) == NUM_CONFUSIONS
    assert {entry["count"] for entry in found} == {2}


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
    path = tmp_path / "runs" / "first" / "results" / "zeroshot_scenes_step-00000003.json"
    results = Results.load(path)
    assert results.dataset["images"] == 12
    assert results.dataset["layout"] == "folders"
    assert results.metrics["top1_tail"].samples == 3
    assert results.details["groups"] == {"tail": 1, "middle": 3}  # floor(0.3 · 4) = 1, floor(0.2 · 4) = 0
    assert results.training_pairs == {"present": 90, "listed": 100}
    assert results.is_partial is False
    classes = results.details["classes"]
    assert [(c["name"], c["images"], c["group"], c["count"]) for c in classes] == [
        ("blue", 3, "middle", 9),
        ("green", 3, "middle", 20),
        ("grey", 3, "tail", 3),
        ("red", 3, "middle", 50),
    ]
    correct = sum(c["correct"] for c in classes)
    assert results.metrics["top1"].value == pytest.approx(100 * correct / 12)
    mistaken = results.details["confusions"]
    assert sum(entry["count"] for entry in mistaken) == 12 - correct
    assert all((tmp_path / "data" / "scenes" / key).is_file() for entry in mistaken for key in entry["examples"])
    # small copies, so that reports need no data
    assert set(results.details["pictures"]) == {key for entry in mistaken for key in entry["examples"]}
    queries = load_per_query(path.with_name(f"{path.stem}.queries.npz"))
    assert queries.kind == "zeroshot"
    assert queries.keys[0] == "zeroshot/blue/0.jpg"
    assert queries.arrays["labels"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert queries.arrays["correct"].sum() == correct
    assert queries.about["classes"][queries.arrays["predictions"][0]] in ("blue", "green", "grey", "red")


def write_scenes(root, described_names=("red", "green", "blue", "grey")):
    """Writes class folders, objects.parquet (grey is the tail) and descriptions.parquet, as data_prep leaves them."""
    write_class_folders(root / "zeroshot")
    counts = {"red": 50, "green": 20, "blue": 9, "grey": 3}
    write_objects(root / "objects.parquet", [ObjectTable.from_counts(counts, "pos", 99)])
    rows = [Description(name, f"It looks {name}, like nothing else.", (), "description 1") for name in described_names]
    write_descriptions(root / "descriptions.parquet", DescriptionTable("m", "pos", "all", rows))
    return root


def test_all_prototypes_report_a_group_of_metrics_each(tmp_path):
    run, data = write_run(tmp_path / "runs", "first"), write_scenes(tmp_path / "scenes")
    evaluated = evaluate(ZeroShotConfig(name="scenes", data=data, checkpoint=str(run), prototypes="all"))
    results = evaluated.results
    protocols = {split_protocol(name)[0] for name in results.metrics}
    assert protocols == {"", "descriptions", "both", "both_for_tail"}
    assert list(evaluated.further) == ["descriptions_predictions", "both_predictions", "both_for_tail_predictions"]
    assert "“NAME. DESCRIPTION”" in results.metrics["descriptions_top1"].protocol
    assert "A class's vector" not in results.metrics["top1"].protocol
    assert results.details["prototypes"]["without_description"] == []
    alone = {
        kind: evaluate(ZeroShotConfig(name="scenes", data=data, checkpoint=str(run), prototypes=kind)).results.metrics
        for kind in ("templates", "descriptions", "both", "tail")
    }
    for kind, prefix in (
        ("templates", ""),
        ("descriptions", "descriptions_"),
        ("both", "both_"),
        ("tail", "both_for_tail_"),
    ):
        for name, metric in alone[kind].items():
            assert results.metrics[prefix + name] == metric


def test_a_missing_description_is_an_error_or_is_told_in_the_results(tmp_path, capsys):
    run, data = write_run(tmp_path / "runs", "first"), write_scenes(tmp_path / "scenes", ("red", "grey"))
    config = ZeroShotConfig(name="scenes", data=data, checkpoint=str(run), prototypes="both")
    with pytest.raises(InputError, match=r"found none for 2 \(blue, green\)"):
        evaluate(config)
    results = evaluate(ZeroShotConfig(**{**vars(config), "allow_undescribed": True})).results
    assert results.details["prototypes"]["without_description"] == ["blue", "green"]
    assert "2 of 4 classes have no description" in capsys.readouterr().err
    assert evaluate(ZeroShotConfig(**{**vars(config), "prototypes": "tail"})).results.metrics["top1"].samples == 12


def test_descriptions_of_a_folder_of_ones_own_must_be_named(folders, tmp_path):
    run = write_run(tmp_path / "runs", "first")
    with pytest.raises(
        InputError, match=r"for --prototypes both, found no --descriptions; give a descriptions.parquet"
    ):
        evaluate(ZeroShotConfig(data=folders, checkpoint=str(run), prototypes="both"))


def test_a_folder_alone_is_evaluated_by_its_folder_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs", "first")
    folder = write_class_folders(tmp_path / "own", 2, ("red_car", "green_tree"))
    results = evaluate(ZeroShotConfig(data=folder, checkpoint=str(run), templates="imagenet")).results
    assert results.dataset["name"] == "own"
    assert len(results.dataset["prompts"]) == 80
    assert results.metrics["top1"].samples == 4


def test_a_partial_imagenet_is_marked(tmp_path, capsys):
    run = write_run(tmp_path / "runs", "first")
    write_class_folders(tmp_path / "imagenet" / "val", 1, imagenet_wnids()[7:9])
    config = ZeroShotConfig(
        name="imagenet", data=tmp_path / "imagenet", checkpoint=str(run), allow_partial=True, templates="name"
    )
    results = evaluate(config).results
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


def evaluated_here(config: ZeroShotConfig):
    """Returns what rank 0 would write. Top level: it runs in new processes."""
    evaluated = evaluate(config, join(config.device))
    values = {name: (metric.value, metric.interval_95) for name, metric in evaluated.results.metrics.items()}
    return values, evaluated.predictions


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path):
    run, data = write_run(tmp_path / "runs", "first"), write_scenes(tmp_path / "scenes")
    config = ZeroShotConfig(
        name="scenes", data=data, checkpoint=str(run), prototypes="all", batch_size=5, workers=0, device="cpu"
    )
    values, predictions = evaluated_here(config)
    for of_rank, predictions_of_rank in on_ranks(2, evaluated_here, config):
        assert of_rank == values
        assert torch.equal(predictions_of_rank, predictions)

"""Features of regions in SCAN's layout: files are checked by what they hold, runs train on them, their checkpoints evaluate."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_material import forked, write_pretrained, write_shards
from regions_material import PLACES, WIDTH, finetuned, write_bert, write_regions
from safetensors.torch import load_file
from torch.nn.functional import normalize

from eval_suite.diagnostics import DiagnosticsConfig
from eval_suite.diagnostics import evaluate as diagnose_model
from eval_suite.encode import encode_functions
from eval_suite.preprocess import model_pictures
from eval_suite.regions import RegionBatches, open_regions, splits_of
from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate
from finetune.config import BackboneConfig, FinetuneConfig
from finetune.data import open_parts
from finetune.noise import DroppedPixels, Dropping, features_of_pictures, kept_places, without_some
from finetune.recipes import RECIPES
from finetune.recipes.comparison import compared
from finetune.run import finetune
from setclip.checkpoint import checkpoints_of, load_model
from setclip.errors import InputError
from setclip.models.backbones import Features
from setclip.models.backbones.towers import Towers
from setclip.vocabulary import SPECIAL

TOWERS = ("--backbone.image", "regions", "--backbone.text", "bigru")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    sizes = {"train": 80, "dev": 20, "test": 20}
    write_regions(folder / "once", sizes)
    write_regions(folder / "five", sizes, repeats=5)
    return folder


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    return finetuned(tmp_path_factory.mktemp("run") / "run", "--regions", place / "once", *TOWERS)


def retrieved(checkpoint, **values):
    config = RetrievalConfig(checkpoint=str(checkpoint), device="cpu", workers=0, **values)
    return {name: metric.value for name, metric in evaluate(config).results.metrics.items()}


# --- runs


def test_repeated_rows_give_the_run_that_single_ones_give(place, run, tmp_path):
    five = finetuned(tmp_path / "run", "--regions", place / "five", *TOWERS)
    one, two = (load_file(checkpoints_of(out)[-1] / "model.safetensors") for out in (run, five))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    figures = [Results.load(out / "results.json").metrics for out in (run, five)]
    assert figures[0] == figures[1]


def test_a_checkpoint_gives_the_recalls_that_its_run_reports(place, run):
    told = {name: metric.value for name, metric in Results.load(run / "results.json").metrics.items()}
    assert retrieved(run, regions=place / "once") == told
    assert retrieved(run) == told
    assert retrieved(run, regions=place / "five", split="test", batch_size=7) == told
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert load_model(run).identity["data"]["regions"] == [PLACES, WIDTH]


def test_bert_learns_beside_regions_with_noise_on_pictures_held_out(place, tmp_path):
    bert = ("--backbone.text", write_bert(tmp_path / "bert"), "--backbone.text-weights", "random", "--noise.words", 0.2)
    more = ("--noise.regions", 0.2, "--backbone.freeze", "none", "--backbone.text-lr-factor", 1, "--hold-out", 16)
    out = finetuned(
        tmp_path / "run", "--regions", place / "once", "--backbone.image", "regions", *bert, *more, head="gpo"
    )
    losses = [json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-3:]) < sum(losses[:3])
    description = json.loads((out / "checkpoints" / "chosen" / "setclip_config.json").read_text())
    assert description["chosen_on"]["images"] == 16
    told = {name: metric.value for name, metric in Results.load(out / "results.json").metrics.items()}
    assert retrieved(out, regions=place / "once") == told


@pytest.mark.slow
def test_two_ranks_with_noise_give_what_one_gives(place, tmp_path):
    noise = ("--noise.words", 0.3, "--noise.regions", 0.3, "--captions-per-image", 2, "--epochs", 2, "--batch-size", 16)
    towers = (*TOWERS, "--backbone.min-count", 1, "--backbone.word-width", 8, "--backbone.hidden-width", 16)
    for size in (1, 2):
        arguments = [
            "--head",
            "gpo",
            "--out",
            tmp_path / f"on-{size}",
            "--width",
            16,
            "--device",
            "cpu",
            "--ranks",
            size,
        ]
        arguments += ["--regions", place / "five", "--log-every-steps", 1, *towers, *noise]
        assert forked([str(word) for word in arguments], tmp_path / f"said-{size}", size) == [0] * size
    one, two = (load_file(checkpoints_of(tmp_path / f"on-{n}")[-1] / "model.safetensors") for n in (1, 2))
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)


def test_a_model_of_pictures_takes_no_regions_nor_the_other_way_about(place, run, tmp_path):
    write_pretrained(tmp_path / "pretrained")
    with pytest.raises(InputError, match=r"expected a model that takes features of regions, found .*takes pictures"):
        retrieved(tmp_path / "pretrained", regions=place / "once")
    shards = write_shards(tmp_path / "data", {"test": 4})
    with pytest.raises(InputError, match=r"takes features of regions; evaluate it with .*--regions DIR"):
        retrieved(run, data=shards)
    with pytest.raises(InputError, match="takes features of regions"):
        model_pictures(load_model(run))
    write_regions(tmp_path / "wide", {"test": 4})
    np.save(tmp_path / "wide" / "test_ims.npy", np.zeros((4, PLACES, WIDTH + 1), np.float32))
    with pytest.raises(InputError, match=f"expected regions {WIDTH} wide, .* found {WIDTH + 1}"):
        retrieved(run, regions=tmp_path / "wide")


def test_diagnostics_of_a_model_on_regions_give_the_variances_that_stand_beside_a_row_s(place, tmp_path):
    slots = ("--options", "num_elements=2", "blocks=1", "heads=2", "head_width=8", "--epochs", 1)
    out = finetuned(tmp_path / "run", "--regions", place / "once", *TOWERS, *slots, head="slot")
    words = {"words": ("red",), "checkpoint": str(out), "device": "cpu"}
    results, found = diagnose_model(DiagnosticsConfig(regions=place / "once", **words))
    assert (results.dataset["split"], results.dataset["images"]) == ("test", 20)
    loaded = load_model(out)
    encode_image, encode_text = encode_functions(loaded)
    split = open_regions(place / "once", "test")
    with torch.no_grad():
        texts = [text for of_picture in split.data.captions for text in of_picture]
        sides = {"image": encode_image(split.regions.of(range(20))), "text": encode_text(texts)}
    for side, sets in sides.items():
        variance = 1 - normalize(sets.float(), dim=-1).mean(1).norm(dim=-1)
        told = results.metrics[f"variance_{side}_log_of_mean"].value
        assert told == pytest.approx(float(variance.mean().log()), abs=1e-4)
    assert any("models of pictures alone" in why for why in found.missing)
    with pytest.raises(ValueError, match="found more than one"):
        DiagnosticsConfig(regions=place / "once", data=place)
    results.save(out / "results" / "diagnostics_test.json")
    content = json.loads((out / "results.json").read_text())
    name = "dive-f30k-frcnn-bigru"
    told = {entry["metric"]: entry["ours"] for entry in compared(name, content, out)["metrics"]}
    assert told["variance_text_log_of_mean"] == results.metrics["variance_text_log_of_mean"].value


# --- files


@pytest.mark.parametrize(("repeats", "dtype"), [(1, np.float32), (5, np.float16)])
def test_a_split_is_read_from_its_file_as_it_is_wanted(tmp_path, repeats, dtype):
    write_regions(tmp_path, {"train": 7, "testall": 3}, repeats, ids=True)
    whole = np.load(tmp_path / "train_ims.npy").astype(dtype)
    np.save(tmp_path / "train_ims.npy", whole)
    assert splits_of(tmp_path) == ["train", "testall"]
    found = open_regions(tmp_path, "train")
    assert isinstance(found.regions.array, np.memmap)
    assert (len(found.regions), found.regions.width, found.regions.repeats) == (7, WIDTH, repeats)
    assert torch.equal(found.regions.of([2, 0]), torch.from_numpy(whole[[2 * repeats, 0]].astype(np.float32)))
    assert found.data.keys[2] == "train2"
    assert [len(texts) for texts in found.data.captions] == [5] * 7
    batches = RegionBatches(found.regions, 3)
    assert torch.equal(torch.cat(list(batches)), torch.from_numpy(whole[::repeats].astype(np.float32)))
    assert [len(batch) for batch in batches[1:]] == [3, 1]


def damage(folder, how):
    """Does to a good folder what a release, a copy or a hand can."""
    ims, caps = folder / "train_ims.npy", folder / "train_caps.txt"
    array, lines = np.load(ims), caps.read_text().splitlines()
    if how == "no captions":
        caps.unlink()
    elif how == "no features":
        ims.unlink()
    elif how == "cut off":
        ims.write_bytes(ims.read_bytes()[:-100])
    elif how == "other":
        ims.write_bytes(b"PK\x03\x04 no array of numpy")
    elif how == "fewer captions":
        caps.write_text("\n".join(lines[:-1]))
    elif how == "blank":
        caps.write_text("\n".join([*lines[:3], " ", *lines[4:]]))
    elif how == "latin":
        caps.write_bytes("caf\xe9\n".encode("latin-1") * len(lines))
    elif how == "flat":
        np.save(ims, array[:, 0])
    elif how == "numbers":
        np.save(ims, array.astype(np.int64))
    elif how == "uneven":
        repeated = np.repeat(array, 5, 0)
        repeated[8:12] = array[0]
        np.save(ims, repeated)
    elif how == "three":
        np.save(ims, np.repeat(array[:10], 3, 0))
        caps.write_text("\n".join(lines[:30]))
    elif how == "ids":
        (folder / "train_ids.txt").write_text("1\n2\n")
    elif how == "uneven ids":
        (folder / "train_ids.txt").write_text("\n".join(str((i + 1 * (i > 8)) // 5) for i in range(60)))
    elif how == "NaN":
        array[3, 0, 0] = np.nan
        np.save(ims, array)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no captions", "expected .*train_caps.txt with captions.*found no such file.*SCAN's release"),
        ("no features", "found no such file; splits there: dev; SCAN's release"),
        ("cut off", "expected a whole array of numpy .*copy it again"),
        ("other", "expected a whole array of numpy"),
        ("fewer captions", r"expected 5 captions a picture \(60 of 12 rows .* found 59 in train_caps.txt"),
        ("blank", "expected captions in .*, one a line, found line 4 empty"),
        ("latin", "expected UTF-8"),
        ("flat", r"expected floats of shape \(pictures, regions, width\).* found float32 \(12, 12\)"),
        ("numbers", "found int64"),
        ("uneven", "expected each picture in 5 equal rows"),
        ("three", r"expected 5 captions of each picture, found 30 captions .* of which 3 in a row are equal"),
        ("ids", "expected an id of each of 12 pictures or of each of 60 captions .* found 2"),
        (
            "uneven ids",
            r"expected one id for the 5 captions of each picture .* found 1 and 2 of picture 1 \(from line 6\)",
        ),
        ("NaN", "row 3: expected finite features"),
        ("counts", "flickr30k, .*split train: expected 29,000 pictures, found 12"),
    ],
)
def test_files_that_do_not_fit_are_told_with_what_to_do(tmp_path, how, message):
    write_regions(tmp_path, {"train": 12, "dev": 2})
    damage(tmp_path, how)
    with pytest.raises(InputError, match=message):
        open_regions(tmp_path, "train", "flickr30k", allow_partial=how != "counts").regions.of(range(12))


def test_a_run_tells_what_is_missing_before_it_makes_a_folder(place, tmp_path):
    config = replace(
        RECIPES["plain"]("mean"), out=tmp_path / "run", device="cpu", regions=tmp_path, batch_size=16,
        backbone=BackboneConfig(image="regions", text="bigru", min_count=1),
    )  # fmt: skip
    for values, message in (
        ({}, "expected region features in .*found a folder without"),
        ({"regions": place / "once", "data": place}, "found both --data .* and --regions"),
        ({"regions": place / "once", "dataset": "flickr30k"}, "expected 29,000 pictures, found 80"),
        (
            {"regions": place / "once", "shared_objects": 0.5},
            "expected captions with parsed objects .* found region features",
        ),
        ({"regions": place / "once", "val_split": "other"}, "other_ims.npy .*splits there: train, dev, test"),
    ):
        with pytest.raises(InputError, match=message):
            finetune("plain", replace(config, **values))


def test_pictures_in_two_splits_are_found_by_their_captions_where_there_are_no_ids(tmp_path, capsys):
    write_regions(tmp_path, {"train": 12, "dev": 4, "test": 4})
    for name in ("ims.npy", "caps.txt"):
        (tmp_path / f"testall_{name}").write_bytes((tmp_path / f"test_{name}").read_bytes())
    config = FinetuneConfig(regions=tmp_path, backbone=BackboneConfig(image="regions", text="bigru"))
    parts = open_parts(config)
    assert (parts.val.split, parts.test.split) == ("dev", "testall")
    with pytest.raises(InputError, match=r"test data apart .* found 4 pictures in both \(first: testall-000000\)"):
        open_parts(replace(config, val_split="test"))
    capsys.readouterr()
    open_parts(replace(config, val_split="dev", test=write_regions(tmp_path / "other", {"test": 6}), test_split="test"))
    assert "6 pictures are both in the training and in the test data (first: test-000000)" in capsys.readouterr().err


def test_another_number_of_captions_a_picture_is_taken_where_it_is_said_alone(tmp_path):
    write_regions(tmp_path, {"train": 10, "val": 2})
    lines = (tmp_path / "train_caps.txt").read_text().splitlines()
    (tmp_path / "train_caps.txt").write_text("\n".join(lines[:20]))
    with pytest.raises(InputError, match=r"expected 5 captions of each picture, found 20 .*--region-captions"):
        open_regions(tmp_path, "train")
    assert [len(texts) for texts in open_regions(tmp_path, "train", captions_of_picture=2).data.captions] == [2] * 10
    with pytest.raises(InputError, match="split val: expected 1,014 pictures, found 2"):
        open_regions(tmp_path, "val", "flickr30k")


# --- noise


def test_regions_and_places_go_at_the_stated_rates_by_the_draw_alone():
    keys = torch.arange(2_000) * 7919
    dropping = Dropping(0.2, seed=1, epoch=2, keys=keys)
    regions, places = (kept_places(dropping, 36, are_regions) for are_regions in (True, False))
    assert regions.float().mean() == pytest.approx(0.8, abs=0.01)
    # r ≤ 0.2 drops nothing; else a share 0.2 r, 0.2 · (1 − 0.2²) / 2 on average
    assert 1 - places.float().mean() == pytest.approx(0.096, abs=0.01)
    assert (places.all(1)).float().mean() > 0.19
    some = kept_places(Dropping(0.2, 1, 2, keys[5:9]), 36, True)
    assert torch.equal(some, regions[5:9])
    assert not torch.equal(kept_places(Dropping(0.2, 1, 3, keys), 36, True), regions)
    assert kept_places(Dropping(0.999, 1, 2, keys), 1, True).all()
    assert (kept_places(Dropping(0.999, 1, 2, keys), 4, True).sum(1) >= 1).all()


def test_regions_that_go_are_in_no_global_feature():
    local = torch.randn(3, 8, 5)
    dropping = Dropping(0.5, 0, 0, torch.arange(3))
    tower = Towers(
        {"kind": "regions", "width": 5}, {"kind": "recurrent", "words": " ".join(SPECIAL), "hidden_width": 4}
    )
    found = features_of_pictures(tower, DroppedPixels(local, dropping))
    for row, kept in enumerate(found.mask):
        assert torch.allclose(found.pooled[row], local[row][kept].mean(0))
        assert torch.equal(found.local[row][kept], local[row][kept])
    assert torch.equal(features_of_pictures(tower, local).pooled, local.mean(1))
    places = without_some(Features(local, None, local.mean(1)), dropping)
    assert torch.equal(places.pooled, local.mean(1))

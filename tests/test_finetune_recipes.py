"""Recipes of papers' rows: every row is there, sums are right, settings build what they say, and a run stands beside its row."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetune_material import write_pretrained, write_shards

from finetune.losses import LOSSES
from finetune.optim import FinetuneOptimConfig, plateaus
from finetune.recipes import PAPERS, RECIPES, ROWS, __main__
from finetune.recipes.base import SOURCES, config_of, stated
from finetune.recipes.comparison import changed_settings, compared, text_of, title_of
from finetune.recipes.published import RUNNING_TIMES, Row
from finetune.run import finetune
from setclip.config import to_dict
from setclip.errors import InputError
from setclip.models.heads import SideWidths, make_pair

RECALLS = [f"{direction}_{name}" for direction in ("i2t", "t2i") for name in ("r1", "r5", "r10")]


def test_every_row_of_the_papers_tables_that_is_of_a_head_of_ours_is_there():
    """Counted by hand in the tables: DivE's COCO and Flickr30K (12 each), ablations, DH-Set's CUB, ASA's tables 1 and 2."""

    def count(pattern):
        return sum(bool(re.fullmatch(pattern, name)) for name in ROWS)

    assert count(r"(dive|pvse|pcme|vsepp|vseinf|scan)-coco-.*") == 12
    assert (
        count(r"(dive|pvse|pcme|vsepp|vseinf|scan)-f30k-.*") == 12 + 5
    )  # and smooth-Chamfer with slots is one of the 12
    assert Counter(name.split("-")[0] for name in ROWS if "-coco-" in name) == {
        "dive": 5, "vseinf": 3, "vsepp": 1, "pvse": 1, "pcme": 1, "scan": 1,
    }  # fmt: skip
    assert sum(row.log_variance is not None for row in ROWS.values()) == 4
    assert sum("eccv_i2t_map_at_r" in row.metrics for row in ROWS.values()) == 2
    assert sorted(name for name in ROWS if "-cub-" in name) == [
        f"{system}-cub-swin{size}-bert" for system in ("dhset", "laps") for size in (224, 384)
    ]
    assert count(r"asa-.*(7x7|14x14)") == 8
    assert count(r"asa-f30k-resnet152-bigru-(i2t|t2i)-(lse|avg)(-avgpool)?") == 8
    assert {"dive-coco-frcnn-bigru", "dhset-cub-swin224-bert", "asa-f30k-resnet152-bigru-i2t-lse"} <= set(PAPERS)
    assert set(PAPERS) - set(ROWS) == {member for row in ROWS.values() for member in row.members} - set(ROWS)
    assert all(name in PAPERS or row.members for name, row in ROWS.items())


def test_a_printed_sum_is_that_of_the_printed_recalls_or_has_an_erratum():
    wrong = set()
    for name, row in ROWS.items():
        sums = {key: value for key, value in row.metrics.items() if key.endswith("rsum")}
        assert all(0 < value <= 100 for key, value in row.metrics.items() if key not in sums)
        for key, printed in sums.items():
            recalls = [row.metrics.get(key.removesuffix("rsum") + recall) for recall in RECALLS]
            if None in recalls:
                assert "ablation" in row.source
            elif abs(sum(recalls) - printed) > 0.05:
                assert abs(sum(recalls) - printed) < 0.21
                assert any("printed sum" in erratum or "recalls sum" in erratum for erratum in row.errata)
                wrong.add((name, key))
    assert wrong == {
        ("vseinf-coco-resnext101-bert", "rsum"),
        ("vseinf-coco-resnext101-bert-ensemble", "rsum"),
        ("dhset-cub-swin384-bert", "class_match_rsum"),
    }


def test_the_errata_that_are_known_stand_beside_the_numbers():
    assert any("507.6" in erratum for erratum in ROWS["dhset-cub-swin384-bert"].errata)
    assert any("196" in erratum for erratum in ROWS["asa-f30k-resnet152-bigru-i2t-lse-14x14"].errata)
    means = {name: sum(times) / len(times) for name, times in RUNNING_TIMES.items()}
    assert means == pytest.approx({"set": 4.726, "hybrid": 3.388})
    assert 1 - means["hybrid"] / means["set"] == pytest.approx(0.283, abs=5e-4)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_is_a_valid_configuration_whose_every_setting_has_a_source(name):
    recipe = PAPERS[name]
    assert {value.source for value in recipe.settings.values()} <= set(SOURCES)
    config = recipe.config()
    settings = config.head_settings()
    assert config.head == recipe.settings["head"].value
    assert set(config.terms()) <= set(LOSSES)
    assert config.terms()
    assert {"dataset", "batch_size", "epochs", "optim.lr", "width", "captions_per_image"} <= set(recipe.settings)
    # with small widths and the scales of a small backbone, so that what the options name exists
    options = {**settings.options, "head_width": 4} if "head_width" in settings.options else settings.options
    image = dict(settings.image_options)
    if "candidate_width" in image:
        image |= {"candidate_width": 8, "scales": [(4, 4), (2, 2)], "widths": [6, 8]}
        image = image if config.backbone.maps == 2 else {"candidate_width": 8}
    similarity = dict(settings.similarity_options)
    if settings.similarity == "laps":
        similarity |= {"width": 8}
    pair = make_pair(
        config.head,
        SideWidths(8, 8),
        SideWidths(6, 6),
        8,
        options,
        image,
        settings.text_options,
        settings.similarity,
        similarity,
        projection=settings.projection,
    )
    inputs = 20 if image.get("scales") else similarity.get("num_patches", 5)
    images = pair.image(torch.randn(2, inputs, 8), None, torch.randn(2, 8))
    texts = pair.text(torch.randn(3, 4, 6), None, torch.randn(3, 6))
    assert pair.scores(images, texts).shape == (2, 3)
    if name.endswith("14x14"):
        assert images.sets.shape[1] == 16
    elif image.get("scales"):
        assert images.sets.shape[1] == 8


def test_rates_of_recipes_are_those_of_their_sources():
    def rates(name, *epochs):
        optim = PAPERS[name].config().optim
        return [optim.rate(0, 100, epoch) for epoch in epochs]

    assert rates("asa-f30k-resnet152-bigru-i2t-avg", 0, 15, 20, 34) == pytest.approx([5e-4, 5e-5, 2e-5, 2e-5])
    assert rates("laps-cub-swin224-bert", 0, 9, 25) == pytest.approx([2e-4, 6e-5, 2e-4 * 0.3**4])
    assert rates("vsepp-coco-resnet152-gru", 14.9, 15, 31) == pytest.approx([2e-4, 2e-5, 2e-5])
    assert rates("scan-coco-frcnn-bigru-t2i-avg", 9, 10) == pytest.approx([5e-4, 5e-5])
    pvse = PAPERS["pvse-coco-resnet152-bigru"].config().optim
    assert [pvse.rate(0, 100, 1.0, [1.0] * n) for n in (11, 12)] == pytest.approx([2e-4, 1e-4])


def test_a_plateau_is_that_of_torch_in_mode_max():
    torch.manual_seed(0)
    for patience in (0, 1, 3):
        values = (torch.randn(60).cumsum(0) + 20).tolist()
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=patience)
        config = FinetuneOptimConfig(lr=1.0, schedule="plateau", decay=0.5, patience=patience)
        for number, value in enumerate(values, 1):
            scheduler.step(value)
            assert config.rate(0, 1, 0.0, values[:number]) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-7
            )
    assert plateaus([], 0) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decay_epochs": (2.0, 1.0)}, "decay-epochs in order, found 2.0 1.0"),
        ({"decay_epochs": (1.0,), "rates": (1e-3, 1e-4)}, "one rate above 0 for each of the 1 --optim.decay-epochs"),
    ],
)
def test_steps_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptimConfig(schedule="steps", **values)


def test_a_setting_that_does_not_exist_is_an_error():
    with pytest.raises(InputError, match=r"expected a setting of fine-tuning, found 'optim.rate2'|'rate2'"):
        config_of({"optim.rate2": stated(1)})


# --- what is shown


def shown(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["finetune.recipes", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    __main__.main()
    return capsys.readouterr().out


def test_the_command_lists_all_shows_sources_and_gives_json(monkeypatch, capsys):
    listed = shown(monkeypatch, capsys)
    assert all(name in listed for name in (*PAPERS, *ROWS))
    one = shown(monkeypatch, capsys, "--show", "dhset-cub-swin384-bert")
    assert re.search(r"--epochs\s+30\.0\s+stated", one)
    assert re.search(r"--weights\.dhset-diversity\s+0\.1\s+reconstructed", one)
    assert "507.6" in one
    both = shown(monkeypatch, capsys, "--show", "scan-f30k-frcnn-bigru-ensemble")
    assert title_of("scan-f30k-frcnn-bigru-ensemble") == "SCAN, Flickr30K, Faster R-CNN + BiGRU, 2 models summed"
    assert "finetune.ensemble runs/scan-f30k-frcnn-bigru-t2i-avg runs/scan-f30k-frcnn-bigru-i2t-lse --row" in both
    content = json.loads(shown(monkeypatch, capsys, "--json", "True", "--show", "dive-coco-frcnn-bigru"))
    found = content["dive-coco-frcnn-bigru"]
    assert found["settings"]["batch_size"] == {"value": 200, "source": "stated", "note": ""}
    assert found["published"]["metrics"]["1k_5fold_rsum"] == 524.6
    with pytest.raises(InputError, match="unknown recipe 'dive-coco-frcn-bigru', perhaps 'dive-coco-frcnn-bigru'"):
        shown(monkeypatch, capsys, "--show", "dive-coco-frcn-bigru")


def test_a_row_of_two_models_and_another_head_are_refused_with_what_to_type():
    with pytest.raises(
        InputError, match=r"--seeds 2 .*finetune.ensemble .*seed-0 .*seed-1 --row dive-f30k-frcnn-bigru-ensemble"
    ):
        RECIPES["dive-f30k-frcnn-bigru-ensemble"](None)
    with pytest.raises(InputError, match=r"expected head slot, .*found --head pie"):
        RECIPES["dive-f30k-frcnn-bigru"]("pie")
    assert RECIPES["dive-f30k-frcnn-bigru"]("slot") == PAPERS["dive-f30k-frcnn-bigru"].config()


# --- beside the published numbers


def test_a_run_of_a_row_writes_its_numbers_beside_the_published_ones_and_tables_join_runs(
    tmp_path, monkeypatch, capsys
):
    write_shards(tmp_path / "data", {"train": 64, "val": 20, "test": 20})
    write_pretrained(tmp_path / "pretrained")
    name = "dive-f30k-frcnn-bigru-slot-mil"
    config = replace(
        PAPERS[name].config(), model=str(tmp_path / "pretrained"), data=tmp_path / "data", dataset=None, width=16, batch_size=32,
        options=("num_elements=2", "blocks=1", "heads=2", "head_width=8"), captions_per_image=2, epochs=1.0, device="cpu",
        backbone=replace(PAPERS["dive-f30k-frcnn-bigru"].config().backbone, image="open_clip", text="open_clip", freeze="both"),
        noise=replace(config_of({}).noise, words=0.0, regions=0.0), seeds=2, out=tmp_path / "run", precision="fp32",
    )  # fmt: skip
    finetune(name, config)
    printed = capsys.readouterr().out
    table = (tmp_path / "run" / "results.md").read_text()
    assert table.strip() in printed
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    ours = content["metrics"]["rsum"]
    assert f"| rsum | {ours['mean']:.1f} ± {ours['standard_deviation']:.1f} | 491.7 | – |" in table
    assert "not of flickr30k test: the numbers do not compare" in table
    assert "changed: batch_size is 32, in the recipe 128" in table
    assert "similarity" not in table  # which was not changed
    one = json.loads((tmp_path / "run" / "seed-1" / "results.json").read_text())
    assert one["details"]["published"]["metrics"][0]["ours"] == ours["values"][1]
    joined = shown(monkeypatch, capsys, "--table", tmp_path / "run", tmp_path / "run" / "seed-0")
    assert joined.count("/ 491.7") == 2
    with pytest.raises(InputError, match="expected a run that has ended"):
        shown(monkeypatch, capsys, "--table", tmp_path)


def content_of(row: Row, config, **more):
    """Returns what a results file of this row's data has, one point above what is published."""
    metrics = {key: {"value": value + 1} for key, value in row.metrics.items() if not key.endswith("class_match_rsum")}
    dataset = {"name": row.dataset, "split": "test", "images": 5_000 if row.dataset == "coco" else 1_000}
    return {"dataset": dataset, "metrics": metrics, "config": config, **more}


def test_a_run_as_the_recipe_has_it_is_compared_without_reproach_but_for_what_is_not_the_source_s(tmp_path):
    name = "dhset-cub-swin224-bert"
    config = to_dict(replace(PAPERS[name].config(), seed=5, out=tmp_path, device="cpu"))
    assert changed_settings(name, config) == []
    found = compared(name, content_of(ROWS[name], config))
    assert [remark[:21] for remark in found["remarks"]] == ["settings of ours, whi", PAPERS[name].notes[0][:21]]
    by_name = {entry["metric"]: entry for entry in found["metrics"]}
    assert by_name["class_match_rsum"]["difference"] == pytest.approx(6, abs=0.11)  # the six recalls, each one above
    assert "| class match: i2t r1 | 72.1 | 71.1 | +1.0 |" in text_of(found)
    partial = compared(name, content_of(ROWS[name], config, is_partial=True))
    assert any("missing: the numbers do not compare" in remark for remark in partial["remarks"])


@pytest.mark.parametrize(
    ("split", "images", "remark"),
    [
        ("test", 5_000, None),
        ("testall", 5_000, None),
        ("test", 1_000, "of 1,000 pictures, not of all 5,000 of coco test"),
        ("val", 5_000, "of coco val, not of coco test"),
    ],
)
def test_a_row_of_coco_is_compared_on_all_its_test_pictures_alone_whatever_the_split_is_called(split, images, remark):
    name = "vseinf-coco-frcnn-bigru"
    content = content_of(ROWS[name], to_dict(PAPERS[name].config()))
    content["dataset"] |= {"split": split, "images": images}
    found = compared(name, content)
    reproaches = [each for each in found["remarks"] if "the numbers do not compare" in each]
    assert [each.startswith(str(remark)) for each in reproaches] == ([] if remark is None else [True])
    assert all((entry["difference"] is None) == (remark is not None) for entry in found["metrics"])


def test_word_vectors_kept_features_and_what_is_not_the_source_s_stand_among_the_remarks():
    def remarks(name, **backbone):
        config = PAPERS[name].config()
        config = replace(config, backbone=replace(config.backbone, **backbone))
        return " | ".join(compared(name, content_of(ROWS[name], to_dict(config)))["remarks"])

    pvse = "pvse-coco-resnet152-bigru"
    at_random = "word vectors began at random, where the source begins with GloVe"
    assert at_random in remarks(pvse)
    assert at_random not in remarks(pvse, glove=Path("glove.6B.300d.txt"))
    assert "glove" not in remarks(pvse, glove=Path("glove.6B.300d.txt")).lower()
    assert "the source's Adam is AMSGrad" in remarks(pvse)
    assert "changed: backbone.cache_gb is 4.0, in the recipe 0.0" in remarks(pvse, cache_gb=4.0)
    assert "cache_gb" not in remarks("dive-coco-frcnn-bigru", cache_gb=1.0)  # whose pictures are not varied
    scan = PAPERS["scan-coco-frcnn-bigru-t2i-avg"]
    assert not any("GloVe" in text for text in (*scan.notes, *(value.note for value in scan.settings.values())))


@pytest.mark.parametrize(
    ("name", "stated_here", "of_another_row"),
    [
        ("dive-coco-resnet152-bigru", ("head", "augment.flip"), ("options.blocks", "triplet.margin", "backbone.words")),
        ("dive-f30k-resnext101-bert", ("head", "backbone.image_size"), ("similarity_options.alpha", "noise.words")),
        ("pvse-f30k-resnet152-bigru", ("triplet.margin",), ("options.num_elements", "batch_size", "optim.lr")),
        ("pcme-f30k-resnet152-bigru", ("options.num_samples",), ("optim.lr", "augment.flip")),
        ("pcme-coco-resnet152-bigru", ("optim.lr",), ("augment.flip", "augment.scale", "backbone.resize")),
        ("vsepp-coco-resnet152-gru", ("optim.lr",), ("augment.flip", "backbone.resize")),
        ("asa-f30k-resnet152-bigru-i2t-lse", ("backbone.image_size",), ("augment.flip", "augment.scale")),
        ("vseinf-coco-frcnn-bigru", ("triplet.margin", "noise.words"), ("optim.lr", "epochs", "optim.decay_epochs")),
        (
            "dhset-cub-swin224-bert",
            ("epochs", "backbone.image"),
            ("augment.kind", "backbone.resize", "backbone.freeze"),
        ),
        ("laps-cub-swin224-bert", ("head", "backbone.image"), ("optim.lr", "batch_size")),
    ],
)
def test_what_is_stated_of_another_row_alone_is_not_stated_of_this_one(name, stated_here, of_another_row):
    settings = PAPERS[name].settings
    assert all(settings[key].source == "stated" for key in stated_here)
    for key in of_another_row:
        assert (settings[key].source, bool(settings[key].note)) == ("reconstructed", True), key


def test_vse_plus_plus_normalises_the_picture_before_its_layer():
    assert PAPERS["vsepp-f30k-resnet152-gru"].config().head_settings().image_options == {"normalise_input": True}


def test_log_variances_come_from_the_diagnostics_of_the_run(tmp_path):
    (tmp_path / "results").mkdir()
    name = "dive-f30k-frcnn-bigru"
    own = content_of(ROWS[name], {})
    own["dataset"]["captions_sha256"] = "a"
    for what, split, captions, first, second in (
        ("flickr30k_test", "test", "a", -2.0, -3.0),
        ("flickr30k_val", "val", "a", -7.0, -8.0),
        ("flickr8k_test", "test", "b", -7.0, -8.0),
    ):
        dataset = {**own["dataset"], "split": split, "captions_sha256": captions}
        metrics = {"variance_image_log_of_mean": {"value": first}, "variance_text_log_of_mean": {"value": second}}
        path = tmp_path / "results" / f"diagnostics_{what}_chosen.json"
        path.write_text(json.dumps({"dataset": dataset, "metrics": metrics}))
    text = text_of(compared(name, own, tmp_path))
    assert "| log circular variance, images | -2.00 | -2.13 | +0.1 |" in text
    with pytest.raises(InputError, match="expected results of a recipe of a paper's row, found 'photos'"):
        compared("photos", {})

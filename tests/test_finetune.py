"""Fine-tuning: heads learn what captions say, a run that is killed ends as if nothing had happened, ranks give one result."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetune_material import Killed, command, forked, sample, troubled, words, write_pretrained, write_shards
from safetensors.torch import load_file

from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate
from finetune import step
from finetune.config import FinetuneConfig
from finetune.data import TrainOrder, open_parts
from finetune.evaluate import results_of
from finetune.recipes import RECIPES
from finetune.run import finetune, over_seeds
from pretrain.losses import LossConfig
from pretrain.resume import STATE_NAME, read_train_state
from pretrain.stopping import EXIT_STOPPED
from setclip.checkpoint import checkpoints_of, load_model, save_checkpoint
from setclip.errors import InputError
from setclip.hold_out import held_out
from setclip.manifest import Manifest
from setclip.models.backbones.open_clip_towers import OpenClipTowers
from setclip.models.clip import build_clip
from setclip.models.heads import HEADS
from setclip.shards import ShardWriter

CHANCE = 78.3  # rsum of a random order of 40 pictures with two captions each


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_shards(folder / "data", {"train": 160, "val": 40, "test": 40})
    write_pretrained(folder / "pretrained")
    return folder


def config_of(place, out, head="mean", **values):
    """Returns the settings of a short run, as Python has them."""
    return replace(
        RECIPES["plain"](head),
        **{
            "model": str(place / "pretrained"), "data": place / "data", "out": out, "width": 16, "batch_size": 32, "epochs": 1.0,
            "device": "cpu", **values,
        },
    )  # fmt: skip


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- what comes out


def test_it_stays_one_process_where_a_pretraining_before_it_has_set_local_rank(place, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as DeepSpeed wants it
    command(words(place, tmp_path / "run", "mean", "--epochs", 1))
    assert "RANK" not in os.environ


@pytest.mark.parametrize("head", HEADS)
def test_each_head_trains_and_its_checkpoint_evaluates_to_the_figures_that_the_run_reports(place, tmp_path, head):
    command(words(place, tmp_path / "run", head, "--epochs", 1))
    told = Results.load(tmp_path / "run" / "results.json")
    assert told.dataset["split"] == "test"
    found = evaluate(
        RetrievalConfig(
            data=place / "data",
            split="test",
            checkpoint=str(tmp_path / "run"),
            gallery_queries=0,
            device="cpu",
            workers=0,
        )
    ).results
    assert {n: m.value for n, m in found.metrics.items()} == {n: m.value for n, m in told.metrics.items()}
    assert found.details["similarity"] == told.details["similarity"]


@pytest.mark.parametrize("head", ["dhset", "asa"])
def test_recalls_of_unseen_pictures_rise_far_above_chance(place, tmp_path, head):
    command(words(place, tmp_path / "run", head, "--epochs", 8))
    assert Results.load(tmp_path / "run" / "results.json").metrics["rsum"].value > 2.5 * CHANCE


def test_the_chosen_checkpoint_is_the_best_on_validation_data_and_dhset_tells_of_both_comparisons(place, tmp_path):
    out = tmp_path / "run"
    command(words(place, out, "dhset", "--optim.lr", 0.05))  # so high that later ones are worse
    told = [entry for entry in metrics_of(out) if "val_rsum" in entry]
    best = max(told, key=lambda entry: entry["val_rsum"])
    description = load_model(out).identity
    assert (description["step"], description["validation"]["value"]) == (best["step"], best["val_rsum"])
    assert {"val_set_rsum", "val_rsum"} <= best.keys()
    assert {"kept", "profile_cosine", "top_overlap"} <= next(e for e in metrics_of(out) if "loss" in e).keys()
    by_set = Results.load(out / "results" / "retrieval_test_set.json")
    assert (by_set.details["similarity"], by_set.details["inference"]) == ("dhset_set", "set")
    assert json.loads((out / "results.json").read_text())["details"]["similarity"] == "cosine"


def test_the_settings_that_a_run_writes_are_read_back_as_they_were(place, tmp_path):
    out = tmp_path / "run"
    command(words(place, out, "slot", "--epochs", 1))
    before = metrics_of(out)
    command(["--config", str(out / "config.yaml"), "--overwrite", "True"])
    assert [{**entry, "elapsed_seconds": 0} for entry in before] == [
        {**e, "elapsed_seconds": 0} for e in metrics_of(out)
    ]


def test_several_seeds_give_mean_and_standard_deviation_and_go_on_where_they_stopped(place, tmp_path, capsys):
    out = tmp_path / "run"
    config = config_of(place, out, seeds=2, weights=RECIPES["plain"]("mean").weights)
    finetune("plain", config)
    found = json.loads((out / "results.json").read_text())
    values = [Results.load(out / f"seed-{seed}" / "results.json").metrics["rsum"].value for seed in (0, 1)]
    assert found["metrics"]["rsum"]["values"] == values
    assert values[0] != values[1]
    assert found["metrics"]["rsum"]["mean"] == pytest.approx(sum(values) / 2)
    assert found["metrics"]["rsum"]["standard_deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert "±" in capsys.readouterr().out
    finetune("plain", replace(config, resume=True, seeds=2))
    assert "seed 1 is done" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"started with other settings: epochs was 1.0, is 2.0"):
        finetune("plain", replace(config, resume=True, epochs=2.0))
    finetune("plain", replace(config, resume=True, test_split="none"))
    assert "is done" not in capsys.readouterr().out, "of other data the results are made anew"
    assert json.loads((out / "results.json").read_text())["dataset"]["split"] == "val"
    other = out / "seed-1" / "results.json"
    other.write_text(other.read_text().replace('"split": "val"', '"split": "test"'))
    with pytest.raises(InputError, match=r"expected results of one split .*seed-1, found split 'val' and 'test'"):
        over_seeds([out / "seed-0", out / "seed-1"])


def test_a_run_that_is_stopped_in_its_evaluation_is_not_done_and_its_results_tell_what_to_evaluate_on(
    place, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def killed_at_test(model, inputs, *more):
        if inputs.part.split == "test":
            raise Killed
        return results_of(model, inputs, *more)

    monkeypatch.setattr("finetune.run.results_of", killed_at_test)
    with pytest.raises(Killed):
        finetune("plain", config_of(place, out))
    assert (out / "results" / "retrieval_val.json").exists()
    assert not (out / "results.json").exists()
    monkeypatch.setattr("finetune.run.results_of", results_of)
    finetune("plain", config_of(place, out, resume=True))
    told = Results.load(out / "results.json")
    assert told.dataset["split"] == "test"

    asked = RetrievalConfig(checkpoint=str(out), gallery_queries=0, resamples=1, device="cpu", workers=0)
    found = evaluate(asked).results
    assert found.dataset == told.dataset
    assert found.metrics["rsum"].value == told.metrics["rsum"].value
    replace(told, dataset={**told.dataset, "split": "held-out"}).save(out / "results.json")
    with pytest.raises(InputError, match=r"pictures held out of its training data at .*; name other data"):
        evaluate(asked)

    monkeypatch.setattr("finetune.run.results_of", killed_at_test)
    with pytest.raises(Killed):
        finetune("plain", config_of(place, out, resume=True))
    assert not (out / "results.json").exists(), "those of before are not taken for those that are asked for now"


# --- towers


def test_local_features_come_with_the_model_s_own_global_features_and_padding_changes_nothing(place):
    loaded = load_model(place / "pretrained")
    cfg = json.loads((checkpoints_of(place / "pretrained")[0] / "open_clip_config.json").read_text())["model_cfg"]
    convolutional = {**cfg, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}}
    vision = {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    of_timm = {**cfg, "vision_cfg": vision}
    for model_cfg, expected in ((cfg, (4, 32)), (convolutional, (4, 256)), (of_timm, (4, 512))):
        towers = OpenClipTowers(model_cfg).eval()
        pixels = torch.randn(3, 3, towers.image_size, towers.image_size)
        images = towers.image(pixels)
        assert images.local.shape[1:] == expected
        tokens = loaded.tokenizer(["red", "red green blue white and more", ""])
        texts = towers.text(tokens)
        whole = OpenClipTowers(model_cfg).clip.eval()
        whole.load_state_dict(towers.clip.state_dict())
        whole.visual.output_tokens = False
        assert torch.allclose(images.pooled, whole.encode_image(pixels), atol=1e-6)
        assert torch.allclose(texts.pooled, whole.encode_text(tokens), atol=1e-6)
        assert texts.mask.sum(1).tolist() == [2, 7, 1]  # the words and the token that ends the text
        alone = towers.text(tokens[:1])
        assert alone.local.shape[1] == 2
        assert torch.allclose(alone.local[0], texts.local[0, :2], atol=1e-5)


def test_a_convolutional_tower_gives_asa_maps_of_several_scales(place, tmp_path):
    cfg = json.loads((checkpoints_of(place / "pretrained")[0] / "open_clip_config.json").read_text())["model_cfg"]
    cfg["vision_cfg"] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    save_checkpoint(tmp_path / "pretrained", build_clip(cfg).state_dict(), cfg, {"model": "small"})
    backbone = replace(FinetuneConfig().backbone, maps=2)
    finetune("plain", config_of(place, tmp_path / "run", "asa", model=str(tmp_path / "pretrained"), backbone=backbone))
    model = load_model(tmp_path / "run").model
    assert model.backbone.scales == [(4, 4), (2, 2)]
    assert model.backbone.scale_widths == [128, 256]
    assert model.encode_image(torch.randn(1, 3, 64, 64)).shape == (1, 8, 16)
    with pytest.raises(InputError, match="expected the head asa for maps of several scales, found slot"):
        finetune(
            "plain", config_of(place, tmp_path / "other", "slot", model=str(tmp_path / "pretrained"), backbone=backbone)
        )


def test_frozen_towers_stay_and_features_in_memory_change_nothing(place, tmp_path):
    command(words(place, tmp_path / "kept", "slot"))
    command(words(place, tmp_path / "anew", "slot", "--backbone.cache-gb", 0))
    kept, anew = (load_file(checkpoints_of(tmp_path / name)[-1] / "model.safetensors") for name in ("kept", "anew"))
    begun = load_model(place / "pretrained").model.state_dict()
    for name, value in begun.items():
        assert torch.equal(kept[f"backbone.clip.{name}"], value.reshape(kept[f"backbone.clip.{name}"].shape)), name
    assert all(torch.allclose(kept[name], anew[name], atol=1e-4) for name in kept)


def test_towers_learn_from_the_epoch_on_that_unfreezes_them(place, tmp_path):
    out = tmp_path / "run"
    command(words(place, out, "mean", "--backbone.freeze", "both", "--backbone.unfreeze-epoch", 2, "--keep", 9))
    begun = {
        f"backbone.clip.{name}": value for name, value in load_model(place / "pretrained").model.state_dict().items()
    }
    states = {int(p.name[5:]): load_file(p / "model.safetensors") for p in checkpoints_of(out)}
    name = "backbone.clip.visual.conv1.weight"
    assert torch.equal(states[10][name], begun[name])
    assert not torch.equal(states[15][name], begun[name])
    steps = load_file(checkpoints_of(out)[-1] / "optimizer.safetensors")
    assert steps[f"step.{name}"] == 10
    assert steps["step.pair.text.projection.weight"] == 20


def test_a_moving_average_in_bf16_is_what_is_validated_and_chosen(place, tmp_path):
    out = tmp_path / "run"
    command(words(place, out, "gpo", "--precision", "bf16", "--ema.decay", 0.9, "--eval-weights", "ema", "--epochs", 1))
    last = checkpoints_of(out)[-1]
    average, weights = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors")
    chosen = load_file(out / "checkpoints" / "chosen" / "model.safetensors")
    name = "pair.image.gru.weight_ih_l0"
    assert torch.equal(chosen[name], average[name])
    assert not torch.equal(chosen[name], weights[name])


# --- going on


def assert_same_end(one: Path, two: Path) -> None:
    """Two runs have the same weights, moments, chosen checkpoint and figures, to the last bit."""
    folders = [checkpoints_of(out)[-1] for out in (one, two)]
    assert folders[0].name == folders[1].name
    for name in ("model.safetensors", "optimizer.safetensors", "../chosen/model.safetensors"):
        first, second = (load_file(folder / name) for folder in folders)
        assert first.keys() == second.keys(), name
        assert all(torch.equal(first[key], second[key]) for key in first), name
    told = [{k: v for k, v in e.items() if k != "elapsed_seconds"} for e in metrics_of(one) if "val_rsum" in e]
    assert told == [{k: v for k, v in e.items() if k != "elapsed_seconds"} for e in metrics_of(two) if "val_rsum" in e]


def test_a_run_that_is_stopped_and_one_that_breaks_off_end_as_if_nothing_had_happened(place, tmp_path, monkeypatch):
    more = ["--ema.decay", 0.9, "--captions-per-image", 2]
    command(words(place, tmp_path / "whole", "slot", *more))
    out = tmp_path / "run"
    arguments = words(place, out, "slot", *more, "--resume", True)
    compute = step.total_loss
    monkeypatch.setattr(step, "total_loss", troubled(compute, "SIGTERM", 7))  # in the middle of an epoch
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == EXIT_STOPPED
    assert checkpoints_of(out)[-1].name == "step-00000007"
    monkeypatch.setattr(
        step, "total_loss", troubled(compute, "raise", 6)
    )  # in step 13, after the validation of step 10
    with pytest.raises(Killed):
        command(arguments)
    assert checkpoints_of(out)[-1].name == "step-00000010"
    monkeypatch.setattr(step, "total_loss", compute)
    command(arguments)
    assert_same_end(tmp_path / "whole", out)


def test_a_loss_that_is_not_finite_is_skipped_and_too_many_send_the_run_back(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(step, "total_loss", troubled(step.total_loss, "nan", 6, times=2))
    command(words(place, out, "mean", "--guard.max-bad-steps", 1, "--epochs", 2))
    said = capsys.readouterr()
    assert "going back to" in said.err
    assert "step 6 is left out" in said.out
    bad = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in bad] == [6, 7]
    assert len(bad[0]["ranks"][0]["keys"]) == 32
    assert all(
        bool(value.isfinite().all()) for value in load_file(checkpoints_of(out)[-1] / "model.safetensors").values()
    )


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_trains_leaves_a_run_that_goes_on(place, tmp_path):
    command(words(place, tmp_path / "whole", "slot"))
    arguments = words(place, tmp_path / "run", "slot", "--resume", True)
    assert forked(arguments, tmp_path / "run.txt", trouble="SIGKILL", at=13) == [-9]
    assert forked(arguments, tmp_path / "run.txt") == [0]
    torch.testing.assert_close(
        *(Results.load(tmp_path / n / "results.json").metrics["rsum"].value for n in ("whole", "run"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", ["slot", "dhset", "laps"])
def test_two_ranks_give_what_one_gives(place, tmp_path, head):
    more = ["--captions-per-image", 2, "--epochs", 2, "--optim.lr", 1e-3]
    if head == "slot":
        more += ["--options", "num_elements=2", "blocks=1", "heads=2", "head_width=16", "dropout=0"]
    for size in (1, 2):
        arguments = words(place, tmp_path / f"on-{size}", head, *more, "--ranks", size)
        assert forked(arguments, tmp_path / f"said-{size}", size) == [0] * size
    one, two = (load_file(checkpoints_of(tmp_path / f"on-{n}")[-1] / "model.safetensors") for n in (1, 2))
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    losses = [[e["loss"] for e in metrics_of(tmp_path / f"on-{n}") if "loss" in e] for n in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    rsums = [[e["val_rsum"] for e in metrics_of(tmp_path / f"on-{n}") if "val_rsum" in e] for n in (1, 2)]
    assert rsums[0] == pytest.approx(rsums[1], abs=4)  # one or two queries that come out otherwise


@pytest.mark.slow
def test_two_ranks_stop_together_go_on_and_end_as_if_nothing_had_happened(place, tmp_path):
    more = ["--backbone.freeze", "image", "--backbone.unfreeze-epoch", 2]
    assert forked(words(place, tmp_path / "whole", "mean", *more), tmp_path / "whole.txt", 2) == [0, 0]
    arguments = words(place, tmp_path / "run", "mean", *more, "--resume", True)
    assert forked(arguments, tmp_path / "run.txt", 2, "SIGTERM", 12) == [EXIT_STOPPED] * 2
    assert forked(arguments, tmp_path / "run.txt", 2) == [0, 0]
    assert_same_end(tmp_path / "whole", tmp_path / "run")


# --- data


def test_held_out_pictures_are_those_of_any_seed_and_no_others_train(place, tmp_path):
    shards = write_shards(tmp_path / "data", {"train": 50, "test": 10})
    found = [open_parts(FinetuneConfig(data=shards, hold_out=20, seed=seed)) for seed in (0, 1)]
    train, val = (set(getattr(found[0], name).data.keys) for name in ("train", "val"))
    assert (len(train), len(val)) == (30, 20)
    assert not train & val
    assert val == set(found[1].val.data.keys)
    assert found[0].val.split == "held-out"
    assert found[0].test.split == "test"


def test_all_pictures_of_one_key_leave_nothing_to_train_on_and_are_not_held_out():
    assert held_out(["a", "a", "b"], 1) in ({0, 1}, {2})
    with pytest.raises(InputError, match="expected pictures left to train on, found that --hold-out 1 takes all 2"):
        held_out(["a", "a"], 1)


def test_batches_have_each_picture_once_an_epoch_and_captions_that_change(place):
    part = open_parts(FinetuneConfig(data=place / "data")).train
    order = TrainOrder(part, 32, 1, seed=0)
    first, second = ([order.batch(number) for number in range(5 * epoch, 5 * epoch + 5)] for epoch in (0, 1))
    assert sorted(int(row) for batch in first for row in batch.rows) == list(range(160))
    assert [batch.rows.tolist() for batch in first] != [batch.rows.tolist() for batch in second]
    of_epoch = [dict(zip(b.rows.tolist(), b.captions[:, 0].tolist(), strict=True)) for b in (*first, *second)]
    chosen = [{k: v for batch in of_epoch[i : i + 5] for k, v in batch.items()} for i in (0, 5)]
    assert 40 < sum(chosen[0][row] != chosen[1][row] for row in range(160)) < 120
    again = TrainOrder(part, 32, 1, seed=0).batch(7)
    assert again.rows.tolist() == second[2].rows.tolist()
    assert again.captions.tolist() == second[2].captions.tolist()


def test_captions_of_a_picture_that_is_there_twice_are_no_negatives_of_each_other(tmp_path):
    with ShardWriter(tmp_path / "train-00000.tar", split="train") as writer:
        for number in (0, 1, 0, 2):
            writer.add(sample(number))
    Manifest(source="folder", shards=[writer.info], pairs_listed=8, pairs_present=8).save(tmp_path)
    part = open_parts(
        FinetuneConfig(data=tmp_path, hold_out=1, test_split="none", captions_per_image=2, allow_partial=True)
    ).train
    order = TrainOrder(part, len(part), 2, seed=0)
    batch = order.batch(0)
    ids = order.image_ids(batch)
    assert [bool(a == b) for a in ids for b in ids] == [
        part.data.keys[a] == part.data.keys[b] for a in batch.rows for b in batch.rows
    ]


# --- what is refused


def test_errors_say_what_to_do(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SETCLIP_DATA", str(tmp_path))
    cases = [
        ({"head": "slott"}, "unknown head 'slott', perhaps 'slot'"),
        (
            {"captions_per_image": 3},
            "expected at least 3 captions of each picture, found fewer of 160.*--captions-per-image 2",
        ),
        (
            {"dataset": "flickr30k"},
            r"flickr30k, split train.*expected 29,000 pictures, found 160.*--allow-partial True",
        ),
        ({"data": None}, "expected shards to train on.*data_prep.run"),
        ({"data": None, "dataset": "coco"}, "expected coco at .*python -m data_prep.run coco"),
        ({"ranks": 2}, "expected 2 processes, found 1; start them with `torchrun --nproc-per-node 2"),
        ({"batch_size": 161}, "expected at least one batch of 161 pictures, found 160; use --batch-size 40"),
        ({"val_split": "test", "test_split": "test"}, "expected test data apart from the validation data"),
        ({"options": ("num_elements=2",)}, "expected options of head mean among none, found num_elements"),
        ({"hold_out": 160}, "expected fewer pictures held out than there are"),
        ({"head": "single", "width": 16}, "expected something to learn, found none"),
        ({"inference": "hybrid"}, "expected inference set of head mean, found hybrid"),
        (
            {"contrastive": LossConfig(name="hard", group_size=4)},
            "expected a contrastive loss of all pairs of a step, found --contrastive.group-size 4; groups are for pretraining",
        ),
        ({"match": "class"}, "expected pictures with classes .* for --match class"),
    ]
    for number, (values, message) in enumerate(cases):
        values = dict(values)
        with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
            finetune("plain", config_of(place, tmp_path / str(number), values.pop("head", "mean"), **values))


def test_a_run_goes_on_with_its_own_settings_only_and_its_folder_is_not_overwritten(place, tmp_path):
    out = tmp_path / "run"
    finetune("plain", config_of(place, out))
    with pytest.raises(InputError, match=r"expected a new or empty run folder.*--resume True.*--overwrite True"):
        finetune("plain", config_of(place, out))
    before = {name: (out / name).read_text() for name in ("config.yaml", "results.json")}
    with pytest.raises(InputError, match=r"started with other settings: width was 16, is 32"):
        finetune("plain", config_of(place, out, width=32, resume=True))
    assert before == {name: (out / name).read_text() for name in before}, "the run that is there stays whole"
    with pytest.raises(
        InputError, match=r"found a fine-tuned one at .*; give the model that it began with \(.*pretrained"
    ):
        finetune("plain", config_of(place, tmp_path / "other", model=str(out)))
    # a checkpoint from before losses had groups is of the same course
    path = checkpoints_of(out)[-1] / STATE_NAME
    state = json.loads(path.read_text())
    course = json.loads(path.read_text())["course"]
    assert state["course"]["contrastive"].pop("group_size", "none") is None
    path.write_text(json.dumps(state))
    assert read_train_state(path.parent, course).step == state["step"]


def test_a_run_does_not_go_on_with_a_pretrained_model_that_was_trained_anew(place, tmp_path):
    model, out = tmp_path / "pretrained", tmp_path / "run"
    shutil.copytree(place / "pretrained", model)
    finetune("plain", config_of(place, out, model=str(model)))
    finetune("plain", config_of(place, out, model=str(model), resume=True))
    (folder,) = checkpoints_of(model)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    save_checkpoint(folder, build_clip(config).state_dict(), config, {"step": 1, "recipe": "test", "model": "small"})
    with pytest.raises(
        InputError, match=r"began with weights of .*step-00000001 .* that are others by now .*--overwrite"
    ):
        finetune("plain", config_of(place, out, model=str(model), resume=True))


def test_a_checkpoint_whose_heads_have_another_width_is_refused(place, tmp_path):
    finetune("plain", config_of(place, tmp_path / "run"))
    chosen = tmp_path / "run" / "checkpoints" / "chosen"
    description = json.loads((chosen / "set_model.json").read_text())
    description["head"]["width"] = 24
    (chosen / "set_model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="is a checkpoint of another model"):
        load_model(tmp_path / "run")

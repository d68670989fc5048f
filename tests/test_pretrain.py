"""pretrain.run: ranks do not change the curve, a resume is exact, and wrong input fails before anything is built."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from material import NOUNS, damage_image, write_model, write_shards
from ranks import on_ranks
from safetensors.torch import load_file

from pretrain.checkpoints import SaveConfig
from pretrain.config import RECIPES, EvalConfig, PretrainConfig, local_batch_size, tiny
from pretrain.losses import LOSSES, LossConfig
from pretrain.optim import OptimConfig, learning_rate, parameter_groups
from pretrain.plan import course_of, make_plan
from pretrain.progress import read_metrics, skip_list
from pretrain.resume import STATE_NAME, read_train_state
from pretrain.run import main, train
from setclip import config as configuration
from setclip import distributed
from setclip.checkpoint import checkpoints_of, load_model
from setclip.errors import InputError
from setclip.images import AugmentConfig
from setclip.manifest import Manifest
from setclip.models.clip import build_clip, model_config, with_bias
from setclip.objects import ObjectTable, write_objects


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_shards(folder / "shards")
    write_model(folder)
    return folder


def config_of(place, out, **changes):
    base = tiny()
    data = replace(
        base.data, shards=place / "shards", workers=0, num_lanes=8, augment=AugmentConfig(kind="shift", pixels=2)
    )
    model = replace(base.model, name=str(place / "small.json"))
    settings = {
        "out": place / out,
        "overwrite": True,
        "data": data,
        "model": model,
        "global_batch_size": 16,
        "steps": 10,
        "log_every_steps": 1,
        "save": SaveConfig(every_steps=5),
        "engine": replace(base.engine, device="cpu"),
    }
    return replace(base, **{**settings, **changes})


def run(config):
    """Trains in this process, which stays in its process group: DeepSpeed keeps the first one that it has seen."""
    return train("tiny", config)


def losses_of(out):
    return [entry["loss"] for entry in read_metrics(out / "metrics.jsonl") if "loss" in entry]


@pytest.fixture(scope="module")
def undisturbed(place):
    return run(config_of(place, "undisturbed"))


def test_training_learns_and_leaves_what_it_promises(place, undisturbed):
    losses = losses_of(place / "undisturbed")
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        "model.safetensors",
        "open_clip_config.json",
        "setclip_config.json",
        "training_state.json",
        "optimizer.safetensors",
        "checksums.json",
    }
    described = json.loads((undisturbed / "setclip_config.json").read_text())
    assert (described["step"], described["samples_seen"], described["epoch"]) == (10, 160, 2.5)
    assert (described["data"]["pairs_present"], described["data"]["pairs_listed"]) == (128, 130)


def test_a_resume_in_mid_epoch_is_bit_identical(place, undisturbed):
    run(config_of(place, "stopped", save=SaveConfig(every_steps=3, keep=9)))
    for later in ("step-00000010", "step-00000009", "step-00000006"):
        for file in (place / "stopped" / "checkpoints" / later).iterdir():
            file.unlink()
        (place / "stopped" / "checkpoints" / later).rmdir()
    last = run(config_of(place, "stopped", overwrite=False, resume=True))
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, resumed = load_file(undisturbed / name), load_file(last / name)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses_of(place / "stopped") == losses_of(place / "undisturbed"), "and the log has each step once"


def train_on_rank(*configs):
    torch.set_num_threads(1)
    for config in configs:
        train("tiny", config)


def test_two_ranks_give_the_curve_of_one_and_resume_its_checkpoint(place, undisturbed):
    on_ranks(2, train_on_rank, config_of(place, "two", engine=replace(tiny().engine, zero_stage=1, device="cpu")))
    one, two = losses_of(place / "undisturbed"), losses_of(place / "two")
    assert two == pytest.approx(one, abs=5e-6)
    # From two ranks at stage 1 back to one at stage 0, from the middle.
    for name in ("step-00000010",):
        for file in (place / "two" / "checkpoints" / name).iterdir():
            file.unlink()
        (place / "two" / "checkpoints" / name).rmdir()
    run(config_of(place, "two", overwrite=False, resume=True))
    assert losses_of(place / "two") == pytest.approx(one, abs=1e-5)


def test_a_resume_with_other_settings_names_the_difference(place, undisturbed):
    config = config_of(place, "undisturbed", overwrite=False, resume=True, seed=1)
    with pytest.raises(InputError, match=r"started with other settings: seed was 0, is 1\. .*config\.yaml"):
        run(config)


def test_bad_samples_are_counted_in_the_log_and_the_checkpoint(place, tmp_path):
    write_shards(tmp_path / "shards")
    key = damage_image(tmp_path / "shards", "train-00000.tar", 3)
    write_model(tmp_path)
    config = config_of(tmp_path, "bad")
    last = run(replace(config, data=replace(config.data, max_bad=0.1)))
    entries = read_metrics(tmp_path / "bad" / "metrics.jsonl")
    assert entries[-1]["bad_samples"] in (2, 3)  # once in each of two and a half epochs
    state = json.loads((last / "training_state.json").read_text())
    assert sum(state["skipped"].values()) == entries[-1]["bad_samples"]
    skips = [json.loads(line) for line in skip_list(tmp_path / "bad", 0).read_text().splitlines()]
    assert len(skips) == entries[-1]["bad_samples"]
    assert {(skip["shard"], skip["key"], skip["reason"]) for skip in skips} == {
        ("train-00000.tar", key, "not an image")
    }


def test_training_starts_from_a_checkpoint(place, undisturbed, tmp_path):
    config = config_of(place, "warm")
    config = replace(
        config,
        model=replace(config.model, pretrained=str(undisturbed)),
        optim=replace(config.optim, lr=1e-12),
        steps=1,
    )
    last = run(config)
    before, after = load_file(undisturbed / "model.safetensors"), load_file(last / "model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_micro_batches_do_not_change_the_curve_and_may_change_at_a_resume(place, undisturbed):
    engine = replace(tiny().engine, device="cpu", accumulation=4)
    run(config_of(place, "cut", engine=engine))
    assert losses_of(place / "cut") == pytest.approx(losses_of(place / "undisturbed"), abs=5e-6)
    shutil.rmtree(place / "cut" / "checkpoints" / "step-00000010")
    run(config_of(place, "cut", overwrite=False, resume=True))
    assert losses_of(place / "cut") == pytest.approx(losses_of(place / "undisturbed"), abs=5e-6)


def test_batch_norm_over_micro_batches_is_announced(place, capsys):
    cfg = json.loads((place / "small.json").read_text())
    cfg["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    (place / "batch_norm.json").write_text(json.dumps(cfg))
    engine = replace(tiny().engine, device="cpu", accumulation=2)
    config = config_of(place, "batch_norm", engine=engine, steps=1)
    run(replace(config, model=replace(config.model, name=str(place / "batch_norm.json"))))
    said = capsys.readouterr().out
    assert "1 rank(s) × 2 × 8 = 16 pairs a step" in said
    assert "note: the model has batch norm, whose statistics are those of 8 pairs at a time" in said


@pytest.fixture(scope="module")
def with_objects(tmp_path_factory):
    """The shards, with statistics of their objects."""
    folder = tmp_path_factory.mktemp("objects") / "shards"
    write_shards(folder)
    counts = {noun: 10 * i + 1 for i, noun in enumerate(NOUNS)}
    write_objects(folder / "objects.parquet", [ObjectTable.from_counts(counts, "pos", 130)])
    return folder


def loss_configs():
    for name, targets in LOSSES.items():
        for target, entry in targets.items():
            yield LossConfig(name=name, target=target or None)
            if "weights" in entry.uses:
                yield LossConfig(name=name, target=target or None, weights="frequency")


def trained(folder, out, loss, **changes):
    config = config_of(folder.parent, out, loss=loss, **changes)
    return replace(
        config,
        data=replace(config.data, shards=folder),
        model=replace(config.model, name=str(write_model(folder.parent))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", list(loss_configs()), ids=lambda loss: f"{loss.full_name}-{loss.weights}")
def test_every_loss_and_target_trains(with_objects, loss):
    run(trained(with_objects, "each", loss, steps=12))
    losses = losses_of(with_objects.parent / "each")
    assert all(map(math.isfinite, losses))
    assert sum(losses[8:]) < sum(losses[:4]), "the third epoch against the first"


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one_with_other_losses_and_micro_batches(with_objects):
    losses = {
        "softmax": LossConfig(target="softmax", weights="frequency"),
        "siglip": LossConfig(name="siglip"),
        "psd": LossConfig(name="psd", hard_share=(0.5, 0.2)),
    }
    engine = replace(tiny().engine, device="cpu", accumulation=2, zero_stage=3)
    for name, loss in losses.items():
        run(trained(with_objects, f"one_{name}", loss, steps=4))
    cut = [trained(with_objects, f"two_{name}", loss, steps=4, engine=engine) for name, loss in losses.items()]
    on_ranks(2, train_on_rank, *cut)
    for name in losses:
        one, two = (losses_of(with_objects.parent / f"{ranks}_{name}") for ranks in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-5), name


def test_a_run_may_follow_one_that_has_left_the_process_group(place):
    for name in ("before", "behind"):
        run(config_of(place, name, steps=1))
        distributed.stop()
    assert losses_of(place / "behind") == losses_of(place / "before")


def test_settings_that_the_loss_does_not_use_are_announced(place, capsys):
    run(config_of(place, "ignored", loss=LossConfig(name="label_smoothing", beta=0.3, no_overlap="uniform"), steps=1))
    said = capsys.readouterr().out
    assert "note: --loss.beta 0.3 is not used by label_smoothing\n" in said
    assert "note: --loss.no-overlap uniform is not used by label_smoothing\n" in said
    assert said.count("is not used") == 2


def test_siglip_trains_a_bias_which_evaluations_and_open_clip_load(place, tmp_path):
    write_shards(tmp_path / "val", (12,), "val")
    last = run(
        config_of(
            place,
            "siglip",
            loss=LossConfig(name="siglip"),
            eval=EvalConfig(every_steps=10, retrieval=tmp_path / "val"),
        )
    )
    lines = read_metrics(place / "siglip" / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert training[-1]["loss"] < training[0]["loss"]
    assert training[0]["logit_bias"] == -10
    assert training[0]["logit_scale"] == pytest.approx(10)
    weights = load_file(last / "model.safetensors")
    assert weights["logit_bias"].shape == ()
    assert weights["logit_bias"] != -10, "it is trained"
    loaded = load_model(last)
    assert torch.equal(loaded.model.logit_bias, weights["logit_bias"])
    peer = open_clip.create_model(f"local-dir:{last}")
    assert torch.equal(peer.logit_bias, weights["logit_bias"])
    assert [line for line in lines if "i2t_r1" in line], "the evaluation on the way ran"


def test_a_bias_that_begins_takes_the_scale_with_it_and_one_without_use_is_left_out(place, undisturbed, capsys):
    def start(out, loss, pretrained):
        config = config_of(place, out, loss=loss, steps=1)
        config = replace(config, model=replace(config.model, pretrained=str(pretrained)))
        return (
            load_file(run(config) / "model.safetensors"),
            capsys.readouterr().out,
            read_metrics(place / out / "metrics.jsonl"),
        )

    siglip = place / "from_hard" / "checkpoints" / "step-00000001"
    weights, said, lines = start("from_hard", LossConfig(name="siglip"), undisturbed)
    assert (
        f"note: {undisturbed} has no logit_bias, which siglip needs: it begins at -10, and the scale at 10 instead"
        in said
    )
    assert lines[0]["logit_bias"] == -10
    assert lines[0]["logit_scale"] == pytest.approx(10)
    before = load_file(undisturbed / "model.safetensors")
    assert torch.allclose(weights["visual.proj"], before["visual.proj"], atol=0.05)

    weights, said, lines = start("from_siglip", LossConfig(name="hard"), siglip)
    assert f"note: the logit_bias -10 of {siglip} is left out: only siglip has a use for it" in said
    assert "logit_bias" not in weights
    assert "logit_bias" not in lines[0]

    weights, said, lines = start("on", LossConfig(name="siglip"), siglip)
    assert "note" not in said


def test_a_model_of_siglips_trains_other_losses_without_its_bias(place, capsys):
    cfg = {**json.loads((place / "small.json").read_text()), "init_logit_bias": -8, "init_logit_scale": math.log(200)}
    assert with_bias(cfg, True) == cfg
    assert with_bias({**cfg, "init_logit_bias": None}, True)["init_logit_bias"] == -10
    (place / "biased.json").write_text(json.dumps(cfg))
    config = config_of(place, "unbiased", steps=1)
    last = run(replace(config, model=replace(config.model, name=str(place / "biased.json"))))
    assert "biased.json is built without its logit_bias: only siglip has a use for it" in capsys.readouterr().out
    assert "logit_bias" not in load_file(last / "model.safetensors")


def test_a_loss_without_objects_trains_on_shards_that_have_none(place, tmp_path, capsys):
    write_shards(tmp_path / "shards")
    manifest = Manifest.load(tmp_path / "shards")
    manifest.parsers.clear()
    manifest.save(tmp_path / "shards")
    config = config_of(tmp_path, "plain", loss=LossConfig(name="hard"), steps=2)
    write_model(tmp_path)
    run(config)
    assert (
        "note: the shards have no objects of 'pos': similar_pairs and equal_pairs are not logged"
        in capsys.readouterr().out
    )
    (first, _) = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert "true_pair_mass" in first
    assert "similar_pairs" not in first
    with pytest.raises(InputError, match=r"needs parsed objects: .* found none; .*data_prep\.parse "):
        run(config_of(tmp_path, "soft"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 4096}, r"one global batch of 4096 samples, found 64; use --global-batch-size 16"),
        ({"steps": 0}, r"at least one step, found --steps 0"),
        ({"model": "ViT-B-23"}, r"unknown model 'ViT-B-23', perhaps 'ViT-B-32'"),
        ({"shards": "nowhere"}, r"expected shards with a manifest at .*nowhere.*found no such folder.*data_prep\.run"),
        ({"split": "val"}, r"shards of split 'val', found splits \['train'\]"),
        (
            {"objects": "llm"},
            r"object_iou/budget needs parsed objects: expected those of 'llm' .* found \['pos'\]; .*data_prep\.parse_llm .*"
            r"--loss\.name hard",
        ),
        ({"objects": "llm", "loss": LossConfig(name="softclip")}, r"the loss softclip needs parsed objects"),
        ({"objects": "llm", "loss": LossConfig(name="siglip", target="iou")}, r"siglip/iou needs parsed objects"),
        (
            {"loss": LossConfig(weights="frequency")},
            r"expected .*shards/objects\.parquet, found no such file; make it with `python -m data_prep\.statistics .*shards`",
        ),
        ({"accumulation": 3}, r"16 pairs a rank cannot be cut into 3 .*; nearest: --engine\.accumulation 2 or 4"),
    ],
)
def test_wrong_input_says_what_to_do(place, changes, message):
    config = config_of(place, "wrong")
    if "model" in changes:
        changes = {"model": replace(config.model, name=changes["model"])}
    if "accumulation" in changes:
        changes = {"engine": replace(config.engine, **changes)}
    for name in ("shards", "split"):
        if name in changes:
            value = Path(changes[name]) if name == "shards" else changes[name]
            changes = {"data": replace(config.data, **{name: value})}
    with pytest.raises(InputError, match=message):
        run(replace(config, **changes))
    assert not (place / "wrong").exists(), "nothing was written"


def test_a_used_run_folder_asks_for_resume_or_overwrite(place, undisturbed):
    with pytest.raises(
        InputError, match=r"new or empty run folder, found .*undisturbed with 2 checkpoints; .*--overwrite"
    ):
        run(config_of(place, "undisturbed", overwrite=False))
    with pytest.raises(InputError, match=r"expected a checkpoint to resume from under .*fresh/checkpoints, found none"):
        run(config_of(place, "fresh", overwrite=False, resume=True))


def test_batch_sizes_that_do_not_divide_suggest_the_nearest():
    with pytest.raises(InputError, match="4096 is not a multiple of 3 ranks; nearest: 4095 or 4098"):
        local_batch_size(4096, 3)
    with pytest.raises(InputError, match="2 is not a multiple of 3 ranks; nearest: 3"):
        local_batch_size(2, 3)


def test_groups_that_do_not_divide_a_ranks_pairs_suggest_the_nearest(place):
    with pytest.raises(
        InputError,
        match=r"16 pairs a rank cannot be cut into groups of 7 pairs, each of one rank; nearest: --loss\.group-size 8",
    ):
        local_batch_size(32, 2, 1, 7)
    assert local_batch_size(32, 2, 1, 8) == 16
    with pytest.raises(InputError, match="16 pairs a rank cannot be cut into groups of 3 pairs"):
        run(config_of(place, "groups of 3", loss=LossConfig(name="hard", group_size=3)))


def test_one_group_is_the_batch_and_several_are_other_batches(place, undisturbed, capsys):
    """A group of all pairs takes the same steps to the last bit."""
    hard = LossConfig(name="hard")
    losses = {}
    for name, size in (("all", None), ("one", 16), ("four", 4)):
        run(config_of(place, f"groups-{name}", loss=replace(hard, group_size=size), steps=3, resume=False))
        losses[name] = losses_of(place / f"groups-{name}")
    assert losses["one"] == losses["all"]
    assert "contrasted in 4 groups of 4 pairs, each of one rank" in capsys.readouterr().out
    assert abs(losses["four"][0] - math.log(4)) < 0.3 < abs(losses["four"][0] - losses["all"][0])


def test_a_run_in_groups_goes_on_with_its_own_ranks_alone(place):
    config = config_of(place, "groups-and-ranks", loss=LossConfig(name="hard", group_size=2), steps=3)
    run(config)
    plan = make_plan("test", replace(config, overwrite=True), replace(distributed.start("cpu"), size=2))
    with pytest.raises(InputError, match="ranks_of_groups was 1, is 2"):
        read_train_state(checkpoints_of(place / "groups-and-ranks")[-1], course_of(config, plan))
    # on purpose both may change, and so may a run begin to have groups, or cease to
    assert read_train_state(checkpoints_of(place / "groups-and-ranks")[-1], course_of(config, plan), True).step == 3
    whole = replace(config, loss=LossConfig(name="hard"))
    with pytest.raises(InputError, match=r"loss was .*ranks_of_groups was 1, is None.* --change True"):
        run(replace(whole, overwrite=False, resume=True))
    run(replace(whole, overwrite=False, resume=True, change=True, steps=4))
    assert len(losses_of(place / "groups-and-ranks")) == 4


def test_a_checkpoint_from_before_groups_resumes(place):
    config = config_of(place, "before-groups", steps=3)
    run(config)
    path = checkpoints_of(place / "before-groups")[-1] / STATE_NAME
    state = json.loads(path.read_text())
    del state["course"]["ranks_of_groups"], state["course"]["loss"]["group_size"]
    path.write_text(json.dumps(state))
    plan = make_plan("test", replace(config, overwrite=True), distributed.start("cpu"))
    assert read_train_state(path.parent, course_of(config, plan)).step == 3


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pretrain.run", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture
def ended(monkeypatch, capsys):
    def ended(*arguments):
        """Runs the command in this process; returns its status and what it wrote."""
        monkeypatch.setattr(sys, "argv", ["pretrain.run", *arguments])
        with pytest.raises(SystemExit) as end:
            configuration.command(main)
        return end.value.code, "".join(capsys.readouterr())

    return ended


def test_the_command_names_the_nearest_recipe_and_flag(ended):
    for arguments, expected in (
        (["tinny"], "error: unknown recipe 'tinny', perhaps 'tiny'; known: cc12m"),
        (["tiny", "--optim.lrr", "1"], "--optim.lr"),
        (["tiny", "--loss.name", "objekt_iou"], "unknown loss 'objekt_iou', perhaps 'object_iou'"),
    ):
        status, said = ended(*arguments)
        assert status == 2
        assert expected in said
        assert "Traceback" not in said


def test_the_manual_of_the_command_has_all_losses_and_flags(ended):
    status, told = ended("tiny", "--help")
    assert status == 0
    assert all(name in told for name in LOSSES)
    assert all(target in told for targets in LOSSES.values() for target in targets)
    assert "--engine.accumulation" in told
    assert "--objects {pos,llm}" in told


def test_the_command_without_data_names_the_place_and_what_makes_it(tmp_path):
    wrong = command("tiny", SETCLIP_DATA=str(tmp_path))
    assert wrong.returncode == 2
    assert f"error: expected scenes at {tmp_path}/scenes, found nothing there" in wrong.stderr
    assert "python -m data_prep.run scenes --out" in wrong.stderr


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_names_a_model_and_adds_up(name):
    config = RECIPES[name]()
    assert isinstance(config, PretrainConfig)
    assert model_config(config.model.name)["embed_dim"]
    assert config.total_steps(2_901_344) >= 1
    assert 256 % 8 == config.data.num_lanes % 8 == 0


def test_the_learning_rate_rises_then_falls_in_samples():
    config = OptimConfig(lr=1.0, warmup_samples=100, final_lr_share=0.1)
    rates = [learning_rate(config, seen, 1100) for seen in (0, 50, 100, 600, 1100, 2000)]
    assert rates == pytest.approx([0, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate(OptimConfig(lr=1.0, warmup_share=0.2), 100, 1000) == 0.5


def test_norms_biases_and_the_scale_have_no_weight_decay(place):
    model = build_clip(json.loads((place / "small.json").read_text()))
    decayed, plain = parameter_groups(model, 0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert "logit_scale" in {names[id(p)] for p in plain["params"]}
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)

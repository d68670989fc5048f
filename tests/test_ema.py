"""The moving average of the weights: what it is, that it survives a resume on any layout, and that it is what is evaluated and
exported where it is asked for."""

import dataclasses

import pytest
import torch
from material import MODEL_CFG, write_model, write_shards
from ranks import on_ranks
from safetensors.torch import load_file
from test_model_options import CFG, RESNET, batch, make_engine, train
from test_pretrain import config_of, run, train_on_rank

from pretrain.config import EvalConfig, PretrainConfig
from pretrain.ema import Ema, EmaConfig
from pretrain.evaluate import Evaluator
from pretrain.export import ExportConfig, export
from pretrain.model_options import ModelConfig
from pretrain.progress import read_metrics
from pretrain.state import gather_moments, gather_weights, restore
from setclip import distributed
from setclip.checkpoint import EMA_NAME, WEIGHTS_NAME, damage_of, load_model, read_description
from setclip.errors import InputError

OPTIONS = ModelConfig(lock_image=True, lock_image_unlocked=1)
CONFIG = EmaConfig(decay=0.7)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema")
    write_shards(folder / "shards")
    write_model(folder)
    return folder


def step(engine, ema, world, number):
    """Takes the `number`-th step, from 1."""
    found = train(engine, world, number - 1, number)
    ema.update(number)
    return found


def test_the_decay_rises_to_what_was_asked_for():
    assert [EmaConfig(decay=0.5).decay_at(t) for t in (1, 8, 1000)] == [2 / 11, 0.5, 0.5]
    assert EmaConfig(decay=0.5, warmup=False).decay_at(1) == 0.5


def test_its_window_is_told_in_samples():
    said = EmaConfig(decay=0.9998).in_words(4096, 2_901_344)
    assert "last 14,194,235 samples (4.89 epochs)" in said
    assert "the decay 0.9998^(b/4096)" in said


@pytest.mark.parametrize(("decay", "warmup"), [(0.7, True), (0.7, False)])
def test_it_is_the_mean_by_hand(decay, warmup):
    world, config = distributed.start("cpu"), EmaConfig(decay=decay, warmup=warmup)
    engine = make_engine(world, OPTIONS)
    ema = Ema(config, engine, 0)
    expected = {name: value.double() for name, value in gather_weights(engine).items()}
    for number in (1, 2, 3):
        step(engine, ema, world, number)
        share = 1 - config.decay_at(number)
        now = gather_weights(engine)
        expected = {name: (1 - share) * value + share * now[name].double() for name, value in expected.items()}
    found = ema.weights()
    assert found.keys() == now.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-6, atol=1e-7), name
    assert torch.equal(found["visual.conv1.weight"], now["visual.conv1.weight"]), "locked"
    assert not torch.allclose(found["visual.proj"], now["visual.proj"], rtol=1e-3)


def test_it_does_not_disturb_training():
    world = distributed.start("cpu")
    plain, watched = make_engine(world, OPTIONS), make_engine(world, OPTIONS)
    ema = Ema(CONFIG, watched, 0)
    for number in (1, 2):
        assert step(watched, ema, world, number) == train(plain, world, number - 1, number)
    kept = gather_weights(watched)
    assert all(torch.equal(value, kept[name]) for name, value in gather_weights(plain).items())


def test_statistics_of_batch_norm_are_averaged_too():
    world = distributed.start("cpu")
    engine = make_engine(world, ModelConfig(), model_cfg=RESNET)
    ema = Ema(CONFIG, engine, 0)
    before = engine.model.visual.bn1.running_mean.clone()
    images, tokens, *_ = batch()
    engine.forward(images, tokens)
    now = engine.model.visual.bn1.running_mean.clone()
    assert not torch.equal(now, before)
    ema.update(1)
    found = ema.weights()["visual.bn1.running_mean"]
    assert torch.allclose(found, before + (1 - CONFIG.decay_at(1)) * (now - before))


def courses(stages, precision="fp32", state=None):
    """Returns, per stage: the average after four steps, after a resume in between, and the state after two.

    `state`: a file of (weights, moments, average) after step 2 of another layout, from which the resumed course then goes on.
    """
    world = distributed.start("cpu")
    found = {}
    for stage in stages:
        engine = make_engine(world, OPTIONS, stage, precision=precision)
        ema = Ema(CONFIG, engine, 0)
        for number in (1, 2):
            step(engine, ema, world, number)
        own = gather_weights(engine), gather_moments(engine, 2), ema.weights()
        for number in (3, 4):
            step(engine, ema, world, number)
        whole = ema.weights()
        engine.close()
        weights, moments, average = torch.load(state) if state else own
        again = make_engine(world, OPTIONS, stage, CFG, weights, precision=precision)
        restore(again, weights, moments, 2)
        resumed = Ema(CONFIG, again, 2)
        resumed.restore(average)
        kept = all(torch.equal(value, average[name]) for name, value in resumed.weights().items())
        for number in (3, 4):
            step(again, resumed, world, number)
        found[stage] = {"whole": whole, "resumed": resumed.weights(), "kept": kept, "state": own}
        again.close()
    return found


def check_bit_identical(found):
    for stage, ended in found.items():
        assert ended["kept"], stage
        assert all(torch.equal(ended["resumed"][name], value) for name, value in ended["whole"].items()), stage


def check_alike(found, expected):
    for stage, ended in found.items():
        assert ended["kept"], stage
        for name, value in expected.items():
            assert (ended["resumed"][name] - value).norm() / value.norm().clamp_min(1e-2) < 1e-5, (stage, name)


def test_a_resume_is_bit_identical():
    check_bit_identical(courses((0,)))


@pytest.mark.slow
def test_a_resume_is_bit_identical_at_every_stage_and_in_bf16():
    (found,) = on_ranks(1, courses, (1, 2, 3), "bf16")
    check_bit_identical(found)
    _, _, average = found[1]["state"]
    assert not torch.equal(average["visual.proj"].bfloat16().float(), average["visual.proj"]), "the average is fp32"


@pytest.mark.slow
def test_it_moves_between_ranks_and_stages(tmp_path):
    """2 → 1, 1 → 2: the average arrives bit for bit, and goes on as that of an undisturbed run does."""
    of_two = on_ranks(2, courses, (0, 1, 2, 3))
    for found in of_two:
        check_bit_identical(found)
    torch.save(of_two[1][2]["state"], tmp_path / "of-two")
    (on_one,) = on_ranks(1, courses, (0, 1, 2, 3), "fp32", tmp_path / "of-two")
    check_alike(on_one, of_two[0][0]["whole"])
    torch.save(on_ranks(1, courses, (1,))[0][1]["state"], tmp_path / "of-one")
    on_two = on_ranks(2, courses, (0, 3), "fp32", tmp_path / "of-one")
    for found in on_two:
        check_alike(found, of_two[0][0]["whole"])


# In a run


def ema_config(place, out, **changes):
    settings = {"ema": EmaConfig(decay=0.8), "steps": 4, **changes}
    base = config_of(place, out, **settings)
    return dataclasses.replace(base, save=dataclasses.replace(base.save, every_steps=2))


@pytest.fixture(scope="module")
def averaged(place):
    return run(ema_config(place, "averaged"))


def test_a_checkpoint_has_the_average_beside_the_weights(averaged):
    weights, average = load_file(averaged / WEIGHTS_NAME), load_file(averaged / EMA_NAME)
    assert {name: value.shape for name, value in average.items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert not torch.equal(average["visual.proj"], weights["visual.proj"])
    assert read_description(averaged)["ema"]["decay"] == 0.8
    (averaged / EMA_NAME).rename(averaged / "away")
    assert damage_of(averaged) == f"{EMA_NAME} is missing"
    (averaged / "away").rename(averaged / EMA_NAME)


def test_a_resumed_run_has_the_same_average(place, averaged):
    expected = load_file(averaged / EMA_NAME)
    averaged.rename(averaged.parent.parent / "kept-aside")
    try:
        resumed = run(ema_config(place, "averaged", overwrite=False, resume=True))
        assert all(torch.equal(value, expected[name]) for name, value in load_file(resumed / EMA_NAME).items())
    finally:
        if not averaged.exists():
            (averaged.parent.parent / "kept-aside").rename(averaged)


@pytest.mark.slow
def test_a_run_goes_on_with_its_average_on_two_ranks_at_another_stage(place, averaged):
    expected = load_file(averaged / EMA_NAME)
    first = ema_config(place, "elastic")
    run(dataclasses.replace(first, steps=4))
    last = place / "elastic" / "checkpoints" / "step-00000004"
    last.rename(place / "elastic" / "away")
    config = dataclasses.replace(
        first, overwrite=False, resume=True, engine=dataclasses.replace(first.engine, zero_stage=3)
    )
    on_ranks(2, train_on_rank, config)
    for name, value in load_file(last / EMA_NAME).items():
        # The bias of attention's keys has no gradient but rounding, of which AdamW makes steps.
        assert name.endswith("in_proj_bias") or (value - expected[name]).abs().max() < 2e-5, name


def test_an_average_may_begin_late_on_purpose(place, capsys):
    run(ema_config(place, "late", ema=EmaConfig(), steps=4))
    last = place / "late" / "checkpoints" / "step-00000004"
    last.rename(place / "late" / "away")
    again = ema_config(place, "late", overwrite=False, resume=True)
    with pytest.raises(InputError, match=r"ema was .* go on with these with --change True"):
        run(again)
    assert (run(dataclasses.replace(again, change=True)) / EMA_NAME).exists()
    assert "has no moving average: it begins with the weights of step 2" in capsys.readouterr().out


def test_evaluation_along_the_way_takes_the_weights_that_are_asked_for(place):
    """The figures are those of the average that was saved, and not of the weights."""
    shards = write_shards(place / "test", (24,), split="test")
    evaluation = EvalConfig(every_steps=4, retrieval=shards, weights="ema")
    of_ema = run(ema_config(place, "of-ema", eval=evaluation))
    run(ema_config(place, "of-model", eval=dataclasses.replace(evaluation, weights="model")))
    figures = [
        next(entry for entry in read_metrics(place / out / "metrics.jsonl") if "rsum" in entry)["rsum"]
        for out in ("of-ema", "of-model")
    ]
    evaluator = Evaluator(evaluation, MODEL_CFG, distributed.start("cpu"), "pos")
    assert figures[0] == evaluator(load_file(of_ema / EMA_NAME))["rsum"]
    assert figures[1] == evaluator(load_file(of_ema / WEIGHTS_NAME))["rsum"]
    assert figures[0] != figures[1]


def test_an_average_that_is_not_kept_cannot_be_evaluated():
    with pytest.raises(ValueError, match=r"eval\.weights ema needs a moving average; give --ema\.decay"):
        PretrainConfig(eval=EvalConfig(weights="ema"))
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), found 1\.0"):
        EmaConfig(decay=1.0)


def test_an_export_takes_the_average(place, averaged, tmp_path):
    out = export(ExportConfig(where=str(averaged), out=tmp_path / "ema", weights="ema"))
    average = load_file(averaged / EMA_NAME)
    loaded = load_model(out)
    assert torch.equal(loaded.model.visual.proj, average["visual.proj"])
    assert loaded.identity["weights"] == "ema"
    assert "exponential moving average in training (decay 0.8 a step)" in (out / "README.md").read_text()
    run(config_of(place, "none", steps=1))
    with pytest.raises(InputError, match=r"ema\.safetensors, found none: .* \(--weights model\)"):
        export(ExportConfig(where=str(place / "none"), out=tmp_path / "none", weights="ema"))

"""pretrain.doctor and the checks before the first step: what is wrong is said in seconds, and forecasts add up."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from material import write_model, write_shards
from ranks import on_ranks

from pretrain import doctor
from pretrain.checks import check_batches, check_start, merged
from pretrain.diagnosis import to_json, to_text
from pretrain.engine import Engine, EngineConfig
from pretrain.forecast import HEADROOM, Costs, forecast
from pretrain.losses import LossConfig
from pretrain.machine import MachineShare, share_of_machine
from pretrain.optim import OptimConfig
from pretrain.plan import make_plan
from pretrain.rates import STAGES, in_groups
from pretrain.run import train
from pretrain.self_check import SelfCheck
from setclip import distributed
from setclip.errors import InputError
from setclip.models.clip import build_clip, model_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    write_shards(folder / "shards")
    write_model(folder)
    return folder


def arguments(place, *further, shards="shards", out="run"):
    return [
        *("tiny", "--data.shards", str(place / shards), "--data.workers", "0", "--data.num-lanes", "8"),
        *("--model.name", str(place / "small.json"), "--out", str(place / out), "--engine.device", "cpu"),
        *("--global-batch-size", "16", "--steps", "10", "--seconds", "0.1", *further),
    ]


def diagnosed(place, *further, **changes):
    return doctor.diagnose(*doctor.read_arguments(arguments(place, *further, **changes)))


def diagnosed_on_rank(place):
    torch.set_num_threads(1)
    found = diagnosed(place)
    return found.local_batch_size, to_json(found), to_text(found)


@pytest.fixture(scope="module")
def found(place):
    return diagnosed(place)


def test_the_doctor_finds_a_sound_run_and_leaves_no_trace(place, found):
    assert not found.faults
    assert not (place / "run").exists()
    text = to_text(found)
    for line in ("1 rank × 16 = 16 pairs a step; 10 steps = 160 pairs = 2.50 epochs", "64 samples in 3 shards"):
        assert line in text
    for name in (
        *STAGES,
        "waiting for reads",
        "a step of 16 pairs",
        "bottleneck",
        "fp32, ZeRO 0",
        "bf16, ZeRO 3",
        "time",
    ):
        assert name in text
    assert "GPU-hours" not in text, "there is no GPU"


def test_the_doctors_json_adds_up(found):
    told = json.loads(json.dumps(to_json(found)))
    assert told["memory"]["bytes"] == sum(told["memory"]["parts"].values())
    own = [r for r in told["memory"]["table"] if (r["precision"], r["zero_stage"], r["accumulation"]) == ("fp32", 0, 1)]
    assert [row["bytes"] for row in own] == [told["memory"]["bytes"]]
    assert (told["pairs"], told["step"]["pairs"], told["step"]["is_whole"]) == (160, 16, True)
    outlook = told["forecast"]
    assert outlook["rate"] == min(outlook["limits"].values()) == outlook["limits"][outlook["bottleneck"]]
    assert outlook["seconds"] == pytest.approx(160 / outlook["rate"])
    assert outlook["gpu_hours"] is None
    assert all(told["loading"]["stages"]["seconds"][name] > 0 for name in STAGES)
    assert told["loading"]["of_core"] > 0


def test_what_keeps_a_run_from_beginning_is_named_all_at_once(place):
    write_shards(place / "cut")
    tar = place / "cut" / "train-00001.tar"
    tar.write_bytes(b"\0" * tar.stat().st_size)
    (place / "taken").mkdir()
    (place / "taken" / "notes.txt").write_text("mine")
    found = diagnosed(place, shards="cut", out="taken")
    assert [fault.split(":")[0] for fault in found.faults] == ["shards", "run folder"]
    assert "train-00001.tar" in found.faults[0]
    assert "train-00000.tar" not in found.faults[0]
    assert "--overwrite True" in found.faults[1]
    assert found.loading is None, "what cannot be read is not measured"
    assert "FAULT" in to_text(found)


def test_a_gpu_that_is_not_there_is_foreseen_from_flops(place):
    found = diagnosed(place, "--ranks", "4", "--gpu", "H100", "--mfu", "0.5", "--gpu-memory", "80")
    assert (found.ranks, found.local_batch_size) == (4, 4)
    assert found.flops_per_pair is not None
    assert found.forecast is not None
    assert found.forecast.limits["step"] == pytest.approx(0.5 * 989e12 / found.flops_per_pair)
    assert found.forecast.device_hours == pytest.approx(160 / found.forecast.rate / 3600)
    text = to_text(found)
    assert "GPU-hours" in text
    assert "of the 80.0 GB that a rank has on H100" in text
    assert "50% of the 989 TFLOPs/s of one H100 are an assumption" in text


def test_bare_the_doctor_says_what_to_give(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 2
    assert "recipes: tiny, photos, cc3m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "Abacus"), "no peak that is known"),
        (("--mfu", "35"), "mfu must lie in"),
        (("--ranks", "0"), "above 0"),
    ],
)
def test_wrong_flags_of_the_doctor_are_refused(place, capsys, flags, message):
    with pytest.raises(SystemExit):
        doctor.read_arguments(arguments(place, *flags))
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


def test_ranks_that_do_not_divide_lanes_are_refused_with_what_does(place):
    _, config = doctor.read_arguments(arguments(place, "--global-batch-size", "48"))
    with pytest.raises(InputError, match=r"divides the 8 lanes.*found 3; use 2 ranks, or --data.num-lanes 9"):
        check_batches(config, 3)
    assert check_batches(config, 4) == 12


def test_a_model_that_is_far_too_large_ends_a_run_before_it_is_built(place):
    cfg = json.loads((place / "small.json").read_text())
    cfg["vision_cfg"] |= {"width": 65536, "layers": 4, "head_width": 64}
    (place / "large.json").write_text(json.dumps(cfg))
    _, config = doctor.read_arguments(arguments(place, "--model.name", str(place / "large.json")))
    with pytest.raises(
        InputError, match=r"expected to need at most .* found an estimate of .*no number of micro-batches fits"
    ):
        train("tiny", config)
    assert not (place / "run").exists()


def test_a_shard_that_cannot_be_read_ends_a_run_before_anything_is_built(place):
    write_shards(place / "gone")
    (place / "gone" / "train-00002.tar").write_bytes(b"")
    _, config = doctor.read_arguments(arguments(place, shards="gone"))
    world = distributed.start("cpu")
    with pytest.raises(InputError, match=r"train-00002\.tar"):
        check_start(config, make_plan("tiny", config, world), world)


def test_faults_are_told_with_the_ranks_that_have_them():
    assert merged([["a"], ["a", "b"], ["a", "b"]]) == ["a", "rank 1, 2: b"]
    assert merged([["a", ""]]) == ["a"]


def test_a_run_says_that_weights_moved_and_steps_were_counted(place, capsys):
    _, config = doctor.read_arguments(arguments(place, "--steps", "2", out="checked"))
    train("tiny", config)
    # The first step of the warm-up has learning rate 0 where it is one step long; then the second tells.
    assert "parameters probed have moved, steps counted: " in capsys.readouterr().out


def engine_of(place):
    model = build_clip(model_config(str(place / "small.json")))
    return Engine(model, EngineConfig(device="cpu"), OptimConfig(), 4, distributed.start("cpu"))


def test_weights_that_do_not_move_and_steps_that_are_not_counted_end_a_run(place):
    engine = engine_of(place)
    check = SelfCheck(engine)
    with pytest.raises(RuntimeError, match="expected the engine to have counted 1 steps, found 0"):
        check.after_step(1, 1e-3)
    engine.set_step(1)
    check.after_step(1, 0.0)  # nothing is to move at learning rate 0
    with pytest.raises(RuntimeError, match="expected the image tower's weights to have moved at step 1"):
        check.after_step(1, 1e-3)
    engine.close()


COSTS = Costs(step=0.010, step_cores=0.010, load=0.004, load_cores=0.003)


def test_a_loader_that_keeps_up_leaves_the_step_as_the_bottleneck():
    found = forecast(COSTS, workers=1, lanes=64, cores=8, ranks=4, pairs=1_440_000)
    assert found.bottleneck == "step"
    assert found.limits == pytest.approx({"step": 100, "loader": 250, "cores": 8 / 0.013})
    assert found.seconds == pytest.approx(3600)
    assert found.device_hours == pytest.approx(4)
    assert (found.workers_needed, found.cores_needed) == (1, 2)


def test_too_few_loader_processes_are_told_with_the_number_that_is_needed():
    slow = replace(COSTS, load=0.050, load_cores=0.045)
    found = forecast(slow, workers=2, lanes=64, cores=16, ranks=1, pairs=1000)
    assert found.bottleneck == "loader"
    assert found.rate == pytest.approx(40)
    assert found.workers_needed == math.ceil(HEADROOM * 0.050 / 0.010) == 6
    assert forecast(slow, workers=6, lanes=64, cores=16, ranks=1, pairs=1000).bottleneck == "step"
    assert forecast(slow, workers=6, lanes=64, cores=3, ranks=1, pairs=1000).bottleneck == "cores"
    assert forecast(slow, workers=6, lanes=2, cores=16, ranks=1, pairs=1000).rate == pytest.approx(40), "a lane each"


@pytest.mark.parametrize(
    ("pairs", "size", "accumulation", "taken"),
    [(16, 8, 1, 16), (24, 3, 1, 24), (48, 24, 1, 48), (16, 16, 4, 8), (16, 4, 2, 16)],
)
def test_a_run_in_groups_is_looked_at_in_groups(place, monkeypatch, pairs, size, accumulation, taken):
    """Its first steps have four pairs, fewer than a group may have; of four micro-batches two are taken."""
    monkeypatch.setattr("pretrain.rates._STEP_SECONDS", 1e6)  # however busy the machine is
    further = ("--loss.group-size", str(size), "--engine.accumulation", str(accumulation))
    found = diagnosed(place, *further, "--global-batch-size", str(pairs))
    assert not found.faults
    assert f"= {pairs} pairs a step in groups of {size}; 10 steps" in to_text(found)
    assert to_json(found)["group_size"] == size
    assert to_json(found)["step"]["pairs"] == taken


@pytest.mark.parametrize(("pairs", "number", "size"), [(4, 1, 4), (8, 2, 8), (6, 2, 3), (64, 1, 16), (14, 2, 14)])
def test_a_step_that_stands_for_a_run_s_has_whole_groups(pairs, number, size):
    wanted = {4: 16, 8: 16, 6: 5, 64: 16, 14: 16}[pairs]
    assert in_groups(LossConfig(group_size=wanted), pairs, number).group_size == size
    assert in_groups(LossConfig(), pairs, number) == LossConfig()


def test_without_loader_processes_loading_and_steps_take_turns():
    found = forecast(COSTS, workers=0, lanes=64, cores=8, ranks=1, pairs=1000)
    assert found.rate == pytest.approx(1 / 0.014)


def test_alone_a_process_has_the_whole_machine():
    assert share_of_machine() == MachineShare(1, share_of_machine().cores)


@pytest.mark.slow
def test_two_ranks_are_looked_at_together(place):
    (local, told, text), (_, other, _) = on_ranks(2, diagnosed_on_rank, place)
    assert (local, told["ranks"]) == (8, 2)
    assert {name: told[name] for name in ("step", "forecast", "loading")} == {
        name: other[name] for name in ("step", "forecast", "loading")
    }
    assert "2 ranks × 8 = 16 pairs a step" in text

"""A run is killed, stopped, frozen, fed NaN or left without disk, and what comes out in the end is as if nothing had happened."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from material import write_model, write_shards
from safetensors.torch import load_file
from troubled_run import KINDS, Trouble, ended, run_with, start

from pretrain.bad_steps import CollapseWatch, GuardConfig
from pretrain.progress import read_metrics
from pretrain.stopping import EXIT_STOPPED
from pretrain.watchdog import EXIT_HUNG, Beat, verdict
from setclip.checkpoint import checkpoints_of, damage_of

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trouble")
    write_shards(folder / "shards")
    write_model(folder)
    return folder


def words(place, out, *more):
    """Returns the arguments of a short run that saves at every third step."""
    return [
        "tiny", "--out", out, "--data.shards", place / "shards", "--model.name", place / "small.json", "--data.workers", 0,
        "--data.num-lanes", 8, "--data.augment.pixels", 2, "--global-batch-size", 16, "--steps", STEPS, "--log-every-steps", 1,
        "--save.every-steps", 3, "--save.keep", 9, "--engine.device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(place):
    """The last checkpoints of undisturbed runs on 1 and on 2 ranks."""
    found = {}
    for ranks in (1, 2):
        out = place / f"undisturbed-{ranks}"
        assert run_with(None, words(place, out), ranks, place / f"undisturbed-{ranks}.txt") == [0] * ranks
        found[ranks] = checkpoints_of(out)[-1]
    return found


def assert_same_end(out, expected):
    """The weights, moments and losses of two runs are equal to the last bit."""
    last = checkpoints_of(out)[-1]
    assert last.name == expected.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = load_file(expected / name), load_file(last / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    runs = [read_metrics(folder / "metrics.jsonl") for folder in (expected.parents[1], out)]
    curves = [[(entry["step"], entry["loss"]) for entry in entries] for entries in runs]
    assert curves[0] == curves[1], "and the log has each step once"


def said(path, rank=0):
    return Path(f"{path}.{rank}").read_text()


# --- killed


def test_killed_on_one_rank_while_saving_it_goes_on_bit_for_bit(place, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    statuses = run_with(Trouble("kill", "saving", number=2), words(place, out), 2, log)
    assert statuses[0] == -signal.SIGKILL
    assert [path.name for path in checkpoints_of(out)] == ["step-00000003"]
    assert run_with(None, words(place, out, "--resume", True), 2, log) == [0, 0]
    assert_same_end(out, undisturbed[2])
    assert not list((out / "checkpoints").glob(".*")), "and what the killed run left half written is gone"


@pytest.mark.slow
def test_killed_at_twenty_moments_on_any_rank_it_ends_bit_for_bit(place, undisturbed, tmp_path):
    moments = random.Random(7)
    kinds = [*KINDS] * 4
    met, kills, at_most = set(), 0, {"start": 1, "reading": 40, "step": 7, "saving": 3, "renaming": 7}
    out, log = tmp_path / "run", tmp_path / "said"
    while kinds:
        kind = kinds.pop(moments.randrange(len(kinds)))
        rank = 0 if kind in ("saving", "renaming") else moments.randrange(2)  # rank 0 writes
        trouble = Trouble("kill", kind, number=moments.randint(1, at_most[kind]), rank=rank)
        again = ["--resume", True] if checkpoints_of(out) else ["--overwrite", True]
        statuses = run_with(trouble, words(place, out, *again), 2, log)
        if statuses == [0, 0]:  # it had come to its end before
            assert_same_end(out, undisturbed[2])
            shutil.rmtree(out)
            kinds.append(kind)
            continue
        assert statuses[rank] == -signal.SIGKILL, said(log, rank)[-2000:]
        met.add(kind)
        kills += 1
    assert (kills, met) == (20, set(KINDS))
    again = ["--resume", True] if checkpoints_of(out) else ["--overwrite", True]
    assert run_with(None, words(place, out, *again), 2, log) == [0, 0]
    assert_same_end(out, undisturbed[2])


# --- asked to stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_saves_on_all_and_ends_with_a_status_of_its_own(place, undisturbed, tmp_path, name):
    out, log = tmp_path / "run", tmp_path / "said"
    statuses = run_with(Trouble(name, "step", number=5, rank=1), words(place, out), 2, log)
    assert statuses == [EXIT_STOPPED, EXIT_STOPPED]
    assert re.search(rf"stopped by {name}: saved at step 5 \(\S+step-00000005\); --resume True goes on", said(log))
    assert checkpoints_of(out)[-1].name == "step-00000005"
    assert run_with(None, words(place, out, "--resume", True), 2, log) == [0, 0]
    shutil.rmtree(out / "checkpoints" / "step-00000005")
    assert_same_end(out, undisturbed[2])


def test_a_signal_while_loader_processes_read_ends_the_run_as_well(place, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    arguments = words(place, out)
    arguments[arguments.index("--data.workers") + 1] = 2
    assert run_with(Trouble("SIGUSR1", "step", number=4), arguments, 1, log) == [EXIT_STOPPED]
    assert checkpoints_of(out)[-1].name == "step-00000004"


# --- hanging


@pytest.mark.parametrize("act", ["hang", "stop"])
def test_a_rank_that_hangs_is_named_and_the_job_ends(place, tmp_path, act):
    out, log = tmp_path / "run", tmp_path / "said"
    trouble = Trouble(act, "reading", number=40, rank=1)
    processes = start(trouble, words(place, out, "--guard.hang-minutes", 0.1), 2, log)
    try:
        processes[0].join(60)
        assert processes[0].exitcode == EXIT_HUNG, said(log)
        if act == "hang":
            assert ended(processes) == [EXIT_HUNG, EXIT_HUNG]
            assert re.search(
                r"rank 1 \(host \S+, process \d+\) holds the others up: reading data for step 5 since \d+ s", said(log)
            )
            assert "_act" in (out / "hang" / "rank-00001.txt").read_text(), "its stack says where"
            assert not re.search(r"rank 0 \(host", said(log))
        else:
            assert re.search(r"rank 1 has not been heard of for \d+ s", said(log))
    finally:
        for process in processes:
            process.kill()


def test_the_verdict_on_ranks_that_are_all_at_the_same_place_blames_none():
    beats = {rank: Beat(rank, "a", 1, 7, "stepping", 9.0, 0.0) for rank in range(3)}
    assert "all ranks are stepping at step 7" in verdict(beats, 3, 60, 5, Path("hang"))
    beats[2] = Beat(2, "b", 5, 6, "saving", 9.0, 0.0)
    text = verdict(beats, 3, 60, 5, Path("hang"))
    assert "rank 2 (host b, process 5) holds the others up: saving for step 6" in text
    assert "rank 0" not in text
    assert "rank 2 has not been heard of" in verdict({0: beats[0], 1: beats[1]}, 3, 60, 5, Path("hang"))


# --- bad numbers


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_a_loss_of_nan_on_one_rank_is_skipped_by_all_and_written_down(place, tmp_path, stage):
    out, log = tmp_path / "run", tmp_path / "said"
    trouble = Trouble("nan", "step", number=4, rank=1)
    assert run_with(trouble, words(place, out, "--engine.zero-stage", stage), 2, log) == [0, 0], said(log)
    (entry,) = read_lines(out / "bad_steps.jsonl")
    assert (entry["step"], entry["ranks"][1]["loss"]) == (4, "nan")
    assert isinstance(entry["ranks"][0]["loss"], float)
    assert [len(rank["keys"]) for rank in entry["ranks"]] == [8, 8]
    assert "the loss on rank 1 is not finite" in said(log)
    assert [e["step"] for e in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, *range(5, STEPS + 1)]
    last = checkpoints_of(out)[-1]
    assert all(bool(value.isfinite().all()) for value in load_file(last / "model.safetensors").values())
    state = json.loads((last / "training_state.json").read_text())
    assert (state["step"], state["applied_steps"]) == (STEPS, STEPS - 1)
    # A resume after the skipped step is exact as well.
    for later in checkpoints_of(out)[2:]:
        shutil.move(later, tmp_path / later.name)
    again = words(place, out, "--engine.zero-stage", stage, "--resume", True)
    assert run_with(None, again, 2, log) == [0, 0]
    one, two = (load_file(f / "model.safetensors") for f in (tmp_path / last.name, checkpoints_of(out)[-1]))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_bf16_skips_a_step_too(place, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    more = ("--engine.zero-stage", 1, "--engine.precision", "bf16")
    assert run_with(Trouble("nan", "step", number=4, rank=1), words(place, out, *more), 2, log) == [0, 0], said(log)
    assert len(read_lines(out / "bad_steps.jsonl")) == 1


def test_too_many_bad_steps_go_back_to_a_checkpoint_without_their_batches(place, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    trouble = Trouble("nan", "step", number=5, times=2, rank=0)
    assert run_with(trouble, words(place, out, "--guard.max-bad-steps", 1), 2, log) == [0, 0], said(log)
    assert "going back to" in said(log)
    assert "step-00000003 and leaving their batches out" in said(log)
    assert re.findall(r"step (\d+) is left out", said(log)) == ["5", "6"]
    state = json.loads((checkpoints_of(out)[-1] / "training_state.json").read_text())
    assert (state["step"], state["applied_steps"], state["left_out"]) == (STEPS, STEPS - 2, [5, 6])


def test_a_run_that_stays_bad_ends_with_an_error(place, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    trouble = Trouble("nan", "step", number=5, times=1000)
    statuses = run_with(trouble, words(place, out, "--guard.max-bad-steps", 1), 1, log)
    assert statuses == [1]
    assert "--guard.rollbacks 1 allows no further return" in said(log)


def test_a_loss_that_stays_at_ln_batch_is_said_once():
    watch = CollapseWatch(GuardConfig(collapse_steps=3), 1024)
    remarks = [watch.add(loss) for loss in (6.93, 6.93, 5.0, 6.931, 6.93, 6.94, 6.93)]
    assert [bool(remark) for remark in remarks] == [False] * 5 + [True, False]
    assert "ln(pairs contrasted) = 6.931 for 3 steps" in str(remarks[5])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- disk


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_next_one_is_tried(place, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    trouble = Trouble("full", "saving", number=1, times=2)
    assert run_with(trouble, words(place, out), 2, log) == [0, 0]
    assert said(log).count("could not be written ([Errno 28] No space left on device); training goes on") == 2
    assert [path.name for path in checkpoints_of(out)] == ["step-00000009", "step-00000012"]
    assert_same_end(out, undisturbed[2])


@pytest.mark.parametrize("times", [1, 3], ids=["the last one", "three in a row"])
def test_a_run_whose_checkpoints_cannot_be_written_fails(place, tmp_path, times):
    out, log = tmp_path / "run", tmp_path / "said"
    first = {1: 4, 3: 1}[times]
    statuses = run_with(Trouble("full", "saving", number=first, times=times), words(place, out), 2, log)
    assert statuses == [2, 2]
    assert "expected to write a checkpoint" in said(log)
    assert len(checkpoints_of(out)) == {1: 3, 3: 0}[times]


def test_a_disk_without_room_is_noticed_before_anything_is_built(place, tmp_path, monkeypatch):
    from pretrain import checkpoints
    from pretrain.checkpoints import SaveConfig, check_space
    from setclip.errors import InputError

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda where: usage)
    with pytest.raises(InputError, match=r"expected 0\.0 GB free at \S+ for 3 checkpoints .* make room"):
        check_space(tmp_path / "a" / "b", torch.nn.Linear(10, 10), SaveConfig())


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(place, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    shutil.copytree(undisturbed[2].parents[1], out)
    for name, file in (("step-00000012", "model.safetensors"), ("step-00000009", "optimizer.safetensors")):
        path = out / "checkpoints" / name / file
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    (out / "checkpoints" / "step-00000006" / "training_state.json").unlink()
    assert run_with(None, words(place, out, "--resume", True), 2, log) == [0, 0]
    for text in (
        "step-00000012 is damaged (model.safetensors has another checksum",
        "step-00000009 is damaged (optimizer.safetensors",
        "step-00000006 is damaged (training_state.json is missing)",
        "resuming at step 3,",
    ):
        assert text in said(log)
    assert_same_end(out, undisturbed[2])
    assert [damage_of(path) for path in checkpoints_of(out)] == [None] * 4, "and what was damaged is written anew"


def test_a_shard_that_disappears_in_mid_run_ends_it_with_its_name(place, tmp_path):
    shutil.copytree(place / "shards", tmp_path / "shards")
    out, log = tmp_path / "run", tmp_path / "said"
    arguments = words(place, out)
    arguments[arguments.index("--data.shards") + 1] = tmp_path / "shards"
    (tmp_path / "shards" / "train-00001.tar").unlink()
    assert run_with(None, arguments, 1, log) == [2]
    assert "train-00001.tar" in said(log)
    assert "Traceback" not in said(log)


# --- changed on purpose


def test_another_schedule_must_be_asked_for_and_says_both_learning_rates(place, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "said"
    shutil.copytree(undisturbed[1].parents[1], out)
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    other = words(place, out, "--resume", True)
    other[other.index("--steps") + 1] = 18
    assert run_with(None, other, 1, log) == [2]
    assert "total_steps was 12, is 18" in said(log)
    assert "go on with these with --change True" in said(log)
    assert run_with(None, [*other, "--change", True], 1, log) == [0]
    assert re.search(r"the learning rate at step 9 was \d\.\d+e-04, is \d\.\d+e-03", said(log))
    assert checkpoints_of(out)[-1].name == "step-00000018"
    # What fixes the data order cannot be changed.
    other[other.index("--global-batch-size") + 1] = 32
    assert run_with(None, [*other, "--change", True], 1, log) == [2]
    assert "global_batch_size was 16, is 32" in said(log)

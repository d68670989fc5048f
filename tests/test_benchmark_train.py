"""The benchmarks of training: both trainers take the same steps, logs are read rightly, and the GPU's script runs on a CPU."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from material import write_shards
from ranks import on_ranks

from benchmarks import (
    layout,
    open_clip_environment,
    open_clip_trainer,
    recorded_run,
    train,
    train_gpu,
    train_material,
    trainers,
)
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.shards import Shard

OUR_LINE = (
    "step   1,020  samples     130,560  loss  4.8341  kl  4.6590  scale  14.24  lr 4.63e-04  grad   6.39  "
    "similar  1.1%        78 samples/s  data wait   4%  0.8 GB  bad 0  1 min 08 s left\n"
)
THEIR_LINE = (
    "2026-11-21,16:57:24 | INFO | Train Epoch: 0 [1408/6528 (22%)] Data (t): 0.055 Batch (t): 2.388, 61.5485/s, 30.7743/s/gpu "
    "LR: 0.000454 Logit Scale: 14.244 Contrastive_loss: 3.8936 (4.4666) Loss: 3.8936 (4.4666)\n"
)


def record_on_rank(arguments: list[str]) -> None:
    sys.argv = ["recorded_run", *arguments]
    recorded_run.main()


def replay_on_rank(arguments: list[str]) -> None:
    open_clip_trainer.main(arguments)


@pytest.fixture
def task(tmp_path) -> trainers.Task:
    return trainers.Task(
        shards=write_shards(tmp_path / "shards"),
        model=trainers.write_model(tmp_path / "model", train.MODELS["vit-32"]),
        global_batch_size=16,
        steps=6,
        workers=0,
        log_every=1,
    )


# --- equal losses


@pytest.mark.slow
def test_open_clips_trainer_has_our_losses_on_our_batches_and_on_one_process_those_of_two(task, tmp_path, monkeypatch):
    def start(arguments):
        *_, ranks = (arguments[i + 1] for i, word in enumerate(arguments) if word == "--nproc-per-node")
        module, *rest = arguments[arguments.index("--") + 1 :]
        on_ranks(
            int(ranks),
            {"recorded_run": record_on_rank, "open_clip_trainer": replay_on_rank}[module.split(".")[1]],
            rest,
        )

    monkeypatch.setattr(train, "_run", start)  # by forked processes, which need no seconds to import
    monkeypatch.setattr(open_clip_environment, "python_of", lambda: Path(sys.executable))  # its reader is not used
    found = train.compare_losses(task, tmp_path / "losses")
    assert len(found["ours"]) == len(found["open_clip"]) == len(found["open_clip_one_process"]) == task.steps
    assert found["largest_difference"] < 1e-4
    assert found["largest_difference_of_open_clip_on_one_and_two_processes"] < 1e-4
    assert found["ours"][-1] < found["ours"][0] - 0.05, "steps were taken"
    twice = dataclasses.replace(task, lr=2 * task.lr, ranks=1)
    (tmp_path / "other").mkdir()
    train.join_batches(tmp_path / "losses", tmp_path / "other", task.ranks)
    other = train.replay_open_clip(twice, tmp_path / "other")
    assert train._largest_difference(found["ours"], other) > 1e-3, "another rate would be noticed"


# --- reading logs


def test_steps_are_read_from_the_lines_of_both_logs_and_from_no_others():
    assert trainers.step_of("ours", OUR_LINE, 128) == 1_020
    assert trainers.step_of("open_clip", THEIR_LINE, 128) == 11
    for line in ("pretraining: 6,528/6,528 samples, 68 samples/s\n", "recipe cc12m, step 3 samples\n", "\n"):
        assert trainers.step_of("ours", line, 128) is None
        assert trainers.step_of("open_clip", line, 128) is None


def test_waiting_for_data_is_the_share_of_the_time_between_the_lines_that_count(tmp_path):
    lines = [THEIR_LINE.replace("1408", str(step * 128)) for step in (1, 11, 21, 31)]
    lines[0] = lines[0].replace("0.055", "9.000")
    lines[3] = lines[3].replace("0.055", "0.255").replace("Loss: 3.8936 (", "Loss: 2.5 (")
    wait, loss = trainers.own_figures("open_clip", lines, 11, 31, tmp_path, 128)
    assert wait == pytest.approx((0.055 + 0.255) / (2 * 2.388))
    assert loss == 2.5
    (tmp_path / "run").mkdir()
    entries = [
        {"step": step, "loss": 1.0 * step, "data_wait_share": share}
        for step, share in ((10, 0.9), (20, 0.1), (30, 0.3))
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in [*entries, {"step": 30, "rsum": 1}])
    )
    assert trainers.own_figures("ours", [], 10, 30, tmp_path, 128) == (pytest.approx(0.2), 30.0)


def test_the_cpu_time_of_a_process_takes_in_what_it_has_started():
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert trainers.cpu_seconds(psutil.Process(process.pid)) > 0.29


def test_a_trainer_that_fails_is_an_error_with_its_last_words(task, tmp_path, monkeypatch):
    command = [
        sys.executable,
        "-c",
        "print('no such tar'); print('x failed (exitcode: 1)'); print('advice'); raise SystemExit(3)",
    ]
    monkeypatch.setattr(trainers, "command_of", lambda *_: command)
    with pytest.raises(InputError, match=r"(?s)ended with 3:\nno such tar\n`.* shows it alone"):
        trainers.run_trainer("ours", task, tmp_path / "run", 0)


def test_only_what_lies_between_two_lines_after_the_warm_up_is_counted(task, tmp_path, monkeypatch):
    (tmp_path / "lines").write_text(
        "".join(THEIR_LINE.replace("1408", str(step * 128)) for step in (1, 11, 21, 31, 36))
    )
    source = "import sys, time\nfor line in open(sys.argv[1]): time.sleep(0.05); print(line, end='', flush=True)"
    monkeypatch.setattr(trainers, "command_of", lambda *_: [sys.executable, "-c", source, str(tmp_path / "lines")])
    start = time.monotonic()
    found = trainers.run_trainer(
        "open_clip", dataclasses.replace(task, global_batch_size=128, log_every=10), tmp_path / "run", 5
    )
    assert found.samples == 20 * 128, "from step 11 to step 31"
    assert 0.05 <= found.seconds < time.monotonic() - start - 0.1  # two pauses, as a reader under load sees them
    assert found.samples_per_second == found.samples / found.seconds


def test_trainers_take_turns_and_the_median_of_their_ratios_counts(task, tmp_path, monkeypatch):
    rates = {"ours": iter((300, 200, 100)), "open_clip": iter((100, 100, 100))}
    order = []

    def run(side, task, folder, first):
        order.append(side)
        return trainers.Measured(600, 600 / next(rates[side]), 60.0, 0.1, 1.0)

    monkeypatch.setattr(train, "run_trainer", run)
    found = train.measure_speed(task, tmp_path, 0, 3)
    assert order == ["ours", "open_clip", "open_clip", "ours", "ours", "open_clip"]
    assert found["times_faster_each"] == pytest.approx([3, 2, 1])
    assert found["times_faster"] == pytest.approx(2)
    assert found["times_faster_per_cpu_second"] == 1


# --- material


def test_pictures_are_repeated_as_samples_of_their_own_with_objects(tmp_path, monkeypatch):
    monkeypatch.delenv("SETCLIP_REAL_DATA", raising=False)
    pairs = train_material._drawn(5)
    monkeypatch.setattr(train_material, "pictures", lambda: (pairs, "five scenes"))
    train_material.write_shards(tmp_path / "shards", 12, 4)
    shards = [Shard(tmp_path / "shards" / info.name) for info in Manifest.load(tmp_path / "shards").of_split("train")]
    samples = [shard.read(row) for shard in shards for row in range(len(shard))]
    assert len({sample.key for sample in samples}) == 12
    assert len({sample.image for sample in samples}) == 5
    assert all(names for sample in samples for names in sample.objects["pos"])
    assert len(trainers.tars_of(tmp_path / "shards").split("::")) == 4
    config = train_gpu.BenchmarkConfig(shards=tmp_path / "shards", samples=30)
    assert train_gpu.repeated_shards(config, tmp_path / "more", 2) == f"12 samples of {tmp_path / 'shards'}, repeated"
    more = Manifest.load(tmp_path / "more")
    assert (len(more.shards), sum(info.samples for info in more.shards)) == (8, 30)
    assert more.parsers == Manifest.load(tmp_path / "shards").parsers


def test_photographs_of_real_data_are_taken(tmp_path):
    if not os.environ.get("SETCLIP_REAL_DATA"):
        pytest.skip("SETCLIP_REAL_DATA is not set")
    pairs, source = train_material.pictures()
    assert source == f"{len(pairs)} photographs of up to 256 pixels"
    assert all(data[:2] == b"\xff\xd8" and max(size) <= 256 and captions for data, *size, captions in pairs)


def test_photographs_that_are_not_there_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SETCLIP_REAL_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"expected photographs listed in .*captions.jsonl, found none"):
        train_material.pictures()


# --- open_clip's environment


def test_an_environment_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv(open_clip_environment.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(
        InputError, match=r"open_clip's trainer.*found none; make it with .python -m benchmarks.open_clip_env"
    ):
        open_clip_environment.python_of()


def test_this_interpreter_serves_where_it_has_the_reader_that_is_required(tmp_path, monkeypatch):
    here = __import__("importlib.metadata").metadata.version("webdataset")
    (tmp_path / "requirements.txt").write_text(f"# why\nwebdataset=={here}\n")
    monkeypatch.setattr(open_clip_environment, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert open_clip_environment.python_of() == Path(sys.executable)


# --- the GPU's script


def test_without_a_gpu_the_script_says_what_to_do(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["train_gpu"])
    with pytest.raises(
        InputError, match=r"expected a CUDA device to measure on, found none; .*--device cpu --models tiny"
    ):
        train_gpu.main()


def test_a_model_without_a_known_batch_size_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpu", "--device", "cpu", "--models", "RN50"])
    with pytest.raises(InputError, match="expected a batch size for RN50"):
        train_gpu.main()


def test_goals_are_judged_by_what_was_measured_on_a_gpu():
    def entry(model, data, side, rate, mfu, wait):
        return {"model": model, "data": data, "trainer": side, "images_per_second": rate, "mfu": mfu, "data_wait": wait}

    runs = [
        entry("ViT-B-16", "jpegs", "ours", 3_000, 0.44, 0.02),
        entry("ViT-B-16", "jpegs", "open_clip", 2_000, 0.3, 0.5),
        entry("ViT-B-16", "synthetic", "ours", 3_600, 0.46, 0.0),
        entry("ViT-B-32", "jpegs", "ours", 9_000, 0.3, 0.2),
    ]
    figures = {
        "runs": runs,
        "ratios": train_gpu.ratios_of(runs),
        "peak_flops": 989e12,
        "left_out": [{"model": "ViT-B-32"}],
    }
    assert figures["ratios"] == {"ViT-B-16, jpegs": 1.5}
    assert train_gpu.verdicts(figures) == [
        "ViT-B-16, jpegs: 1.50 times open_clip's trainer",
        "goal MFU of ViT-B-16, jpegs: 0.440: MISSED",
        "goal MFU of ViT-B-16, synthetic: 0.460: reached",
        "goal data wait of ViT-B-16: 0.020: reached",
        "goal times open_clip's trainer, ViT-B-16, jpegs: 1.500: reached",
        "left out: {'model': 'ViT-B-32'}",
    ]
    assert train_gpu.verdicts({**figures, "peak_flops": None})[-1].startswith("goals are those of a GPU")


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_with_a_tiny_model_and_both_trainers(task, tmp_path, monkeypatch, capsys):
    try:
        open_clip_environment.python_of()
    except InputError as error:
        pytest.skip(str(error))
    figures = tmp_path / "figures.json"
    flags = ["--shards", str(task.shards), "--samples", "64", "--steps", "21", "--warmup", "1", "--workers", "1"]
    flags += ["--device", "cpu", "--models", "tiny", "--batch-size", "8", "--compile", "False", "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", ["train_gpu", *flags])
    train_gpu.main()
    found = json.loads(figures.read_text())
    assert found["left_out"] == []
    assert [(run["data"], run["trainer"], run["samples"]) for run in found["runs"]] == [
        ("jpegs", "ours", 80),
        ("jpegs", "open_clip", 160),
        ("synthetic", "ours", 80),
        ("synthetic", "open_clip", 160),
    ]
    assert all(run["images_per_second"] > 0 and run["mfu"] is None and run["loss"] > 0 for run in found["runs"])
    assert found["runs"][2]["loss"] < 1.5, "one batch again and again is learned by heart"
    assert set(found["ratios"]) == {"tiny, jpegs", "tiny, synthetic"}
    assert "none is judged" in capsys.readouterr().out


def test_both_layouts_of_pictures_are_measured():
    found = layout.measure("conv-tiny-64", pairs=4, repeats=2)
    assert set(found) == {"channels first", "channels last"}
    assert all(0 < seconds < 60 for seconds in found.values())

"""What a run tells while it goes on: model FLOPs and peaks, memory, lines and the live display, trackers."""

import importlib.util
import multiprocessing
import os
import pty
import re
import sys
import time

import pytest
import ranks  # noqa: F401 (says what the processes are forked with)
import torch
from material import MODEL_CFG, write_model, write_shards

from pretrain import progress, throughput, trackers
from pretrain.config import tiny
from pretrain.progress import RunLog, evaluation_text, read_lines, read_metrics
from pretrain.throughput import Utilisation, host_memory, peak_flops, training_flops, utilisation_of
from pretrain.trackers import Careful, LogConfig, TensorBoard, WeightsAndBiases, check_trackers, curves_of
from setclip.config import command
from setclip.models.clip import build_clip

CPU = torch.device("cpu")


# --- model FLOPs utilisation


def tower_flops(tokens, width, layers=1):
    """By hand: 2·m·n·k of each product of matrices of a transformer whose MLP is four times as wide."""
    linear = 2 * tokens * width * width * (3 + 1 + 4 + 4)
    attention = 2 * 2 * tokens * tokens * width
    return layers * (linear + attention)


IMAGE_FLOPS = 2 * 4 * (3 * 16 * 16) * 32 + tower_flops(5, 32) + 2 * 32 * 16
TEXT_FLOPS = tower_flops(12, 16) + 2 * 16 * 16


def test_flops_are_those_of_the_matrix_products_three_times():
    assert training_flops(build_clip(MODEL_CFG)) == 3 * (IMAGE_FLOPS + TEXT_FLOPS)


def test_a_locked_tower_has_no_backward_pass():
    model = build_clip(MODEL_CFG)
    for parameter in model.visual.parameters():
        parameter.requires_grad_(False)
    assert training_flops(model) == IMAGE_FLOPS + 3 * TEXT_FLOPS


def test_counting_flops_leaves_weights_and_random_state_alone():
    model = build_clip(MODEL_CFG)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    training_flops(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 2080 Ti", None),
    ],
)
def test_peaks_are_found_by_whole_words_of_the_name(name, peak):
    assert peak_flops(name) == peak


def test_mfu_is_the_share_of_the_peak():
    assert Utilisation(flops_per_pair=2e9, peak_flops=1e12).mfu(pairs_per_second=250) == 0.5


def test_without_a_known_peak_the_option_is_named():
    model = build_clip(MODEL_CFG)
    assert "on CPUs" in (why := utilisation_of(model, "bf16", CPU))
    assert "--log.peak-tflops" in why
    given = utilisation_of(model, "fp32", CPU, peak_tflops=0.5)
    assert given == Utilisation(3 * (IMAGE_FLOPS + TEXT_FLOPS), 0.5e12)


def test_a_gpu_without_a_known_peak_or_bf16_says_so(monkeypatch):
    model, gpu = build_clip(MODEL_CFG), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Model X")
    assert utilisation_of(model, "fp32", gpu).startswith("in fp32: ")
    assert utilisation_of(model, "bf16", gpu).startswith("on Model X, whose peak is not known")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert utilisation_of(model, "bf16", gpu).peak_flops == 989e12


def test_a_model_whose_flops_cannot_be_counted_says_so(monkeypatch):
    def fails(_):
        raise NotImplementedError("no meta kernel\nand more")

    monkeypatch.setattr(throughput, "training_flops", fails)
    why = utilisation_of(build_clip(MODEL_CFG), "bf16", CPU, peak_tflops=1.0)
    assert why == "for this model: its FLOPs cannot be counted (no meta kernel)"


@pytest.mark.parametrize("peak", [0.0, -1.0, float("inf"), float("nan")])
def test_a_peak_that_is_none_is_refused(peak):
    with pytest.raises(ValueError, match=r"--log\.peak-tflops must be above 0"):
        LogConfig(peak_tflops=peak)


def test_memory_grows_with_what_a_process_holds_and_counts_its_children():
    before, _ = host_memory()
    held = bytearray(b"\1" * 2**26)
    assert host_memory()[0] - before > 2**25
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    try:
        assert host_memory()[1] > 0
    finally:
        child.kill()
        child.join()
    del held


# --- lines


def own(data_wait_share, bad_samples, gpu=None):
    return {
        "data_wait_share": data_wait_share,
        "bad_samples": bad_samples,
        "gpu_memory_bytes": gpu,
        "cpu_memory_bytes": 2e9,
        "loader_memory_bytes": 1e9,
    }


def test_a_line_averages_its_steps_and_takes_the_worst_rank(tmp_path, capsys):
    log = RunLog(tmp_path / "metrics.jsonl", 10**9, 0, 0, world_size=2, utilisation=Utilisation(1e9, 1e12))
    for loss in (1.0, 3.0):
        with log.timed("data"):
            time.sleep(0.01)
        with log.timed("step"):
            time.sleep(0.01)
        log.add(64, loss=loss, kl=loss / 2, similar_pairs=0.015, grad_norm=4.0)
    entry = log.line(
        [own(0.1, 2, 5e9), own(0.4, 3, 7e9)], step=2, samples_seen=128, epoch=0.1, lr=1e-3, logit_scale=14.3
    )
    assert (entry["loss"], entry["kl"], entry["grad_norm"]) == (2.0, 1.0, 4.0)
    assert (entry["data_wait_share"], entry["bad_samples"], entry["gpu_memory_bytes"]) == (0.4, 5, 7e9)
    assert entry["samples_per_second"] == pytest.approx(2 * entry["samples_per_second_per_rank"])
    assert entry["samples_per_second"] * entry["seconds_per_step"] == pytest.approx(64)
    assert entry["mfu"] == pytest.approx(entry["samples_per_second_per_rank"] * 1e9 / 1e12)
    (written,) = read_metrics(tmp_path / "metrics.jsonl")
    assert written.items() >= entry.items()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert len(said) <= 200
    for words in (
        "step       2",
        "loss  2.0000",
        "scale  14.30",
        "similar  1.5%",
        "data wait  40%",
        "7.0 GB",
        "bad 5",
        "left",
    ):
        assert words in said


def test_an_evaluation_is_one_line_of_its_main_figures():
    found = {"zeroshot_top1": 12.345, "zeroshot_top1_tail": 3.0, "zeroshot_mean_per_class": 1.0, "i2t_r5": 50.0}
    assert evaluation_text(1200, found) == "step   1,200  zeroshot_top1 12.35  zeroshot_top1_tail 3.00  i2t_r5 50.00"


def test_a_resume_drops_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "l\xff')
    (tmp_path / "skipped-00001.jsonl").write_text('{"step": 1, "key": "a"}\n{"step": 3, "key": "b"}\n')
    RunLog(path, 100, 2, 2)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
    assert [entry["key"] for entry in read_lines(tmp_path / "skipped-00001.jsonl")] == ["a"]


def live(terminal, folder):
    """What a run shows whose standard error is a terminal."""
    os.environ.update(COLUMNS="230", TERM="xterm")
    sys.stdout = sys.stderr = open(terminal, "w", buffering=1)  # noqa: SIM115
    log = RunLog(folder / "metrics.jsonl", 6400, 0, 0)
    for step in range(1, 31):
        log.add(64, loss=2.5, kl=1.0, grad_norm=1.0)
        time.sleep(0.02)
        if step == 15:
            now = {"step": step, "samples_seen": 64 * step, "epoch": 1.0, "lr": 0.1, "logit_scale": 14.0}
            log.line([log.of_this_rank(0)], **now)
    log.close()


def test_a_terminal_has_a_live_display_with_the_time_left(tmp_path):
    ours, theirs = pty.openpty()
    process = multiprocessing.get_context("fork").Process(target=live, args=(theirs, tmp_path))
    process.start()
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # the other end is closed
        pass
    process.join()
    os.close(ours)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert process.exitcode == 0
    assert re.search(r"pretraining ━+.*1920/6400 [\d,]+ samples/s 0:00:\d\d loss 2.500", text), text[-500:]
    assert re.search(r"step +15 +samples +960 .* left", text)
    assert "pretraining: " not in text, "no lines of a job's log"


def test_a_job_log_is_told_of_long_silence_only(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path / "metrics.jsonl", 6400, 0, 0)
    log.add(64, loss=2.5)
    assert capsys.readouterr().out == ""
    now = time.monotonic()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now + 61)
    log.add(64, loss=2.5)
    assert re.fullmatch(r"pretraining: 128/6,400 samples, .* left, loss 2.500\n", capsys.readouterr().out)


# --- trackers


def test_entries_become_curves_in_groups():
    entry = {"step": 3, "samples_seen": 9, "time": 1.0, "loss": 2.0, "mfu": 0.4, "text_prompt": 0.5, "bad_samples": 1}
    assert curves_of(entry) == {
        "train/loss": 2.0,
        "speed/mfu": 0.4,
        "train/text_prompt": 0.5,
        "data/bad_samples": 1.0,
    }
    assert curves_of({"step": 3, "zeroshot_top1": 12.0, "note": "x"}) == {"eval/zeroshot_top1": 12.0}


@pytest.mark.parametrize(
    ("flags", "package"), [(["--log.tensorboard", "True"], "tensorboard"), (["--log.wandb", "mine"], "wandb")]
)
def test_a_tracker_without_its_package_ends_the_command_before_training(tmp_path, monkeypatch, capsys, flags, package):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name, *rest: None if name == package else there(name, *rest)
    )
    words = [
        *("run", "tiny", "--out", tmp_path / "run", "--data.shards", write_shards(tmp_path / "shards")),
        *("--model.name", write_model(tmp_path), "--global-batch-size", 16, "--data.num-lanes", 8),
        *("--engine.device", "cpu", *flags),
    ]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    from pretrain.run import main

    with pytest.raises(SystemExit, match="2"):
        command(main)
    said = capsys.readouterr().err
    assert f"expected the package {package}, found none in this environment; `pip install {package}`, or give" in said
    assert not (tmp_path / "run").exists()


def test_trackers_are_off_by_default():
    check_trackers(tiny().log)
    assert trackers.open_trackers(tiny().log, None, 0, {}) == []


class Failing:
    def __init__(self):
        self.calls = []

    def write(self, entry):
        self.calls.append(entry)
        if len(self.calls) == 2:
            raise OSError("the network is gone")

    def close(self):
        self.calls.append("close")


def test_a_tracker_that_fails_is_said_and_gets_nothing_more(tmp_path, capsys):
    tracker = Failing()
    log = RunLog(tmp_path / "metrics.jsonl", 100, 0, 0, trackers=[Careful(tracker)])
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan") if step == 1 else 1.0})
    log.close()
    assert [entry.get("loss") for entry in tracker.calls] == [None, 1.0], "NaN is not handed on"
    assert capsys.readouterr().err.count("warning: Failing failed (the network is gone) and gets nothing more") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_tensorboard_goes_on_after_a_resume_without_what_was_taken_back(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        board = TensorBoard(tmp_path, first)
        for step in range(first + 1, last + 1):
            board.write({"step": step, "loss": loss, "time": 1000.0 + step})
        board.close()
        time.sleep(1.1)  # files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        *((1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0))
    ]


@pytest.mark.slow
def test_weights_and_biases_work_offline_and_go_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        tracker = WeightsAndBiases("setclip-tests", tmp_path, {"seed": 0})
        tracker.write({"step": step, "loss": 1.0})
        tracker.close()
    (name,) = {path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert name == (tmp_path / "wandb_id.txt").read_text().strip()

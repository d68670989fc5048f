"""The report of runs: right figures from the run folder, whatever state it is in, in one file that loads nothing."""

import base64
import dataclasses
import html as html_escapes
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from evaluation_samples import write_class_folders
from material import damage_image, write_model, write_shards
from pages import CHROMIUM, Page, dumped
from PIL import Image

from pretrain import report, training
from pretrain.bad_steps import RollBack
from pretrain.config import EvalConfig, PretrainConfig, tiny
from pretrain.losses import LossConfig
from pretrain.progress import read_metrics
from pretrain.report_curves import MOST_POINTS
from pretrain.report_remarks import remarks
from pretrain.report_runs import Run, find_run, newest_run_folder, read_run, read_runs
from pretrain.retrieved import read_retrieved, write_retrieved
from pretrain.run import train
from pretrain.sessions import SessionLog, read_sessions
from pretrain.stopping import Stopped
from pretrain.trackers import LogConfig
from setclip import config as configuration
from setclip.config import command
from setclip.errors import InputError
from setclip.images import AugmentConfig


def config_of(place, out, **changes):
    base = tiny()
    settings = {
        "out": place / "runs" / out,
        "data": dataclasses.replace(
            base.data,
            shards=place / "shards",
            workers=0,
            num_lanes=8,
            max_bad=0.5,
            augment=AugmentConfig(kind="shift", pixels=2),
        ),
        "model": dataclasses.replace(base.model, name=str(place / "small.json")),
        "engine": dataclasses.replace(base.engine, device="cpu"),
        "global_batch_size": 16,
        "steps": 6,
        "log_every_steps": 1,
        "log": LogConfig(peak_tflops=0.01),
    }
    return dataclasses.replace(base, **{**settings, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs: "soft" evaluates on its way and writes its report, "hard" was stopped in the middle and went on."""
    folder = tmp_path_factory.mktemp("watching")
    write_shards(folder / "shards")
    (folder / "shards" / "gone.txt").write_text(damage_image(folder / "shards", "train-00000.tar", 3))
    write_shards(folder / "val", sizes=(9,), split="val")
    write_class_folders(folder / "classes", names=("dog", "cat", "<b>bird</b>", "car"))
    write_model(folder)
    evaluated = EvalConfig(every_steps=2, zeroshot=folder / "classes", retrieval=folder / "val")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "REPORT_AFTER_SECONDS", 0.0)
        train("tiny", config_of(folder, "soft", eval=evaluated, loss=LossConfig(name="object_iou")))
    hard = config_of(folder, "hard", loss=LossConfig(name="hard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "REPORT_AFTER_SECONDS", 0.0)
        patch.setattr(training.Training, "_count", signalled_at(2, training.Training._count))
        with pytest.raises(Stopped):
            train("tiny", hard)
    shutil.copy(folder / "runs" / "hard" / "report.html", folder / "stopped.html")
    train("tiny", dataclasses.replace(hard, resume=True))
    return folder


def signalled_at(step, count):
    def counted(run, batch):
        count(run, batch)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)

    return counted


@pytest.fixture(scope="module")
def page(place):
    return Page(place / "runs" / "soft" / "report.html")


# --- what a run writes


def test_metrics_have_every_figure_that_is_watched(place):
    entries = read_metrics(place / "runs" / "soft" / "metrics.jsonl")
    training_entries = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in training_entries] == [1, 2, 3, 4, 5, 6]
    for entry in training_entries:
        assert entry.keys() == {
            *("step", "samples_seen", "epoch", "time", "elapsed_seconds"),
            *("loss", "kl", "true_pair_mass", "similar_pairs", "equal_pairs", "logit_scale", "grad_norm", "lr"),
            *("samples_per_second", "samples_per_second_per_rank", "seconds_per_step", "data_wait_share", "mfu"),
            *("cpu_memory_bytes", "loader_memory_bytes", "bad_samples"),
        }
        assert all(math.isfinite(value) for value in entry.values())
        assert 0 <= entry["data_wait_share"] <= 1
        assert entry["samples_per_second"] * entry["seconds_per_step"] == pytest.approx(16)
        assert entry["mfu"] > 0
    evaluations = [entry for entry in entries if "loss" not in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    assert {"zeroshot_top1", "i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "rsum"} <= evaluations[0].keys()


def test_starts_are_recorded_with_how_they_ended(place):
    first, second = read_sessions(place / "runs" / "hard")
    assert (first.step, first.end_step, first.how) == (0, 3, "stopped")
    assert first.reason.startswith("SIGUSR1: saved at step 3 (")
    assert (second.step, second.end_step, second.how) == (3, 6, "finished")
    assert (second.facts["ranks"], second.facts["device"], second.facts["recipe"]) == (1, "CPU", "tiny")


@pytest.mark.parametrize(
    ("error", "how", "reason"),
    [
        (Stopped("SIGTERM: saved at step 7"), "stopped", "SIGTERM: saved at step 7"),
        (RollBack([3]), "rolled back", "steps 3 were skipped: their loss or gradient was not finite"),
        (KeyboardInterrupt(), "interrupted", ""),
        (OSError("No space left"), "failed", "OSError: No space left"),
    ],
)
def test_an_end_is_told_by_what_ended_it(tmp_path, error, how, reason):
    with pytest.raises(type(error)), SessionLog(tmp_path).recorded(lambda: 7, {}):
        raise error
    (session,) = read_sessions(tmp_path)
    assert (session.how, session.end_step) == (how, 7)
    assert session.reason == reason


def test_a_start_after_a_kill_in_mid_line_can_be_read(tmp_path):
    log = SessionLog(tmp_path)
    with log.recorded(lambda: 3, {}):
        pass
    with open(tmp_path / "sessions.jsonl", "a") as file:
        file.write('{"event": "sta')
    with log.recorded(lambda: 5, {}):
        pass
    assert [session.step for session in read_sessions(tmp_path)] == [3, 5]


def test_the_first_and_the_newest_answers_stay(tmp_path):
    for step in (10, 20, 30, 20):  # the last one: gone back to a checkpoint
        write_retrieved(tmp_path, step, {"t2i": {}, "i2t": {}})
    assert [found.step for found in read_retrieved(tmp_path)] == [10, 20]
    (tmp_path / "retrieved" / "step-00000020.json").write_text("[]")
    with pytest.raises(
        InputError, match=r"step-00000020.json: expected a gallery of retrieval, found .*; remove the file"
    ):
        read_retrieved(tmp_path)


def test_answers_that_cannot_be_written_are_said_and_end_nothing(tmp_path, capsys):
    (tmp_path / "retrieved").write_text("in the way")
    write_retrieved(tmp_path, 10, {})
    assert "warning: what was retrieved at step 10 could not be written" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_said_and_the_run_is_whole(place, monkeypatch, capsys):
    monkeypatch.setattr(training, "REPORT_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(report, "compose", lambda *_: 1 / 0)
    last = train("tiny", config_of(place, "unlucky", steps=2))
    assert last.is_dir()
    said = capsys.readouterr()
    assert "warning: report.html could not be written (division by zero); the run is whole" in said.err
    assert f"checkpoint: {last}" in said.out
    shutil.rmtree(place / "runs" / "unlucky")


def test_a_run_that_is_stopped_writes_its_page_and_renews_it_when_it_goes_on(place):
    stopped = Page(place / "stopped.html")
    assert "3 of 6 steps, epoch 0.75: the run stopped when asked to, and can go on, after" in stopped.words
    assert "6 of 6 steps" in Page(place / "runs" / "hard" / "report.html").words


# --- the page


def test_the_page_of_a_run_has_all_its_sections_and_loads_nothing(page):
    assert page.sections == [
        *("training", "evaluation", "speed", "numbers", "retrieved", "bad-samples", "starts", "settings")
    ]
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.all("img"))
    assert not page.all("script")
    assert not page.all("link")
    assert all(not link["href"].startswith("http") for link in page.all("a"))


def test_figures_are_those_of_the_metrics(place, page):
    entries = read_metrics(place / "runs" / "soft" / "metrics.jsonl")
    last = [entry for entry in entries if "loss" in entry][-1]
    assert f"loss, last {last['loss']:.4f}" in page.words
    assert "6 of 6" in page.words
    assert "samples seen 96" in page.words
    curve = next(svg["aria-label"] for svg in page.all("svg") if svg["aria-label"].startswith("Loss"))
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert curve == f"Loss (nats) over steps: loss from {losses[0]:.4g} to {losses[-1]:.4g} at step 6"
    labels = {svg["aria-label"].split(" (")[0] for svg in page.all("svg")}
    assert labels >= {
        *("Loss", "KL from the labels", "Logit scale", "Learning rate", "Gradient norm", "False negatives"),
        *("Zero-shot accuracy", "Recall at 1", "Recall at 5"),
        *("Samples a second", "Waiting for data", "MFU", "Memory"),
    }


def test_the_figures_of_each_evaluation_stand_in_a_column(place, page):
    values = [entry["i2t_r5"] for entry in read_metrics(place / "runs" / "soft" / "metrics.jsonl") if "i2t_r5" in entry]
    row = re.search(r"picture → caption, R@5, % ((?:[\d.]+ )+)", page.words)[1].split()
    assert row[:3] == [f"{value:.1f}" for value in values]
    assert "step 2 4 6 best" in page.words


def test_bad_samples_are_shown_with_reason_and_place(place, page):
    key = (place / "shards" / "gone.txt").read_text()
    assert f"train-00000.tar, {key}, first at step" in page.words
    assert "1 sample, met" in page.words
    assert any(f"sample {key} of train-00000.tar" in image["alt"] for image in page.all("img"))


def test_of_a_picture_that_was_cut_short_the_upper_part_is_shown():
    data = io.BytesIO()
    Image.new("RGB", (400, 400), (200, 30, 30)).save(data, "JPEG", quality=95)
    picture = report.trouble._what_is_left(data.getvalue()[:-400], "x")
    assert picture.alt == "what is left of x"
    shown = Image.open(io.BytesIO(base64.b64decode(picture.src.removeprefix("data:image/jpeg;base64,"))))
    red = shown.getpixel((20, 5))
    assert red[0] > 180 > 60 > red[1]


def test_the_same_queries_are_shown_at_the_first_and_the_newest_evaluation(place, page):
    assert [found.step for found in read_retrieved(place / "runs" / "soft")] == [2, 6]
    notes = re.findall(r"step (\d): right (picture|caption) at rank \d+ of (\d+)", page.words)
    assert notes.count(("2", "picture", "9")) == notes.count(("2", "caption", "18")) == 3
    assert notes.count(("6", "picture", "9")) >= 3
    assert "The same queries at the first evaluation and at the newest." in page.words


def test_settings_are_told_against_the_recipe(place, page):
    assert "soft against recipe tiny this run recipe" in page.words
    assert "--global-batch-size 16 256" in page.words
    assert "--log.peak-tflops 0.01 None" in page.words
    assert "--optim.eps" in page.words.split("settings of soft")[1], "all are there, if folded away"
    assert "--optim.eps" not in page.words.split("settings of soft")[0]


def test_several_runs_lie_on_top_of_each_other_on_a_page_beside_the_first(place):
    out = report.write_report([place / "runs" / "soft", place / "runs" / "hard"])
    assert out == place / "runs" / "comparison.html"
    both = Page(out)
    out.unlink()
    assert "2 runs side by side (2 finished)" in both.words
    loss = next(svg["aria-label"] for svg in both.all("svg") if svg["aria-label"].startswith("Loss"))
    assert "soft from" in loss
    assert "hard from" in loss
    assert "Settings that differ soft hard --loss.name object_iou hard" in both.words
    assert "MFU, median" in both.words


def test_the_command_takes_names_and_prints_a_summary(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["report", "hard", "--out", "pages/hard.html"])
    report.main()
    said = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    assert "| steps | 6 of 6 |" in said
    assert "| starts | 2 |" in said
    assert said.endswith("report: pages/hard.html\n")
    assert "hard: starts" in Page(place / "pages" / "hard.html").words


def test_the_command_alone_takes_the_newest_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["report"])
    report.main()
    assert "no run given: taking the newest, runs/hard" in capsys.readouterr().out


# --- whatever the run folder holds


def written(folder: Path, lines=(), sessions=(), settings=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if sessions:
        (folder / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sessions))
    if settings is not None:
        (folder / "config.yaml").write_text(settings)
    return folder


def line(step, **values):
    return {"step": step, "samples_seen": 16 * step, "loss": 2.0, "kl": 1.0, "time": 1000.0 + step, **values}


def started(step=0, at=None, **facts):
    return {"event": "start", "step": step, "time": time.time() if at is None else at, "total_steps": 100, **facts}


def of(folder):
    return Page(report.write_report([folder]))


def test_a_run_without_a_step_has_a_page(tmp_path):
    shown = of(written(tmp_path / "run", sessions=[started()]))
    assert "0 of 100 steps" in shown.words
    assert "the run has been going on" in shown.words
    assert "training" not in shown.sections


def test_a_run_that_failed_before_its_first_step_says_why(tmp_path):
    end = {"event": "end", "step": 0, "how": "failed", "reason": "OSError: <gone>", "time": 1001.0}
    shown = of(written(tmp_path / "run", sessions=[started(at=1000.0), end]))
    assert "It failed at step 0: OSError: <gone>." in shown.words


def test_a_run_that_goes_on_tells_the_time_left(tmp_path):
    now = time.time()
    lines = [line(step, time=now - 50 + step, seconds_per_step=1.0, epoch=0.1) for step in range(1, 51)]
    shown = of(written(tmp_path / "run", lines, [started(at=now - 50)]))
    assert "50 of 100 steps" in shown.words
    assert "About 50 s are left." in shown.words
    assert "Its last line is of" in shown.words


def test_a_run_that_is_silent_for_long_has_ended_without_a_word(tmp_path, monkeypatch):
    folder = written(tmp_path / "run", [line(1)], [started(at=1000.0)])
    long_ago = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: long_ago)
    assert read_run(folder).state == "ended without a word"
    assert "goes on from the last checkpoint" in of(folder).words


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0\0\0", b'{"loss": 1.0, "x": "\xff\xfe', b"[3]"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    folder = written(tmp_path / "run", [line(1), line(2)])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [entry["step"] for entry in read_run(folder).training] == [1, 2]
    assert "Loss" in of(folder).words


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = written(tmp_path / "run", [line(1), line(2)])
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("oops\n" + text)
    with pytest.raises(
        InputError, match=r"metrics.jsonl, line 1: expected a JSON object, found 'oops' .*; remove the line"
    ):
        report.write_report([folder])


def test_losses_that_are_not_finite_leave_the_page_whole(tmp_path):
    lines = [line(1), line(2, loss=float("nan")), line(3, grad_norm=float("inf")), line(4, grad_norm=0.0)]
    assert "Gradient norm" in of(written(tmp_path / "run", lines)).words


def test_a_figure_that_is_never_finite_is_left_out(tmp_path):
    shown = of(written(tmp_path / "run", [line(1, grad_norm=float("nan")), line(2, grad_norm=float("nan"))]))
    assert not [svg for svg in shown.all("svg") if svg["aria-label"].startswith("Gradient")]


def test_runs_of_another_version_are_shown_as_far_as_they_tell(tmp_path):
    settings = "steps: 4\nglobal_batch_size: 8\nmodel:\n  name: old-model\n  forgotten: 3\nloss: nothing\n"
    lines = [{"step": 1, "loss": 2.0}, {"step": 4, "loss": 1.5, "speed": "fast"}]
    shown = of(written(tmp_path / "run", lines, [started(recipe="gone", total_steps=4)], settings))
    assert "--model.forgotten 3 –" in shown.words
    assert "the defaults (the recipe is not known)" in shown.words
    assert "old-model" in shown.words


def test_a_run_folder_without_settings_says_so(tmp_path):
    assert "there is no config.yaml in the run folder" in of(written(tmp_path / "run", [line(1)])).words


def test_an_unknown_run_gets_the_nearest_names(tmp_path):
    for name in ("cc12m", "cc12m-hard", "yfcc"):
        written(tmp_path / name, [line(1)])
    (tmp_path / "cc12").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        InputError, match=r"found none, perhaps 'cc12m' or 'cc12m-hard'; runs in .*: cc12m, cc12m-hard, yfcc$"
    ):
        find_run(Path("cc12m-h"), tmp_path)
    assert find_run(Path("yfcc"), tmp_path) == tmp_path / "yfcc"
    with pytest.raises(InputError, match=r"expected a run folder with metrics.jsonl at .*cc12, found an empty folder"):
        report.write_report([find_run(Path("cc12"), tmp_path)])


def test_no_runs_at_all_say_what_makes_one(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"found none; name a run folder, or make one with `python -m pretrain.run"):
        newest_run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "mine"])
    with pytest.raises(SystemExit, match="2"):
        command(report.main)
    assert "expected a run folder at mine or runs/mine, found none; runs in runs/: none" in capsys.readouterr().err


def test_a_run_named_twice_and_more_runs_than_colours_are_refused(tmp_path):
    folders = [written(tmp_path / str(number), [line(1)]) for number in range(7)]
    with pytest.raises(InputError, match="expected different runs"):
        report.write_report([folders[0], tmp_path / "1" / ".." / "0"])
    with pytest.raises(InputError, match="expected at most 6 runs in one report, found 7"):
        report.write_report(folders)


def test_runs_of_one_name_get_the_folder_above_it(tmp_path):
    folders = [written(tmp_path / parent / "tiny", [line(1)]) for parent in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/tiny", "b/tiny"]


def test_a_long_run_is_drawn_with_few_points(tmp_path):
    lines = [line(step, grad_norm=1 + step % 7, mfu=0.4, similar_pairs=0.01) for step in range(1, 8_001)]
    for number in range(1, 41):
        lines.append({"step": 200 * number, "samples_seen": 1, "zeroshot_top1": float(number), "i2t_r1": 1.0})
    folder = written(tmp_path / "run", lines, settings=configuration_text())
    out = report.write_report([folder])
    assert out.stat().st_size < 600_000
    shown = Page(out)
    assert "All figures, 6 of 40 evaluations" in shown.words
    assert "step 200 1,600 3,200 4,800 6,400 8,000 best" in shown.words
    drawn = re.search(r'aria-label="Loss.*?</svg>', shown.source, re.DOTALL)[0]
    assert max(path.count("L ") for path in re.findall(r' d="([^"]*)"', drawn)) <= 2 * MOST_POINTS + 2


def configuration_text():
    import yaml

    return yaml.safe_dump(configuration.to_dict(PretrainConfig()))


def test_a_skipped_step_names_rank_and_samples(tmp_path):
    folder = written(tmp_path / "run", [line(1), line(3)])
    bad = {
        "step": 2,
        "grad_norm": "nan",
        "ranks": [{"loss": 2.0, "keys": ["a", "b"]}, {"loss": "nan", "keys": [f"k{n}" for n in range(9)]}],
    }
    (folder / "bad_steps.jsonl").write_text(json.dumps(bad) + "\n")
    shown = of(folder)
    assert "step 2 loss, rank 1 nan k0, k1, k2, k3 and 5 more" in shown.words
    assert "1 step was skipped because loss or gradient was not finite." in shown.words


# --- remarks


def run_of(training, settings=None, evaluations=(), **changes):
    lines = [{"samples_seen": 16 * (number + 1), "step": number + 1, **entry} for number, entry in enumerate(training)]
    base = Run(Path("nowhere"), "run", lines, list(evaluations), [], [], [], settings or {"steps": len(lines)}, {})
    return dataclasses.replace(base, **changes)


SOUND = {"loss": 2.0, "kl": 1.0, "logit_scale": 20.0, "data_wait_share": 0.01, "samples_per_second": 100.0}


def test_a_sound_run_has_no_remarks():
    assert remarks(run_of([SOUND] * 40, {"steps": 40, "global_batch_size": 64, "optim.max_logit_scale": 100.0})) == []


def top1(*values):
    return [{"step": 10 * (number + 1), "zeroshot_top1": value} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("run", "remark"),
    [
        (run_of([SOUND | {"data_wait_share": 0.3}] * 9), "30 % of the time went into waiting for data"),
        (
            run_of([SOUND | {"samples_per_second": 100.0 if n < 50 else 60.0} for n in range(60)]),
            "It has become slower: 60 samples/s of late, 100 in the first half",
        ),
        (
            run_of([SOUND | {"loader_memory_bytes": 1e9 + 5e7 * n} for n in range(60)]),
            "Memory of the loaders grows",
        ),
        (
            run_of([SOUND | {"loss": math.log(64)}] * 9, {"steps": 9, "global_batch_size": 64}),
            "The loss stays at ln(pairs contrasted) = 4.159: all features are alike",
        ),
        (
            run_of([SOUND | {"loss": math.log(8)}] * 9, {"steps": 9, "global_batch_size": 64, "loss.group_size": 8}),
            "The loss stays at ln(pairs contrasted) = 2.079: all features are alike",
        ),
        (run_of([SOUND | {"kl": 1.0 + max(0, n - 30) / 10} for n in range(64)]), "KL has risen from 1.000"),
        (
            run_of([SOUND | {"logit_scale": 100.0}] * 9, {"steps": 9, "optim.max_logit_scale": 100.0}),
            "The logit scale is at its cap of 100",
        ),
        (
            run_of([SOUND] * 40, evaluations=top1(10.0, 30.0, 20.0)),
            "Zero-shot top-1 was best at step 20 (30.0 %); at step 30 it is 20.0 %",
        ),
        (run_of([SOUND | {"bad_samples": 4}] * 9), "2.7 % of the samples read could not be used (4)"),
        (run_of([SOUND] * 9, {"steps": 90}), "It has 9 of 90 steps, and nothing has been added of late"),
        (
            run_of([SOUND] * 9, files=[Path("hang/rank-00001.txt")]),
            "A rank hung; hang/ in the run folder has the stacks",
        ),
    ],
)
def test_what_is_wrong_is_remarked_alone(run, remark):
    (found,) = remarks(run)
    assert remark in found


# --- in a browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_every_picture_and_neither_phone_nor_desk_scrolls_sideways(page, place, tmp_path):
    both = Page(report.write_report([place / "runs" / "soft", place / "runs" / "hard"], tmp_path / "both.html"))
    assert "CONSOLE" not in dumped(place / "runs" / "soft" / "report.html", tmp_path).stderr

    # The page's own policy forbids scripts, and a window is 500 wide at least: frames of both widths, looked into.
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px" srcdoc="{html_escapes.escape(shown.source)}"></iframe>'
        for shown in (page, both)
        for width in (360, 1200)
    )
    look = (
        "<script>onload = () => { document.body.dataset.found = [...document.querySelectorAll('iframe')].map(f => {"
        "const d = f.contentDocument, all = [...d.images], e = d.documentElement;"
        "return [f.clientWidth, e.scrollWidth <= e.clientWidth, all.filter(i => i.naturalWidth).length].join(' ') "
        "}).join(', ') }</script>"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(f"<!DOCTYPE html><body>{frames}{look}</body>", encoding="utf-8")
    found = re.search(r'data-found="([^"]*)"', dumped(frame, tmp_path).stdout)[1]
    numbers = [len(page.all("img")), len(both.all("img"))]
    assert numbers[0] > 10
    assert found == ", ".join(f"{width} true {number}" for number in numbers for width in (360, 1200))

"""setclip.demo: the whole road by the real commands, and what it says when it cannot go on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from setclip import demo
from setclip.demo_record import ARMS, SLOTS, DemoFolder, DemoRecord
from setclip.errors import InputError

ROOT = Path(__file__).parents[1]


def test_the_arms_differ_in_loss_and_place_only(tmp_path):
    folder, config = DemoFolder(tmp_path), demo.DemoConfig(out=tmp_path)
    ours, hard = (demo.pretrain_command(folder, config, arm) for arm in ARMS)
    assert [(a, b) for a, b in zip(ours, hard, strict=True) if a != b] == [
        ("object_iou", "hard"),
        (str(folder.run("object_iou")), str(folder.run("hard"))),
    ]


def test_steps_and_seed_reach_the_commands(tmp_path):
    config = demo.DemoConfig(out=tmp_path, steps=77, seed=5)
    line = " ".join(demo.pretrain_command(DemoFolder(tmp_path), config, "hard"))
    assert "--steps 77 --seed 5" in line
    assert "--seed 5" in " ".join(demo.scenes_command(DemoFolder(tmp_path), config))


def test_a_folder_with_something_else_is_never_removed(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=r"something else than a demo in it, which --overwrite True would not remove"
        ):
            demo.claim(tmp_path, overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_earlier_demo_is_replaced_only_when_asked_to(tmp_path):
    DemoRecord(config={}).save(tmp_path)
    (tmp_path / "old").touch()
    with pytest.raises(InputError, match=r"found an earlier demo in .*; replace it with --overwrite True"):
        demo.claim(tmp_path, overwrite=False)
    assert (tmp_path / "old").exists()
    demo.claim(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_step_names_the_command_to_repeat(tmp_path):
    steps = demo.Demo(DemoFolder(tmp_path), demo.DemoConfig(out=tmp_path))
    steps.step("go well", ["-c", "pass"])
    with pytest.raises(
        InputError, match=r"step '2/7 go wrong' ended with status 3.*\npython -c 'raise SystemExit\(3\)'$"
    ):
        steps.step("go wrong", ["-c", "raise SystemExit(3)"], ["-c", "print('not reached')"])
    assert [step.title for step in DemoRecord.load(tmp_path).steps] == ["go well"]


def test_the_first_arm_s_model_is_fine_tuned_by_its_own_loss(tmp_path):
    line = " ".join(demo.finetune_command(DemoFolder(tmp_path), demo.DemoConfig(out=tmp_path, seed=5)))
    assert f"--model {tmp_path / 'runs' / 'object_iou'} " in line
    assert "--contrastive.name object_iou" in line
    assert "--seed 5" in line


def test_no_steps_are_refused():
    with pytest.raises(InputError, match=r"expected at least 1 step, found --steps 0"):
        demo.DemoConfig(steps=0)


@pytest.mark.slow
def test_the_fast_demo_goes_all_the_way(tmp_path):
    out = tmp_path / "demo"
    flags = f"--fast True --overwrite False --out {out}"
    line = [sys.executable, "-m", "setclip.demo", *flags.split()]
    # What the README names; a checkout that was not installed by `make` would be now.
    by_make = ["make", "-C", ROOT, "demo", f"DEMO_FLAGS={flags}", "--no-print-directory"]
    installed = ROOT / ".venv/.installed"
    is_installed = installed.exists() and installed.stat().st_mtime > (ROOT / "pyproject.toml").stat().st_mtime
    done = subprocess.run(by_make if is_installed else line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    folder = DemoFolder(out)
    lines = done.stdout.splitlines()
    if is_installed:
        assert lines.pop().startswith("Open ")  # make's own
    assert lines[-1] == f"report: {folder.report}"
    for number in range(1, demo.NUM_STEPS + 1):
        assert f"\n=== {number}/{demo.NUM_STEPS} " in done.stdout
    for module in ("data_prep.run scenes", "pretrain.run tiny", "finetune.run --head slot"):
        assert f"$ python -m {module} " in done.stdout
    for module in ("eval_suite.retrieval", "eval_suite.zeroshot scenes", "eval_suite.diagnostics"):
        assert f"$ python -m {module} " in done.stdout
    html = folder.report.read_text(encoding="utf-8")
    for arm in ARMS:
        assert (folder.checkpoint(arm) / "model.safetensors").stat().st_size > 0
        top1 = json.loads(folder.results("zeroshot", arm).read_text())["metrics"]["top1"]
        low, high = top1["interval_95"]
        shown = [f"{value:.2f}" if 0 < value < 1 else f"{value:.1f}" for value in (top1["value"], low, high)]
        assert f"<td>{shown[0]} [{shown[1]}, {shown[2]}]</td>" in html
    rsum = json.loads(folder.results("retrieval", SLOTS).read_text())["metrics"]["rsum"]["value"]
    section = html.split('<section id="sets"')[1].split("</section>")[0]
    assert f"<td>{rsum:.1f} [" in section
    assert section.count("<img") == 4 * (1 + 4)
    assert "Made with --fast True" in html

    again = subprocess.run(line, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "--overwrite True" in again.stderr
    assert folder.report.exists()

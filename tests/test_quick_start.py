"""Imports of our commands with few garbage collections: when, and that nothing of it stays."""

import gc
import subprocess
import sys

import pytest

from setclip import config, quick_start
from setclip.errors import InputError


@pytest.fixture
def as_command(monkeypatch):
    """This process as one that was started as `python -m pretrain.run`."""
    before = gc.get_threshold()
    gc.unfreeze()  # what the tests themselves were made of
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pretrain.run", "tiny"])
    yield
    quick_start.end()
    gc.freeze()
    gc.set_threshold(*before)


@pytest.mark.parametrize(
    ("words", "is_ours"),
    [
        (["python", "-m", "pretrain.run", "cc12m"], True),
        (["python", "-u", "-m", "finetune.run", "--head", "slot"], True),
        (["python", "-m", "torch.distributed.run", "-m", "pretrain.run"], False),
        (["python", "-m", "pretraining"], False),
        (["python", "-m", "benchmarks.open_clip_trainer"], False),
        (["python", "-X", "importtime", "-W", "error", "-m", "eval_suite.zeroshot", "imagenet"], True),
        (["python", "train.py", "setclip"], False),
        (["python", "bin/torchrun", "-m", "pretrain.run"], False),
        (["python", "-c", "import sys", "-m", "pretrain.run"], False),
        (["python", "-m"], False),
        ([], False),
    ],
)
def test_only_our_commands_are_started_so(words, is_ours):
    assert quick_start.is_our_command(words) is is_ours


def test_a_program_that_imports_setclip_keeps_its_collector(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py"])
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    quick_start.begin_if_command()
    quick_start.end()
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)


def test_a_command_imports_with_few_collections_and_trains_with_pythons_own(as_command):
    before = gc.get_threshold()
    quick_start.begin_if_command()
    quick_start.begin_if_command()  # setclip was imported twice
    assert gc.get_threshold()[0] > 10 * before[0]
    seen = []
    config.command(lambda: seen.append((gc.get_threshold(), gc.get_freeze_count() > 10_000)))
    assert seen == [(before, True)]


def test_a_command_that_fails_has_its_collector_again(as_command):
    before = gc.get_threshold()
    quick_start.begin_if_command()

    def fail():
        raise InputError("expected more")

    with pytest.raises(SystemExit):
        config.command(fail)
    assert gc.get_threshold() == before


@pytest.mark.slow
def test_a_real_command_begins_and_ends_it_and_its_end_is_silent():
    code = (
        "import gc, runpy, sys; sys.orig_argv = ['python', '-m', 'pretrain.run']; sys.argv = ['run', '--help']\n"
        "try: runpy.run_module('pretrain.run', run_name='__main__')\n"
        "except SystemExit as end: print('status', end.code, 'frozen', gc.get_freeze_count() > 100_000, gc.get_threshold())"
    )
    plain = subprocess.run(
        [sys.executable, "-c", "import gc; print(gc.get_threshold())"], capture_output=True, text=True
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"status 0 frozen True {plain.stdout.strip()}"
    assert "leaked" not in done.stderr, "of what triton's binding finds there when the program ends"

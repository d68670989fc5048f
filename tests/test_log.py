"""What people see: lines in a job's log, and one speaker among the ranks."""

import re

import pytest

from setclip import log
from setclip.log import Meter, duration, progress, say, warn


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def is_alone(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_a_meter_in_a_pipe_prints_plain_lines_with_rate_and_time_left(capsys, clock):
    meter = Meter(1_000, "reading", "samples")
    for _ in range(4):
        clock[0] += 5.0
        meter.update(100, note="loss 1.5")
    assert capsys.readouterr().out.splitlines() == [
        "reading: 200/1,000 samples, 20 samples/s, 40 s left, loss 1.5",
        "reading: 400/1,000 samples, 20 samples/s, 30 s left, loss 1.5",
    ]


def test_seconds_between_lines_decide_how_often(capsys, clock, monkeypatch):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    meter = Meter(3, "working", "steps")
    for _ in range(3):
        clock[0] += 4.0
        meter.update()
    assert [line.partition(" steps")[0] for line in capsys.readouterr().out.splitlines()] == [
        "working: 1/3",
        "working: 2/3",
        "working: 3/3",
    ]


def test_long_work_leaves_a_last_line_and_short_work_none(capsys, clock):
    short = Meter(2, "short")
    clock[0] += 1.0
    short.update(2)
    short.close()
    assert capsys.readouterr().out == ""
    long = Meter(2, "long")
    clock[0] += 9.0
    long.update(2)
    clock[0] += 2.0
    long.close()
    assert capsys.readouterr().out == "long: 2/2 samples, 0.18 samples/s\n"


def test_the_rate_of_a_resumed_run_counts_what_it_did_itself(capsys, clock):
    meter = Meter(2_000, "training", initial=1_000)
    clock[0] += 10.0
    meter.update(500)
    assert "1,500/2,000 samples, 50 samples/s, 10 s left" in capsys.readouterr().out


def test_without_a_total_there_is_no_time_left(capsys, clock):
    meter = Meter(None, "reading")
    clock[0] += 20.0
    meter.update(40)
    assert capsys.readouterr().out == "reading: 40 samples, 2.00 samples/s\n"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_rank_1_is_silent(capsys, clock, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    meter = Meter(10, "reading")
    clock[0] += 60.0
    meter.update(5)
    meter.print_above("a line")
    meter.close()
    say("something")
    warn("something else")
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def test_rank_0_says_and_warns(capsys):
    say("hello")
    warn("careful")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("hello\n", "warning: careful\n")


def test_progress_yields_every_item_and_counts_it(capsys, monkeypatch):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress("abc", description="letters", unit="letters")) == ["a", "b", "c"]
    assert re.match(r"letters: 1/3 letters, [\d.,]+ letters/s, ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(41.4, "41 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"), (12_000, "3 h 20 min"), (0, "0 s")],
)
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text

"""The papers' claims as experiments: what is judged, that a killed experiment goes on, and a page that is made of JSON alone."""

import gzip
import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import jobs_material
import pytest
import torch
from finetune_material import Killed, write_shards
from scipy import stats

from benchmarks.claims import batch, corpus, page
from benchmarks.claims.appearance import describe_nouns
from benchmarks.claims.choice import choose
from benchmarks.claims.corpus import LABELS, domains, labels
from benchmarks.claims.experiment import Arm, Claim, Default, Experiment, Found, Measure, Options, Plot, Row, Table
from benchmarks.claims.figure import write_figure
from benchmarks.claims.identity import check_unit, common_settings, shards_of
from benchmarks.claims.jobs import in_processes
from benchmarks.claims.judge import Paired, holds_chance, holm, paired, verdict
from benchmarks.claims.pretraining import with_settings
from benchmarks.claims.registry import EXPERIMENTS
from benchmarks.claims.run import ClaimsConfig, claims, main, share
from benchmarks.claims.sets import CLAIMS, HISTORY, log_variances
from benchmarks.claims.units import held, read_units, run_missing
from data_prep.plan import Record
from data_prep.sources.folder import FolderConfig, plan
from finetune.config import FinetuneConfig
from finetune.data import open_parts
from pretrain.config import RECIPES, PretrainConfig
from pretrain.stopping import Stopped
from setclip.descriptions import read_descriptions
from setclip.errors import InputError
from setclip.models.heads import HeadOutput
from setclip.shards import Shard, key_of

QUICK = Options(quick=True)


# --- judging


def test_the_paired_test_is_student_s():
    first, second = [49.1, 52.3, 50.2, 51.0], [47.0, 51.9, 48.8, 50.1]
    found, expected = paired(first, second), stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval_95 == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.count, found.mean) == (4, pytest.approx(1.2))
    assert found.deviation == pytest.approx(0.7257, abs=1e-4)


def test_one_seed_and_equal_differences_give_no_p_value():
    assert paired([3.0], [2.0]) == Paired(count=1, mean=1.0, deviation=None, interval_95=None, p_value=None)
    assert paired([3.0, 4.0], [2.0, 3.0]) == Paired(count=2, mean=1.0, deviation=0.0, interval_95=(1, 1), p_value=None)


def between(low: float, high: float) -> Paired:
    return Paired(count=3, mean=(low + high) / 2, deviation=1.0, interval_95=(low, high), p_value=0.5)


@pytest.mark.parametrize(
    ("low", "high", "kind", "expected"),
    [
        (0.1, 0.8, "more", "less than would matter"),
        (-0.8, -0.1, "more", "less than would matter"),
        (0.1, 5.0, "more", "holds here"),
        (-5.0, -0.1, "more", "contradicted"),
        (-0.9, 0.8, "more", "no difference seen"),
        (-0.9, 1.1, "more", "inconclusive"),
        (-1.1, 0.2, "more", "inconclusive"),
        (-5.0, -0.1, "less", "holds here"),
        (0.1, 5.0, "less", "contradicted"),
        (-0.9, 0.8, "equal", "holds here"),
        (0.1, 0.8, "equal", "holds here"),
        (1.1, 5.0, "equal", "contradicted"),
        (-5.0, -1.1, "equal", "contradicted"),
        (-0.9, 1.1, "equal", "inconclusive"),
    ],
)
def test_a_verdict_goes_by_where_the_interval_lies(low, high, kind, expected):
    assert verdict(between(low, high), kind, 1.0, 0.04) == expected


def test_a_claim_holds_or_is_contradicted_only_by_the_adjusted_p_value():
    for sign, word in ((1, "holds"), (-1, "contradicted")):
        found = between(*sorted((sign * 0.1, sign * 5.0)))
        assert verdict(found, "more", 1.0, 0.11) == f"{word}, but not after adjusting"
        assert verdict(found, "more", 1.0, 0.05) == f"{word}, but not after adjusting"
    assert verdict(between(0.1, 0.8), "more", 1.0, 0.11) == "less than would matter"


def test_the_same_difference_with_every_seed_is_inconclusive_except_within_an_arm():
    same = paired([10.1, 20.3], [10.0, 20.2])  # equal but for rounding
    assert same.deviation == 0
    assert verdict(same, "more", 0.01) == "inconclusive"
    assert verdict(same, "more", 0.01, is_one_arm=True) == "holds here"
    assert verdict(paired([5.0, 6.0], [5.0, 6.0]), "equal", 1.0, is_one_arm=True) == "holds here"


def test_one_seed_or_an_arm_that_chance_explains_is_inconclusive():
    assert verdict(paired([9.0], [1.0]), "more", 1.0) == "inconclusive"
    assert verdict(between(1, 2), "more", 1.0, is_chance=True) == "inconclusive"
    assert holds_chance([9.0, 11.0, 10.5], 10.0)
    assert not holds_chance([29.0, 31.0, 30.5], 10.0)
    assert holds_chance([19.0], 10.0)
    assert not holds_chance([21.0], 10.0)
    assert not holds_chance([1.0], None)


def test_p_values_are_adjusted_for_their_number_as_holm_does():
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]


# --- running, with arms that are computed at once


def experiment_of(calls: list, fails_at: int | None = None) -> Experiment:
    """Returns an experiment whose runs are noted in `calls`; the run of that number breaks off."""

    def run(prepared: str, settings, seed: int, out: Path) -> Found:
        assert prepared == "prepared"
        if len(calls) == fails_at:
            out.mkdir(parents=True, exist_ok=True)
            raise Killed
        calls.append((settings["base"], settings.get("lr"), seed))
        value = settings["base"] + (0.6 if settings["base"] > 10 else 0.5) * seed - abs(settings.get("lr", 2.0) - 2.0)
        return Found(
            values={
                "score": value,
                "sets.score": value + 0.01 * seed,
                "nothing": None,
                "some": value if seed else None,
            },
            held_out={"score": value},
            chance={"score": 1.0},
            steps=3,
        )

    def prepare_all(work: Path, shared: Path, options: Options) -> str:
        calls.append("prepared")
        return "prepared"

    rates = ({"lr": 1.0}, {"lr": 2.0})
    return Experiment(
        title="Scores",
        question="Which is best?",
        about={"Data": "none."},
        limits=["Nothing."],
        arms={
            "low": Arm(what="the low one", settings={"base": 10.0}, candidates=rates),
            "high": Arm(what="the high one", settings={"base": 20.0}),
            "still": Arm(what="not trained", settings={"base": 5.0}, is_fixed=True),
        },
        rows={
            "low": Row(arm="low"),
            "high": Row(arm="high"),
            "high, sets": Row(arm="high", prefix="sets."),
            "still": Row(arm="still"),
        },
        measures={
            "score": Measure(heading="score"),
            "nothing": Measure(heading="never there"),
            "some": Measure(heading="some"),
        },
        claims=[
            Claim(text="high beats low", source="A", better="high", worse="low", measure="score", margin=1.0),
            Claim(text="low beats still", source="B", better="low", worse="still", measure="score", margin=1.0),
            Claim(
                text="sets are as good",
                source="C",
                better="high, sets",
                worse="high",
                measure="score",
                margin=1.0,
                kind="equal",
            ),
        ],
        chosen_by="score",
        seeds=3,
        settings={"train": {"steps": 3}},
        made_of=lambda prepared: {"shards": {"photos": {"digest": prepared, "samples": {"train": 2431}}}},
        prepare=prepare_all,
        run=run,
        tables=lambda units: [Table(title="More", text="Of all.", header=["a"], rows=[[str(len(units))]])],
        plot=lambda units: Plot(title="A line", x_label="x", y_label="y", series={"one": [[1, 2], [2, 3]]}),
    )


def test_without_a_figure_of_its_own_an_experiment_shows_the_measure_that_chooses(tmp_path):
    experiment = replace(experiment_of([]), plot=None)
    run_all(experiment, tmp_path)
    content = page.gather("made up", experiment, read_units(tmp_path, {}), {}, "command")
    series = content["plot"]["series"]
    assert content["plot"]["y_label"] == content["measures"]["score"]["heading"]
    assert series.keys() == content["rows"].keys()
    for name, [[_, mean, deviation]] in series.items():
        measured = content["rows"][name]["measures"]["score"]
        assert (mean, deviation) == (measured["mean"], measured["deviation"] or 0.0)
    unseen = replace(experiment, chosen_by="another")
    assert page.gather("made up", unseen, [], {}, "command")["plot"] is None
    for path in (tmp_path / "units").glob("high-seed[12].json"):
        path.unlink()
    series = page.gather("made up", experiment, read_units(tmp_path, {}), {}, "command")["plot"]["series"]
    assert {"low", "high (1 seed)", "still"} <= set(series), "the one that is fixed has its one seed by design"


def run_all(experiment: Experiment, work: Path, **more) -> int:
    return run_missing(experiment, work, work / "data", QUICK, experiment.seeds, **more)


def test_the_candidate_that_held_out_data_choose_is_taken_for_the_other_seeds(tmp_path):
    calls: list = []
    assert run_all(experiment_of(calls), tmp_path) == 8
    assert calls == [
        "prepared",
        (10.0, 1.0, 0), (10.0, 2.0, 0), (20.0, None, 0), (5.0, None, 0),
        (10.0, 2.0, 1), (20.0, None, 1), (10.0, 2.0, 2), (20.0, None, 2),
    ]  # fmt: skip


def test_arms_that_come_last_follow_all_seeds_of_the_others(tmp_path):
    calls: list = []
    experiment = experiment_of(calls)
    arms = {**experiment.arms, "low": replace(experiment.arms["low"], comes_last=True)}
    run_all(replace(experiment, arms=arms), tmp_path)
    assert calls[1:] == [
        (20.0, None, 0), (5.0, None, 0), (20.0, None, 1), (20.0, None, 2),
        (10.0, 1.0, 0), (10.0, 2.0, 0), (10.0, 2.0, 1), (10.0, 2.0, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("fails_at", [0, 1, 3, 6])
def test_an_experiment_that_breaks_off_does_only_what_is_missing(tmp_path, fails_at):
    whole: list = []
    run_all(experiment_of(whole), tmp_path / "whole")
    calls: list = []
    with pytest.raises(Killed):
        run_all(experiment_of(calls, fails_at=fails_at + 1), tmp_path / "broken")
    before = len(calls) - 1
    run_all(experiment_of(calls), tmp_path / "broken")
    assert before == fails_at
    assert [call for call in calls if call != "prepared"] == whole[1:]
    assert run_all(experiment_of(calls), tmp_path / "broken") == 0
    assert calls[-1] != "prepared"  # nothing is prepared where nothing is missing
    assert not list((tmp_path / "broken/runs").glob("*"))


def test_two_calls_at_once_share_the_runs_and_make_none_twice(tmp_path):
    calls: list = []
    experiment = experiment_of(calls)
    both = threading.Barrier(2, timeout=30)

    def run(prepared, settings, seed, place):
        if seed == 0 and settings["base"] == 10.0:
            both.wait()  # the two candidates are tried at once, so by two calls
        return experiment.run(prepared, settings, seed, place)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: run_all(replace(experiment, run=run), tmp_path), range(2)))
    assert sum(made) == 8
    assert min(made) > 0
    runs = [call for call in calls if call != "prepared"]
    assert sorted(runs, key=str) == sorted(set(runs), key=str)
    assert len(runs) == 8


def test_several_processes_work_at_once_and_the_first_speaks_here(tmp_path, capfd, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert in_processes(partial(jobs_material.meet, tmp_path, 2), 2, tmp_path / "logs") == []
    assert len(set((tmp_path / "calls").read_text().split())) == 2
    (log,) = (tmp_path / "logs").iterdir()
    assert log.read_text().startswith("one of several\n")
    assert capfd.readouterr().out.count("one of several") == 1
    assert "OMP_NUM_THREADS" not in os.environ


def test_each_of_several_processes_has_its_part_of_the_cores(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    in_processes(jobs_material.say_threads, 1, tmp_path)
    assert capfd.readouterr().out.startswith(f"{cores}\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the user says
    in_processes(jobs_material.say_threads, 1, tmp_path)
    assert capfd.readouterr().out.startswith("1\n")


def test_a_process_that_fails_is_told_with_the_end_of_its_log_and_the_others_go_on(tmp_path, capfd):
    (failure,) = in_processes(partial(jobs_material.fail_on_the_second, tmp_path), 2, tmp_path)
    assert re.match(r"process [12] ended with status 1", failure)
    assert "no more room" in failure + capfd.readouterr().err  # the first one's own words stand in the terminal


def test_processes_that_share_are_asked_to_stop_together_and_save(tmp_path):
    asks = multiprocessing.get_context("spawn").Process(
        target=jobs_material.ask_to_stop, args=(os.getpid(), tmp_path, 2)
    )
    asks.start()
    with pytest.raises(Stopped, match="SIGUSR1"):
        in_processes(partial(jobs_material.train_until_asked, tmp_path), 2, tmp_path / "logs")
    asks.join()
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_the_page_of_a_part_lies_beside_its_runs_and_names_the_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda options: experiment_of([]))
    assert claims("toy", ClaimsConfig()) == Path("docs/claims/toy.md")
    whole = Path("docs/claims/toy.md").read_text()
    text = claims("toy", ClaimsConfig(arms=("high", "still"), seeds=2)).read_text()
    assert Path("docs/claims/toy.md").read_text() == whole
    assert "`python -m benchmarks.claims toy --arms high still --seeds 2`" in text
    assert "| high | 2 |" in text
    assert "| low | 0 |" in text
    assert "| high | 3 |" in whole


def published(tmp_path, monkeypatch, name: str = "toy", **options) -> Path:
    """Runs the toy experiment in a folder of its own and returns its archive."""
    place = tmp_path / f"published-{name}"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setitem(EXPERIMENTS, name, lambda options: experiment_of([]))
    claims(name, ClaimsConfig(**options))
    return place / f"docs/claims/{name}.runs.jsonl.gz"


def elsewhere(tmp_path, monkeypatch) -> list:
    """Goes to a new folder; returns the calls of the toy experiment that is to be run there."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    calls: list = []
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda options: experiment_of(calls))
    return calls


def test_published_runs_give_the_same_page_elsewhere_and_are_gone_on_from(tmp_path, monkeypatch):
    archive = published(tmp_path, monkeypatch)
    calls = elsewhere(tmp_path, monkeypatch)
    claims("toy", ClaimsConfig(take_runs=archive, table_only=True))
    for path in archive.parent.iterdir():
        assert Path("docs/claims", path.name).read_bytes() == path.read_bytes(), path.name
    assert "[toy.runs.jsonl.gz](toy.runs.jsonl.gz)" in Path("docs/claims/toy.md").read_text()
    claims("toy", ClaimsConfig(take_runs=archive))
    assert calls == []
    text = claims("toy", ClaimsConfig(seeds=4)).read_text()
    assert calls == ["prepared", (10.0, 2.0, 3), (20.0, None, 3)]
    assert "3 seeds were set before the runs, and there are more" in text
    assert "there are more" not in archive.with_name("toy.md").read_text()


def test_a_page_of_fewer_runs_than_were_published_lies_beside_them(tmp_path, monkeypatch, capsys):
    archive = published(tmp_path, monkeypatch)
    whole = {path.name: path.read_bytes() for path in archive.parent.iterdir()}
    Path("runs/claims/toy/units/high-seed1.json").unlink()
    assert claims("toy", ClaimsConfig(table_only=True)) == Path("runs/claims/toy/toy.md")
    assert "has 1 run not in runs/claims/toy, so it and its page stay" in capsys.readouterr().out
    for options in ({"arms": ("high",)}, {"quick": True}):
        claims("toy", ClaimsConfig(**options, table_only=True, pages=Path("other")))
        assert not list(Path("other").glob("*.gz")), "a part is not published"
    assert {path.name: path.read_bytes() for path in archive.parent.iterdir()} == whole
    claims("toy", ClaimsConfig(take_runs=archive))
    assert {path.name: path.read_bytes() for path in archive.parent.iterdir()} == whole


def test_of_published_runs_none_is_taken_where_one_does_not_fit(tmp_path, monkeypatch):
    archive = published(tmp_path, monkeypatch)
    lines = gzip.decompress(archive.read_bytes()).split(b"\n")
    calls = elsewhere(tmp_path, monkeypatch)
    config = ClaimsConfig(take_runs=Path("taken"))

    def refused(content: bytes, message: str, **options) -> None:
        Path("taken").write_bytes(content)
        with pytest.raises(InputError, match=message):
            claims("toy", replace(config, **options))
        assert not list(Path("runs").rglob("*.json"))

    packed = archive.read_bytes()
    for content in (
        *(b"no gzip", packed[:-9], packed[:40] + bytes([packed[40] ^ 255]) + packed[41:]),
        *(gzip.compress(text) for text in (b"", b"[1]\n", b"{}\n", b"x\n", lines[0] + b"\n{}\n")),
    ):
        refused(content, r"taken: expected runs as NAME\.runs\.jsonl\.gz has them")
    other = gzip.compress(b"\n".join([lines[0].replace(b'"toy"', b'"labels"'), *lines[1:]]))
    refused(other, "taken: expected runs of toy, found those of labels")
    strange = gzip.compress(b"\n".join([*lines[:-2], lines[-2].replace(b'"still"', b'"../still"'), b""]))
    refused(strange, r"taken: expected runs of the experiment's arms, found one of '\.\./still'")
    refused(archive.read_bytes(), "made with quick True, found one with False", quick=True)
    refused(archive.read_bytes(), "made with device cuda, found one with cpu", device="cuda")
    assert calls == []


def test_a_run_that_another_call_is_making_is_not_taken(tmp_path, monkeypatch):
    archive = published(tmp_path, monkeypatch)
    elsewhere(tmp_path, monkeypatch)
    work = Path("runs/claims/toy")
    left = work / "runs/high-seed2/checkpoints"
    left.mkdir(parents=True)
    with held(work, "high-seed1"):
        claims("toy", ClaimsConfig(take_runs=archive, table_only=True))
    assert not (work / "units/high-seed1.json").exists()
    assert (work / "units/high-seed2.json").exists()
    assert not left.exists(), "what was begun of it is of no use"


def held_out(values: dict) -> dict:
    return {"held_out": {"seeds": list(values), "values": list(values.values())} if values else None}


def test_a_default_stays_unless_held_out_figures_choose_another_beyond_chance():
    rows = {
        "today": held_out({0: 10.0, 1: 14.0, 2: 12.0, 3: 11.0}),
        "better": held_out({0: 12.1, 1: 16.0, 2: 13.9, 3: 13.0}),
        "best of one": held_out({3: 90.0}),
        "noise": held_out({0: 30.0, 1: 4.0, 2: 12.0, 3: 11.0}),
        "worse": held_out({0: 8.0, 1: 12.1, 2: 10.0, 3: 9.0}),
        "not run": held_out({}),
    }
    found = choose(Default(what="β", row="today", others=tuple(rows)[1:]), rows)
    assert found["chosen"] == "better"
    compared = {each["row"]: each for each in found["compared"]}
    assert set(compared) == set(rows) - {"today", "not run"}
    expected = stats.ttest_rel([12.1, 16.0, 13.9, 13.0], [10.0, 14.0, 12.0, 11.0]).pvalue
    assert compared["better"]["p_value"] == pytest.approx(expected)
    assert compared["better"]["p_value_holm"] > compared["better"]["p_value"]
    assert compared["best of one"]["count"] == 1
    rows["better"] = held_out({0: 12.1, 1: 13.9, 2: 13.9, 3: 13.0})
    assert choose(Default(what="β", row="today", others=("better", "noise", "worse")), rows)["chosen"] == "today"
    assert choose(Default(what="β", row="not run", others=("better",)), rows)["compared"] == []


def test_a_page_tells_what_its_held_out_figures_choose(tmp_path):
    experiment = replace(experiment_of([]), default=Default(what="the rate", row="high", others=("low", "still")))
    assert "Not run yet." in page.markdown(content_of(experiment, tmp_path))
    run_all(experiment, tmp_path)
    text = page.markdown(content_of(experiment, tmp_path))
    assert_tables_are_whole(text)
    assert "Held-out figures choose the rate: *high* is the default" in text
    assert "| low | -10.1 | -10.3 to -9.9 |" in text
    assert "**high** stays." in text
    swapped = replace(experiment, default=Default(what="the rate", row="low", others=("high",)))
    assert "**high** is chosen instead." in page.markdown(content_of(swapped, tmp_path))


def test_the_hours_of_a_sitting_count_once_for_all_processes(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda options: experiment_of(calls))
    config = ClaimsConfig(quick=True, out=tmp_path / "toy")
    assert share("toy", config, time.time() - 1) == 0
    assert share("toy", config, time.time() + 60) == 8


def test_no_run_is_begun_that_would_end_after_the_hours_of_a_sitting(tmp_path):
    calls: list = []
    assert run_all(experiment_of(calls), tmp_path, max_hours=1e-9) == 0
    assert run_all(experiment_of(calls), tmp_path) == 8


def test_arms_that_are_named_are_run_alone_and_unknown_ones_refused(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda options: experiment_of(calls))
    config = ClaimsConfig(quick=True, out=tmp_path / "toy", arms=("high", "still"), seeds=2)
    text = claims("toy", config).read_text()
    assert calls == ["prepared", (20.0, None, 0), (5.0, None, 0), (20.0, None, 1)]
    assert "| low | 0 |" in text
    with pytest.raises(InputError, match="unknown arm 'hihg', perhaps 'high'; known: high, low, still"):
        claims("toy", replace(config, arms=("hihg",)))


def test_runs_of_other_settings_are_refused(tmp_path):
    run_all(experiment_of([]), tmp_path)
    other = experiment_of([])
    changed = replace(other, arms={**other.arms, "high": Arm(what="", settings={"base": 21.0})})
    with pytest.raises(InputError, match=r"high-seed0.json: expected a run with settings .*21.0.*; remove that file"):
        run_all(changed, tmp_path)


def test_runs_of_a_quick_or_a_shorter_experiment_are_not_taken_for_those_of_another(tmp_path):
    experiment = experiment_of([])
    run_all(experiment, tmp_path)
    full = Options(quick=False)
    with pytest.raises(InputError, match=r"made with quick False, found one with True; remove that file"):
        run_missing(experiment, tmp_path, tmp_path, full, 3)
    with pytest.raises(InputError, match=r"made with quick False, found one with True"):
        read_units(tmp_path, common_settings(experiment, full))
    with pytest.raises(InputError, match=r"made with train.steps 300, found one with 3;"):
        run_all(replace(experiment, settings={"train": {"steps": 300}}), tmp_path)
    renamed = replace(experiment, settings={"train": {"steps": 3, "new": 1, "log_every_steps": 7}})
    assert run_all(renamed, tmp_path) == 0  # a setting that came later, and one that decides nothing


def test_runs_of_other_data_or_another_device_are_not_gone_on_with(tmp_path):
    run_all(experiment_of([]), tmp_path)
    (tmp_path / "units/high-seed2.json").unlink()
    other = replace(experiment_of([]), made_of=lambda prepared: {"shards": {"photos": {"digest": "other"}}})
    with pytest.raises(InputError, match=r"made with shards .*'other'.*, found one with .*'prepared'"):
        run_all(other, tmp_path)
    path = tmp_path / "units/high-seed0.json"
    unit = json.loads(path.read_text())
    unit["made_with"]["device"] = "cuda"
    path.write_text(json.dumps(unit))
    with pytest.raises(InputError, match=r"made with device .*cuda"):
        read_units(tmp_path, {})
    with pytest.raises(InputError, match=r'expected a run with "made_with"'):
        check_unit(path, {"settings": {}}, {})


def test_data_are_known_by_the_digests_and_counts_of_their_manifests(tmp_path):
    write_shards(tmp_path / "photos", {"train": 3, "val": 2})
    found = shards_of(tmp_path / "photos")
    assert found["photos"]["samples"] == {"train": 3, "val": 2}
    write_shards(tmp_path / "more/photos", {"train": 4, "val": 2})
    assert shards_of(tmp_path / "more/photos")["photos"]["digest"] != found["photos"]["digest"]


# --- the page


def content_of(experiment: Experiment, work: Path) -> dict:
    units = read_units(work, common_settings(experiment, QUICK))
    return json.loads(json.dumps(page.gather("scores", experiment, units, {}, "python -m x")))


def test_a_page_of_json_alone_has_means_verdicts_and_what_was_tried(tmp_path):
    experiment = experiment_of([])
    run_all(experiment, tmp_path)
    content = content_of(experiment, tmp_path)
    assert [claim["verdict"] for claim in content["claims"]] == ["holds here"] * 3
    assert content["claims"][0]["difference"] == pytest.approx(10.1)
    assert content["rows"]["low"]["settings"] == {"base": 10.0, "lr": 2.0}
    assert content["rows"]["low"]["held_out"]["values"] == [10.0, 10.5, 11.0]
    text = page.markdown(content, "scores.svg")
    assert "| low | 3 | 10.5 ± 0.5 | 10.8 ± 0.4 (2 of 3) | 10.5 ± 0.5 |" in text  # the second is held out
    assert "| still | fixed | 5.0 |  | 5.0 |" in text
    assert "| low | `base 10.0`, `lr 1.0` | 9.0 |" in text
    assert "never there" not in text
    assert "![A line](scores.svg)" in text
    assert "**holds here**" in text
    assert "| 7 |" in text  # the units of what was chosen


def claim_of(experiment: Experiment, work: Path, **changes) -> dict:
    """Returns how the first claim is judged with some changes."""
    claims_ = [replace(experiment.claims[0], **changes), *experiment.claims[1:]]
    return content_of(replace(experiment, claims=claims_), work)["claims"][0]


def test_equal_and_post_hoc_claims_are_not_among_those_that_p_values_are_adjusted_for(tmp_path):
    experiment = experiment_of([])
    run_all(experiment, tmp_path)
    content = content_of(experiment, tmp_path)
    first, second, equal = content["claims"]
    assert (equal["p_value"], equal["p_value_holm"]) == (None, None)
    assert first["p_value_holm"] == pytest.approx(2 * first["p_value"])  # of two claims, not three
    assert "post hoc" not in page.markdown(content).lower()
    claims_ = [replace(experiment.claims[0], post_hoc=True), *experiment.claims[1:]]
    content = content_of(replace(experiment, claims=claims_), tmp_path)
    first, second, _ = content["claims"]
    assert first["p_value"] is not None
    assert first["p_value_holm"] is None
    assert second["p_value_holm"] == pytest.approx(second["p_value"])
    text = page.markdown(content)
    assert "**holds here** (post hoc, not adjusted)" in text
    assert "set before the runs of all claims but those marked post hoc" in text
    assert [claim.text for claim in CLAIMS if claim.post_hoc] == [
        "slots, smooth-Chamfer, beat the pretrained vectors, of which nothing was learned"
    ]


def test_a_page_judges_by_adjusted_p_values(tmp_path):
    experiment = experiment_of([])
    run_all(experiment, tmp_path)
    weak = replace(experiment.claims[1], margin=0.1)  # p 0.003
    content = content_of(replace(experiment, claims=[weak] * 30), tmp_path)
    assert content["claims"][0]["p_value"] < 0.05 < content["claims"][0]["p_value_holm"]
    assert "**holds, but not after adjusting**" in page.markdown(content)


def test_seeds_without_a_value_leave_the_others_of_their_measure(tmp_path):
    experiment = experiment_of([])
    run_all(experiment, tmp_path)
    content = content_of(experiment, tmp_path)
    assert content["rows"]["high"]["measures"]["some"]["seeds"] == [1, 2]
    assert re.search(r"\| high \| 3 \|.*\(2 of 3\)", page.markdown(content))
    claim = claim_of(experiment, tmp_path, measure="some")
    assert (claim["seeds"], claim["why"]) == (2, "no value on 1 seed")
    assert claim["difference"] == pytest.approx(10.15)
    claim = claim_of(experiment, tmp_path, measure="nothing")
    assert (claim["seeds"], claim["verdict"], claim["why"]) == (0, "inconclusive", "no value on 3 seeds")


def test_a_row_less_an_arm_has_differences_by_seed_and_is_inconclusive_where_chance_explains_one_of_them(tmp_path):
    experiment = experiment_of([])
    run_all(experiment, tmp_path)
    rows = {**experiment.rows, "gain": Row(arm="high", minus="low")}
    experiment = replace(experiment, rows=rows)
    (tmp_path / "units/high-seed1.json").unlink()
    row = content_of(experiment, tmp_path)["rows"]["gain"]
    assert row["seeds"] == row["measures"]["score"]["seeds"] == [0, 2]
    assert row["measures"]["score"]["values"] == row["held_out"]["values"] == [10.0, pytest.approx(10.2)]
    assert row["measures"]["score"]["parts"] == [[20.0, 21.2], [10.0, 11.0]]
    assert row["measures"]["some"]["seeds"] == [2], "a side without a value has no difference"
    assert row["what"] == "*high* less *low*, seed by seed"
    text = page.markdown(content_of(experiment, tmp_path))
    assert "| gain | 2 | 10.1 ± 0.1 | 10.2 (1 of 2) |" in text
    assert_tables_are_whole(text)
    for arm, why in ((None, ""), ("high", "an arm's interval holds chance"), ("low", "an arm's interval holds chance")):
        units = read_units(tmp_path, {})
        for unit in units:
            if unit["arm"] == arm:
                unit["values"] = {**unit["values"], "score": 1.0 + 0.1 * unit["seed"]}
        claim = replace(experiment.claims[0], better="gain", worse="still")
        found = page.gather("made up", replace(experiment, claims=[claim]), units, {}, "x")["claims"][0]
        assert found["why"] == why, arm
        assert (found["verdict"] == "inconclusive") == bool(why)


def test_all_sizes_of_groups_go_on_from_one_start_of_their_seed(tmp_path, monkeypatch):
    asked, steps = [], []
    monkeypatch.setattr(batch, "pretrained", lambda recipe, config: asked.append(config) or config.out)
    monkeypatch.setattr(
        batch,
        "measured",
        lambda data, number, place, kind: steps.append((number, place)) or Found(values={}, held_out={}),
    )
    monkeypatch.setattr(batch, "find_checkpoint", lambda place: place)
    monkeypatch.setattr(batch, "weights_path", lambda place: tmp_path / "weights")
    (tmp_path / "weights").write_bytes(b"w")
    options = Options(quick=False)
    experiment = batch.batch(options)
    data = corpus.Corpus(options, tmp_path, tmp_path, RECIPES["tiny"](), tmp_path / "work")
    data = replace(data, base=replace(data.base, steps=200))
    for seed in (0, 1):
        for name, arm in experiment.arms.items():
            found = experiment.run(data, arm.settings, seed, tmp_path / name)
            assert found.more == {"start": hashlib.sha256(b"w").hexdigest()}
            place = tmp_path / f"work/starts/seed{seed}" if name == "start" else tmp_path / name
            assert steps.pop() == (200 if name == "start" else 12, place)
    starts = [config for config in asked if config.model.pretrained is None]
    others = [config for config in asked if config.model.pretrained is not None]
    assert len(starts) == 14, "asked for by every arm"
    assert {(config.seed, config.loss.full_name, config.steps) for config in starts} == {
        (0, "hard", 200),
        (1, "hard", 200),
    }
    assert [config.seed for config in others] == 6 * [1000] + 6 * [1001], (
        "or the start's very batches would be the groups"
    )
    assert {(config.global_batch_size, config.steps) for config in others} == {(4096, 12)}
    assert [config.model.pretrained for config in others] == [str(starts[7 * i].out) for i in (0, 1) for _ in range(6)]
    assert [config.loss.group_size for config in others] == 2 * [256, 256, 1024, 1024, 4096, 4096]
    assert {config.loss.full_name for config in others[1::2]} == {"object_iou/budget"}
    assert [name for name, arm in experiment.arms.items() if not arm.comes_last] == ["start"]
    assert experiment.rows["4,096, Object-IoU less hard"].minus == "4,096, hard"


@pytest.mark.slow
def test_the_quick_way_of_batch_goes_from_data_to_page(tmp_path):
    out = tmp_path / "batch"
    text = claims("batch", ClaimsConfig(quick=True, out=out)).read_text()
    content = json.loads((out / "batch.json").read_text())
    assert {name: len(row["seeds"]) for name, row in content["rows"].items()} == dict.fromkeys(content["rows"], 1)
    assert len(content["rows"]) == 7
    assert "64, Object-IoU less hard" in text
    values = {name: row["measures"]["top1"]["values"][0] for name, row in content["rows"].items()}
    gains = [[size, values[f"{size}, Object-IoU"] - values[f"{size}, hard"], 0] for size in (32, 64)]
    assert content["plot"]["series"] == {"Object-IoU less hard": [pytest.approx(point) for point in gains]}
    assert "Different starts" not in text
    (start,) = (out / "starts").glob("seed0/checkpoints/*/model.safetensors")
    before = start.stat().st_ino, start.stat().st_mtime_ns
    (out / "units/64-hard-seed0.json").unlink()
    again = json.loads((claims("batch", ClaimsConfig(quick=True, out=out)).with_suffix(".json")).read_text())
    assert again["rows"]["64, hard"]["measures"] == content["rows"]["64, hard"]["measures"]
    assert (start.stat().st_ino, start.stat().st_mtime_ns) == before, "the start is not trained again"


def test_a_page_of_batch_names_seeds_whose_arms_went_on_from_different_starts():
    units = [{"seed": seed, "more": {"start": digest}} for seed, digest in ((0, "a"), (0, "a"), (1, "b"), (1, "c"))]
    (table,) = EXPERIMENTS["batch"](QUICK).tables(units)
    assert table.rows == [["1", "2"]]
    assert not EXPERIMENTS["batch"](QUICK).tables(units[:3])


def test_a_page_tells_its_history_its_shards_and_uncommitted_changes(tmp_path):
    experiment = replace(experiment_of([]), history=["A grid was given up."])
    run_all(experiment, tmp_path)
    for number, path in enumerate(sorted((tmp_path / "units").glob("*.json"))):
        unit = json.loads(path.read_text())
        unit["provenance"]["commit"] = "0" * 40 + ("+changes" if number < 2 else "")
        path.write_text(json.dumps(unit))
    text = page.markdown(content_of(experiment, tmp_path))
    assert "at commit `0000000`, `0000000+changes`" in text
    assert "2 of 8 runs were made with changes that were not committed" in text
    assert "- **Shards**: photos: 2,431 of train" in text
    assert text.endswith("A grid was given up.\n")
    history = EXPERIMENTS["sets"](Options(quick=False)).history
    assert history == HISTORY
    assert any("two epochs at one learning rate" in each for each in history)
    assert "2,431" not in str(EXPERIMENTS["labels-photos"](Options(quick=False)).about)


def test_a_page_of_what_is_there_says_how_many_seeds(tmp_path):
    experiment = experiment_of([])
    assert "Nothing has been run yet." in page.markdown(content_of(experiment, tmp_path))
    with pytest.raises(Killed):
        run_all(experiment_of([], fails_at=7), tmp_path)
    content = content_of(experiment, tmp_path)
    assert {name: len(row["seeds"]) for name, row in content["rows"].items()} == {
        "low": 2, "high": 2, "high, sets": 2, "still": 1,
    }  # fmt: skip
    assert content["claims"][0]["seeds"] == 2
    assert "Not all of the 3 seeds are there yet for: low, high, high, sets." in page.markdown(content)


def assert_tables_are_whole(text: str) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_a_table_has_as_many_cells_in_each_line(tmp_path):
    experiment = experiment_of([])
    run_all(experiment, tmp_path)
    assert_tables_are_whole(page.markdown(content_of(experiment, tmp_path)))


def test_the_same_figure_is_the_same_file(tmp_path):
    plot = {"title": "t", "x_label": "x", "y_label": "y", "is_bars": False, "log_x": True}
    for name in ("a", "b"):
        write_figure(tmp_path / f"{name}.svg", {**plot, "series": {"one": [[256, 1, 0.1], [512, 2, 0.2]]}})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    write_figure(tmp_path / "bars.svg", {**plot, "is_bars": True, "series": {"one": [[0, 1, 0.1]]}})
    assert ">one<" in (tmp_path / "bars.svg").read_text()


# --- the experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("is_quick", [True, False])
def test_every_claim_of_an_experiment_is_about_its_rows_and_measures(name, is_quick):
    experiment = EXPERIMENTS[name](Options(quick=is_quick))
    assert {row.arm for row in experiment.rows.values()} == set(experiment.arms)
    for claim in experiment.claims:
        assert {claim.better, claim.worse} <= set(experiment.rows)
        assert claim.measure in experiment.measures
    if experiment.default is not None:
        assert {experiment.default.row, *experiment.default.others} <= set(experiment.rows)
        compared = [experiment.rows[name] for name in (experiment.default.row, *experiment.default.others)]
        assert not any(experiment.arms[row.arm].is_fixed for row in compared)
        first = experiment.arms[compared[0].arm]
        config = with_settings(PretrainConfig(), first.settings, 0, Path("x"))
        assert (config.loss, config.text) == (PretrainConfig().loss, PretrainConfig().text), "what the code has"
    for row in experiment.rows.values():
        assert row.minus is None or not any(experiment.arms[name].is_fixed for name in (row.arm, row.minus))
    if not is_quick:
        assert experiment.claims
        assert experiment.seeds >= 3
    assert "Nothing has been run yet." in page.markdown(page.gather(name, experiment, [], {}, "x"))


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[1].glob("docs/claims/*.json")), ids=lambda path: path.stem
)
def test_a_published_page_chooses_what_the_code_has(path):
    default = json.loads(path.read_text()).get("default")  # labels, tail and sets are older, and choose nothing
    assert default is None or default["chosen"] == default["row"]


def test_the_arms_of_labels_are_losses_with_their_controls():
    config = RECIPES["tiny"]()
    losses = {name: with_settings(config, arm.settings, 0, Path("x")).loss for name, arm in LABELS.items()}
    for beta in (0.1, 0.2, 0.5):
        assert losses[f"budget {beta}"].beta == losses[f"smoothing {beta}"].smoothing == beta
    assert losses["weighted"].weights == "frequency"
    texts = [
        with_settings(config, arm.settings, 0, Path("x")).text for arm in domains(Options(quick=False)).arms.values()
    ]
    assert [(text.prompt, text.description) for text in texts] == [(0, 0), (0.25, 0), (0, 0.25), (0.25, 0.25)]
    assert len(labels(QUICK).arms) == 2


def test_descriptions_tell_colours_and_shape_of_the_drawings(tmp_path):
    texts = read_descriptions(describe_nouns(tmp_path, 300)).texts
    assert len(texts) == 300
    assert texts["tomato"].startswith("it is red")
    assert "green" in texts["cactus"]
    assert "taller than wide" in texts["candle"]
    assert "wider than tall" in texts["whale"]
    assert len(set(texts.values())) > 150


def test_held_out_pictures_of_a_preparation_are_those_that_fine_tuning_holds_out(tmp_path):
    write_shards(tmp_path / "whole", {"train": 30})
    (tmp_path / "images").mkdir()
    lines = []
    for number, sample in enumerate(Shard(tmp_path / "whole/train-00000.tar")):
        (tmp_path / f"images/{number}.jpg").write_bytes(sample.image)
        lines.append(json.dumps({"file_name": f"{number}.jpg", "captions": sample.captions}))
    (tmp_path / "captions.jsonl").write_text(
        "\n".join([*lines, json.dumps({"file_name": "no.jpg", "caption": "none"})])
    )
    config = FolderConfig(
        out=tmp_path / "out", images=tmp_path / "images", captions=tmp_path / "captions.jsonl", hold_out=8
    )
    keys: dict[str, list[str]] = {"val": [], "train": []}
    for unit in plan(config).units:
        keys[unit.split] += [key_of(record.image)[0] for record in unit.read() if isinstance(record, Record)]
    parts = open_parts(FinetuneConfig(data=tmp_path / "whole", hold_out=8, test_split="none"))
    assert len(keys["val"]) == 8
    assert sorted(keys["val"]) == sorted(parts.val.data.keys)
    assert sorted(keys["train"]) == sorted(parts.train.data.keys)
    with pytest.raises(InputError, match=r"found --hold-out 30 of 30"):
        plan(replace(config, hold_out=30))
    with pytest.raises(ValueError, match="give the other samples another --split"):
        replace(config, split="val")


class Heads(torch.nn.Module):
    """Sets whose variance is known."""

    def __init__(self, sets, mask=None):
        super().__init__()
        self.sets, self.mask, self.some = sets, mask, torch.nn.Parameter(torch.zeros(1))

    def images(self, features):
        return HeadOutput(self.sets, self.mask)

    texts = images


class Store:
    def __len__(self):
        return 2

    def of(self, rows, device):
        return None


class Inputs:
    images = texts = Store()


def test_the_log_variance_is_that_of_the_elements_that_are_there():
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [9.0, 9.0]]] * 2)
    mask = torch.tensor([[True, True, False]] * 2)
    assert log_variances(Heads(opposite, mask), Inputs()) == {"image": pytest.approx(0.0), "text": pytest.approx(0.0)}
    assert log_variances(Heads(opposite[:, :1]), Inputs()) == {"image": None, "text": None}
    same = torch.ones(2, 2, 2)
    assert log_variances(Heads(same), Inputs()) == {"image": None, "text": None}


@pytest.mark.slow
def test_two_processes_make_the_page_of_labels_beside_their_runs(tmp_path):
    config = ClaimsConfig(quick=True, jobs=2, arms=("hard",), out=tmp_path / "labels")
    text = claims("labels", config).read_text()
    assert sorted(path.name for path in tmp_path.glob("labels/units/*")) == ["hard-seed0.json", "hard-seed1.json"]
    assert "| hard | 2 |" in text
    assert "`python -m benchmarks.claims labels --quick True --arms hard`" in text
    assert (tmp_path / "labels/labels.svg").exists()
    assert list(tmp_path.glob("labels/jobs/*-2.log"))


@pytest.mark.slow  # 12 s: pretrains, computes features, trains four heads twice
def test_the_quick_way_of_sets_goes_from_data_to_page(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sets"
    monkeypatch.setattr(
        "sys.argv", ["claims", "sets", "--quick", "True", "--out", str(out), "--json", str(tmp_path / "x.json")]
    )
    main()
    content = json.loads((tmp_path / "x.json").read_text())
    assert {name: len(row["seeds"]) for name, row in content["rows"].items()} == {
        "pretrained": 1, "mean": 2, "slot, smooth-Chamfer": 2, "dhset, hybrid": 2, "dhset, set": 2,
    }  # fmt: skip
    slot = content["rows"]["slot, smooth-Chamfer"]["measures"]
    assert {"rsum", "i2t_r1", "log_var_image", "log_var_text"} <= slot.keys()
    assert len(content["tables"]) == 2
    assert content["commits"]
    assert "RANK" not in os.environ
    units = sorted((out / "units").glob("*.json"))
    before = {path: path.read_bytes() for path in units}
    units[0].unlink()  # of dhset, seed 0
    capsys.readouterr()
    text = claims("sets", ClaimsConfig(quick=True, out=out)).read_text()
    assert "## DH-Set: time of set and hybrid inference" in text
    assert_tables_are_whole(text)
    assert {path: path.read_bytes() for path in units[1:]} == {path: before[path] for path in units[1:]}
    again, first = (json.loads(data) for data in (units[0].read_bytes(), before[units[0]]))
    assert again["values"] == first["values"]  # the same features, the same seed: the same run
    assert "features of" not in capsys.readouterr().out

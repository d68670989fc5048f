"""Results files go round, and tables are made from them."""

import dataclasses
import json
import subprocess
import sys

import pytest

from eval_suite import results as module
from eval_suite.results import Metric, Results, default_out, markdown_table, split_protocol
from setclip import provenance
from setclip.config import command
from setclip.errors import InputError
from setclip.metric_text import metric_words, number_text, with_interval


def some_results(run="a", value=31.25, name="scenes", **changes):
    top1 = Metric(
        value=value,
        unit="%",
        protocol="Share of images.",
        samples=300,
        chance=1 / 3,
        interval_95=(value - 2, value + 2),
        interval_method="Wilson",
        tie_variants={"pessimistic": value},
    )
    rank = Metric(value=12.0, unit="rank", protocol="Median.", samples=300, chance=150.0)
    identity = {"where": f"runs/{run}/checkpoints/step-00001500", "step": 1500}
    values = {
        "evaluation": "zeroshot",
        "dataset": {"name": name, "place": "data/scenes", "images": 300, "classes": 300},
        "metrics": {"top1": top1, "medr": rank},
        "headline": ["top1", "medr"],
        "checkpoint": {**identity, "data": {"pairs_present": 900, "pairs_listed": 1000}},
        "config": {"batch_size": 128},
        "seconds": 1.5,
    }
    return Results(**{**values, **changes})


def test_what_is_written_is_read_back_equal(tmp_path):
    results = some_results()
    results.save(tmp_path / "deep" / "r.json")
    assert Results.load(tmp_path / "deep" / "r.json") == results


def test_a_file_carries_protocol_counts_interval_checkpoint_configuration_and_commit(tmp_path):
    some_results().save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    metric = content["metrics"]["top1"]
    assert metric["protocol"] == "Share of images."
    assert (metric["samples"], metric["interval_95"]) == (300, [29.25, 33.25])
    assert content["checkpoint"]["step"] == 1500
    assert content["config"] == {"batch_size": 128}
    assert content["training_pairs"] == {"present": 900, "listed": 1000}
    assert {"setclip", "commit", "versions"} <= set(content["provenance"])
    assert {"torch", "scikit-learn", "faiss-cpu"} <= set(content["provenance"]["versions"])


def test_training_pairs_are_unknown_for_models_of_others():
    assert some_results(checkpoint={"where": "ViT-B-32:openai"}).training_pairs is None


def test_runs_on_one_data_set_share_a_table_with_chance_below():
    table = markdown_table([some_results("hard", 39.1), some_results("soft", 50.0, is_partial=True)])
    assert table.splitlines() == [
        "**zeroshot, scenes (300 images, 300 classes)**",
        "",
        "| model | top1 % | medr ↓ |",
        "| --- | ---: | ---: |",
        "| hard, step 1,500 | 39.1 [37.1, 41.1] | 12 |",
        "| soft, step 1,500 (partial) | 50.0 [48.0, 52.0] | 12 |",
        "| *chance* | 0.33 | 150 |",
    ]


def test_other_data_or_counts_get_a_table_of_their_own():
    fewer = {"name": "scenes", "place": "x", "images": 299, "classes": 300}
    table = markdown_table([some_results(), some_results(name="cifar10"), some_results(dataset=fewer)])
    assert table.count("| model |") == 3
    assert "(299 images, 300 classes)" in table


def test_runs_of_one_name_are_told_apart_by_their_place():
    one, two = some_results("a"), some_results("a")
    two.checkpoint["where"] = "other/a/checkpoints/step-00001500"
    table = markdown_table([one, two])
    assert "| runs/a/checkpoints/step-00001500 |" in table
    assert "| other/a/checkpoints/step-00001500 |" in table


def test_evaluations_of_one_checkpoint_are_told_apart_by_their_settings():
    one = some_results(config={"batch_size": 128, "templates": "name"})
    two = some_results(config={"batch_size": 64, "templates": "imagenet"})
    table = markdown_table([one, two])
    assert "| a, step 1,500, templates name |" in table
    assert "| a, step 1,500, templates imagenet |" in table
    twice = markdown_table([some_results(created="2026-01-01"), some_results(created="2026-01-02")])
    assert "| a, step 1,500, evaluated 2026-01-01 |" in twice


def test_each_protocol_has_a_narrow_table_that_names_it():
    top1 = some_results().metrics["top1"]
    names = ["i2t_r1", "t2i_r1", "1k_5fold_rsum", "eccv_i2t_map_at_r", "cxc_t2i_r1", "class_match_i2t_r1"]
    results = some_results(
        evaluation="retrieval",
        dataset={"name": "coco", "split": "test", "images": 5000, "captions": 25000},
        metrics={name: dataclasses.replace(top1, chance=None if "eccv" in name else 0.1) for name in names},
        headline=[*names, "not_there"],
        details={"protocols": {"5k": "COCO 5K.", "1k-5fold": "", "eccv": "", "cxc": ""}},
    )
    blocks = [block.splitlines() for block in markdown_table([results]).rstrip().split("\n\n**")]
    assert [block[0].strip("*").rpartition(": ")[2] for block in blocks] == [
        "5K",
        "1K, mean of 5 folds",
        "ECCV Caption",
        "CxC",
        "class match",
    ]
    assert [block[2] for block in blocks] == [
        "| model | i2t r1 % | t2i r1 % |",
        "| model | rsum % |",
        "| model | i2t map at r % |",
        "| model | t2i r1 % |",
        "| model | i2t r1 % |",
    ]
    # Where no metric has a chance there is no row for it.
    assert ["chance" in block[-1] for block in blocks] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("i2t_r1", ("", "i2t_r1")),
        ("rsum", ("", "rsum")),
        ("1k_5fold_i2t_r10", ("1k_5fold", "i2t_r10")),
        ("1k_5fold_rsum", ("1k_5fold", "rsum")),
        ("eccv_t2i_map_at_r", ("eccv", "t2i_map_at_r")),
        ("class_match_t2i_medr", ("class_match", "t2i_medr")),
        ("top1_tail", ("", "top1_tail")),
        ("descriptions_top1_tail", ("descriptions", "top1_tail")),
        ("both_mean_per_class", ("both", "mean_per_class")),
        ("something_else", ("", "something_else")),
    ],
)
def test_a_metric_is_taken_apart_into_protocol_and_measure(name, parts):
    assert split_protocol(name) == parts


@pytest.mark.parametrize(
    ("name", "unit", "words"),
    [
        ("i2t_r5", "%", "picture → caption, R@5, %"),
        ("t2i_medr", "rank", "caption → picture, median rank"),
        ("t2i_map_at_r", "%", "caption → picture, mAP@R, %"),
        ("rsum", "sum of %", "sum of the six recalls"),
        ("top1_tail", "%", "top-1, tail, %"),
        ("mean_per_class", "%", "mean per class, %"),
    ],
)
def test_metrics_have_names_in_words(name, unit, words):
    assert metric_words(name, unit) == words


def test_numbers_have_the_digits_that_their_units_deserve():
    assert [number_text(value, "%") for value in (45.25, 0.333, 0.0, None)] == ["45.2", "0.33", "0.0", "–"]
    assert number_text(1234.0, "rank") == "1,234"
    assert with_interval(45.2, "%", (43.14, 47.26)) == "45.2 [43.1, 47.3]"
    assert with_interval(7.0, "rank", None) == "7"


def test_results_lie_in_the_run_or_else_under_runs():
    identity = {"where": "runs/a/checkpoints/step-00000003"}
    assert str(default_out("zeroshot", "scenes", identity)) == "runs/a/results/zeroshot_scenes_step-00000003.json"
    identity = {"where": "ViT-B-32:openai"}
    assert str(default_out("retrieval", "x_dev", identity)) == "runs/results/retrieval_x_dev_ViT-B-32-openai.json"


def test_a_nan_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    some_results().save(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        some_results(value=float("nan")).save(path)
    assert Results.load(path).metrics["top1"].value == 31.25
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_command_prints_a_comparison_and_explains_what_is_no_results_file(tmp_path, monkeypatch, capsys):
    for run in ("hard", "soft"):
        some_results(run).save(tmp_path / f"{run}.json")
    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path / "hard.json"), str(tmp_path / "soft.json")])
    command(module.main)
    printed = capsys.readouterr().out
    assert "| hard, step 1,500 |" in printed
    assert "| soft, step 1,500 |" in printed
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="expected a results file of Setclip, found"):
        Results.load(tmp_path / "other.json")
    with pytest.raises(InputError, match=r"expected a results file at .*none.json, found none"):
        Results.load(tmp_path / "none.json")
    (tmp_path / "old.json").write_text('{"format_version": 99}')
    with pytest.raises(InputError, match="expected format_version 1, found 99; evaluate again"):
        Results.load(tmp_path / "old.json")
    monkeypatch.setattr(sys, "argv", ["results"])
    with pytest.raises(SystemExit):
        command(module.main)
    assert "expected results files, found no argument" in capsys.readouterr().err


def test_a_page_that_was_not_committed_is_no_change_of_the_code(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    def found():
        provenance.git_commit.cache_clear()
        return provenance.git_commit()

    monkeypatch.setattr("setclip.__file__", str(tmp_path / "setclip/__init__.py"))
    (tmp_path / "setclip").mkdir()
    (tmp_path / "docs/claims").mkdir(parents=True)
    code = tmp_path / "setclip/__init__.py"
    code.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    try:
        commit = found()
        assert len(commit) == 40
        for page in ("docs/claims/labels.json", "README.md"):
            (tmp_path / page).write_text("{}")
        assert found() == commit
        code.write_text("a = 1")
        assert found() == f"{commit}+changes"
        git("commit", "-qam", "second")
        (tmp_path / "setclip/new.py").write_text("")
        assert found().endswith("+changes")
    finally:
        provenance.git_commit.cache_clear()

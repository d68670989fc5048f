"""Results files go round, and tables are made from them."""

import json
import sys

import pytest

from eval_suite import results as module
from eval_suite.results import Metric, Results, default_out, markdown_table
from setclip.config import command
from setclip.errors import InputError


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

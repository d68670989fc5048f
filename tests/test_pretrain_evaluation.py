"""Evaluation while a model trains: on all ranks, the same figures as of the checkpoint alone, and the best checkpoint stays."""

import json

import pytest
from evaluation_samples import write_class_folders
from material import write_model, write_shards
from troubled_run import run_with

from eval_suite.retrieval import RetrievalConfig
from eval_suite.retrieval import evaluate as evaluate_retrieval
from eval_suite.zeroshot import ZeroShotConfig
from eval_suite.zeroshot import evaluate as evaluate_zero_shot
from pretrain.progress import read_metrics
from setclip.checkpoint import checkpoints_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on two ranks that evaluates at every third step, keeps the last checkpoint and the best."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_shards(folder / "shards")
    write_shards(folder / "val", sizes=(9,), split="val")
    write_class_folders(folder / "classes")
    words = [
        "tiny", "--out", folder / "run", "--data.shards", folder / "shards", "--model.name", write_model(folder),
        "--data.workers", 0, "--data.num-lanes", 8, "--data.augment.pixels", 2, "--global-batch-size", 16, "--steps", 12,
        "--save.every-steps", 100, "--save.keep", 1, "--save.best", "rsum", "--engine.device", "cpu", "--engine.zero-stage", 1,
        "--eval.every-steps", 3, "--eval.zeroshot", folder / "classes", "--eval.retrieval", folder / "val",
    ]  # fmt: skip
    assert run_with(None, words, 2, folder / "said") == [0, 0], (folder / "said.0").read_text()
    return folder


def figures_of(place):
    return {e["step"]: e for e in read_metrics(place / "run" / "metrics.jsonl") if "rsum" in e}


def test_the_figures_on_the_way_are_those_of_the_checkpoint_alone(place):
    last = checkpoints_of(place / "run")[-1]
    on_the_way = figures_of(place)[12]
    common = {"checkpoint": str(last), "device": "cpu"}
    retrieved = evaluate_retrieval(RetrievalConfig(data=place / "val", gallery_queries=0, **common)).results.metrics
    classified = evaluate_zero_shot(
        ZeroShotConfig(data=place / "classes", templates="picture", **common)
    ).results.metrics
    for name, metric in retrieved.items():
        assert on_the_way[name] == metric.value, name
    for name, metric in classified.items():
        assert on_the_way[f"zeroshot_{name}"] == metric.value, name


def test_it_evaluates_at_each_third_step_and_keeps_the_best(place):
    figures = figures_of(place)
    assert sorted(figures) == [3, 6, 9, 12]
    best = json.loads((place / "run" / "best.json").read_text())
    value = max(entry["rsum"] for entry in figures.values())
    first = min(step for step, entry in figures.items() if entry["rsum"] == value)
    assert best == {"metric": "rsum", "value": value, "step": first}
    assert [path.name for path in checkpoints_of(place / "run")] == sorted({f"step-{first:08d}", "step-00000012"})


def test_a_best_figure_that_is_not_there_names_those_that_are(place, tmp_path):
    words = [
        "tiny", "--out", tmp_path / "run", "--data.shards", place / "shards", "--model.name", place / "small.json",
        "--data.workers", 0, "--data.num-lanes", 8, "--global-batch-size", 16, "--steps", 1, "--engine.device", "cpu",
        "--eval.every-steps", 1, "--eval.retrieval", place / "val", "--save.best", "top1",
    ]  # fmt: skip
    assert run_with(None, words, 1, tmp_path / "said") == [2]
    assert "found 'top1'; figures: rsum, i2t_r1," in (tmp_path / "said.0").read_text()

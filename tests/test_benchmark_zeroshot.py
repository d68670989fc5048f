"""The benchmark of zero-shot classification on a few pictures: both sides see the same and answer alike."""

import json
import sys

import pytest
import torch

from benchmarks import zeroshot


@pytest.fixture
def tars(tmp_path):
    names, found, _ = zeroshot._generated(120)
    return zeroshot.write_tars(tmp_path / "tars", found, names, ("a photo of a {}.", "{}"))


@pytest.mark.parametrize("model", zeroshot.MODELS)
def test_clip_benchmark_gives_the_same_accuracy_and_answers_on_the_same_checkpoint_and_tars(model, tars, tmp_path):
    checkpoint = zeroshot.write_model(tmp_path / "run", model)
    theirs = zeroshot.evaluate_peer(checkpoint, tars)
    ours = zeroshot.evaluate_ours(checkpoint, tars, "pillow")
    assert len(ours.predictions) == 120
    assert torch.equal(ours.predictions, theirs.predictions)
    assert ours.top1 == pytest.approx(theirs.top1, abs=1e-6)
    assert ours.mean_per_class == pytest.approx(theirs.mean_per_class, abs=1e-6)


@pytest.mark.slow
def test_the_command_says_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SETCLIP_REAL_DATA", raising=False)
    monkeypatch.setattr(zeroshot, "pictures", lambda count: zeroshot._generated(count // 10))
    monkeypatch.setattr(sys, "argv", ["zeroshot", "--quick", "--json", str(tmp_path / "a.json")])
    threads = torch.get_num_threads()
    zeroshot.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "100 pictures (generated), CPU time of one thread" in printed
    assert "largest difference of accuracies: 0.0e+00 (goal 1e-06: reached)" in printed
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["vit-48"]["answers_that_differ"]["ours"] == 0
    assert figures["vit-48"]["times_faster"] > 0

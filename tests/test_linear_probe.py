"""Linear probe: the fit against its optimality condition, the sweep, the parts held out, convergence, and the command."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluation_samples import small_model, write_class_folders, write_run
from sklearn.linear_model import LogisticRegression

from eval_suite import linear_probe as module
from eval_suite.linear_probe import LinearProbeConfig, evaluate, linear_probe, probe_folders, split_classes
from eval_suite.results import Results
from setclip.errors import InputError


def clouds(num_per_class=30, num_classes=4, width=6, spread=1.2, seed=0):
    """Gaussian clouds around fixed centres: (features, labels)."""
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    labels = np.repeat(np.arange(num_classes), num_per_class)
    noise = np.random.default_rng(seed).normal(size=(len(labels), width))
    return torch.from_numpy(centres[labels] + spread * noise).float(), torch.from_numpy(labels)


def probe(train, test, num_classes=4, **options):
    return linear_probe(
        *train, *test, num_classes, **{"show_progress": False, "lowest_c": 1e-3, "highest_c": 1e3, **options}
    )


def test_the_predictions_are_those_of_a_fit_on_all_training_pictures_with_the_chosen_penalty():
    train, test = clouds(), clouds(seed=1)
    outcome = probe(train, test)
    own = LogisticRegression(C=outcome.c, max_iter=10_000, tol=1e-8).fit(train[0].double().numpy(), train[1].numpy())
    expected = own.predict(test[0].double().numpy())
    assert outcome.predictions.tolist() == expected.tolist()
    assert outcome.metrics["top1"].value == pytest.approx(100 * np.mean(expected == test[1].numpy()))
    assert 40 < outcome.metrics["top1"].value < 100


def test_the_fit_is_where_the_gradient_of_the_penalised_likelihood_vanishes():
    x, y = (array.numpy() for array in clouds())
    x = x.astype(np.float64)
    fit = module._fit(x, y, 0.5, 1000, 16_000)
    weights, bias = fit.model.coef_, fit.model.intercept_
    logits = x @ weights.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    residual = p / p.sum(1, keepdims=True) - np.eye(4)[y]
    assert fit.converged
    assert np.abs(residual.T @ x + weights / 0.5).max() / len(x) < 1e-3
    assert np.abs(residual.sum(0)).max() / len(x) < 1e-3


def test_the_sweep_starts_two_decades_apart_and_halves_its_steps_around_the_best():
    outcome = probe(clouds(), clouds(seed=1), lowest_c=1e-6, highest_c=1e6, finest=0.25)
    exponents = [round(np.log10(point.c), 6) for point in outcome.sweep]
    assert {-6, -4, -2, 0, 2, 4, 6} <= set(exponents)
    assert len(exponents) <= 7 + 2 * 3
    best = max(point.top1 for point in outcome.sweep)
    assert outcome.c == min(point.c for point in outcome.sweep if point.top1 == best)
    near = [abs(e - np.log10(outcome.c)) for e in exponents if e != round(np.log10(outcome.c), 6)]
    assert min(near) == pytest.approx(0.25)


def test_each_point_of_the_sweep_is_the_accuracy_on_the_validation_part_of_a_fit_on_the_rest():
    (x, y), test = clouds(), clouds(seed=1)
    fit_rows, held = split_classes(y, 0.2, 0)
    for point in probe((x, y), test, finest=1.0).sweep:
        own = LogisticRegression(C=point.c, max_iter=10_000).fit(x[fit_rows].double().numpy(), y[fit_rows].numpy())
        right = own.predict(x[held].double().numpy()) == y[held].numpy()
        assert point.top1 == pytest.approx(100 * right.mean())


def test_the_test_part_has_no_say_in_the_penalty():
    train, (features, labels) = clouds(), clouds(seed=1)
    first = probe(train, (features, labels))
    second = probe(train, (features.flip(0), labels))
    assert second.c == first.c
    assert second.sweep == first.sweep
    assert second.metrics["top1"].value != first.metrics["top1"].value


def test_mean_per_class_weighs_each_class_alike_and_counts_by_hand():
    features = torch.eye(2).repeat_interleave(torch.tensor([8, 4]), 0) + 0.01
    labels = torch.tensor([0] * 8 + [1] * 4)
    test = torch.cat((torch.eye(2)[[0] * 6], torch.eye(2)[[1, 0]]))
    outcome = probe((features, labels), (test, torch.tensor([0] * 6 + [1, 1])), 2)
    assert outcome.metrics["top1"].value == 87.5  # seven of eight
    assert outcome.metrics["mean_per_class"].value == 75.0  # all of six, one of two
    assert (outcome.metrics["top1"].samples, outcome.metrics["mean_per_class"].samples) == (8, 2)
    assert outcome.metrics["top1"].chance == 50.0
    low, high = outcome.metrics["top1"].interval_95
    assert 50 < low < 87.5 < high < 100


def test_the_accuracy_that_is_asked_for_chooses():
    # 40 of one class, 4 of another that lies among them: a weak penalty wins by class, a strong one by picture.
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200, 2, generator=generator)
    rare = torch.randn(20, 2, generator=generator) + torch.tensor([1.6, 0.0])
    train = torch.cat((common, rare)), torch.tensor([0] * 200 + [1] * 20)
    for chosen_by in ("top1", "mean_per_class"):
        outcome = probe(train, train, 2, chosen_by=chosen_by)
        chosen = next(point for point in outcome.sweep if point.c == outcome.c)
        assert getattr(chosen, chosen_by) == max(getattr(point, chosen_by) for point in outcome.sweep)


# --- parts that are held out


def test_a_share_of_each_class_is_held_out_and_every_class_stays_in_both_parts():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    kept, held = split_classes(labels, 0.2, seed=3)
    assert labels[held].bincount().tolist() == [2, 1, 1]
    assert labels[kept].bincount().tolist() == [8, 4, 1, 1]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(18))
    again = split_classes(labels, 0.2, seed=3)
    assert torch.equal(again[1], held)
    assert any(not torch.equal(split_classes(labels, 0.2, seed=s)[1], held) for s in range(4, 8))


# --- convergence


def test_a_fit_that_stops_early_goes_on_where_it_stands_until_it_has_converged():
    train, test = clouds(), clouds(seed=1)
    patient = probe(train, test, finest=2.0)
    hasty = probe(train, test, finest=2.0, iterations=2)
    assert hasty.converged
    assert not hasty.notes
    assert hasty.predictions.tolist() == patient.predictions.tolist()


def test_a_fit_that_does_not_converge_says_so():
    outcome = probe(clouds(), clouds(seed=1), finest=2.0, iterations=2, most_iterations=3)
    assert not outcome.converged
    assert outcome.iterations == 3
    assert not any(point.converged for point in outcome.sweep if point.c > 1)
    assert outcome.notes[0] == "the last fit had not converged after 3 iterations; raise --most-iterations"
    assert "of the sweep had not converged" in outcome.notes[1]


def test_a_best_penalty_at_the_end_of_the_range_is_said():
    outcome = probe(clouds(spread=0.1), clouds(spread=0.1, seed=1), lowest_c=10, highest_c=100)
    assert outcome.notes == ["the chosen C = 10 is the end of the range; widen it with --lowest-c or --highest-c"]


# --- what does not fit


def test_features_and_labels_that_do_not_fit_are_errors():
    train, test = clouds(), clouds(seed=1)
    with pytest.raises(InputError, match=r"expected training features \(N, D\) and N labels, found \(120, 2, 6\)"):
        probe((train[0][:, None].repeat(1, 2, 1), train[1]), test)
    with pytest.raises(InputError, match=r"expected test labels in \[0, 3\)"):
        probe((train[0][:90], train[1][:90]), test, num_classes=3)
    with pytest.raises(InputError, match=r"expected finite test features"):
        probe(train, (test[0] * torch.nan, test[1]))
    with pytest.raises(
        InputError, match=r"at least two training pictures of each of 5 classes.* found 0 of class number 4"
    ):
        probe(train, test, num_classes=5)
    with pytest.raises(InputError, match=r"expected 0 < lowest C ≤ highest C"):
        probe(train, test, lowest_c=10, highest_c=1)


# --- the command


def folders(tmp_path):
    return write_class_folders(tmp_path / "train", 6), write_class_folders(tmp_path / "test", 3)


def test_the_command_separates_colours_and_writes_results_that_load(tmp_path, monkeypatch, capsys):
    train, test = folders(tmp_path)
    small_model(tmp_path)
    out = tmp_path / "results.json"
    arguments = ["--train", str(train), "--test", str(test), "--checkpoint", str(tmp_path / "runs" / "small")]
    monkeypatch.setattr(sys, "argv", ["linear_probe", *arguments, "--out", str(out), "--finest", "1"])
    module.main()
    results = Results.load(out)
    assert results.evaluation == "linear_probe"
    assert results.metrics["top1"].value > 60
    assert results.dataset["images"] == 12
    assert results.dataset["train_images"] == 24
    assert results.dataset["validation_images"] == 4
    sweep = results.details["sweep"]
    assert {"c", "top1", "mean_per_class", "iterations", "converged"} == set(sweep[0])
    assert results.details["c"] in [point["c"] for point in sweep]
    printed = capsys.readouterr().out
    assert "| C | validation top-1 % |" in printed
    assert "linear_probe, test (12 images, 4 classes)" in printed
    assert json.loads(out.read_text())["config"]["validation_share"] == 0.2


def test_one_folder_is_parted_by_the_seed_and_no_picture_is_in_both_parts(tmp_path):
    place = write_class_folders(tmp_path / "in", 10)
    write_run(tmp_path / "runs", "small")
    config = LinearProbeConfig(data=place, checkpoint=str(tmp_path / "runs" / "small"), finest=2.0)
    train, test = probe_folders(config)
    assert (len(train.paths), len(test.paths)) == (32, 8)
    assert not set(train.paths) & set(test.paths)
    for part in (train, test):
        assert [path.parent.name for path in part.paths] == [part.classes[label] for label in part.labels]
    results, outcome = evaluate(config)
    assert results.dataset["held_out"]
    assert outcome.num_validation == 8  # of 32: two of eight in each class


def test_folders_that_do_not_fit_each_other_are_errors_before_a_model_is_loaded(tmp_path):
    train, test = folders(tmp_path)
    with pytest.raises(InputError, match=r"expected --train DIR and --test DIR, or --data DIR"):
        evaluate(LinearProbeConfig(train=train))
    with pytest.raises(InputError, match=r"expected other pictures for the test than for training"):
        evaluate(LinearProbeConfig(train=train, test=train))
    with pytest.raises(InputError, match=r"expected --test-share between 0 and 1, found 1"):
        evaluate(LinearProbeConfig(data=train, test_share=1))
    (test / "red").rename(test / "crimson")
    with pytest.raises(InputError, match=r"expected the test classes among the 4 of .* found others: crimson"):
        evaluate(LinearProbeConfig(train=train, test=test))
    for path in list((train / "blue").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match=r"at least two training pictures of each class in .* found fewer of 1: blue"):
        evaluate(LinearProbeConfig(train=train, test=write_class_folders(tmp_path / "other", 1)))

"""What became of each query, and paired tests on it: against plain formulas, and on cases that are clear beforehand."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from evaluation_samples import write_captioned, write_run

from eval_suite import retrieval as retrieval_command
from eval_suite import significance as module
from eval_suite.metrics import median_rank
from eval_suite.per_query import load_per_query, per_query_path, save_per_query
from eval_suite.significance import SignificanceConfig, compare, differences
from setclip.errors import InputError


def zero_shot_file(path, correct, labels=None, keys=None):
    correct = np.asarray(correct, dtype=bool)
    labels = np.zeros(len(correct), dtype=int) if labels is None else np.asarray(labels)
    keys = keys or [f"{i}.jpg" for i in range(len(correct))]
    save_per_query(path, kind="zeroshot", keys=keys, correct=correct, labels=labels, predictions=labels)
    return load_per_query(path)


def retrieval_file(path, i2t, t2i, owners, captions="x", protocol="full", **more):
    arrays = {
        f"{protocol}.i2t.image": np.arange(len(i2t)),
        f"{protocol}.i2t.rank": np.asarray(i2t),
        f"{protocol}.t2i.image": np.asarray(owners),
        f"{protocol}.t2i.rank": np.asarray(t2i),
        **more,
    }
    keys = [f"key{i}" for i in range(len(i2t))]
    save_per_query(path, kind="retrieval", keys=keys, about={"captions_sha256": captions}, **arrays)
    return load_per_query(path)


def by_name(found):
    return {each.metric: each for each in found}


# --- the file


def test_the_file_gives_back_what_was_saved_in_the_smallest_numbers(tmp_path):
    labels = torch.tensor([300, 2, 1])
    save_per_query(
        tmp_path / "deep" / "a.queries.npz",
        kind="zeroshot",
        keys=["n01/ä.jpg", "b.jpg", "c.jpg"],
        about={"templates": "simple"},
        correct=[True, False, True],
        labels=labels,
        predictions=[300, 3, 1],
        ranks=torch.tensor([0, 4, 0]),
    )
    found = load_per_query(tmp_path / "deep" / "a.queries.npz")
    assert found.kind == "zeroshot"
    assert found.keys.tolist() == ["n01/ä.jpg", "b.jpg", "c.jpg"]
    assert found.about == {"templates": "simple"}
    assert found.arrays["correct"].tolist() == [True, False, True]
    assert found.arrays["labels"].tolist() == [300, 2, 1]
    assert found.arrays["labels"].dtype == np.uint16
    assert found.arrays["ranks"].dtype == np.uint8
    assert per_query_path("runs/a/results/r.json").name == "r.queries.npz"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.queries.npz"]


def test_arrays_that_do_not_fit_are_refused_when_they_are_written(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match="no 'predictions'"):
        save_per_query(path, kind="zeroshot", keys=["a"], correct=[True], labels=[1])
    with pytest.raises(ValueError, match=r"'labels' of shape \(2,\)"):
        save_per_query(path, kind="zeroshot", keys=["a"], correct=[True], labels=[1, 2], predictions=[1])
    with pytest.raises(ValueError, match="kind 'probe'"):
        save_per_query(path, kind="probe", keys=["a"])
    with pytest.raises(ValueError, match=r"without full\.i2t\.image and .rank"):
        save_per_query(path, kind="retrieval", keys=["a"], **{"full.i2t.rank": [1]})
    with pytest.raises(ValueError, match=r"'full\.i2t\.image' with images 0 to 3"):
        save_per_query(path, kind="retrieval", keys=["a"], **{"full.i2t.rank": [1, 1], "full.i2t.image": [0, 3]})
    with pytest.raises(ValueError, match="of float64 instead of whole numbers"):
        save_per_query(path, kind="retrieval", keys=["a"], **{"full.i2t.rank": [0.5], "full.i2t.image": [0]})
    assert not path.exists()


def test_other_files_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"at .*none\.npz, found no file; evaluate again"):
        load_per_query(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"text\.npz: expected a file of queries of Setclip"):
        load_per_query(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(InputError, match=r"other\.npz: expected a file of queries of Setclip"):
        load_per_query(tmp_path / "other.npz")


# --- the tests


def test_p_is_that_of_counting_all_ways_to_change_places(tmp_path):
    first = zero_shot_file(tmp_path / "a.npz", [1, 0, 0, 0, 1, 0, 1, 0, 0, 1])
    second = zero_shot_file(tmp_path / "b.npz", [1, 1, 1, 0, 0, 1, 1, 1, 0, 1])
    difference = second.arrays["correct"].astype(int) - first.arrays["correct"].astype(int)
    signs = np.array(list(itertools.product((1, -1), repeat=10)))
    exact = (np.abs(signs @ difference) >= abs(difference.sum())).mean()
    found = by_name(differences(first, second, draws=20_000))["top1"]
    assert found.difference == pytest.approx(30.0)
    assert (found.first, found.second) == (pytest.approx(40.0), pytest.approx(70.0))
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert found.images == 10


def test_the_interval_is_that_of_a_mean_of_paired_differences(tmp_path):
    generator = np.random.default_rng(0)
    correct = generator.random((2, 800)) < np.array([[0.5], [0.6]])
    found = by_name(
        differences(*(zero_shot_file(tmp_path / f"{i}.npz", each) for i, each in enumerate(correct)), draws=4_000)
    )["top1"]
    pairs = 100 * (correct[1].astype(float) - correct[0])
    half = 1.96 * pairs.std() / np.sqrt(800)
    assert found.interval_95 == pytest.approx((pairs.mean() - half, pairs.mean() + half), abs=0.4)


def test_runs_of_equal_quality_are_seldom_told_apart_and_different_ones_are(tmp_path):
    generator = np.random.default_rng(1)
    p_values = []
    for number in range(60):
        pair = [zero_shot_file(tmp_path / f"{number}{i}.npz", generator.random(120) < 0.5) for i in range(2)]
        p_values.append(by_name(differences(*pair, draws=400))["top1"].p_value)
    assert sum(p < 0.05 for p in p_values) <= 8  # three are expected; more than eight in one of 150 such tests
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.15)
    worse, better = (zero_shot_file(tmp_path / f"{p}.npz", generator.random(400) < p) for p in (0.4, 0.6))
    assert by_name(differences(worse, better, draws=1_000))["top1"].p_value == pytest.approx(1 / 1_001)


def test_a_run_compared_with_itself_differs_in_nothing(tmp_path):
    owners = np.arange(40) // 4
    run = retrieval_file(tmp_path / "a.npz", np.arange(10), np.arange(40) % 13, owners)
    for each in differences(run, run, draws=200):
        assert (each.difference, each.interval_95, each.p_value) == (0.0, (0.0, 0.0), 1.0), each.metric


def test_retrieval_metrics_and_their_differences_are_those_of_the_ranks(tmp_path):
    generator = np.random.default_rng(2)
    owners = np.repeat(np.arange(30), 5)
    ranks = [(generator.integers(0, 20, 30), generator.integers(0, 12, 150)) for _ in range(2)]
    runs = [retrieval_file(tmp_path / f"{i}.npz", *each, owners) for i, each in enumerate(ranks)]
    found = by_name(differences(*runs, draws=500))
    sums = [0.0, 0.0]
    for place, direction in enumerate(("i2t", "t2i")):
        for k in (1, 5, 10):
            values = [100 * (each[place] < k).mean() for each in ranks]
            sums = [a + b for a, b in zip(sums, values, strict=True)]
            of = found[f"{direction}_r{k}"]
            assert (of.first, of.second) == pytest.approx(tuple(values))
            assert of.difference == pytest.approx(values[1] - values[0])
            assert of.interval_95[0] <= of.difference <= of.interval_95[1]
        medians = [median_rank(torch.tensor(each[place])) for each in ranks]
        of = found[f"{direction}_medr"]
        assert (of.first, of.second, of.difference) == (*medians, medians[1] - medians[0])
    assert (found["rsum"].first, found["rsum"].second) == pytest.approx(tuple(sums))
    assert found["rsum"].images == 30


def test_captions_of_an_image_are_drawn_and_flipped_together(tmp_path):
    # All captions of an image improve or worsen together: 20 images, not 200 captions, say how sure one can be.
    owners = np.repeat(np.arange(20), 10)
    is_better = np.arange(20) < 13
    first = retrieval_file(tmp_path / "a.npz", np.zeros(20, int), np.where(is_better, 9, 0)[owners], owners)
    second = retrieval_file(tmp_path / "b.npz", np.zeros(20, int), np.where(is_better, 0, 9)[owners], owners)
    found = by_name(differences(first, second, draws=4_000))["t2i_r1"]
    assert found.difference == pytest.approx(30.0)
    # of 20 fair coins 13 or more, or 7 or fewer, show heads
    assert found.p_value == pytest.approx(0.263, abs=0.03)
    assert found.interval_95[0] < 0 < found.interval_95[1]


def test_mean_per_class_weighs_classes_alike_and_medians_of_folds_are_averaged(tmp_path):
    labels = [0] * 8 + [1] * 2
    first = zero_shot_file(tmp_path / "a.npz", [1] * 8 + [0, 0], labels)
    second = zero_shot_file(tmp_path / "b.npz", [1] * 6 + [0, 0] + [1, 1], labels)
    found = by_name(differences(first, second, draws=300))
    assert found["mean_per_class"].first == pytest.approx(50.0)
    assert found["mean_per_class"].second == pytest.approx((75 + 100) / 2)
    folds = np.array([0, 0, 0, 1, 1, 1])
    more = {"1k-5fold.i2t.fold": folds, "1k-5fold.t2i.fold": folds}
    ranks = [[0, 1, 2, 4, 8, 9], [0, 0, 2, 0, 0, 1]]
    runs = [
        retrieval_file(tmp_path / f"f{i}.npz", r, r, np.arange(6), protocol="1k-5fold", **more)
        for i, r in enumerate(ranks)
    ]
    of = by_name(differences(*runs, draws=300))["1k_5fold_i2t_medr"]
    assert (of.first, of.second) == ((2 + 9) / 2, (1 + 1) / 2)


def test_runs_on_other_data_are_refused_by_what_differs(tmp_path):
    first = zero_shot_file(tmp_path / "a.npz", [1, 0, 1])
    with pytest.raises(InputError, match="same images in the same order, found 3 and 3 with 1 in common"):
        differences(first, zero_shot_file(tmp_path / "b.npz", [1, 0, 1], keys=["0.jpg", "x", "y"]))
    with pytest.raises(InputError, match="found other ones for 1 of 3 images"):
        differences(first, zero_shot_file(tmp_path / "c.npz", [1, 0, 1], labels=[0, 0, 2]))
    run = retrieval_file(tmp_path / "r.npz", [0, 1, 2], [0, 1, 2], [0, 1, 2])
    with pytest.raises(InputError, match="two runs of one evaluation, found zeroshot and retrieval"):
        differences(first, run)
    with pytest.raises(InputError, match="the same captions, found SHA-256 x and y"):
        differences(run, retrieval_file(tmp_path / "s.npz", [0, 1, 2], [0, 1, 2], [0, 1, 2], captions="y"))
    with pytest.raises(InputError, match="found full and 5k; evaluate both with the same --protocols"):
        differences(run, retrieval_file(tmp_path / "t.npz", [0, 1, 2], [0, 1, 2], [0, 1, 2], protocol="5k"))
    with pytest.raises(InputError, match=r"the same queries in both runs, found others in full\.t2i\.image"):
        differences(run, retrieval_file(tmp_path / "u.npz", [0, 1, 2], [0, 1, 2], [0, 1, 1]))


def test_the_command_compares_two_runs_of_retrieval(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_captioned(tmp_path / "data", [[f"a {i}", f"b {i}"] for i in range(8)], [{}] * 8)
    for step, name in ((3, "first"), (4, "second")):
        run = str(write_run(tmp_path / "runs", name, step))
        arguments = ["retrieval", "--data", str(data), "--checkpoint", run, "--out", f"{name}.json", "--resamples", "9"]
        monkeypatch.setattr(sys, "argv", arguments)
        retrieval_command.main()
    capsys.readouterr()
    monkeypatch.setattr(
        sys, "argv", ["significance", "first.json", "second.json", "--json", "out/d.json", "--draws", "300"]
    )
    module.main()
    printed = capsys.readouterr().out
    assert "| metric | A | B | B − A | 95 % interval | p |" in printed
    assert "Paired over 8 images" in printed
    content = json.loads((tmp_path / "out" / "d.json").read_text())
    names = [each["metric"] for each in content["differences"]]
    assert names == [
        *(f"{d}_r{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)),
        "rsum",
        "i2t_medr",
        "t2i_medr",
    ]
    first, second = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("first", "second"))
    for each in content["differences"]:
        assert each["first"] == pytest.approx(first[each["metric"]]["value"])
        assert each["second"] == pytest.approx(second[each["metric"]]["value"])


def test_the_command_wants_two_files_and_what_lies_beside_them(tmp_path):
    with pytest.raises(InputError, match=r"expected two results files, found 0; .*significance A\.json B\.json"):
        compare(SignificanceConfig())
    with pytest.raises(ValueError, match="draws must be at least 100, found 9"):
        SignificanceConfig(draws=9)

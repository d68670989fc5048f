"""The protocols of retrieval against plain slow formulas in float64, and the data sets that they belong to."""

import itertools
import json
import sys
import warnings

import numpy as np
import pytest
import torch
from evaluation_samples import write_captioned, write_run

from eval_suite import retrieval as module
from eval_suite.encode import encode_texts
from eval_suite.feature_similarity import FeatureSimilarity
from eval_suite.gallery import gallery
from eval_suite.judgements import COUNTS, in_rows, judgements
from eval_suite.metrics import chance_of_lists
from eval_suite.per_query import load_per_query
from eval_suite.protocols import PROTOCOLS, Setting, folded, judged_pairs, whole_gallery
from eval_suite.ranks import TIE_RULES, retrieval_ranks
from eval_suite.relevance import answers_of_class, listed_answers, relevance
from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate, retrieval
from eval_suite.retrieval_data import RETRIEVAL_DATASETS, RetrievalData, Split, count_faults, open_retrieval
from eval_suite.scores import dot_scores, joint_scores, remembered
from setclip.errors import InputError
from setclip.manifest import open_split


def table(scores):
    return lambda rows, columns: scores[rows, columns]


def plain(scores, is_right, rule):
    """One query by sorting: (0-based rank of the best right answer, R-Precision, mAP@R)."""
    index = np.arange(len(scores))
    second = {"pessimistic": is_right, "optimistic": ~is_right, "first_come": index}[rule]
    hits = is_right[np.lexsort((index, second, -scores.astype(np.float64)))]
    num_right = int(is_right.sum())
    precisions = [hits[:i].sum() / i for i in range(1, num_right + 1) if hits[i - 1]]
    return int(np.flatnonzero(hits)[0]), hits[:num_right].sum() / num_right, sum(precisions) / num_right


def plain_judged(scores, queries, answers, direction):
    """All queries by sorting, for each rule: three lists."""
    rows = scores.numpy() if direction == "i2t" else scores.numpy().T
    found = {}
    for rule in TIE_RULES:
        each = []
        for query, right in sorted(zip(queries, answers, strict=True)):
            is_right = np.zeros(rows.shape[1], dtype=bool)
            is_right[right] = True
            each.append(plain(rows[query], is_right, rule))
        found[rule] = [list(column) for column in zip(*each, strict=True)]
    return found


def random_judgements(generator, num_queries, gallery_size, most):
    queries = torch.randperm(num_queries, generator=generator)[: num_queries * 2 // 3].tolist()
    answers = [
        torch.randperm(gallery_size, generator=generator)[
            : int(torch.randint(1, most, (1,), generator=generator))
        ].tolist()
        for _ in queries
    ]
    return queries, answers


# --- several right answers


@pytest.mark.parametrize("levels", [2, 9, 100_000])
@pytest.mark.parametrize(("direction", "block_size"), [("i2t", 7), ("t2i", 7), ("i2t", 500), ("t2i", 500)])
def test_listed_right_answers_give_what_sorting_gives_under_every_tie_rule(levels, direction, block_size):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (31, 83), generator=generator).float()
    num_queries, gallery = (31, 83) if direction == "i2t" else (83, 31)
    queries, answers = random_judgements(generator, num_queries, gallery, most=20)
    right = listed_answers(queries, answers, gallery)
    found = relevance(table(scores), right, direction, num_queries, block_size=block_size)
    for rule, (ranks, precisions, averages) in plain_judged(scores, queries, answers, direction).items():
        assert found.rank[rule].tolist() == ranks, rule
        assert found.r_precision[rule].tolist() == pytest.approx(precisions, abs=1e-12), rule
        assert found.map_at_r[rule].tolist() == pytest.approx(averages, abs=1e-12), rule
    assert right.queries.tolist() == sorted(queries)


def test_right_answers_by_class_give_what_sorting_gives_though_a_query_has_hundreds(monkeypatch):
    monkeypatch.setattr("eval_suite.relevance.SCORES_AT_A_TIME", 2_000)  # several pieces a stripe
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(40, (60, 600), generator=generator).float()
    of_images = torch.randint(3, (60,), generator=generator)
    of_texts = torch.randint(3, (600,), generator=generator)
    found = relevance(table(scores), answers_of_class(of_images, of_texts), "i2t", 60, block_size=16)
    answers = [(of_texts == each).nonzero().flatten().tolist() for each in of_images]
    assert min(map(len, answers)) > 150
    for rule, (ranks, precisions, averages) in plain_judged(scores, list(range(60)), answers, "i2t").items():
        assert found.rank[rule].tolist() == ranks
        assert found.r_precision[rule].tolist() == pytest.approx(precisions, abs=1e-12)
        assert found.map_at_r[rule].tolist() == pytest.approx(averages, abs=1e-12)


def test_a_hand_made_query_has_the_precisions_that_one_works_out():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    found = relevance(table(scores), listed_answers([0], [[0, 2, 4]], 5), "i2t", 1)
    # Right, wrong, right among the first R = 3: R-Precision 2/3; mAP@R (1/1 + 2/3) / 3.
    assert found.r_precision["pessimistic"].item() == pytest.approx(2 / 3)
    assert found.map_at_r["pessimistic"].item() == pytest.approx((1 + 2 / 3) / 3)
    tied = relevance(table(torch.ones(1, 5)), listed_answers([0], [[0, 2]], 5), "i2t", 1)
    assert {rule: values.item() for rule, values in tied.map_at_r.items()} == {
        "pessimistic": 0.0,
        "first_come": 0.5,
        "optimistic": 1.0,
    }
    assert {rule: values.item() for rule, values in tied.rank.items()} == {
        "pessimistic": 3,
        "first_come": 0,
        "optimistic": 0,
    }


def test_with_own_captions_as_the_right_answers_ranks_are_those_of_the_whole_gallery():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(30, (20, 60), generator=generator).float()
    owners = torch.arange(60) // 3
    i2t, t2i = retrieval_ranks(table(scores), owners, 20)
    of_images = listed_answers(range(20), [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)], 60)
    of_texts = listed_answers(range(60), [[t // 3] for t in range(60)], 20)
    for ranks, right, direction, num in ((i2t, of_images, "i2t", 20), (t2i, of_texts, "t2i", 60)):
        found = relevance(table(scores), right, direction, num, with_lists=False)
        assert all(torch.equal(found.rank[rule], ranks.by(rule)) for rule in TIE_RULES)
        assert not found.map_at_r


def test_chance_of_lists_is_what_random_orders_give_on_average():
    generator = np.random.default_rng(0)
    num_right = torch.tensor([3, 7])
    sums = np.zeros(2)
    for _ in range(4_000):
        for r in num_right.tolist():
            is_right = np.zeros(12, dtype=bool)
            is_right[:r] = True
            _, precision, average = plain(generator.permutation(12), is_right, "first_come")
            sums += (precision, average)
    assert chance_of_lists(12, num_right) == pytest.approx(tuple(100 * sums / 8_000), abs=0.7)


def test_scores_that_are_not_finite_are_an_error_here_too():
    scores = torch.zeros(4, 8)
    scores[2, 5] = float("nan")
    with pytest.raises(InputError, match="row 2 and column 5"):
        relevance(table(scores), listed_answers([2], [[1]], 8), "i2t", 4)


# --- folds


def test_folds_are_galleries_of_their_own_and_every_metric_is_the_mean_over_them():
    generator = torch.Generator().manual_seed(5)
    scores = torch.randint(200, (50, 250), generator=generator).float()
    owners = torch.arange(250) // 5
    found = folded(table(scores), owners, 50, Setting(resamples=20))
    folds = [
        whole_gallery(table(scores[f : f + 10, 5 * f : 5 * f + 50]), owners[:50], 10, Setting(resamples=1)).metrics
        for f in range(0, 50, 10)
    ]
    for name in folds[0]:
        metric = found.metrics[f"1k_5fold_{name}"]
        assert metric.value == pytest.approx(np.mean([fold[name].value for fold in folds]), abs=1e-9), name
        assert metric.chance == pytest.approx(np.mean([fold[name].chance for fold in folds])), name
        for rule, value in metric.tie_variants.items():
            assert value == pytest.approx(np.mean([fold[name].tie_variants[rule] for fold in folds]), abs=1e-9)
    recalls = [m.value for n, m in found.metrics.items() if n.rpartition("_")[2] in ("r1", "r5", "r10")]
    assert len(recalls) == 6
    assert found.metrics["1k_5fold_rsum"].value == pytest.approx(sum(recalls))
    low, high = found.metrics["1k_5fold_rsum"].interval_95
    assert low <= found.metrics["1k_5fold_rsum"].value <= high
    assert "In 5 folds of 10 images in file order" in found.metrics["1k_5fold_i2t_r1"].protocol


def test_folds_of_different_sizes_weigh_the_same():
    generator = torch.Generator().manual_seed(6)
    scores = torch.randint(50, (13, 26), generator=generator).float()
    found = folded(table(scores), torch.arange(26) // 2, 13, Setting(resamples=5))
    starts = [number * 13 // 5 for number in range(6)]
    of_folds = []
    for first, last in itertools.pairwise(starts):
        own = scores[first:last, 2 * first : 2 * last]
        ranks = retrieval_ranks(table(own), torch.arange(2 * (last - first)) // 2, last - first)[1].by("pessimistic")
        of_folds.append(100 * (ranks < 1).double().mean().item())
    assert sorted({last - first for first, last in itertools.pairwise(starts)}) == [2, 3]
    assert found.metrics["1k_5fold_t2i_r1"].value == pytest.approx(np.mean(of_folds))


def test_blocks_that_are_kept_are_not_computed_again_and_folds_find_them():
    asked = []

    def score(rows, columns):
        asked.append((rows.start, rows.stop, columns.start, columns.stop))
        return torch.ones(rows.stop - rows.start, columns.stop - columns.start) * rows.start

    keeping = remembered(score, max_scores=1_000_000)
    owners = torch.arange(1_000)
    whole_gallery(keeping, owners, 1_000, Setting(resamples=1))
    assert sorted(asked) == [(r, r + 500, c, c + 500) for r in (0, 500) for c in (0, 500)]
    folded(keeping, owners, 1_000, Setting(resamples=1), num_folds=2)
    assert len(asked) == 4
    few = remembered(score, max_scores=250_000)
    asked.clear()
    whole_gallery(few, owners, 1_000, Setting(resamples=1))
    assert len(asked) == 4 + 1  # of the two with right pairs one is kept


# --- judgements of COCO


def test_the_judgements_are_those_that_their_authors_count():
    for name, directions in COUNTS.items():
        for direction, (queries, pairs) in directions.items():
            found = judgements(name, direction)
            assert (len(found), sum(map(len, found.values()))) == (queries, pairs)
    assert max(map(len, judgements("eccv", "i2t").values())) == 48
    assert max(map(len, judgements("eccv", "t2i").values())) == 19


def test_ids_become_rows_and_what_is_missing_is_told():
    listed = {7: [70, 71, 72], 8: [70], 9: [99]}
    judged = in_rows(listed, query_ids=[9, 7], answer_ids=[71, 70], gallery={70, 71, 99})
    assert (judged.queries, judged.answers) == ([1], [[1, 0]])
    assert judged.num_right == [3]  # 72 is in no gallery, and counts
    assert judged.missing_queries == [8]
    assert judged.missing_answers == [99]


def test_judged_metrics_equal_those_of_the_package_eccv_caption():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses faster JSON
        from eccv_caption._metrics import compute_eccv_metrics, compute_r_at_k
    generator = torch.Generator().manual_seed(11)
    scores = torch.rand(30, 90, generator=generator)
    owners = torch.arange(90) // 3
    right, expected = {}, {}
    for direction, num_queries, size in (("i2t", 30, 90), ("t2i", 90, 30)):
        queries, answers = random_judgements(generator, num_queries, size, most=12)
        num_right = [len(each) + (query % 3 == 0) for query, each in zip(queries, answers, strict=True)]
        right[direction] = listed_answers(queries, answers, size, num_right)
        rows = scores if direction == "i2t" else scores.T
        ranked = {query: rows[query].argsort(descending=True).tolist() for query in queries}
        truth = dict(zip(queries, answers, strict=True))
        for query in queries:  # a right answer that the gallery does not have counts in R
            truth[query] = truth[query] + [size + 1] * (query % 3 == 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = compute_eccv_metrics(ranked, truth)
        expected |= {f"x_{direction}_{name.removeprefix('eccv_')}": value for name, value in theirs.items()}
        expected |= {f"x_{direction}_r{k}": compute_r_at_k(ranked, truth, k) for k in (5, 10)}
    expected = {name.replace("rprecision", "r_precision"): 100 * value for name, value in expected.items()}
    measures = ("map_at_r", "r_precision", "r1", "r5", "r10")
    found = judged_pairs(table(scores), right, owners, "x_", measures, "some are right", Setting(resamples=5))
    assert {name: metric.value for name, metric in found.metrics.items()} == pytest.approx(expected, abs=1e-9)


def coco_like(folder, num_images=24, captions_each=5, **manifest):
    """Images of COCO's test split by their real ids, those that ECCV Caption judged together first."""
    texts_of = judgements("original", "i2t")
    image_of = {text: image for image, texts in texts_of.items() for text in texts}
    first, right = next(iter(judgements("eccv", "i2t").items()))
    images = list(dict.fromkeys([first, *(image_of[text] for text in right), *texts_of]))[:num_images]
    captions = [[f"image {image}, text {text}" for text in texts_of[image][:captions_each]] for image in images]
    extras = [{"coco_id": image, "sentids": list(texts_of[image][:captions_each])} for image in images]
    return write_captioned(folder, captions, extras, **manifest), images, texts_of


def test_the_command_on_coco_reports_all_four_protocols_and_marks_a_part_as_partial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SETCLIP_DATA", raising=False)
    _, images, texts_of = coco_like(tmp_path / "data" / "coco")
    write_run(tmp_path / "runs", "first")
    arguments = ["retrieval", "coco", "--out", "c.json", "--allow-partial", "True", "--resamples", "20"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    printed = capsys.readouterr()
    assert "1k-5fold: COCO 1K: five folds" in printed.out
    assert "warning: partial: 24 images instead of 5,000" in printed.err
    results = Results.load("c.json")
    assert results.is_partial
    assert list(results.details["protocols"]) == ["5k", "1k-5fold", "eccv", "cxc"]
    assert results.headline[:2] == ["i2t_r1", "i2t_r5"]
    assert results.headline[-5:] == [
        "1k_5fold_rsum",
        "eccv_i2t_map_at_r",
        "eccv_t2i_map_at_r",
        "cxc_i2t_r1",
        "cxc_t2i_r1",
    ]
    assert set(results.headline) <= set(results.metrics)
    queries = load_per_query("c.queries.npz")
    assert queries.protocols() == ["5k", "1k-5fold", "eccv", "cxc"]
    assert len(queries.keys) == 24
    # The judged images that are there, and what of their right answers is there: worked out from the ids alone.
    texts = {text for image in images for text in texts_of[image]}
    judged = [i for i in images if set(judgements("eccv", "i2t").get(i, ())) & texts]
    assert len(judged) >= 1
    assert queries.arrays["eccv.i2t.image"].tolist() == sorted(images.index(i) for i in judged)
    assert results.metrics["eccv_i2t_map_at_r"].samples == len(judged)
    map_at_r = 100 * queries.arrays["eccv.i2t.map_at_r"].mean()
    assert results.metrics["eccv_i2t_map_at_r"].value == pytest.approx(map_at_r)
    r1 = 100 * (queries.arrays["5k.t2i.rank"] < 1).mean()
    assert results.metrics["t2i_r1"].value == pytest.approx(r1)


def test_a_wrong_number_of_images_is_an_error_that_names_what_is_missing(tmp_path):
    place, images, texts_of = coco_like(tmp_path / "coco", dropped={"image not found": 4_976})
    lacking = sorted(set(texts_of) - set(images))[:2]
    expected = (
        r"coco, split test at .*: expected 5,000 images with 5 captions each, found 24 images and 120 captions: 4,976 "
        rf"images missing; no image of COCO id {lacking[0]}, {lacking[1]}, .*The preparation left out image not found: "
        r"4,976. .*--allow-partial True"
    )
    with pytest.raises(InputError, match=expected):
        open_retrieval("coco", place)
    assert open_retrieval("coco", place, allow_partial=True)[4] is True
    assert open_retrieval("elsewhere", place)[3:] == (("full",), False)  # of another name nothing is expected


def test_captions_beyond_the_fifth_are_not_taken_and_fewer_are_a_fault(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RETRIEVAL_DATASETS["flickr30k"].splits, "test", Split(images=3))
    captions = [[f"{i} {j}" for j in range(7 if i == 1 else 5)] for i in range(3)]
    extras = [{"sentids": list(range(10 * i, 10 * i + len(texts)))} for i, texts in enumerate(captions)]
    place = write_captioned(tmp_path / "seven", captions, extras)
    split, _, data, protocols, is_partial = open_retrieval("flickr30k", place)
    assert (split, protocols, is_partial) == ("test", ("full",), False)
    assert data.captions[1] == ["1 0", "1 1", "1 2", "1 3", "1 4"]
    assert data.caption_ids[1] == [10, 11, 12, 13, 14]
    assert "2 captions beyond the first 5 of an image are not taken" in capsys.readouterr().out
    place = write_captioned(tmp_path / "four", [texts[:4] for texts in captions], [{}] * 3)
    with pytest.raises(InputError, match=rf"3 images without 5 captions \(first: {data.keys[0]}, 4\)"):
        open_retrieval("flickr30k", place)


def test_the_published_splits_are_what_the_data_sets_expect():
    splits = {name: {s: each.images for s, each in d.splits.items()} for name, d in RETRIEVAL_DATASETS.items()}
    assert splits["flickr30k"] == {"val": 1_014, "test": 1_000}
    assert splits["coco"] == {"val": 5_000, "test": 5_000}
    assert splits["cub"] == {"test": 2_967}
    whole = RetrievalData(
        keys=[f"{i}" for i in range(5_000)],
        captions=[["a", "b", "c", "d", "e"]] * 5_000,
        image_ids=sorted(judgements("original", "i2t")),
        caption_ids=[None] * 5_000,
        class_ids=[None] * 5_000,
    )
    expected = RETRIEVAL_DATASETS["coco"].splits["test"]
    assert count_faults(whole, expected, 5, has_coco_ids=True) == []
    assert PROTOCOLS["5k"].faults(whole) == []
    ids = {direction: judgements("original", direction) for direction in ("i2t", "t2i")}
    captions = [list(ids["i2t"][image]) for image in whole.image_ids]
    with_ids = RetrievalData(**{**vars(whole), "caption_ids": captions})
    assert PROTOCOLS["eccv"].faults(with_ids) == PROTOCOLS["cxc"].faults(with_ids) == []


def test_judged_protocols_want_ids_and_images_of_the_test_split(tmp_path):
    place = write_captioned(tmp_path / "plain", [["a"], ["b"]], [{}, {}])
    run = str(write_run(tmp_path / "runs", "first"))
    with pytest.raises(InputError, match="protocol eccv: expected coco_id and one of sentids for each caption"):
        evaluate(RetrievalConfig(data=place, protocols=("eccv",), checkpoint=run))
    other = write_captioned(
        tmp_path / "val", [["a"], ["b"]], [{"coco_id": 1, "sentids": [1]}, {"coco_id": 2, "sentids": [2]}]
    )
    with pytest.raises(InputError, match="expected images of COCO's test split, found none that cxc judged"):
        evaluate(RetrievalConfig(data=other, protocols=("cxc",), checkpoint=run))
    with pytest.raises(InputError, match="at least 5 images for 5 folds, found 2"):
        evaluate(RetrievalConfig(data=place, protocols=("1k-5fold",), checkpoint=run))
    six = write_captioned(tmp_path / "six", [[f"text {i}"] for i in range(6)], [{}] * 6)
    with pytest.raises(InputError, match="5k: 6 images instead of 5,000, 6 images without 5 captions"):
        evaluate(RetrievalConfig(data=six, protocols=("5k",), checkpoint=run))


# --- CUB


def write_birds(folder, monkeypatch):
    monkeypatch.setitem(RETRIEVAL_DATASETS["cub"].splits, "test", Split(images=12, classes=3))
    captions = [[f"bird {i % 3}, text {j}" for j in range(10)] for i in range(12)]
    return write_captioned(folder, captions, [{"class_id": 151 + i % 3} for i in range(12)])


def test_cub_matches_by_class_unless_told_otherwise(tmp_path, monkeypatch):
    place = write_birds(tmp_path / "cub", monkeypatch)
    run = str(write_run(tmp_path / "runs", "first"))
    shared = {"name": "cub", "data": place, "checkpoint": run, "resamples": 20}
    found = evaluate(RetrievalConfig(**shared)).results
    assert list(found.details["protocols"]) == ["class"]
    assert set(found.headline) == {
        f"class_match_{d}_{m}" for d in ("i2t", "t2i") for m in ("r1", "r5", "r10", "r_precision", "map_at_r")
    }
    # 4 of 12 images are right for a caption
    assert found.metrics["class_match_t2i_r1"].chance == pytest.approx(100 / 3)
    assert found.metrics["class_match_t2i_r_precision"].chance == pytest.approx(100 / 3)
    assert "120 captions each rank all 12 images; all of the query's class are right, 4.0 a query" in (
        found.metrics["class_match_t2i_r1"].protocol
    )
    by_instance = evaluate(RetrievalConfig(**shared, match="instance")).results
    assert "rsum" in by_instance.metrics
    assert by_instance.metrics["t2i_r1"].chance == pytest.approx(100 / 12)


def test_the_gallery_marks_what_the_match_takes_for_right(tmp_path, monkeypatch):
    place = write_birds(tmp_path / "cub", monkeypatch)
    shared = {"name": "cub", "data": place, "checkpoint": str(write_run(tmp_path / "runs", "first")), "resamples": 5}
    class_of = {sample.key: sample.extra["class_id"] for shard in open_split(place)[1] for sample in shard}

    def is_right(by_class, query, answer):
        return class_of[query] == class_of[answer] if by_class else query == answer

    for match in ("class", "instance"):
        found = evaluate(RetrievalConfig(**shared, match=match, gallery_queries=40)).pictures
        assert ("of the query's class" in found["right"]) == (match == "class")
        entries = [entry for d in ("i2t", "t2i") for which in ("chosen", "worst") for entry in found[d][which]]
        for entry in entries:
            expected = [is_right(match == "class", entry["query"]["key"], a["key"]) for a in entry["answers"]]
            assert [a["is_right"] for a in entry["answers"]] == expected
            if True in expected:  # captions of a class are equal here, so that others may tie with the first right one
                assert entry["rank"] >= expected.index(True) + 1
            else:
                assert entry["rank"] > len(expected)
        num_right = sum(a["is_right"] for entry in entries for a in entry["answers"])
        assert num_right > 0
        worst = [entry["rank"] for entry in found["t2i"]["worst"]]
        assert worst == sorted(worst, reverse=True)


def test_the_gallery_of_judged_queries_shows_these_alone():
    scores = torch.arange(30.0).reshape(5, 6)
    owners = torch.tensor([0, 1, 1, 2, 3, 4])
    right = {
        "i2t": listed_answers([1, 3], [[5, 0], [2]], 6),
        "t2i": listed_answers([0, 4], [[4], [0, 1]], 5),
    }
    ranks = {d: relevance(table(scores), right[d], d, n).rank["pessimistic"] for d, n in (("i2t", 5), ("t2i", 6))}
    keys, captions = list("abcde"), [["0"], ["1", "2"], ["3"], ["4"], ["5"]]
    found = gallery(table(scores), ranks["i2t"], ranks["t2i"], owners, keys, captions, 5, 2, right=right)
    assert [entry["query"]["key"] for entry in found["i2t"]["chosen"]] == ["b", "d"]
    assert [[a["is_right"] for a in entry["answers"]] for entry in found["i2t"]["chosen"]] == [
        [True, False],
        [False] * 2,
    ]
    assert [entry["rank"] for entry in found["i2t"]["chosen"]] == [1, 4]
    assert [entry["query"]["caption"] for entry in found["t2i"]["chosen"]] == ["0", "4"]
    assert [entry["rank"] for entry in found["t2i"]["chosen"]] == [1, 4]
    assert [entry["query"]["caption"] for entry in found["t2i"]["worst"]] == ["4"]


def test_cub_without_classes_or_with_a_class_too_few_is_an_error(tmp_path, monkeypatch):
    place = write_birds(tmp_path / "cub", monkeypatch)
    monkeypatch.setitem(RETRIEVAL_DATASETS["cub"].splits, "test", Split(images=12, classes=50))
    with pytest.raises(InputError, match=r"expected 12 images of 50 classes with 10 captions each.*3 of 50 classes"):
        open_retrieval("cub", place)
    plain_place = write_captioned(tmp_path / "plain", [["a"], ["b"]], [{}, {}])
    run = str(write_run(tmp_path / "runs", "first"))
    with pytest.raises(InputError, match=r"expected class_id in every sample's JSON .* or use --match instance"):
        evaluate(RetrievalConfig(data=plain_place, match="class", checkpoint=run))


def test_choices_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected --match or --protocols, found both"):
        RetrievalConfig(match="class", protocols=("full",))
    place = write_captioned(tmp_path / "plain", [["a"], ["b"]], [{}, {}])
    with pytest.raises(InputError, match="found full and 5k, which are the same ranking"):
        evaluate(RetrievalConfig(data=place, protocols=("full", "5k")))
    with pytest.raises(
        InputError, match=r"unknown protocol '1k', perhaps .*; known: 1k-5fold, 5k, class, cxc, eccv, full"
    ):
        evaluate(RetrievalConfig(data=place, protocols=("1k",)))


# --- sets and joint scores


def test_sets_of_several_sizes_are_filled_with_zero_vectors_and_masks_tell():
    sizes = {"a": 1, "bb": 2, "ccc": 3}

    def encode_text(texts):
        most = max(sizes[text] for text in texts)
        features = torch.zeros(len(texts), most, 4)
        for row, text in enumerate(texts):
            features[row, : sizes[text], 0] = 2.0
        return features

    features = encode_texts(encode_text, ["a", "bb", "a", "ccc"], batch_size=2, show_progress=False)
    assert features.shape == (4, 3, 4)
    assert features.any(-1).sum(1).tolist() == [1, 2, 1, 3]


def test_a_function_that_judges_fragments_jointly_ranks_by_its_scores():
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(9, 4, 6, generator=generator)
    words[::2, 2:] = 0  # some captions are shorter

    def max_mean(images, texts, masks):
        grid = torch.einsum("rkd,cld->rckl", images, texts).amax(2)
        return (grid * masks[1]).sum(-1) / masks[1].sum(-1)

    def encode_image(ids):
        return torch.nn.functional.pad(words[ids, :2], (0, 0, 0, 1))

    outcome = retrieval(
        encode_image,
        lambda texts: words[[int(text) for text in texts]],
        torch.arange(9).split(4),
        [[str(i)] for i in range(9)],
        make_score=joint_scores(max_mean),
        show_progress=False,
    )
    unit = torch.nn.functional.normalize(words.double(), dim=-1)
    expected = torch.empty(9, 9, dtype=torch.float64)
    for i in range(9):
        for t in range(9):
            length = int(words[t].any(-1).sum())
            expected[i, t] = (unit[i, :2] @ unit[t, :length].T).amax(0).mean()
    better = [(expected[i] > expected[i, i]).sum().item() for i in range(9)]
    assert outcome.i2t.better.tolist() == better


def test_sets_are_ranked_by_the_similarity_that_is_named_and_masks_are_seen():
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(12, 3, 8, generator=generator)
    texts = torch.randn(12, 3, 8, generator=generator)
    texts[::3, 2] = 0  # sets of two
    unit = [torch.nn.functional.normalize(each.double(), dim=-1) for each in (images, texts)]
    expected = torch.empty(12, 12, dtype=torch.float64)
    for i in range(12):
        for t in range(12):
            grid = unit[0][i] @ unit[1][t, : 2 if t % 3 == 0 else 3].T
            expected[i, t] = (grid.amax(0).mean() + grid.amax(1).mean()) / 2
    similarity = FeatureSimilarity("chamfer", {}, {"similarity": "mil"})
    outcome = retrieval(
        lambda ids: images[ids],
        lambda names: texts[[int(name) for name in names]],
        torch.arange(12).split(5),
        [[str(i)] for i in range(12)],
        make_score=similarity,
        show_progress=False,
    )
    scores = outcome.score(slice(0, 12), slice(0, 12)).double()
    scale = expected.std() / scores.std()  # sum or mean of the two directions
    assert torch.allclose(scores * scale, expected, atol=1e-6)
    assert outcome.t2i.better.tolist() == [(expected[:, t] > expected[t, t]).sum().item() for t in range(12)]
    assert similarity.described == {"similarity": "chamfer", "similarity_options": {}}


def test_single_vectors_are_sets_of_one_to_the_similarities_of_sets(tmp_path):
    place = write_captioned(tmp_path / "data", [[f"text {i}", f"number {i}"] for i in range(6)], [{}] * 6)
    run = str(write_run(tmp_path / "runs", "first"))
    values = []
    for similarity in (None, "avg", "chamfer"):
        found = evaluate(RetrievalConfig(data=place, checkpoint=run, resamples=5, similarity=similarity)).results
        values.append({name: metric.value for name, metric in found.metrics.items()})
        assert found.details["similarity"] == (similarity or "cosine")
    assert values[0] == values[1] == values[2]


def test_the_dot_product_refuses_sets_and_says_what_they_need():
    with pytest.raises(
        InputError, match=r"expected single vectors of one width, found images \(2, 3, 4\).*--similarity"
    ):
        dot_scores(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


# --- what the command keeps


def test_the_gallery_holds_small_pictures_of_the_keys_that_it_names(tmp_path):
    place = write_captioned(tmp_path / "data", [[f"text {i}"] for i in range(6)], [{}] * 6)
    run = str(write_run(tmp_path / "runs", "first"))
    pictures = evaluate(RetrievalConfig(data=place, checkpoint=run, resamples=5, gallery_queries=2)).pictures
    named = {answer["key"] for entry in pictures["t2i"]["chosen"] for answer in entry["answers"]}
    assert named <= set(pictures["pictures"])
    json.dumps(pictures)

"""Retrieval: the function against a plain formula, the gallery, and the command on shards."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluation_samples import small_model, write_run, write_shards

from eval_suite import retrieval as module
from eval_suite.encode import encode_functions
from eval_suite.gallery import gallery
from eval_suite.images import ShardImages, image_batches
from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate, read_captions, retrieval
from setclip.errors import InputError
from setclip.images import eval_transform
from setclip.manifest import open_split


def one_hot_encoders(num_images, shift_texts=0):
    """Image i is the unit vector i; text "i" is the unit vector i + shift."""
    eye = torch.eye(num_images)
    return (lambda ids: eye[ids]), (lambda texts: eye[[(int(t) + shift_texts) % num_images for t in texts]])


def id_batches(num_images, size=7):
    return torch.arange(num_images).split(size)


def values_of(outcome):
    return {name: metric.value for name, metric in outcome.metrics.items()}


def test_perfect_features_reach_every_maximum():
    captions = [[str(i)] * (1 + i % 3) for i in range(20)]
    outcome = retrieval(*one_hot_encoders(20), id_batches(20), captions)
    values = values_of(outcome)
    assert values["rsum"] == 600.0
    assert {values["i2t_r1"], values["t2i_r10"]} == {100.0}
    assert (values["i2t_medr"], values["t2i_medr"]) == (1.0, 1.0)
    assert outcome.metrics["rsum"].interval_95 == (600.0, 600.0)


def test_wrong_features_score_nothing_under_ties_against_us_and_the_other_rules_stand_beside():
    captions = [[str(i)] for i in range(20)]
    outcome = retrieval(*one_hot_encoders(20, shift_texts=1), id_batches(20), captions)
    # One text scores 1, all others 0 like the right one: the rank is anything from 2 to 20.
    assert values_of(outcome)["t2i_r10"] == 0.0
    assert outcome.metrics["t2i_r10"].tie_variants["optimistic"] == 100.0
    assert 0 < outcome.metrics["t2i_r10"].tie_variants["first_come"] < 100
    assert outcome.metrics["t2i_medr"].value == 20
    assert outcome.metrics["t2i_medr"].tie_variants["optimistic"] == 2


def test_chance_and_counts_stand_beside_every_number():
    captions = [[str(i)] * 5 for i in range(40)]
    metrics = retrieval(*one_hot_encoders(40), id_batches(40), captions).metrics
    assert metrics["t2i_r1"].chance == pytest.approx(2.5)
    assert metrics["i2t_r1"].chance == pytest.approx(2.5)
    assert metrics["i2t_r5"].chance == pytest.approx(100 * (1 - np.prod([(195 - j) / (200 - j) for j in range(5)])))
    assert metrics["rsum"].chance == pytest.approx(sum(m.chance for n, m in metrics.items() if "_r" in n))
    assert (metrics["i2t_r1"].samples, metrics["t2i_r1"].samples) == (40, 200)
    assert "40 images each rank 200 captions" in metrics["i2t_r1"].protocol


def test_a_small_model_on_shards_gives_what_the_plain_float64_formula_gives(tmp_path):
    loaded = small_model(tmp_path)
    _, shards = open_split(write_shards(tmp_path / "shards"))
    _, captions = read_captions(shards)
    images = ShardImages(shards, eval_transform(32))
    encode_image, encode_text = encode_functions(loaded)
    outcome = retrieval(encode_image, encode_text, image_batches(images, 5, 0), captions)

    with torch.no_grad():
        image_features = encode_image(torch.stack([images[i] for i in range(len(images))])).double().numpy()
        text_features = encode_text([t for texts in captions for t in texts]).double().numpy()
    scores = image_features @ text_features.T
    owners = np.arange(24) // 2
    i2t = [min((scores[i] > s).sum() for s in scores[i, owners == i]) for i in range(12)]
    t2i = [(scores[:, t] > scores[owners[t], t]).sum() for t in range(24)]
    assert outcome.i2t.better.tolist() == i2t
    assert outcome.t2i.better.tolist() == t2i
    expected = {f"i2t_r{k}": 100 * np.mean(np.array(i2t) < k) for k in (1, 5, 10)}
    expected |= {f"t2i_r{k}": 100 * np.mean(np.array(t2i) < k) for k in (1, 5, 10)}
    values = values_of(outcome)
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert values["rsum"] == pytest.approx(sum(expected.values()))
    assert values["i2t_medr"] == np.floor(np.median(i2t)) + 1
    low, high = outcome.metrics["rsum"].interval_95
    assert low < values["rsum"] < high


def test_captions_that_do_not_fit_the_images_are_an_error():
    captions = [[str(i)] for i in range(20)]
    with pytest.raises(InputError, match="expected features of 20 images, found 19"):
        retrieval(*one_hot_encoders(20), id_batches(19), captions)
    with pytest.raises(InputError, match="expected a text for each of 20 images, found none for 1"):
        retrieval(*one_hot_encoders(20), id_batches(20), [*captions[:19], []])


def test_a_score_that_judges_pairs_jointly_takes_the_place_of_the_dot_product():
    def opposite(image_features, text_features):
        return lambda rows, columns: -(image_features[rows] @ text_features[columns].T)

    outcome = retrieval(*one_hot_encoders(20), id_batches(20), [[str(i)] for i in range(20)], make_score=opposite)
    assert values_of(outcome)["rsum"] == 0.0


def test_the_gallery_marks_right_answers_and_lists_the_worst_failures_first():
    captions = [[str(i)] for i in range(20)]
    captions[4] = ["5"]  # ranks image 5 first
    outcome = retrieval(*one_hot_encoders(20), id_batches(20), captions)
    found = gallery(
        outcome.score,
        outcome.i2t,
        outcome.t2i,
        outcome.image_of_text,
        [f"key{i}" for i in range(20)],
        captions,
        num_queries=5,
        k=3,
    )
    chosen = found["t2i"]["chosen"]
    assert len(chosen) == 5
    assert chosen[0]["answers"][0] == {"key": "key0", "score": 1.0, "is_right": True}
    assert [a["is_right"] for a in chosen[0]["answers"]] == [True, False, False]
    worst = found["t2i"]["worst"]
    assert [entry["query"] for entry in worst] == [{"caption": "5", "key": "key4"}]
    assert worst[0]["rank"] == 20
    assert worst[0]["answers"][0] == {"key": "key5", "score": 1.0, "is_right": False}
    assert found["i2t"]["worst"][0]["query"] == {"key": "key4", "captions": ["5"]}


def test_the_command_writes_results_and_gallery(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data" / "own", split="dev")
    write_run(tmp_path / "runs", "first")
    monkeypatch.delenv("SETCLIP_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["retrieval", "own", "--out", "out/r.json", "--gallery-queries", "3"])
    module.main()
    printed = capsys.readouterr().out
    assert "taking the newest run, runs/first" in printed
    assert "split 'dev'" in printed
    results = Results.load("out/r.json")
    assert (results.dataset["images"], results.dataset["captions"], results.dataset["split"]) == (12, 24, "dev")
    assert results.headline[:2] == ["i2t_r1", "i2t_r5"]
    assert results.details["gallery"] == "r.gallery.json"
    pictures = json.loads((tmp_path / "out" / "r.gallery.json").read_text())
    keys, captions = read_captions(open_split(tmp_path / "data" / "own")[1])
    entry = pictures["i2t"]["chosen"][0]
    assert entry["query"] == {"key": keys[0], "captions": captions[0]}
    assert len(entry["answers"]) == 5
    assert {a["key"] for a in entry["answers"]} <= set(keys)
    assert pictures["data"] == "data/own"


def test_the_result_does_not_depend_on_batch_size_and_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, run = write_shards(tmp_path / "shards"), write_run(tmp_path / "runs", "first")
    first, second = (
        evaluate(RetrievalConfig(data=data, checkpoint=str(run), batch_size=size, workers=workers)).results
        for size, workers in ((3, 0), (12, 1))
    )
    assert first.metrics == second.metrics


def test_a_place_that_is_not_there_says_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SETCLIP_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"expected scenes at .*: python -m data_prep.run scenes --out .*/scenes"):
        evaluate(RetrievalConfig(name="scenes"))
    write_shards(tmp_path / "flickr8k")
    with pytest.raises(
        InputError, match="unknown dataset 'flickr8', perhaps 'flickr8k'; known: coco, cub, flickr30k, flickr8k, scenes"
    ):
        evaluate(RetrievalConfig(name="flickr8"))
    with pytest.raises(InputError, match="expected shards of split 'val', found splits"):
        evaluate(RetrievalConfig(name="flickr8k", split="val"))
    with pytest.raises(InputError, match="expected the name of a data set"):
        evaluate(RetrievalConfig())


def test_a_sample_without_caption_is_an_error_that_names_it(tmp_path):
    _, shards = open_split(write_shards(tmp_path / "shards", captions_each=0))
    with pytest.raises(InputError, match=f"test-00000.tar, sample {shards[0].keys[0]}: expected a caption, found none"):
        read_captions(shards)

"""Sets of embeddings end to end: which similarity compares them, and retrieval and diagnostics of exported ones."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluation_samples import color_of_image, color_of_text, write_run, write_shards

from eval_suite import diagnostics as diagnostics_command
from eval_suite import retrieval as retrieval_command
from eval_suite.embed import EmbedSettings, embed
from eval_suite.embed_files import Embeddings
from eval_suite.embed_source import open_source
from eval_suite.embedded import embedded_features
from eval_suite.encode import encode_texts
from eval_suite.feature_similarity import FeatureSimilarity, mask_of
from eval_suite.images import ShardImages, image_batches
from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate, retrieval, scores_of
from eval_suite.retrieval_data import read_samples
from setclip.errors import InputError
from setclip.images import eval_transform
from setclip.manifest import open_split
from setclip.similarity import make_similarity

MODEL = {"where": "colours", "fingerprint": "0123456789abcdef"}


def with_own_number(features, numbers):
    """Sets of two elements: the colour, and a vector that tells samples apart."""
    spread = torch.stack([numbers.cos(), numbers.sin(), (2 * numbers).cos()], -1)
    return torch.stack([features, spread], 1)


def set_of_image(images):
    return with_own_number(color_of_image(images), images.float().mean((1, 2, 3)))


def set_of_text(texts):
    return with_own_number(color_of_text(texts), torch.tensor([float(text.split()[4].strip(",")) for text in texts]))


def embedded(place, out, model=MODEL, **settings):
    source = open_source(place, None)
    options = EmbedSettings(**settings)
    return embed(
        source, out, set_of_image, set_of_text, eval_transform(32), model, options, workers=0, show_progress=False
    )


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- which similarity


def test_what_is_asked_for_goes_before_what_the_checkpoint_names_and_that_before_what_fits():
    named = {"similarity": {"name": "smooth_chamfer", "alpha": 4.0}}
    assert FeatureSimilarity("chamfer", {}, {"similarity": "mil"}).name == "chamfer"
    assert FeatureSimilarity(None, {}, {"similarity": "mil"}).name == "mil"
    assert FeatureSimilarity(None, {}, named).similarity.alpha == 4.0
    assert FeatureSimilarity("smooth_chamfer", {}, named).similarity.alpha == 4.0
    assert FeatureSimilarity("smooth_chamfer", {"alpha": 8}, named).similarity.alpha == 8.0
    assert FeatureSimilarity("maxpair", {}, named).described == {"similarity": "maxpair", "similarity_options": {}}
    assert FeatureSimilarity(None, {"alpha": 8}).name == "smooth_chamfer"


def test_single_vectors_are_compared_by_cosine_and_sets_by_smooth_chamfer_where_nothing_is_named(capsys):
    vectors, sets = unit(5, 8), unit(5, 3, 8)
    everything = (slice(0, 5), slice(0, 5))
    of_vectors, of_sets = FeatureSimilarity(), FeatureSimilarity()
    torch.testing.assert_close(of_vectors(vectors, vectors)(*everything), vectors @ vectors.T)
    assert of_vectors.described["similarity"] == "cosine"
    assert capsys.readouterr().out == ""
    expected = make_similarity("smooth_chamfer")(sets, sets)
    torch.testing.assert_close(of_sets(sets, sets)(*everything), expected)
    assert of_sets.described["similarity"] == "smooth_chamfer"
    assert "comparing them by smooth_chamfer" in capsys.readouterr().out


def test_numbers_that_were_learned_come_from_the_checkpoint_or_from_the_options_or_are_missed(capsys):
    trained = {"similarity": {"name": "match_prob", "a": 12.5, "b": -3.0}}
    sets = unit(4, 3, 8)
    expected = torch.sigmoid(12.5 * torch.einsum("ikd,jld->ijkl", sets, sets) - 3.0).mean((2, 3))
    for found in (
        FeatureSimilarity(None, {}, trained),
        FeatureSimilarity("match_prob_cos", {}, trained),  # the same by its longer name
        FeatureSimilarity("match_prob", {"a": 12.5, "b": -3.0}),
    ):
        torch.testing.assert_close(found(sets, sets)(slice(0, 4), slice(0, 4)), expected)
    assert capsys.readouterr().err == ""
    FeatureSimilarity("match_prob_l2", {"a": 3.0}, trained)
    assert "match_prob_l2 learns b, and neither" in capsys.readouterr().err


def test_a_similarity_that_cannot_be_made_says_what_it_would_take():
    for make in (make_similarity, lambda name, **options: FeatureSimilarity(name, options)):
        with pytest.raises(
            InputError, match="'mil' no options, found alpha; leave out alpha, which smooth_chamfer can"
        ):
            make("mil", alpha=8)
        with pytest.raises(
            InputError, match="'match_prob' the options a, b, found scale; leave out scale, which maxpair"
        ):
            make("match_prob", scale=8)
        with pytest.raises(InputError, match=r"expected numbers for the options of similarity .* alpha='steep'"):
            make("smooth_chamfer", alpha="steep")
        with pytest.raises(InputError, match="unknown similarity 'chanfer', perhaps 'chamfer'"):
            make("chanfer")
    with pytest.raises(InputError, match=r"as a name, or as an object with a name and options, found \{'alpha': 3\}"):
        FeatureSimilarity(None, {}, {"similarity": {"alpha": 3}})


def test_zero_vectors_are_no_elements():
    sets = unit(3, 4, 8)
    assert mask_of(sets) is None
    sets[1, 2:] = 0
    assert mask_of(sets).tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    score = scores_of(make_similarity("mil"))(-sets, sets)
    expected = torch.einsum("kd,ld->kl", -sets[1, :2], sets[1, :2]).max()
    torch.testing.assert_close(score(slice(1, 2), slice(1, 2)).squeeze(), expected)


# --- exported embeddings


@pytest.mark.parametrize("settings", [{}, {"format": "npy"}])
def test_features_stand_in_the_order_of_the_data_whatever_the_order_of_the_files(settings, tmp_path):
    place = write_shards(tmp_path / "shards")
    found = embedded(place, tmp_path / "out", **settings)
    _, shards = open_split(place)
    data = read_samples(shards)
    order = np.random.default_rng(0).permutation(len(data.keys))
    keys, captions = [data.keys[i] for i in order], [data.captions[i][:1] for i in order]
    images, texts = embedded_features(found, keys, captions)
    pictures = ShardImages(shards, eval_transform(32))
    expected = torch.nn.functional.normalize(set_of_image(torch.stack([pictures[int(i)] for i in order])), dim=-1)
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(
        texts, encode_texts(set_of_text, [text for own in captions for text in own], show_progress=False)
    )


def test_embeddings_that_lack_or_contradict_the_data_are_refused(tmp_path):
    place = write_shards(tmp_path / "shards")
    found = embedded(place, tmp_path / "out")
    data = read_samples(open_split(place)[1])
    with pytest.raises(
        InputError, match=r"all 13 pictures of the data, found none of 1 \(first: other\); embed the whole"
    ):
        embedded_features(found, [*data.keys, "other"], [*data.captions, ["text"]])
    captions = [list(own) for own in data.captions]
    captions[4][1] = "something else"
    with pytest.raises(
        InputError, match=rf"sample {data.keys[4]} caption 1 as the data has it, 'something else', found"
    ):
        embedded_features(found, data.keys, captions)
    captions = [[*own, "one more"] for own in data.captions]
    with pytest.raises(InputError, match="all 36 captions of the data, found none of 12"):
        embedded_features(found, data.keys, captions)
    without_texts = embedded(place, tmp_path / "pictures", texts=False)
    with pytest.raises(InputError, match="all 24 captions of the data, found none of 24"):
        embedded_features(without_texts, data.keys, data.captions)
    with pytest.raises(ValueError, match="expected --checkpoint or --embeddings, found both"):
        RetrievalConfig(data=place, checkpoint="x", embeddings=tmp_path)


@pytest.mark.parametrize("similarity", ["smooth_chamfer", "avg"])
def test_retrieval_of_exported_sets_is_that_of_the_encode_functions(similarity, tmp_path):
    place = write_shards(tmp_path / "shards")
    embedded(place, tmp_path / "out")
    options = ("alpha=8",) if similarity == "smooth_chamfer" else ()
    config = RetrievalConfig(
        data=place,
        embeddings=tmp_path / "out",
        similarity=similarity,
        similarity_options=options,
        resamples=20,
        gallery_queries=2,
    )
    found = evaluate(config)
    _, shards = open_split(place)
    make_score = scores_of(make_similarity(similarity, **({"alpha": 8} if options else {})))
    batches = image_batches(ShardImages(shards, eval_transform(32)), 5, 0)
    captions = read_samples(shards).captions
    expected = retrieval(set_of_image, set_of_text, batches, captions, make_score, resamples=20, show_progress=False)
    assert found.results.metrics == expected.metrics
    assert found.results.checkpoint["where"] == "colours"
    assert found.results.details["similarity"] == similarity
    assert found.results.details["similarity_options"] == ({"alpha": 8} if options else {})
    assert found.pictures["right"].endswith("an image's own captions are right.")


def test_the_commands_take_exported_sets(tmp_path, monkeypatch, capsys):
    place = write_shards(tmp_path / "shards")
    embedded(place, tmp_path / "out", {**MODEL, "similarity": {"name": "maxpair", "scale": 8}})
    shared = ["--data", str(place), "--embeddings", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["retrieval", *shared, "--out", str(tmp_path / "r.json")])
    retrieval_command.main()
    results = Results.load(tmp_path / "r.json")
    assert results.details["similarity_options"] == {"scale": 8}
    assert json.loads((tmp_path / "r.gallery.json").read_text())["t2i"]["chosen"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["diagnostics", *shared, "--out", str(tmp_path / "d.json"), "--words", "red", "--similarity", "mil"],
    )
    diagnostics_command.main()
    results = Results.load(tmp_path / "d.json")
    assert results.details["similarity"] == "mil"
    assert set(results.details["contribution"]) == {"all", "image 1", "image 2", "text 1", "text 2"}
    assert 'id="contribution"' in (tmp_path / "d.html").read_text()


def test_options_reach_the_similarity_of_a_checkpoint_of_single_vectors(tmp_path, monkeypatch):
    """Of one element each, smooth-Chamfer is the cosine for any α."""
    monkeypatch.chdir(tmp_path)
    place, run = write_shards(tmp_path / "shards"), str(write_run(tmp_path / "runs", "first"))
    shared = {"data": place, "checkpoint": run, "resamples": 5, "gallery_queries": 0}
    plain = evaluate(RetrievalConfig(**shared)).results
    other = evaluate(RetrievalConfig(**shared, similarity="smooth_chamfer", similarity_options=("alpha=3",))).results
    assert other.details["similarity_options"] == {"alpha": 3}
    assert {n: m.value for n, m in plain.metrics.items()} == {n: m.value for n, m in other.metrics.items()}
    with pytest.raises(InputError, match="'avg' no options, found alpha"):
        evaluate(RetrievalConfig(**shared, similarity="avg", similarity_options=("alpha=3",)))


def test_an_unfinished_export_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="found an unfinished export"):
        evaluate(RetrievalConfig(data=write_shards(tmp_path / "shards"), embeddings=tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="expected complete embeddings"):
        Embeddings.open(tmp_path / "none")

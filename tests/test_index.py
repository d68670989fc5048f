"""Search: against plain arithmetic, approximate indices with their recall, sets, the page, and both commands."""

import json
import re
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from evaluation_samples import (
    color_of_image,
    color_of_text,
    jpeg,
    small_model,
    write_class_folders,
    write_run,
    write_shards,
)

from eval_suite import index as module
from eval_suite.embed import EmbedSettings, embed
from eval_suite.embed_source import open_source
from eval_suite.encode import encode_functions
from eval_suite.index import build, query, read_queries, similarity_options_of
from eval_suite.index_files import SearchIndex, VectorSearch, measure_recall
from eval_suite.search_page import write_search_page
from setclip.errors import InputError
from setclip.images import decode_tensor, eval_transform

MODEL = {"where": "colours", "fingerprint": "0123456789abcdef"}
TRANSFORM = eval_transform(32)


def color_set_of_image(images):
    """Sets of two elements: the colours of the upper and of the lower half."""
    return torch.stack([color_of_image(half) for half in images.chunk(2, dim=2)], 1)


def color_set_of_text(texts):
    """Sets of two elements: the two colours that a text names."""
    return torch.stack([color_of_text(text.split(" and ")) for text in texts])


def made(place, out, encode_image=color_of_image, encode_text=color_of_text, search=None, **options):
    source = open_source(place)
    return build(
        source, out, encode_image, encode_text, TRANSFORM, MODEL, search, workers=0, show_progress=False, **options
    )


def asked(index, *texts, images=(), k=20, place=None):
    return query(index, color_of_image, color_of_text, TRANSFORM, texts, images, k, place)


def unit_vectors(num, width, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(num, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- single vectors


def test_a_text_finds_the_pictures_of_its_colour_in_the_order_of_the_float64_cosines(tmp_path):
    place = write_class_folders(tmp_path / "in", 4)
    index = made(place, tmp_path / "index")
    found = asked(index, "red", "blue", k=5)
    for name, one in zip(("red", "blue"), found, strict=True):
        paths = sorted(place.rglob("*.jpg"))
        images = torch.stack([TRANSFORM(decode_tensor(path.read_bytes())) for path in paths])
        features = torch.nn.functional.normalize(color_of_image(images).double(), dim=1)
        scores = features @ torch.nn.functional.normalize(color_of_text([name]).double(), dim=1)[0]
        order = scores.argsort(descending=True, stable=True)[:5].tolist()
        assert [hit.path for hit in one.hits] == [paths[i].relative_to(place).as_posix() for i in order]
        assert [hit.score for hit in one.hits] == pytest.approx(scores[order].tolist(), abs=1e-6)
        assert [hit.path.split("/")[0] for hit in one.hits[:4]] == [name] * 4


def test_a_picture_finds_itself_first_and_equal_pictures_in_the_order_of_their_names(tmp_path):
    place = write_class_folders(tmp_path / "in")
    shutil.copy(place / "red" / "1.jpg", place / "red" / "copy.jpg")
    index = made(place, tmp_path / "index")
    (found,) = asked(index, images=[place / "red" / "copy.jpg"], k=3)
    assert [hit.path for hit in found.hits[:2]] == ["red/1.jpg", "red/copy.jpg"]
    assert found.hits[0].score == pytest.approx(1, abs=1e-6)


def test_more_pictures_than_there_are_cannot_be_asked_for(tmp_path):
    index = made(write_class_folders(tmp_path / "in", 1), tmp_path / "index")
    assert len(asked(index, "red", k=50)[0].hits) == 4


def test_an_exact_index_gives_the_top_ten_of_the_float64_scores_on_random_vectors(tmp_path):
    vectors, queries = unit_vectors(500, 24), unit_vectors(20, 24, seed=1)
    index = SearchIndex(tmp_path, {"shape": [24]}, [""] * 500, [""] * 500, _faiss=faiss.IndexFlatIP(24))
    index._faiss.add(vectors)
    expected = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, :10]
    assert [[row for row, _ in hits] for hits in index.search(torch.from_numpy(queries), 10)] == expected.tolist()


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_approximate_index_says_how_much_of_the_exact_answers_it_finds(tmp_path, kind):
    place = write_shards(tmp_path / "shards", num_samples=60)
    index = made(place, tmp_path / "index", search=VectorSearch(kind=kind))
    recall = index.description["recall"]
    assert recall == {"k": 10, "pictures": 100.0, "texts": 100.0, "num_pictures": 60, "num_texts": 60}
    assert asked(index, "red", k=3)[0].hits[0].picture.captions[0].startswith("a red picture")
    exact = made(place, tmp_path / "exact")
    assert "recall" not in exact.description
    assert [h.path for h in asked(exact, "blue")[0].hits] == [h.path for h in asked(index, "blue")[0].hits]


def test_recall_is_the_share_of_the_exact_top_ten_counted_by_hand():
    vectors, queries = unit_vectors(400, 16), unit_vectors(30, 16, seed=1)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, 10, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    index.nprobe = 2
    found = index.search(queries, 10)[1]
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    by_hand = 100 * np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    own = []
    for row in range(400):
        scores = vectors @ vectors[row]
        right = [i for i in np.argsort(-scores) if i != row][:10]
        own.append(len(set(index.search(vectors[row : row + 1], 11)[1][0].tolist()) & set(right)) / 10)
    recall = measure_recall(index, vectors, torch.from_numpy(queries), 400)
    assert 20 < by_hand < 95
    assert recall["texts"] == pytest.approx(by_hand)
    assert recall["pictures"] == pytest.approx(100 * np.mean(own))


def test_an_approximate_index_of_a_single_picture_has_no_recall(tmp_path):
    place = write_class_folders(tmp_path / "in", 1, ("red",))
    index = made(place, tmp_path / "index", search=VectorSearch(kind="hnsw"))
    assert index.description["recall"]["pictures"] is None
    assert len(asked(index, "red")[0].hits) == 1


# --- sets


def test_sets_are_searched_exactly_by_the_similarity_of_the_index(tmp_path):
    place = write_class_folders(tmp_path / "in", 4)
    index = made(place, tmp_path / "index", color_set_of_image, color_set_of_text, similarity="mil")
    assert (index.description["kind"], index.description["shape"]) == ("sets", [2, 3])
    text = torch.nn.functional.normalize(color_set_of_text(["red and blue"]), dim=-1)
    hits = index.search(text, 8)[0]
    sets = torch.from_numpy(np.load(tmp_path / "index" / "sets.npy")).double()
    scores = torch.einsum("kd,njd->nkj", text[0].double(), sets).amax((1, 2))
    order = scores.argsort(descending=True, stable=True)[:8]
    assert [row for row, _ in hits] == order.tolist()
    assert [score for _, score in hits] == pytest.approx(scores[order].tolist(), abs=1e-6)
    assert {index.paths[row].split("/")[0] for row, _ in hits} == {"red", "blue"}


def test_elements_that_are_not_there_are_not_searched(tmp_path):
    """Of sets of different sizes the smaller ones are filled up with zeros, whose cosines are no answers."""

    def image_sets(images):
        sets = color_set_of_image(images)
        sets[:, 1] *= torch.arange(len(images))[:, None] % 2
        return sets

    place = write_class_folders(tmp_path / "in", 2)
    index = made(place, tmp_path / "index", image_sets, color_set_of_text, similarity="avg")
    sets = torch.from_numpy(np.load(tmp_path / "index" / "sets.npy"))
    assert sorted(set(sets.any(-1).sum(1).tolist())) == [1, 2]
    query_set = torch.nn.functional.normalize(torch.tensor([[[0.2, 0.3, 0.9], [0.0, 0.0, 0.0]]]), dim=-1)
    hits = dict(index.search(query_set, len(sets))[0])
    for row, own in enumerate(sets):
        cosines = own[own.any(-1)] @ query_set[0, 0]
        assert hits[row] == pytest.approx(cosines.mean().item(), abs=1e-6)


def test_an_index_of_sets_takes_the_similarity_of_the_checkpoint_with_its_numbers(tmp_path):
    place = write_class_folders(tmp_path / "in", 2)
    model = {**MODEL, "similarity": {"name": "match_prob", "a": 5.0, "b": -1.0}}
    source = open_source(place)
    index = build(
        source,
        tmp_path / "index",
        color_set_of_image,
        color_set_of_text,
        TRANSFORM,
        model,
        workers=0,
        show_progress=False,
    )
    assert index.description["similarity"] == "match_prob"
    assert index.description["similarity_options"] == {"a": 5.0, "b": -1.0}
    assert "faiss-cpu" in index.description["provenance"]["versions"]
    (found,) = query(index, color_set_of_image, color_set_of_text, TRANSFORM, ["red and blue"], k=3)
    assert len(found.hits) == 3
    sets = torch.from_numpy(np.load(tmp_path / "index" / "sets.npy"))
    text = torch.nn.functional.normalize(color_set_of_text(["red and blue"])[0], dim=-1)
    expected = torch.sigmoid(5.0 * torch.einsum("nkd,ld->nkl", sets, text) - 1.0).mean((1, 2)).topk(3).values
    assert [hit.score for hit in found.hits] == pytest.approx(expected.tolist(), abs=1e-6)
    write_search_page(tmp_path / "found.html", [found], index.description, "in")
    assert "match prob" in (tmp_path / "found.html").read_text()


def test_sets_take_no_approximate_index_and_no_unknown_similarity(tmp_path):
    place = write_class_folders(tmp_path / "in", 1)
    with pytest.raises(InputError, match=r"expected the exact search for sets of vectors, found --search.kind hnsw"):
        made(place, tmp_path / "a", color_set_of_image, search=VectorSearch(kind="hnsw"))
    with pytest.raises(InputError, match=r"unknown similarity 'mill'.* perhaps 'mil'"):
        made(place, tmp_path / "b", color_set_of_image, similarity="mill")


def test_the_options_of_a_similarity_are_kept_with_the_index(tmp_path):
    place, options = write_class_folders(tmp_path / "in", 1), similarity_options_of(["alpha=8", "subtract_offset=true"])
    index = made(place, tmp_path / "index", color_set_of_image, similarity_options=options)
    assert index.description["similarity"] == "smooth_chamfer"
    assert index.description["similarity_options"] == {"alpha": 8, "subtract_offset": True}
    with pytest.raises(InputError, match=r"expected for similarity 'mil' .*found alpha; leave out"):
        made(place, tmp_path / "other", color_set_of_image, similarity="mil", similarity_options={"alpha": 8})
    with pytest.raises(InputError, match=r"expected an option of the similarity as NAME=VALUE, found 'alpha'"):
        similarity_options_of(["alpha"])


def test_queries_of_another_shape_are_refused(tmp_path):
    index = made(write_class_folders(tmp_path / "in", 1), tmp_path / "index")
    with pytest.raises(InputError, match=r"expected queries of the index's shape, 3 each, found 2 × 3"):
        index.search(torch.ones(1, 2, 3), 1)


# --- the folder


def test_a_build_that_was_stopped_goes_on_and_leaves_no_embeddings_behind(tmp_path, monkeypatch):
    place, out = write_class_folders(tmp_path / "in"), tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_index", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made(place, out)
    with pytest.raises(InputError, match=r"expected a search index at .*, found an unfinished index"):
        SearchIndex.open(out)

    def encode_nothing(images):
        raise AssertionError

    made(place, out, encode_nothing)
    assert {path.name for path in out.iterdir()} == {"index.json", "vectors.faiss", "pictures.parquet"}
    made(place, tmp_path / "whole")
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_a_missing_or_cut_file_of_an_index_is_found_on_opening(tmp_path):
    index = made(write_class_folders(tmp_path / "in"), tmp_path / "index")
    path = index.folder / "vectors.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"vectors.faiss: expected \d+ bytes as index.json says, found \d+"):
        SearchIndex.open(index.folder)
    with pytest.raises(InputError, match=r"expected a search index at .*, found no such folder; make it with"):
        SearchIndex.open(tmp_path / "nowhere")


# --- pictures that are gone


@pytest.mark.parametrize("where", ["folder", "moved"])
def test_missing_and_changed_pictures_are_shown_as_such(tmp_path, where):
    place = write_class_folders(tmp_path / "in", 2)
    index = made(place, tmp_path / "index")
    if where == "moved":
        place = place.rename(tmp_path / "elsewhere")
    (place / "red" / "0.jpg").unlink()
    (place / "red" / "1.jpg").write_bytes(jpeg((30, 40, 220), 999))
    found = asked(index, "red", k=8, place=place)
    problems = {hit.path: hit.picture.problem for hit in found[0].hits}
    assert problems.pop("red/0.jpg") == "missing"
    assert problems.pop("red/1.jpg") == "changed"
    assert set(problems.values()) == {""}
    write_search_page(tmp_path / "found.html", found, index.description, "in")
    html = (tmp_path / "found.html").read_text()
    assert "no picture (missing): red/0.jpg" in html
    assert "Of these 8 pictures, 1 missing, 1 changed since the index was built." in " ".join(re.split(r"\s+", html))
    assert html.count("data:image/jpeg;base64,") == 7


def test_a_picture_that_left_its_shard_is_missing(tmp_path):
    place = write_shards(tmp_path / "shards", num_samples=4)
    index = made(place, tmp_path / "index")
    shutil.rmtree(place)
    write_shards(place, num_samples=2)
    hits = asked(index, "red", k=4)[0].hits
    assert sorted(hit.picture.problem for hit in hits) == ["", "", "missing", "missing"]


# --- the page


def test_the_page_is_one_file_with_every_query_and_escapes_what_was_typed(tmp_path):
    place = write_shards(tmp_path / "shards")
    index = made(place, tmp_path / "index", search=VectorSearch(kind="hnsw"))
    found = asked(
        index, "red <script>alert(1)</script>", images=[write_class_folders(tmp_path / "in", 1) / "blue" / "0.jpg"], k=5
    )
    write_search_page(tmp_path / "found.html", found, index.description, "shards")
    html = (tmp_path / "found.html").read_text()
    assert "<script>" not in html
    assert "red &lt;script&gt;" in html
    assert html.count('<figure class="sample card">') == 5 + 1 + 5
    assert "of the exact top 10 it finds 100.0 % for pictures, 100.0 % for texts" in html
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", html)


# --- the commands


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `python -m eval_suite.index` with these arguments and returns what it prints."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["index", *map(str, arguments)])
        module.main()
        printed = capsys.readouterr()
        return printed.out + printed.err

    return start


def test_the_commands_build_and_query_with_the_features_of_the_checkpoint(tmp_path, run):
    place = write_class_folders(tmp_path / "in", 4)
    loaded = small_model(tmp_path)
    out = tmp_path / "index"
    printed = run("build", place, "--checkpoint", tmp_path / "runs" / "small", "--out", out)
    assert "index: 16 pictures, 16 dimensions, exact search" in printed
    (tmp_path / "queries.txt").write_text("a dog\n\n  a cat \n")
    html = tmp_path / "pages" / "found.html"
    printed = run(
        "query",
        out,
        "a red thing",
        "--queries",
        tmp_path / "queries.txt",
        "--image",
        place / "red" / "2.jpg",
        "--k",
        3,
        "--html",
        html,
    )
    assert [line for line in printed.splitlines() if line in ("a red thing", "a dog", "a cat", "picture 2.jpg")] == [
        "a red thing",
        "a dog",
        "a cat",
        "picture 2.jpg",
    ]
    assert "4 queries among 16 pictures" in printed
    assert html.is_file()
    (best,) = re.findall(r"picture 2.jpg\n +1  +([\d.]+)  (\S+)", printed)
    assert best == ("1.000", "red/2.jpg")

    encode_image, encode_text = encode_functions(loaded)
    paths = sorted(place.rglob("*.jpg"))
    with torch.no_grad():
        features = encode_image(torch.stack([TRANSFORM(decode_tensor(path.read_bytes())) for path in paths]))
        scores = (encode_text(["a dog"]).double() @ features.double().T)[0]
    wanted = [paths[i].relative_to(place).as_posix() for i in scores.argsort(descending=True)[:3].tolist()]
    rows = printed.split("a dog\n")[1].splitlines()[:3]
    assert [line.split()[2] for line in rows] == wanted


def test_a_query_with_another_model_than_the_index_is_refused(tmp_path, run):
    place = write_class_folders(tmp_path / "in", 1)
    first, second = (write_run(tmp_path / "runs", name, step) for name, step in (("one", 1), ("two", 2)))
    run("build", place, "--checkpoint", first, "--out", tmp_path / "index")
    with pytest.raises(
        InputError, match=r"expected the model of the index, .*runs/one/.*, found .*runs/two/.*give that one"
    ):
        run("query", tmp_path / "index", "red", "--checkpoint", second)
    first.rename(tmp_path / "runs" / "renamed")
    run("query", tmp_path / "index", "red", "--checkpoint", tmp_path / "runs" / "renamed")


def test_an_index_is_built_from_exported_embeddings_and_they_stay(tmp_path, run):
    place = write_class_folders(tmp_path / "in")
    embed(
        open_source(place),
        tmp_path / "e",
        color_of_image,
        color_of_text,
        TRANSFORM,
        MODEL,
        EmbedSettings(dtype="float16"),
        workers=0,
    )
    run("build", "--embeddings", tmp_path / "e", "--out", tmp_path / "index", "--search.kind", "hnsw")
    assert (tmp_path / "e" / "embeddings.json").is_file()
    index = SearchIndex.open(tmp_path / "index")
    assert [hit.path.split("/")[0] for hit in asked(index, "blue", k=3)[0].hits] == ["blue"] * 3
    assert json.loads((tmp_path / "index" / "index.json").read_text())["recall"]["texts"] is None


def test_bad_pictures_are_left_out_of_an_index_and_said(tmp_path, run):
    place = write_class_folders(tmp_path / "in")
    (place / "red" / "0.jpg").write_bytes(b"")
    write_run(tmp_path / "runs", "small")
    printed = run(
        "build", place, "--checkpoint", tmp_path / "runs" / "small", "--out", tmp_path / "i", "--max-bad", 0.1
    )
    assert "left out: 1 empty file" in printed
    assert len(SearchIndex.open(tmp_path / "i")) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "expected --out and either a folder of pictures or shards or --embeddings"),
        (["query"], "expected an index and a query, found no index"),
        (["query", "x"], "expected an index and a query, found no query"),
        (["query", "x", "red", "--k", "0"], "expected at least one picture a query, found --k 0"),
        (["query", "x", "--queries", "nowhere.txt"], "expected a text file with one query a line at nowhere.txt"),
        (["search"], "unknown command 'search'"),
    ],
)
def test_wrong_flags_are_said_before_anything_is_loaded(run, arguments, message):
    with pytest.raises(InputError, match=message):
        run(*arguments)


def test_a_query_by_a_picture_that_is_not_there_or_damaged_is_an_error(tmp_path):
    index = made(write_class_folders(tmp_path / "in", 1), tmp_path / "index")
    with pytest.raises(InputError, match=r"expected a picture at nowhere.jpg, found no such file"):
        asked(index, images=[Path("nowhere.jpg")])
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(InputError, match=r"bad.jpg: expected an image, found one that cannot be decoded"):
        asked(index, images=[tmp_path / "bad.jpg"])
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"empty.txt: expected one query a line, found none"):
        read_queries(tmp_path / "empty.txt")


def test_an_index_is_not_built_over_another(tmp_path, run):
    made(write_class_folders(tmp_path / "in", 1), tmp_path / "index")
    with pytest.raises(InputError, match=r"expected no index at .*, found one; query it, give another --out"):
        run("build", tmp_path / "in", "--out", tmp_path / "index")

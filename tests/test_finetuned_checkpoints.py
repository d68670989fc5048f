"""What the commands of evaluation make of fine-tuned checkpoints: pictures of heads, learned numbers, search, export."""

import dataclasses
import html as html_escapes
import json
import re
import sys

import numpy as np
import pytest
import torch
from evaluation_samples import write_run
from finetune_material import command, sample, words, write_pretrained, write_shards
from pages import CHROMIUM, Page, dumped

from eval_suite import diagnostics, embed, index
from eval_suite.embed_files import Embeddings
from eval_suite.embedded import embedded_features
from eval_suite.encode import encode_functions, encode_images, encode_texts
from eval_suite.head_diagnostics import diagnose_head
from eval_suite.images import ShardImages, image_batches
from eval_suite.index_files import SearchIndex
from eval_suite.preprocess import model_pictures
from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate
from eval_suite.retrieval_data import read_samples
from setclip.checkpoint import load_model
from setclip.errors import InputError
from setclip.manifest import Manifest, open_split
from setclip.models.heads import HeadOutput
from setclip.models.matching import make_matching, score_matrix
from setclip.shards import ShardWriter
from setclip.similarity import make_similarity

RUNS = {
    "slot": ("slot", ()),
    "dhset": ("dhset", ()),
    "dhset-set": ("dhset", ("--inference", "set")),
    "dhset_fragment": ("dhset_fragment", ()),
    "match_prob": ("slot", ("--similarity", "match_prob", "--optim.lr", 0.03)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shards, and runs of two steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_shards(folder / "data", {"train": 64, "val": 20, "test": 24})
    write_pretrained(folder / "pretrained")
    for name, (head, more) in RUNS.items():
        command(words(folder, folder / name, head, "--epochs", 1, "--test-split", "none", *more))
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs a command's main with these words."""

    def called(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    return called


def opened(place, name, split="test"):
    """Returns the loaded model, the pictures of a split as it takes them, and its captions."""
    loaded = load_model(place / name)
    _, shards = open_split(place / "data", split)
    return loaded, ShardImages(shards, model_pictures(loaded)), read_samples(shards).captions


def features_of(place, name):
    loaded, images, captions = opened(place, name)
    encode_image, encode_text = encode_functions(loaded)
    texts = [text for of_image in captions for text in of_image]
    return (
        encode_images(encode_image, image_batches(images, 8, 0), len(captions), show_progress=False),
        encode_texts(encode_text, texts, show_progress=False),
        texts,
    )


def diagnosed(run, place, name, out, *more):
    """Runs the command; returns the results and the page."""
    run(diagnostics, "--data", place / "data", "--checkpoint", place / name, "--out", out, "--num-words", 1, *more)
    return Results.load(out), Page(out.with_suffix(".html"))


# --- diagnostics


def test_the_page_of_slots_shows_where_each_looks_and_which_words_it_takes(place, tmp_path, run):
    results, page = diagnosed(run, place, "slot", tmp_path / "slot.json", "--pictures", 3)
    assert page.sections == ["gap", "words", "sets", "contribution", "looks", "taken", "missing"]
    assert len(page.all("img")) == 3 * (1 + 2)  # the photograph and an overlay of each slot
    head = results.details["head"]
    assert (head["head"], len(head["words"]), len(head["favourite_words"])) == ("slot", 3, 2)
    caption = head["words"][0]["caption"]
    taken = {word for element in head["words"][0]["elements"] for word, _ in element}
    assert taken <= {*caption.split(), "<end_of_text>"}
    assert caption in page.words
    assert results.details["does_not_apply"] == ["Sub-spaces are DH-Set's; the head slot has none."]
    assert results.metrics["slots_image_overlap"].value == pytest.approx(100 * head["elements"]["image"]["overlap"])


def test_figures_of_attention_are_the_plain_formulas_over_the_attention_of_the_head(place):
    loaded, images, captions = opened(place, "slot")
    found = diagnose_head(loaded, images, captions, num_shown=2)
    encode_image, _ = encode_functions(loaded)
    kept: list[HeadOutput] = []
    loaded.model.pair.image.register_forward_hook(lambda module, given, output: kept.append(output))
    with torch.no_grad():
        for row in range(len(captions)):
            encode_image(images[row][None])
    attention = np.stack([output.attention[0].numpy().astype(np.float64) for output in kept])
    attention /= attention.sum(-1, keepdims=True)
    places = np.exp(-(attention * np.log(attention)).sum(-1)).mean(0)
    np.testing.assert_allclose(found.image.places, places, rtol=1e-5)
    assert found.image.overlap == pytest.approx(np.minimum(attention[:, 0], attention[:, 1]).sum(-1).mean(), rel=1e-5)
    assert (found.image.inputs, found.image.samples) == (4, 24)
    assert 4 < found.text.inputs < 8  # four or seven words, and the token that ends a text
    for element, favourites in enumerate(found.favourites):
        assert sum(share for _, share in favourites) <= 1 + 1e-6, element


def test_the_page_of_dhset_shows_what_its_sub_spaces_share_and_says_that_it_has_no_slots(place, tmp_path, run):
    results, page = diagnosed(run, place, "dhset", tmp_path / "dhset.json")
    assert page.sections == ["gap", "words", "sets", "subspaces", "missing"]
    subspaces = load_model(place / "dhset").model.pair.text.subspaces
    for name, value in subspaces.statistics().items():
        assert results.metrics[f"subspaces_{name}"].value == pytest.approx(value), name
    assert "variance_text_log_of_mean" in results.metrics  # of the sub-spaces' vectors, though hybrid ones are compared
    assert "Cosines of profiles" in page.words
    assert "of pictures and captions the head dhset has no attention" in page.words


def test_a_model_without_heads_says_what_does_not_apply(place, tmp_path, run):
    plain = write_run(tmp_path / "runs", "plain")
    results, page = diagnosed(run, place, plain, tmp_path / "plain.json")
    assert page.sections == ["gap", "words", "missing"]
    assert "two towers and no heads; `python -m finetune.run` trains heads" in page.words
    assert len(results.details["does_not_apply"]) == 2


@pytest.mark.parametrize("similarity", ["diagonal", "cosine"])
def test_a_similarity_that_does_not_compare_single_elements_is_refused_before_all_is_encoded(
    place, tmp_path, run, similarity, monkeypatch
):
    monkeypatch.setattr(diagnostics, "diagnose", None)
    message = (
        rf"expected a similarity that compares sets of 2 and 2 elements.*found {similarity} \(.*take smooth_chamfer"
    )
    with pytest.raises(InputError, match=message):
        diagnosed(run, place, "slot", tmp_path / "x.json", "--similarity", similarity)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_the_pictures_of_heads_and_neither_phone_nor_desk_scrolls_sideways(place, tmp_path, run):
    pages = [diagnosed(run, place, name, tmp_path / f"{name}.json")[1] for name in ("slot", "dhset")]

    assert "CONSOLE" not in dumped(tmp_path / "slot.html", tmp_path).stderr
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px" srcdoc="{html_escapes.escape(page.source)}"></iframe>'
        for page in pages
        for width in (360, 1200)
    )
    look = (
        "<script>onload = () => { document.body.dataset.found = [...document.querySelectorAll('iframe')].map(f => {"
        "const d = f.contentDocument, all = [...d.images], e = d.documentElement;"
        "return [e.scrollWidth <= e.clientWidth, all.filter(i => i.naturalWidth).length, "
        "d.querySelectorAll('svg').length].join(' ') }).join(', ') }</script>"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(f"<!DOCTYPE html><body>{frames}{look}</body>", encoding="utf-8")
    found = re.search(r'data-found="([^"]*)"', dumped(frame, tmp_path).stdout)[1]
    slot, dhset = f"true {6 * 3} 1", "true 0 4"  # a drawing of a word; and three of sub-spaces
    assert found == f"{slot}, {slot}, {dhset}, {dhset}"


# --- learned numbers


def test_learned_numbers_of_a_similarity_are_in_the_checkpoint_and_give_the_run_s_own_figures(place, tmp_path, run):
    loaded = load_model(place / "match_prob")
    named = dict(loaded.identity["similarity"])
    learned = {name: value.item() for name, value in loaded.model.pair.similarity.named_parameters()}
    assert named == {"name": "match_prob", **learned}
    assert all(learned[name] != start for name, start in {"a": 1.0, "b": 0.0}.items())

    told = json.loads((place / "match_prob" / "metrics.jsonl").read_text().splitlines()[-1])
    settings = {"data": place / "data", "gallery_queries": 0, "device": "cpu", "workers": 0}
    found = evaluate(RetrievalConfig(split="val", checkpoint=str(place / "match_prob"), **settings)).results
    assert {name: found.metrics[name].value for name in ("rsum", "i2t_r1", "t2i_r1")} == {
        name: told[f"val_{name}"] for name in ("rsum", "i2t_r1", "t2i_r1")
    }
    assert found.details["similarity_options"] == learned

    run(embed, place / "data", "--checkpoint", place / "match_prob", "--out", tmp_path / "embeddings")
    again = evaluate(RetrievalConfig(split="val", embeddings=tmp_path / "embeddings", **settings)).results
    assert {n: m.value for n, m in again.metrics.items()} == {n: m.value for n, m in found.metrics.items()}


# --- sub-spaces that collapse


def test_sub_spaces_with_one_profile_are_told_once_and_those_apart_not(place, tmp_path, capsys):
    quick = ["--test-split", "none", "--eval-every", 9]
    command(words(place, tmp_path / "one", "dhset", "--epochs", 2, "--optim.lr", 1e-6, *quick))
    said = capsys.readouterr().err
    assert said.count("the sub-spaces have nearly one profile (mean cosine 0.9") == 1
    assert "step 2 of 4" in said
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert sum("top_overlap" in line for line in lines) == 4
    more = ["--options", "num_rows=1", "num_elements=2", "--weights.dhset-diversity", 10, "--optim.lr", 0.1]
    command(words(place, tmp_path / "apart", "dhset", "--epochs", 6, *more, *quick))
    assert "nearly one profile" not in capsys.readouterr().err


# --- search and export


def best(scores, k):
    """Returns the first k columns of each row by falling score, of equal ones the lower first, and their scores."""
    values, rows = scores.sort(dim=1, descending=True, stable=True)
    return rows[:, :k].tolist(), values[:, :k].tolist()


def test_hybrid_vectors_go_to_faiss_and_rank_as_the_hybrid_comparison_of_sets_does(place, tmp_path, run, capsys):
    run(index, "build", place / "data", "--split", "test", "--checkpoint", place / "dhset", "--out", tmp_path / "index")
    assert "index: 24 pictures, 32 dimensions, exact search" in capsys.readouterr().out
    found = SearchIndex.open(tmp_path / "index")
    assert (found.description["kind"], found.description["shape"]) == ("exact", [32])

    loaded, _, captions = opened(place, "dhset")
    model, texts = loaded.model, [of_image[0] for of_image in captions]
    with torch.no_grad():
        sets = model.texts(model.backbone.text(model.backbone.tokenizer(texts))).sets
    image_features, _, _ = features_of(place, "dhset")
    scores = make_similarity("dhset_hybrid")(image_features[:, None], sets)  # from four vectors a text, not one
    queries = encode_texts(encode_functions(loaded)[1], texts, show_progress=False)
    assert queries.shape == (24, 32)
    rows, values = best(scores.T, 10)
    hits = found.search(queries, 10)
    assert [[row for row, _ in own] for own in hits] == rows
    np.testing.assert_allclose([[score for _, score in own] for own in hits], values, atol=1e-6)


@pytest.mark.parametrize("name", ["slot", "dhset-set", "dhset_fragment", "match_prob"])
def test_sets_are_searched_as_the_checkpoint_compares_them_by_text_and_by_picture(place, tmp_path, run, name, capsys):
    run(index, "build", place / "data", "--split", "test", "--checkpoint", place / name, "--out", tmp_path / "index")
    found = SearchIndex.open(tmp_path / "index")
    named = dict(load_model(place / name).identity["similarity"])
    similarity = make_matching(named.pop("name"), **named).eval()
    assert found.description["similarity"] == load_model(place / name).identity["similarity"]["name"]
    said = capsys.readouterr().out
    assert re.search(
        rf"index: 24 pictures, sets of \d × 32 dimensions, compared by {found.description['similarity']}", said
    )

    image_sets, text_sets, texts = features_of(place, name)
    image_sets = image_sets if image_sets.ndim == 3 else image_sets[:, None]
    masks = [None if bool((there := sets.any(-1)).all()) else there for sets in (image_sets, text_sets)]
    with torch.no_grad():
        rows, values = best(score_matrix(similarity, image_sets, text_sets, *masks).T, 5)
    hits = found.search(text_sets, 5)
    np.testing.assert_allclose([[score for _, score in own] for own in hits], values, atol=1e-6)
    # scores that differ by rounding alone may change places
    gaps = np.diff([value[:5] for value in values]).min(1) < -1e-6
    same = [[row for row, _ in own] == expected for own, expected in zip(hits, rows, strict=True)]
    assert all(np.array(same)[np.abs(np.diff(values)).min(1) > 1e-6]), gaps

    shard = open_split(place / "data", "test")[1][0]
    (tmp_path / "photo.jpg").write_bytes(shard.read(3).image)
    run(
        index,
        "query",
        tmp_path / "index",
        texts[0],
        "--image",
        tmp_path / "photo.jpg",
        "--k",
        3,
        "--html",
        tmp_path / "q.html",
    )
    by_text, by_picture = capsys.readouterr().out.split("picture photo.jpg")
    assert shard.keys[hits[0][0][0]] in by_text
    assert len(re.findall(r"^ +\d ", by_picture, re.MULTILINE)) == 3
    if name in ("slot", "dhset-set"):  # others need not score equal sets highest
        assert shard.keys[3] in by_picture.splitlines()[1]  # a picture finds itself
    assert (tmp_path / "q.html").exists()


def test_sets_of_different_sizes_are_exported_part_by_part_and_read_back_as_the_model_gives_them(place, tmp_path, run):
    """The first shard's captions have four words, the second's seven: parts whose sets have different sizes."""
    folder, infos = tmp_path / "data", []
    folder.mkdir()
    for part, caption in enumerate((0, 1)):
        with ShardWriter(folder / f"test-{part:05d}.tar", split="test") as writer:
            for number in range(100 + 6 * part, 106 + 6 * part):
                one = sample(number)
                writer.add(
                    dataclasses.replace(one, captions=[one.captions[caption]], objects={"pos": one.objects["pos"][:1]})
                )
        infos.append(writer.info)
    Manifest(source="folder", shards=infos, pairs_listed=12, pairs_present=12, parsers={"pos": "test 1"}).save(folder)
    for file_format in ("parquet", "npy"):
        out = tmp_path / file_format
        run(embed, folder, "--checkpoint", place / "dhset_fragment", "--out", out, "--format", file_format)
        embeddings = Embeddings.open(out)
        assert embeddings.shape("texts") == (8, 32)
        assert [part["shape"]["texts"] for part in embeddings.description["parts"]] == [[5, 32], [8, 32]]
        _, shards = open_split(folder, "test")
        data = read_samples(shards)
        images, texts = embedded_features(embeddings, data.keys, data.captions)
        loaded = load_model(place / "dhset_fragment")
        encode_image, encode_text = encode_functions(loaded)
        own = encode_texts(encode_text, [of[0] for of in data.captions], show_progress=False)
        torch.testing.assert_close(texts, own, atol=1e-5, rtol=0)
        assert (texts[:6, 5:] == 0).all()
        pictures = image_batches(ShardImages(shards, model_pictures(loaded)), 8, 0)
        torch.testing.assert_close(
            images, encode_images(encode_image, pictures, 12, show_progress=False), atol=1e-5, rtol=0
        )
    settings = {"data": folder, "split": "test", "gallery_queries": 0}
    by_model = evaluate(RetrievalConfig(checkpoint=str(place / "dhset_fragment"), device="cpu", workers=0, **settings))
    by_file = evaluate(RetrievalConfig(embeddings=tmp_path / "npy", **settings))
    assert by_model.results.metrics["rsum"].value == by_file.results.metrics["rsum"].value

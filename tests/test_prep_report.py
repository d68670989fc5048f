"""report.html of prepared shards: right figures, bounded work, equal bytes, whatever the folder holds."""

import dataclasses
import io
import itertools
import re

import numpy as np
import pytest
from material import damage_image, sample, write_shards
from pages import Page
from PIL import Image

from data_prep import cards, report, statistics
from data_prep.report import write_report
from setclip.manifest import Manifest
from setclip.shards import Sample, ShardInfo, ShardWriter, key_of


def of(folder, statistics_too=True, **changes):
    """Writes the report of a folder and returns the page."""
    manifest = dataclasses.replace(Manifest.load(folder), **changes)
    if statistics_too:
        statistics.write_statistics(folder, statistics.counted_shards(manifest.shards))
    write_report(folder, manifest)
    return Page(folder / "report.html")


def written(folder, samples, split="train") -> ShardInfo:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / f"{split}-00000.tar", split=split) as writer:
        for each in samples:
            writer.add(each)
    return writer.info


def saved(folder, *infos, **settings):
    pairs = sum(info.captions for info in infos)
    Manifest(source="test", shards=list(infos), pairs_listed=pairs, pairs_present=pairs, **settings).save(folder)
    return folder


def picture_in(kind, size=(50, 30)):
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), (10, 200, 30), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return of(
        write_shards(tmp_path_factory.mktemp("data") / "d", (60, 40)),
        samples_listed=125,
        dropped={"dead link": 20, "truncated": 5, "empty caption (captions, not samples)": 2},
        inputs={
            "a.tar": {"listed": 25, "packed": 20, "dropped": {"truncated": 5}},
            "b.tar": {"listed": 100, "packed": 80, "dropped": {"dead link": 20}},
            "c.tar": {"listed": 5, "packed": 5, "dropped": {}},
        },
        warnings=["numbers 3 to 4 are missing"],
        config={"short_side": 256, "stop_words": ["thing", "lot"]},
        credits=["Pictures: Somebody, CC BY 4.0"],
    )


def test_the_page_says_what_is_present_and_what_was_left_out_and_why(page):
    for text in (
        "200 of 202 pairs present",
        "100 of 125 that the inputs list",
        "dead link 20 16.0 %",
        "truncated 5 4.0 %",
        "empty caption (captions, not samples) 2 0.99 %",
        "numbers 3 to 4 are missing",
        "stop words thing, lot",
        "parser pos test 1",
        "Pictures: Somebody, CC BY 4.0",
    ):
        assert text in page.words


def test_inputs_are_named_by_their_losses_and_those_without_are_not(page):
    assert "b.tar 100 20 20.0 % dead link (20) a.tar 25 5 20.0 % truncated (5)" in page.words
    assert "c.tar" not in page.words


def test_bars_are_shares_of_the_most_frequent_reason():
    manifest = Manifest(
        source="x", shards=[], pairs_listed=40, pairs_present=0, samples_listed=40, dropped={"a": 30, "b": 10}
    )
    (block,) = report.losses_section(manifest).blocks
    assert re.findall(r"width:([\d.]+)%", block) == ["100.0", "33.3"]


def test_each_figure_is_labelled_and_each_picture_has_words(page):
    figures = [attributes["aria-label"] for attributes in page.all("svg")]
    assert len(figures) == len(set(figures)) == 5  # side, aspect, words, objects, ranks
    pictures = page.all("img")
    assert len(pictures) > 24
    assert all(p["src"].startswith("data:image/jpeg;base64,/9j/") and p["alt"] for p in pictures)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_head_and_tail_objects_are_shown_with_pictures_of_them(tmp_path):
    samples = [
        dataclasses.replace(sample(n, captions=1), captions=[f"caption {n}"], objects={"pos": [["dog", f"noun {n}"]]})
        for n in range(20)
    ]
    page = of(saved(tmp_path, written(tmp_path, samples), parsers={"pos": "1"}))
    assert "dog in 20 captions, rank 1 of 21 caption 0" in page.words
    (tail,) = re.findall(r"From the tail (.*?) How it was made", page.words)
    shown = re.findall(r"noun (\d+) in 1 caption, rank \d+ of 21 caption (\d+) dog noun (\d+)", tail)
    assert len(shown) == 6
    assert all(name == caption == pill for name, caption, pill in shown)


def test_of_equally_frequent_objects_those_of_the_tail_are_shown(tmp_path):
    samples = [
        dataclasses.replace(sample(n, captions=1), captions=["x"], objects={"pos": [[f"noun {n}"]]}) for n in range(10)
    ]
    page = of(saved(tmp_path, written(tmp_path, samples), parsers={"pos": "1"}))
    (tail,) = re.findall(r"From the tail (.*?) How it was made", page.words)
    assert re.findall(r"noun \d (?=in)", tail) == ["noun 0 ", "noun 1 ", "noun 2 "]
    assert "The tail, 3 of 10 objects, has 30.0 % of all mentions" in page.words


def test_equal_folders_give_equal_bytes_wherever_they_lie(tmp_path):
    pages = []
    for name in ("one", "the other"):
        folder = write_shards(tmp_path / name, (6, 5))
        of(folder)
        pages.append((folder / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_manifest_gives_the_same_page_before_it_is_saved_and_after(tmp_path):
    folder = write_shards(tmp_path)
    changed = {"dropped": {"b": 2, "a": 2}, "config": {"sizes": (1, 2)}, "warnings": ["w"]}
    of(folder, **changed)
    before = (folder / "report.html").read_bytes()
    dataclasses.replace(Manifest.load(folder), **changed).save(folder)
    of(folder)
    assert (folder / "report.html").read_bytes() == before


def test_markup_in_captions_objects_reasons_and_inputs_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    one = dataclasses.replace(sample(1, captions=1), captions=[evil], objects={"pos": [[evil]]})
    inputs = {evil: {"listed": 3, "packed": 1, "dropped": {evil: 2}}}
    folder = saved(tmp_path, written(tmp_path, [one]), parsers={evil: evil}, credits=[evil], config={evil: evil})
    page = of(folder, dropped={evil: 2}, inputs=inputs, warnings=[evil], source=evil)
    assert page.all("script") == []
    assert page.words.count("<script>") > 8


def test_pictures_of_all_formats_are_shown_and_one_that_cannot_be_decoded_is_said(tmp_path):
    samples = []
    for kind, ext in (("PNG", "png"), ("WEBP", "webp"), ("JPEG", "jpg")):
        data = picture_in(kind)
        key, sha256 = key_of(data)
        one = sample(1, captions=1)
        samples.append(dataclasses.replace(one, key=key, image=data, image_ext=ext, sha256=sha256, width=50, height=30))
    samples.append(sample(4, captions=1))
    folder = saved(tmp_path, written(tmp_path, samples), parsers={"pos": "1"})
    damage_image(folder, "train-00000.tar", 3)
    page = of(folder)
    sheet = page.all("img")[:4]
    assert [p["src"].partition(";")[0] for p in sheet] == ["data:image/jpeg"] * 3 + ["data:image/svg+xml"]
    assert sheet[3]["alt"].startswith("no picture (not an image): captioned: a boat")
    assert "no picture (not an image)" in page.words


def test_a_sample_that_cannot_be_read_is_counted_not_hidden(tmp_path):
    folder = write_shards(tmp_path, (3,))
    data = (folder / "train-00000.tar").read_bytes()
    (folder / "train-00000.tar").write_bytes(data.replace(b'{"key"', b'?"key"', 1))
    page = of(folder)
    assert "1 sample could not be read" in page.words
    assert "sample 0 of train-00000.tar cannot be read" in page.words


def test_splits_have_sheets_of_their_own_and_none_need_be_called_train(tmp_path):
    infos = [written(tmp_path, [sample(n)], split) for n, split in enumerate(("dev", "test"))]
    page = of(saved(tmp_path, *infos, parsers={"pos": "1"}))
    assert "Split “dev”" in page.words
    assert "Split “test”" in page.words
    assert "dev 1 2 captions, 1 shard" in page.words


def test_captions_without_objects_and_folders_without_parsers_are_no_trouble(tmp_path):
    bare = dataclasses.replace(sample(1), objects={})
    page = of(saved(tmp_path / "a", written(tmp_path / "a", [bare])))
    assert "No caption was parsed" in page.words
    empty = dataclasses.replace(sample(1), objects={"pos": [[], []]})
    page = of(saved(tmp_path / "b", written(tmp_path / "b", [empty]), parsers={"pos": "1"}))
    assert "objects.parquet has no objects of parser pos" in page.words


def test_several_parsers_stand_beside_each_other(tmp_path):
    both = dataclasses.replace(sample(1, captions=1), objects={"pos": [["dog"]], "llm": [["old dog"]]})
    page = of(saved(tmp_path, written(tmp_path, [both]), parsers={"pos": "1", "llm": "2"}))
    for text in ("Parser “llm”", "Parser “pos”", "pos: dog", "llm: old dog"):
        assert text in page.words


def test_the_work_and_the_page_do_not_grow_with_the_number_of_samples(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(report, "MOST_SHARDS", 5)
    monkeypatch.setattr(report, "MOST_SAMPLES", 20)
    monkeypatch.setattr(report.cards, "Shard", lambda path: opened.append(path.name) or cards_shard(path))
    cards_shard = cards.report.Shard
    sizes = []
    for number in (10, 40):
        folder = write_shards(tmp_path / str(number), (3,) * number)
        opened.clear()
        page = of(folder)
        assert len(opened) < 50
        sizes.append((folder / "report.html").stat().st_size)
        assert f"Measured on 15 samples, spread evenly over 5 of {number} shards, not on all" in page.words
    assert sizes[1] < 1.1 * sizes[0]


def test_many_objects_make_no_larger_drawing(tmp_path):
    names = [f"noun {n}" for n in range(5000)]
    one = dataclasses.replace(sample(1, captions=1), objects={"pos": [names]})
    page = of(saved(tmp_path, written(tmp_path, [one]), parsers={"pos": "1"}))
    assert "tail: 1500" in page.words
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_one_giant_caption_does_not_squeeze_the_histogram(tmp_path):
    values = np.array([5] * 990 + [6] * 9 + [100_000])
    block = report._whole_numbers(values, "Length", "words", "captions")
    assert "The last bar holds all from 6 words" in block
    assert "from 5 to 100,000 words" in block


def test_a_long_caption_and_many_captions_are_cut(tmp_path):
    captions = ["word " * 1000] + [f"caption {n}" for n in range(8)]
    long = Sample(
        key="a" * 24,
        image=sample(1).image,
        image_ext="jpg",
        captions=captions,
        objects={},
        width=40,
        height=40,
        sha256="",
    )
    page = of(saved(tmp_path, written(tmp_path, [long])))
    assert "and 4 more captions" in page.words
    assert (tmp_path / "report.html").stat().st_size < 100_000


def test_the_command_writes_the_page_again(tmp_path, monkeypatch, capsys):
    folder = write_shards(tmp_path)
    of(folder)
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    report.main()
    assert (folder / "report.html").read_bytes() == before
    assert "report.html" in capsys.readouterr().out


# --- which samples are looked at


def info(name, samples):
    return ShardInfo(name=name, split="train", samples=samples, captions=samples, bytes=1, sha256="")


@pytest.mark.parametrize(("total", "number"), [(10, 3), (3, 10), (1, 1), (0, 5), (1000, 7), (7, 7)])
def test_spread_numbers_are_different_ascending_and_evenly_spaced(total, number):
    found = cards.spread(total, number)
    assert len(found) == min(total, number)
    assert found == sorted(set(found))
    assert all(0 <= each < total for each in found)
    if len(found) > 1:
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1


def test_places_lie_within_their_shards_and_cover_all_where_few_are_there():
    shards = [info("a", 2), info("empty", 0), info("b", 3)]
    places = cards.spread_places(shards, 100)
    assert [(p.shard.name, p.row) for p in places] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
    assert cards.drawn_places(shards, 100, seed=1) == places


def test_draws_depend_on_the_seed_and_on_nothing_else():
    shards = [info("a", 500), info("b", 500)]
    assert cards.drawn_places(shards, 20, 1) == cards.drawn_places(shards, 20, 1)
    assert cards.drawn_places(shards, 20, 1) != cards.drawn_places(shards, 20, 2)
    assert len(set(cards.drawn_places(shards, 20, 1))) == 20


def test_places_of_an_object_are_found_in_the_index_once_a_sample(tmp_path):
    samples = [
        dataclasses.replace(sample(0), objects={"pos": [["dog", "cat"], ["dog"]]}),
        dataclasses.replace(sample(1), objects={}),
        dataclasses.replace(sample(2), objects={"pos": [[], ["dog"]]}),
    ]
    shard = written(tmp_path, samples)
    found = list(cards.places_with_objects(tmp_path, [shard], "pos", ["dog", "bird"]))
    assert [(name, place.row) for name, place in found] == [("dog", 0), ("dog", 2)]
    assert list(cards.places_with_objects(tmp_path, [shard], "llm", ["dog"])) == []

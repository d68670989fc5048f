"""The report of evaluations: one file from results files, right figures, pictures with and without the data at hand."""

import base64
import dataclasses
import html as html_escapes
import io
import itertools
import json
import math
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from evaluation_samples import write_shards
from pages import CHROMIUM, Page, dumped
from PIL import Image

from eval_suite import report as module
from eval_suite.gallery import MAX_PICTURE_BYTES, PICTURE_SIDE, gallery, shown_keys, small_pictures
from eval_suite.per_query import load_per_query, per_query_path, save_per_query
from eval_suite.protocols import Setting, whole_gallery
from eval_suite.report import write_report
from eval_suite.report_data import results_files
from eval_suite.results import Metric, Results
from eval_suite.scores import dot_scores
from eval_suite.significance import differences
from setclip import plots
from setclip.config import command
from setclip.errors import InputError
from setclip.files import write_json
from setclip.manifest import open_split
from setclip.report import PictureBook

NUM_IMAGES = 24
DRAWS = 200
CLASSES = [f"class {number}" for number in range(11)] + ["<script>alert('a class')</script>"]


def identity(run, step=3):
    where = f"runs/{run}/checkpoints/step-{step:08d}"
    data = {"source": "folder", "pairs_present": 90, "pairs_listed": 100, "credits": ["Pictures: Somebody, CC BY 4.0"]}
    return {"where": where, "step": step, "recipe": "tiny", "data": data}


def retrieval_of(folder, shards_place, run, noise, with_pictures=True):
    """Writes results, gallery and queries of a random embedding, as the command of retrieval does."""
    shards = open_split(shards_place, "test")[1]
    samples = [sample for shard in shards for sample in shard]
    captions = [list(sample.captions) for sample in samples]
    captions[0][0] = "<script>alert('a caption')</script>"
    owners = torch.arange(NUM_IMAGES).repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, 8, generator=generator)
    texts = images[owners] + noise * torch.randn(len(owners), 8, generator=generator)
    score = dot_scores(*(torch.nn.functional.normalize(side, dim=1) for side in (images, texts)))
    outcome = whole_gallery(score, owners, NUM_IMAGES, Setting(resamples=50))
    keys = [sample.key for sample in samples]
    read = PictureBook(shards).image if with_pictures else None
    chosen = gallery(score, *outcome.ranks, owners, keys, captions, read_image=read)
    path = folder / f"retrieval_{run}.json"
    write_json(folder / f"retrieval_{run}.gallery.json", {"data": str(shards_place), "split": "test", **chosen})
    arrays = {
        f"full.{d}.{name}": values
        for d, of in outcome.queries.items()
        for name, values in (("image", of.image), ("rank", of.rank["pessimistic"]))
    }
    save_per_query(per_query_path(path), kind="retrieval", keys=keys, about={"captions_sha256": "a"}, **arrays)
    results = Results(
        evaluation="retrieval",
        dataset={"name": "scenes", "place": str(shards_place), "split": "test", "images": NUM_IMAGES, "captions": 48},
        metrics=outcome.metrics,
        headline=["i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "rsum", "i2t_medr", "t2i_medr"],
        checkpoint=identity(run),
        config={"split": "test", "seed": 0},
        details={"gallery": f"retrieval_{run}.gallery.json", "protocols": {"full": "Each image ranks all captions."}},
        seconds=1.0,
    )
    results.save(path)
    return path


def zeroshot_of(folder, shards_place, run, correct, class_names=CLASSES, confusions=None, **changes):
    """Writes results of a classification with these numbers of right pictures, of 10 each."""
    shards = open_split(shards_place, "test")[1]
    keys = [key for shard in shards for key in shard.keys]
    num = len(class_names)
    groups = ["head" if row < num // 4 else "tail" if row >= num - num // 3 else "middle" for row in range(num)]
    table = [
        {"name": name, "images": 10, "correct": right, "group": group, "count": 1000 // (row + 1)}
        for row, (name, right, group) in enumerate(zip(class_names, correct, groups, strict=True))
    ]
    if confusions is None:
        confusions = [
            {"true": class_names[0], "predicted": class_names[-1], "count": 3, "examples": keys[:3]},
            {"true": class_names[2], "predicted": class_names[1], "count": 2, "examples": keys[3:5]},
        ]

    def metric(chosen):
        value = 100.0 * sum(right for right, group in zip(correct, groups, strict=True) if group in chosen)
        value /= 10 * sum(group in chosen for group in groups)
        samples = 10 * sum(group in chosen for group in groups)
        return Metric(
            value=value,
            unit="%",
            protocol="Share of the images.",
            samples=samples,
            chance=100 / num,
            interval_95=(max(0.0, value - 5), value + 5),
            interval_method="Wilson",
            tie_variants={"pessimistic": value},
        )

    metrics = {"top1": metric({"head", "middle", "tail"})}
    metrics |= {f"top1_{group}": metric({group}) for group in ("head", "middle", "tail")}
    values = {
        "evaluation": "zeroshot",
        "dataset": {"name": "scenes", "place": str(shards_place), "images": 10 * num, "classes": num, "split": "test"},
        "metrics": metrics,
        "headline": list(metrics),
        "checkpoint": identity(run),
        "config": {"templates": "picture"},
        "details": {"classes": table, "confusions": confusions},
    }
    path = folder / f"zeroshot_{run}.json"
    Results(**{**values, **changes}).save(path)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Shards, and the results of two runs on them."""
    root = tmp_path_factory.mktemp("evaluated")
    place = write_shards(root / "shards", NUM_IMAGES)
    folder = root / "results"
    folder.mkdir()
    files = [retrieval_of(folder, place, run, noise) for run, noise in (("near", 0.8), ("far", 2.0))]
    files += [zeroshot_of(folder, place, "near", [8, 9, 3, 10, 7, 7, 6, 5, 5, 4, 1, 0])]
    files += [zeroshot_of(folder, place, "far", [4, 9, 3, 1, 7, 2, 6, 5, 0, 4, 1, 2])]
    return files


def plain(path):
    """Returns results without what figures are drawn from."""
    results = Results.load(path)
    return dataclasses.replace(results, details={}, metrics={"top1": results.metrics["top1"]}, headline=["top1"])


@pytest.fixture(scope="module")
def page(evaluated, tmp_path_factory):
    return written(evaluated, tmp_path_factory.mktemp("page") / "report.html")


def written(files, out, **settings):
    write_report(files, out, **{"draws": DRAWS, **settings})
    return Page(out)


# --- one file


def test_the_page_loads_nothing_and_has_no_script(page):
    outward = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data") and re.match(r"(https?:)?//", value or "")
    ]
    assert outward == []
    assert not page.all("script")
    assert not page.all("link")
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_picture_is_embedded_and_has_alternative_text(page):
    pictures = page.all("img")
    assert len(pictures) > 60
    assert all(p["src"].startswith("data:image/jpeg;base64,/9j/") and p["alt"].strip() for p in pictures)


def test_the_menu_leads_to_every_part_and_no_id_is_there_twice(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a")]
    assert set(targets) <= set(ids)
    assert targets == [
        "retrieval-scenes-test",
        "retrieval-scenes-test-numbers",
        "retrieval-scenes-test-comparison",
        "retrieval-scenes-test-retrieved",
        "zeroshot-scenes-test",
        "zeroshot-scenes-test-numbers",
        "zeroshot-scenes-test-comparison",
        "zeroshot-scenes-test-frequency",
        "zeroshot-scenes-test-classes",
        "zeroshot-scenes-test-confusions",
        "settings",
    ]


def test_headings_start_with_one_title_and_skip_no_level(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_captions_and_names_of_classes_are_escaped(page):
    assert "<script" not in page.source
    assert "<script>alert('a caption')</script>" in page.words
    assert "<script>alert('a class')</script>" in page.words


def test_the_same_results_give_the_same_page(page, evaluated, tmp_path):
    assert written(evaluated, tmp_path / "again.html").source == page.source


def test_each_figure_is_labelled_for_those_who_do_not_see_it(page):
    labels = [attributes.get("aria-label", "") for attributes in page.all("svg")]
    assert len(labels) == 6  # bars, two of frequency, two of spread, one matrix
    assert all(len(label) > 30 for label in labels)


# --- numbers


def test_numbers_stand_with_interval_chance_and_count(page):
    near, far = (f"{value:.1f} [{value - 5:.1f}, {value + 5:.1f}]" for value in (65 / 1.2, 44 / 1.2))
    assert f"top-1, % {near} {far} 8.3 120" in page.words
    assert "Share of the images. Wilson the same under each rule" in page.words
    assert "Each image ranks all captions." in page.words


def test_the_lead_says_what_was_evaluated_and_what_came_out(page):
    assert "2 models side by side: retrieval on scenes test (24 images, 48 captions) and zero-shot" in page.words
    assert "Zero-shot, scenes test, top-1: 54.2 % for near and 36.7 % for far (chance 8.3 %)." in page.words


def test_settings_tell_training_pairs_configuration_and_credits(page):
    for text in ("training pairs 90 of 100 listed", "templates picture", "runs/near/checkpoints/step-00000003"):
        assert text in page.words
    assert "Pictures: Somebody, CC BY 4.0" in page.words


def test_models_are_named_by_their_runs_and_by_steps_only_where_needed(page, evaluated, tmp_path):
    assert "step" not in page.words.split("What was run")[0]
    first = Results.load(evaluated[2])
    later = dataclasses.replace(first, checkpoint=identity("near", 6))
    later.save(tmp_path / "later.json")
    assert (
        "near, step 3 and near, step 6" in written([evaluated[2], tmp_path / "later.json"], tmp_path / "b.html").words
    )


def test_partial_results_other_templates_and_ties_that_matter_are_said_at_the_top(evaluated, tmp_path):
    first = plain(evaluated[2])
    first.save(tmp_path / "first.json")
    tied = dataclasses.replace(first.metrics["top1"], tie_variants={"optimistic": first.metrics["top1"].value + 7})
    other = dataclasses.replace(
        first,
        is_partial=True,
        checkpoint=identity("other"),
        dataset={**first.dataset, "templates": "name"},
        metrics={"top1": tied},
        headline=["top1"],
    )
    other.save(tmp_path / "other.json")
    words = written([tmp_path / "first.json", tmp_path / "other.json"], tmp_path / "r.html").words
    top = words[: words.index("Zero-shot classification: scenes test 120 images")]
    assert "Partial: Zero-shot classification: scenes test, other: samples that the protocol asks for" in top
    assert "evaluated with different templates: None, name" in top
    assert "the rule for equal scores moves a percentage by 7.0" in top
    assert "other (partial)" in words
    assert "optimistic 61.2" in words


def test_protocols_have_tables_of_their_own(evaluated, tmp_path):
    first = Results.load(evaluated[0])
    further = {f"cxc_{name}": metric for name, metric in first.metrics.items() if "_r" in name}
    metrics = {**first.metrics, **further, "eccv_i2t_map_at_r": first.metrics["i2t_r1"]}
    dataclasses.replace(first, metrics=metrics, details={}).save(tmp_path / "a.json")
    words = written([tmp_path / "a.json"], tmp_path / "r.html").words
    assert "scenes test, CxC near chance of picture → caption, R@1, %" in words
    assert "scenes test, ECCV Caption near chance of picture → caption, mAP@R, %" in words


# --- comparison


def test_a_comparison_is_paired_where_the_files_of_queries_are_there(evaluated, page):
    queries = [load_per_query(per_query_path(path)) for path in evaluated[:2]]
    of = {difference.metric: difference for difference in differences(*queries, DRAWS)}
    i2t = of["i2t_r1"]
    low, high = i2t.interval_95
    assert i2t.p_value < 0.05
    assert high < 0
    row = f"−{-i2t.difference:.1f} [−{-low:.1f}, −{-high:.1f}] {i2t.p_value:.3f}"
    assert f"picture → caption, R@1, % {i2t.first:.1f} {i2t.second:.1f} {row}" in page.words
    assert "Paired over 24 images" in page.words


def test_without_files_of_queries_intervals_are_all_and_the_page_says_so(page):
    assert "Intervals only: no zeroshot_near.queries.npz and zeroshot_far.queries.npz beside the results." in page.words
    assert "top-1, % 54.2 36.7 −17.5 apart" in page.words
    assert "top-1, tail, % 25.0 17.5 −7.5 overlap" in page.words


def test_files_of_queries_of_other_captions_are_not_paired(evaluated, tmp_path):
    files = [shutil.copy(path, tmp_path) for path in evaluated[:2]]
    first, second = (load_per_query(per_query_path(path)) for path in evaluated[:2])
    for path, content, digest in zip(files, (first, second), "ab", strict=True):
        about = {"captions_sha256": digest}
        save_per_query(per_query_path(path), kind="retrieval", keys=content.keys, about=about, **content.arrays)
    words = written([tmp_path / path.name for path in evaluated[:2]], tmp_path / "r.html").words
    assert "Intervals only: the files of queries cannot be paired (expected two runs with the same captions" in words
    assert "names a gallery, retrieval_near.gallery.json, which is not beside it; copy both" in words


# --- classes


def test_the_worst_and_the_best_classes_are_listed_beside_those_of_the_other_run(page):
    assert "Worst classes near far pictures <script>alert('a class')</script> (tail) 0.0 % 20.0 % 10" in page.words
    assert "Best classes near far pictures class 3 (middle) 100.0 % 10.0 % 10" in page.words


def test_accuracy_against_frequency_tells_the_rank_correlation(evaluated, tmp_path):
    place = evaluated[0].parent.parent / "shards"
    path = zeroshot_of(tmp_path, place, "falling", [10, 10, 9, 8, 8, 7, 6, 5, 4, 3, 2, 1])
    words = written([path], tmp_path / "r.html").words
    # ranks 1.5 1.5 3 4.5 4.5 6 … 12 against 1 … 12: 4 ranks are off by a half
    expected = 1 - 6 * 4 * 0.25 / (12 * (144 - 1))
    assert (
        f"rank correlation of accuracy and count is {math.floor(expected * 100 + 0.5) / 100:.2f} over 12 classes"
        in words
    )


def test_the_matrix_says_what_is_not_drawn_and_the_pairs_have_pictures(page):
    assert "All classes. A cell is as dark as its share" in page.words
    assert "The results list 5 of 55 wrong answers; the rest is not drawn." in page.words
    assert "class 2 → class 1 2 of 10 pictures" in page.words
    assert len([p for p in page.all("img") if p["alt"] == "class 2, taken for class 1"]) == 2


def test_of_many_classes_the_most_confused_are_drawn(evaluated, tmp_path):
    names = [f"name {number}" for number in range(60)]
    mixed = [
        {"true": names[row], "predicted": names[row + 1], "count": 9 - row // 10, "examples": []} for row in range(59)
    ]
    place = evaluated[0].parent.parent / "shards"
    page = written([zeroshot_of(tmp_path, place, "a", [1] * 60, names, mixed)], tmp_path / "r.html")
    assert "The 24 classes of the most frequent confusions, of 60." in page.words
    (matrix,) = [svg for svg in page.source.split("<svg ") if svg.startswith('role="img" aria-label="Confusion matrix')]
    drawn = matrix[: matrix.index("</svg>")]
    assert "name 23<" in drawn
    assert "name 24<" not in drawn


def test_a_matrix_colours_right_and_wrong_cells_apart_and_writes_percentages_into_few():
    svg = plots.confusion_matrix(["a", "<b>"], {(0, 0): 1.0, (0, 1): 0.25, (1, 1): 0.5}, "some matrix")
    assert "&lt;b&gt;" in svg
    assert len(re.findall(r"fill: var\(--series-1\)", svg)) == 2
    assert len(re.findall(r"fill: var\(--series-2\)", svg)) == 1
    assert all(f">{number}<" in svg for number in (100, 25, 50))
    many = plots.confusion_matrix([f"n{row}" for row in range(40)], {(0, 0): 0.25}, "large matrix")
    assert ">25<" not in many


def test_a_linear_probe_shows_its_sweep_and_what_it_notes(evaluated, tmp_path):
    points = [{"c": 10.0**e, "top1": 60.0 - e * e, "mean_per_class": 5.0} for e in range(-3, 4)]
    details = {"c": 1.0, "chosen_by": "top1 on 30 training pictures held out", "sweep": points, "notes": ["C is odd"]}
    place = evaluated[0].parent.parent / "shards"
    path = zeroshot_of(tmp_path, place, "a", [5] * 12, evaluation="linear_probe", details=details)
    page = written([path], tmp_path / "r.html")
    assert "Linear probe: scenes test, a: C is odd." in page.words
    assert "a: C = 1 was taken, by top1 on 30 training pictures held out." in page.words
    (curve,) = [svg["aria-label"] for svg in page.all("svg") if "over C" in svg["aria-label"]]
    assert curve.endswith("a from 51.0 to 60.0, best at 1")


# --- pictures


def test_right_answers_are_marked_and_what_is_missing_among_the_best_is_shown_apart(evaluated, tmp_path):
    page = written(evaluated[:1], tmp_path / "r.html", queries=4)
    found = json.loads(evaluated[0].with_name("retrieval_near.gallery.json").read_text())
    shown = []
    for direction in ("t2i", "i2t"):
        chosen = found[direction]["chosen"]
        shown += [chosen[place * len(chosen) // 4] for place in range(4)] + found[direction]["worst"][:4]
    right = sum(answer["is_right"] for entry in shown for answer in entry["answers"])
    without = [entry for entry in shown if not any(answer["is_right"] for answer in entry["answers"])]
    assert right > 0
    assert without
    assert (
        page.source.count('<li class="right') == page.source.count('<span class="unseen-label"> right</span>') == right
    )
    assert page.source.count('<div class="wanted') == len(without)


def test_queries_tell_the_rank_in_the_other_run(page, evaluated):
    near, far = (
        json.loads(path.with_name(f"{path.stem}.gallery.json").read_text())["t2i"]["chosen"][0]["rank"]
        for path in evaluated[:2]
    )
    assert f"right picture at rank {near} of 24 (far: {far})" in page.words


def test_a_gallery_holds_exactly_the_pictures_that_it_shows_and_needs_no_shards(evaluated, tmp_path):
    content = json.loads(evaluated[0].with_name("retrieval_near.gallery.json").read_text())
    assert list(content["pictures"]) == shown_keys(content)
    for path in (evaluated[0], evaluated[0].with_name("retrieval_near.gallery.json")):
        shutil.copy(path, tmp_path)
    gone = tmp_path / "retrieval_near.gallery.json"
    gone.write_text(json.dumps({**content, "data": "no/such/place"}))
    page = written([tmp_path / "retrieval_near.json"], tmp_path / "r.html")
    assert len(page.all("img")) > 30
    assert all(p["src"].startswith("data:image/jpeg") for p in page.all("img"))
    assert "not shown" not in page.words


@pytest.fixture
def bare(evaluated, tmp_path):
    """Results whose gallery has no pictures; the shards are where they were."""
    place = shutil.copytree(evaluated[0].parent.parent / "shards", tmp_path / "here")
    return retrieval_of(tmp_path, place, "bare", 0.8, with_pictures=False), place


def test_an_older_gallery_takes_its_pictures_from_the_shards(bare, tmp_path):
    page = written([bare[0]], tmp_path / "r.html")
    assert "not shown" not in page.words
    assert all(p["src"].startswith("data:image/jpeg") for p in page.all("img"))


def test_pictures_that_are_nowhere_are_tiles_and_the_page_says_how_to_get_them(bare, tmp_path):
    path, place = bare
    moved = place.rename(tmp_path / "there")
    page = written([path], tmp_path / "r.html")
    assert page.all("img")
    assert all(p["src"].startswith("data:image/svg+xml") for p in page.all("img"))
    assert re.search(rf"\d+ pictures are not shown: .* and {re.escape(str(place))} does not have them", page.words)
    found = written([path], tmp_path / "r.html", data=moved)
    assert "not shown" not in found.words
    assert all(p["src"].startswith("data:image/jpeg") for p in found.all("img"))


def test_shards_that_cannot_be_read_are_named_with_their_fault(bare, tmp_path):
    path, place = bare
    (place / "manifest.json").write_text('{"format_version": 1}')
    assert "manifest.json: expected format_version 2, found 1" in written([path], tmp_path / "r.html").words


def test_small_pictures_are_small_whatever_they_were():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png")
    blobs = {"noise": file.getvalue(), "no picture": b"hello"}
    found = small_pictures(blobs, blobs.__getitem__)
    assert list(found) == ["noise"]
    jpeg = base64.b64decode(found["noise"])
    assert len(jpeg) <= MAX_PICTURE_BYTES
    assert Image.open(io.BytesIO(jpeg)).size == (PICTURE_SIDE, PICTURE_SIDE * 3 // 4)


# --- the command


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    command(module.main)


def test_typed_bare_the_newest_results_are_taken_and_named(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run, age in {"old": 200, "new": 100, "older": 300}.items():
        path = tmp_path / "runs" / run / "results" / "zeroshot.json"
        plain(evaluated[2]).save(path)
        os.utime(path, (1e9 - age, 1e9 - age))
    run_command(monkeypatch)
    assert "no results files given: taking the newest, runs/new/results" in capsys.readouterr().out
    assert (tmp_path / "runs" / "new" / "results" / "report.html").exists()


def test_without_any_results_the_error_says_what_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_command(monkeypatch)
    told = capsys.readouterr().err
    assert "expected results files in runs/*/results/, found none" in told
    assert "python -m eval_suite.zeroshot NAME" in told


def test_a_folder_stands_for_its_results_and_other_json_is_left_out_and_named(evaluated, tmp_path, monkeypatch, capsys):
    for path in evaluated[2:]:
        plain(path).save(tmp_path / path.name)
    (tmp_path / "difference.json").write_text('{"differences": []}')
    run_command(monkeypatch, tmp_path, "--out", tmp_path / "deep" / "page.html", "--draws", DRAWS)
    told = capsys.readouterr()
    assert f"report of 2 results files: {tmp_path}/deep/page.html" in told.out
    assert f"leaving out {tmp_path}/difference.json: no results file" in told.err
    assert results_files([tmp_path]) == sorted(tmp_path / path.name for path in evaluated[2:])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"expected results files in .*empty, found none among 0 JSON files"):
        results_files([empty])


def test_a_file_named_twice_is_taken_once(evaluated):
    around = evaluated[0].parent / ".." / "results" / evaluated[0].name
    assert results_files([evaluated[0], around]) == [evaluated[0]]


def test_a_gallery_that_is_no_json_is_refused(evaluated, tmp_path):
    shutil.copy(evaluated[0], tmp_path)
    (tmp_path / "retrieval_near.gallery.json").write_text("{")
    with pytest.raises(InputError, match=r"retrieval_near.gallery.json: expected JSON, found"):
        write_report([tmp_path / "retrieval_near.json"], tmp_path / "r.html")


# --- in a browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_every_picture_and_neither_phone_nor_desk_scrolls_sideways(page, tmp_path):
    whole = tmp_path / "report.html"
    whole.write_text(page.source, encoding="utf-8")
    assert "CONSOLE" not in dumped(whole, tmp_path).stderr

    # The page's own policy forbids scripts, and a window is 500 wide at least: frames of both widths, looked into.
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px" srcdoc="{html_escapes.escape(page.source)}"></iframe>'
        for width in (360, 1200)
    )
    look = (
        "<script>onload = () => { document.body.dataset.found = [...document.querySelectorAll('iframe')].map(f => {"
        "const d = f.contentDocument, all = [...d.images], e = d.documentElement;"
        "return [f.clientWidth, e.scrollWidth <= e.clientWidth, all.filter(i => i.naturalWidth).length, "
        "[...d.querySelectorAll('.scroll')].some(s => s.scrollWidth > s.clientWidth)].join(' ') }).join(', ') }</script>"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(f"<!DOCTYPE html><body>{frames}{look}</body>", encoding="utf-8")
    number = len(page.all("img"))
    found = re.search(r'data-found="([^"]*)"', dumped(frame, tmp_path).stdout)[1]
    # On a phone the wide tables scroll in their own boxes.
    assert found == f"360 true {number} true, 1200 true {number} false"

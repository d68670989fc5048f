"""Diagnostics: each figure against a value by hand or a plain float64 formula, and the command with its page."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from evaluation_samples import color_of_image, color_of_text, write_run, write_shards

from eval_suite import diagnostics as module
from eval_suite.diagnostics import diagnose
from eval_suite.diagnostics_page import write_diagnostics_page
from eval_suite.images import ShardImages, image_batches
from eval_suite.modality_gap import central_vectors, modality_gap
from eval_suite.overlays import (
    attention_cards,
    attention_overlays,
    key_overlap,
    overlap_picture,
    profile_cosines,
    profile_picture,
)
from eval_suite.protocols import Setting, whole_gallery
from eval_suite.results import Results
from eval_suite.retrieval_data import read_samples
from eval_suite.set_diagnostics import circular_variance, contribution_rows, element_contribution
from eval_suite.word_dimensions import frequent_words, pairs_of_word, word_dimensions
from setclip.errors import InputError
from setclip.images import eval_transform
from setclip.manifest import open_split
from setclip.report import sample_cards


def unit(*shape, seed=0):
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=shape))
    return torch.nn.functional.normalize(values, dim=-1)


def largest_cosine(images, texts):
    """Score of sets: the largest cosine of their elements."""
    return lambda r, c: torch.einsum("ikd,jld->ijkl", images[r].double(), texts[c].double()).amax((2, 3)).float()


# --- circular variance


def test_the_variance_of_two_elements_is_one_minus_the_cosine_of_half_their_angle():
    angles = torch.tensor([0.01, 1.0, 2.0, math.pi])
    sets = torch.stack([torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.stack([angles.cos(), angles.sin()], -1)], 1)
    expected = [1 - math.cos(angle / 2) for angle in angles.tolist()]
    assert circular_variance(sets).of_sets.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_variance_is_the_plain_float64_formula_on_random_sets():
    sets = unit(50, 4, 16)
    expected = 1 - sets.mean(1).norm(dim=-1)
    found = circular_variance(sets)
    np.testing.assert_allclose(found.of_sets, expected, rtol=1e-12)
    assert found.log_of_mean == pytest.approx(math.log(expected.mean()))
    assert found.mean_of_logs == pytest.approx(np.mean(np.log(expected.numpy())))
    assert found.mean_of_logs < found.log_of_mean


def test_nearly_equal_elements_keep_their_digits_where_the_plain_formula_loses_them():
    angle = 1e-8
    sets = torch.tensor([[[1.0, 0.0], [math.cos(angle), math.sin(angle)]]], dtype=torch.float64)
    assert circular_variance(sets).of_sets.item() == pytest.approx(angle**2 / 8, rel=1e-6)
    assert (1 - sets.mean(1).norm(dim=-1)).item() == 0


def test_elements_of_any_length_count_as_directions_and_zero_vectors_are_not_there():
    sets = unit(6, 3, 8)
    padded = torch.cat((sets * 7.0, torch.zeros(6, 2, 8)), 1)
    np.testing.assert_allclose(circular_variance(padded).of_sets, circular_variance(sets).of_sets, rtol=1e-12)


def test_a_collapsed_set_has_no_mean_of_logarithms_and_is_counted():
    found = circular_variance(torch.cat((unit(2, 1, 4).expand(2, 3, 4), unit(1, 3, 4, seed=1))))
    assert found.num_collapsed == 2
    assert found.mean_of_logs is None
    assert math.isfinite(found.log_of_mean)
    assert circular_variance(unit(2, 1, 4)).log_of_mean is None


def test_single_vectors_and_empty_sets_have_no_variance():
    with pytest.raises(InputError, match=r"expected sets \(N, K, D\), found shape \(5, 4\)"):
        circular_variance(unit(5, 4))
    with pytest.raises(InputError, match=r"found 1 of 3 without"):
        circular_variance(torch.cat((unit(2, 2, 4), torch.zeros(1, 2, 4, dtype=torch.float64))))


# --- contribution of elements


def test_an_element_that_is_right_finds_all_and_one_that_is_wrong_nothing():
    eye = torch.eye(12)
    images = torch.stack((eye, eye.roll(1, 0)), 1)  # the second element is that of the next image
    found = element_contribution(images, eye[:, None], torch.arange(12), largest_cosine, resamples=10)
    assert set(found) == {"all", "image 1", "image 2", "text 1"}
    assert found["image 1"]["rsum"].value == 600
    assert found["image 2"]["i2t_r1"].value == 0
    assert found["text 1"]["rsum"].value == found["all"]["rsum"].value
    # With all, each query has a wrong answer with the right one's score: ties count against us.
    assert contribution_rows(found)[:3] == [
        ["all", "0.0", "0.0", "400.0"],
        ["image 1", "100.0 (+100.0)", "100.0 (+100.0)", "600.0 (+200.0)"],
        [
            "image 2",
            "0.0 (+0.0)",
            "0.0 (+0.0)",
            "0.0 (-400.0)",
        ],  # one wrong answer before, ten level with the right one
    ]


def test_one_element_is_kept_against_all_elements_of_the_other_side():
    images, texts, owner = unit(15, 3, 6).float(), unit(30, 2, 6, seed=1).float(), torch.arange(30) // 2
    found = element_contribution(images, texts, owner, largest_cosine, resamples=10)
    for name, sides in {
        "all": (images, texts),
        "image 2": (images[:, [1]], texts),
        "text 1": (images, texts[:, [0]]),
    }.items():
        expected = whole_gallery(largest_cosine(*sides), owner, 15, Setting(resamples=10)).metrics
        assert {n: m.value for n, m in found[name].items()} == {n: m.value for n, m in expected.items()}


def test_sets_of_different_sizes_have_no_contribution_of_an_element():
    texts = unit(4, 2, 6).float()
    texts[1, 1] = 0
    with pytest.raises(InputError, match=r"expected text sets of one size"):
        element_contribution(unit(4, 2, 6).float(), texts, torch.arange(4), largest_cosine)
    with pytest.raises(InputError, match=r"expected image sets \(N, K, D\)"):
        element_contribution(unit(4, 6).float(), texts, torch.arange(4), largest_cosine)


# --- dimensions of a word


def test_marks_are_counted_over_all_marks_by_hand():
    u = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 5, 1, -9]])
    found = word_dimensions("dog", u, torch.ones(3, 4), top=2, threshold=0.3)
    # Marks: {3, 2}, {0, 1}, {1, 0} (dimensions 0 and 2 are equal there, the lower counts).
    assert dict(zip(found.dimensions.tolist(), found.probabilities.tolist(), strict=True)) == {
        0: pytest.approx(2 / 6),
        1: pytest.approx(2 / 6),
        2: pytest.approx(1 / 6),
        3: pytest.approx(1 / 6),
    }
    assert found.dimensions.tolist() == [0, 1, 2, 3]
    assert found.marked.tolist() == [0, 1]
    assert found.common.tolist() == [0, 1]
    assert (found.uniform, found.ceiling, found.num_pairs) == (0.25, 0.5, 3)


def test_the_levels_are_the_plain_formula_on_random_pairs_and_sum_to_one():
    u, v = unit(40, 300), unit(40, 300, seed=1)
    found = word_dimensions("dog", u, v)
    expected = np.zeros(300)
    for s in (u * v).numpy():
        expected[np.argsort(-s)[:100]] += 1 / (40 * 100)
    np.testing.assert_allclose(found.probabilities, np.sort(expected)[::-1], rtol=1e-12)
    np.testing.assert_allclose(expected[found.dimensions.numpy()], found.probabilities, rtol=1e-12)
    assert found.probabilities.sum().item() == pytest.approx(1)


def test_a_threshold_that_no_level_can_reach_is_said():
    found = word_dimensions("dog", torch.ones(5, 1024).cumsum(1), torch.ones(5, 1024))
    assert found.probabilities[:100].tolist() == pytest.approx([0.01] * 100)
    assert len(found.marked) == 0
    assert len(found.common) == 100
    assert "no level can be above 1/100 = 0.01, so the threshold 0.015 marks nothing" in found.notes[0]
    assert word_dimensions("dog", unit(5, 1024), unit(5, 1024, seed=1), top=66).notes == []


def test_a_top_of_all_dimensions_says_nothing_and_says_so():
    found = word_dimensions("dog", unit(5, 64), unit(5, 64, seed=1))
    assert found.top == 64
    assert found.probabilities.tolist() == pytest.approx([1 / 64] * 64)
    assert "all 64 dimensions are among the top of each pair" in found.notes[0]


def test_words_match_as_a_whole_in_any_case():
    captions = ["A dog.", "two dogs", "hotdog stand", "the DOG's bowl", "a traffic light", "dog-sled"]
    assert pairs_of_word("dog", captions) == [0, 3, 5]
    assert pairs_of_word("traffic light", captions) == [4]
    assert pairs_of_word("c++", ["c++ book", "c book"]) == [0]


def test_the_most_frequent_objects_are_counted_once_a_caption():
    assert frequent_words([["dog", "dog"], ["cat"], ["cat", "tree"], ["ant"]], 3) == ["cat", "ant", "dog"]


def test_a_word_without_pairs_has_no_dimensions():
    with pytest.raises(InputError, match=r"expected pairs of vectors \(N, D\) of 'dog', found \(0, 4\)"):
        word_dimensions("dog", torch.zeros(0, 4), torch.zeros(0, 4))


# --- modality gap


def test_the_gap_of_two_opposite_cones_is_known_by_hand():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    gap = modality_gap(images, -images, torch.arange(2))
    assert gap.distance == pytest.approx(2)
    assert gap.constant_share == pytest.approx(1)
    assert (gap.matched_cosine, gap.unmatched_cosine) == (pytest.approx(-1), pytest.approx(-1))
    assert (gap.image_cone, gap.text_cone) == (pytest.approx(1), pytest.approx(1))


def test_the_gap_is_the_plain_float64_formula_with_several_texts_an_image():
    images, texts = unit(9, 5).float(), (unit(20, 5, seed=1) + 0.5).float()
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 4, 5, 6, 6, 7, 7, 7, 8, 8])
    gap = modality_gap(images, texts, owner)
    x, y = (t.double().numpy() / np.linalg.norm(t.double().numpy(), axis=1, keepdims=True) for t in (images, texts))
    cosines = x @ y.T
    is_match = owner.numpy()[None] == np.arange(9)[:, None]
    assert gap.distance == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    assert gap.matched_cosine == pytest.approx(cosines[is_match].mean())
    assert gap.unmatched_cosine == pytest.approx(cosines[~is_match].mean())
    differences = y - x[owner.numpy()]
    share = (differences.mean(0) ** 2).sum() / (differences**2).sum(1).mean()
    assert gap.constant_share == pytest.approx(share)
    assert 0 < gap.constant_share < 1


def test_equal_features_have_no_gap_and_one_image_no_unmatched_pair():
    features = unit(7, 4)
    gap = modality_gap(features, features, torch.arange(7))
    assert (gap.distance, gap.constant_share) == (0, 0)
    assert gap.matched_cosine == pytest.approx(1)
    assert modality_gap(features[:1], features[:2], torch.zeros(2, dtype=torch.int64)).unmatched_cosine is None


def test_sets_are_seen_by_the_direction_of_their_mean():
    sets = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(central_vectors(sets), [[half, half], [1, 0]], atol=1e-12)
    with pytest.raises(InputError, match=r"of sets take their central vectors"):
        modality_gap(sets, sets, torch.arange(2))


# --- overlays and sub-spaces


def test_an_overlay_colours_the_photograph_where_a_slot_looks_and_is_grey_elsewhere():
    photo = np.full((40, 60, 3), (200, 100, 50), np.uint8)
    attention = np.zeros((2, 6))  # 2 rows of 3 patches
    attention[0, 0], attention[1, 5] = 1, 0.2
    first, second = attention_overlays(photo, attention, (2, 3))
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    for overlay, looked_at, elsewhere in ((first, (0, 0), (39, 59)), (second, (39, 59), (0, 0))):
        assert overlay.shape == (40, 60, 3)
        assert overlay[elsewhere].tolist() == [grey] * 3
        assert np.ptp(overlay[looked_at].astype(int)) > 60
    np.testing.assert_array_equal(first, second[::-1, ::-1])  # each is shown against its own highest value


def test_a_common_scale_leaves_a_weak_slot_pale():
    photo = np.full((20, 20, 3), 128, np.uint8)
    each = attention_overlays(photo, [[1, 0, 0, 0], [0.1, 0, 0, 0]], (2, 2))
    common = attention_overlays(photo, [[1, 0, 0, 0], [0.1, 0, 0, 0]], (2, 2), scale="common")
    np.testing.assert_array_equal(each[0], each[1])
    np.testing.assert_array_equal(common[0], each[0])
    assert np.ptp(common[1][0, 0].astype(int)) < np.ptp(each[1][0, 0].astype(int)) / 3
    np.testing.assert_array_equal(attention_overlays(photo, np.zeros((1, 4)), (2, 2))[0], photo)


def test_cards_say_where_each_slot_looks_most():
    photo = np.full((20, 20, 3), 128, np.uint8)
    html = sample_cards(attention_cards(photo, [[0.1, 0.1, 0.6, 0.2]], (2, 2), "a <b> dog"))
    assert "most at row 2, column 1 of 2 × 2: 60 %" in html
    assert html.count("data:image/jpeg;base64,") == 2
    assert "a &lt;b&gt; dog" in html


def test_attention_that_does_not_fit_the_picture_is_refused():
    photo = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(
        InputError, match=r"expected attention over 2 × 2 = 4 patches, found 5; leave out the class token"
    ):
        attention_overlays(photo, np.ones((2, 5)), (2, 2))
    with pytest.raises(InputError, match=r"expected attention that is not negative, found -1"):
        attention_overlays(photo, [[1, 1, 1, -1]], (2, 2))
    with pytest.raises(InputError, match=r"expected a photograph \(H, W, 3\) uint8, found \(8, 8, 3\) float64"):
        attention_overlays(photo.astype(float), np.ones((1, 4)), (2, 2))
    with pytest.raises(InputError, match=r"expected finite attention \(K, N\), found shape \(4,\)"):
        attention_overlays(photo, np.ones(4), (2, 2))


def test_overlap_and_cosine_of_sub_spaces_are_known_by_hand():
    profiles = [[3, 2, 0, 0], [0, 2, 3, 0], [0, 0, 0, 5]]
    np.testing.assert_allclose(key_overlap(profiles, top=2), [[1, 0.5, 0.5], [0.5, 1, 0], [0.5, 0, 1]])
    np.testing.assert_allclose(profile_cosines(profiles), [[1, 4 / 13, 0], [4 / 13, 1, 0], [0, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(key_overlap(profiles, top=100), np.ones((3, 3)))


def test_sub_space_drawings_are_inline_and_name_every_sub_space():
    profiles = np.random.default_rng(0).random((3, 50))
    stripes = profile_picture(profiles, "profiles of three sub-spaces")
    assert stripes.startswith('<svg role="img" aria-label="profiles of three sub-spaces"')
    assert all(f"sub-space {number}" in stripes for number in (1, 2, 3))
    assert "data:image/png;base64," in stripes
    matrix = overlap_picture(np.eye(3), "overlap")
    assert (matrix.count("1.00"), matrix.count("0.00")) == (3, 6)
    with pytest.raises(InputError, match=r"expected profiles that are not negative"):
        profile_picture(-profiles, "x")
    with pytest.raises(InputError, match=r"found none in sub-space 2"):
        profile_cosines([[1, 0], [0, 0]])
    with pytest.raises(InputError, match=r"expected a square matrix"):
        overlap_picture(np.ones((2, 3)), "x")


# --- all together


def shard_data(tmp_path):
    _, shards = open_split(write_shards(tmp_path / "shards"))
    return image_batches(ShardImages(shards, eval_transform(32)), 5, 0), read_samples(shards).captions


def test_single_vectors_have_a_gap_and_words_and_no_sets(tmp_path):
    batches, captions = shard_data(tmp_path)
    found = diagnose(color_of_image, color_of_text, batches, captions, ["red", "BLUE"], top=1, show_progress=False)
    assert [(word.word, word.num_pairs) for word in found.words] == [("red", 6), ("BLUE", 6)]
    assert [word.dimensions[0].item() for word in found.words] == [0, 2]  # of red, green and blue
    assert not found.variance
    assert not found.contribution
    assert found.gap.matched_cosine > 0.9 > found.gap.unmatched_cosine


def test_sets_have_variance_and_contribution_too(tmp_path):
    batches, captions = shard_data(tmp_path)

    def both(features):
        return torch.stack((features, torch.tensor([1.0, 2.0, 3.0]).expand_as(features)), 1)

    found = diagnose(
        lambda images: both(color_of_image(images)),
        lambda texts: both(color_of_text(texts)),
        batches,
        captions,
        ["red"],
        largest_cosine,
        show_progress=False,
    )
    assert set(found.variance) == {"image", "text"}
    assert found.variance["text"].num_collapsed == 0
    assert set(found.contribution) == {"all", "image 1", "image 2", "text 1", "text 2"}
    metrics = module.metrics_of(found)
    assert {name for name in metrics if name.startswith("variance")} == {
        f"variance_{side}_{how}" for side in ("image", "text") for how in ("log_of_mean", "mean_of_logs")
    }
    details = module.details_of(found)
    assert details["contribution"]["image 2"]["rsum"] == found.contribution["image 2"]["rsum"].value
    results = Results(
        evaluation="diagnostics",
        dataset={"name": "x", "split": "test", "images": 12, "captions": 24},
        metrics=metrics,
        headline=[],
        checkpoint={},
        config={},
        details=details,
    )
    write_diagnostics_page(tmp_path / "page.html", results, found.words, found.contribution)
    html = (tmp_path / "page.html").read_text()
    assert all(f'id="{anchor}"' in html for anchor in ("gap", "words", "sets", "contribution"))
    assert "captions, mean of the logs" in html


def test_a_word_that_no_caption_has_is_an_error_before_anything_is_encoded(tmp_path):
    batches, captions = shard_data(tmp_path)
    with pytest.raises(InputError, match=r"found none of 24 captions with 'dog', 'cat'"):
        diagnose(None, None, batches, captions, ["red", "dog", "cat"])


def test_the_command_writes_results_and_a_page_beside_them(tmp_path, monkeypatch, capsys):
    place = write_shards(tmp_path / "shards")
    run = write_run(tmp_path / "runs", "small")
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["diagnostics", "--data", str(place), "--checkpoint", str(run), "--out", str(out), "--num-words", "1"],
    )
    module.main()
    printed = capsys.readouterr().out
    assert "picture: 24 pairs, strongest dimensions" in printed
    results = Results.load(out)
    (word,) = results.details["words"]
    assert (word["word"], word["top"], len(word["dimensions"])) == ("picture", 1, 16)
    assert sum(word["probabilities"]) == pytest.approx(1)
    assert results.metrics["gap"].value == results.details["gap"]["distance"]
    html = (tmp_path / "out.html").read_text()
    assert "Modality gap" in html
    assert "“picture”" in html
    assert 'http-equiv="Content-Security-Policy"' in html
    assert json.loads(out.read_text())["evaluation"] == "diagnostics"

"""The benchmark of packing: that it runs without what it may lack, and that its measure of quality is right."""

import io
import json
import sys

import numpy as np
import PIL.Image
import pytest

from benchmarks import packing


def test_the_quick_mode_runs_without_real_data_and_without_img2dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SETCLIP_REAL_DATA", raising=False)
    monkeypatch.setenv("SETCLIP_IMG2DATASET_ENV", str(tmp_path / "none"))
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(
        sys, "argv", ["packing", "--quick", "True", "--sides", "300", "--repeats", "1", "--json", str(figures)]
    )
    packing.main()
    said = capsys.readouterr().out
    assert "python -m data_prep.fetch setup" in said
    made = json.loads(figures.read_text())
    assert made["packing"]["samples_per_cpu_second"][0] > 50
    (resizing,) = made["resizing"].values()
    assert list(resizing["images_per_cpu_second"]) == ["ours"]
    assert min(resizing["decibels"]["ours"].values()) > 28


@pytest.mark.parametrize(("pixels", "extent", "source"), [(3, 6, 6), (256, 511.5, 512), (5, 7, 7)])
def test_the_weights_of_an_exact_reduction_cover_its_extent_once(pixels, extent, source):
    weights = packing.area_weights(pixels, extent, source)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    covered = weights.sum(0) * extent / pixels
    np.testing.assert_allclose(covered, np.minimum(extent - np.arange(source), 1), atol=1e-4)


def test_a_result_that_is_moved_by_a_pixel_is_less_close():
    y, x = np.mgrid[0:128, 0:192]
    picture = np.stack([x % 97, y, (x + y) % 101], -1).astype(np.uint8)
    source = io.BytesIO()
    PIL.Image.fromarray(picture).save(source, "PNG")
    half = picture.reshape(64, 2, 96, 2, 3).mean((1, 3)).round().astype(np.uint8)
    right, moved = io.BytesIO(), io.BytesIO()
    PIL.Image.fromarray(half).save(right, "PNG")
    PIL.Image.fromarray(np.roll(half, 1, 1)).save(moved, "PNG")
    area, lanczos = packing.closeness(source.getvalue(), right.getvalue())
    assert area > 50
    assert area > lanczos > packing.closeness(source.getvalue(), moved.getvalue())[1]

"""The benchmark of the loader on a few pictures: both sides load them, and the pixels agree."""

import json
import sys

import numpy as np
import pytest
import simplejpeg
import torch

from benchmarks import loader, open_clip_environment
from setclip.errors import InputError


@pytest.fixture(scope="module")
def drawn():
    return loader._drawn(6, 256)


def test_pictures_of_512_pixels_are_four_of_256(drawn):
    large = [simplejpeg.decode_jpeg(data, "RGB") for data in loader.mosaics(drawn)]
    small = simplejpeg.decode_jpeg(drawn[1], "RGB").astype(int)
    assert {picture.shape for picture in large} == {(512, 512, 3)}
    assert np.abs(large[0][:256, 256:].astype(int) - small).mean() < 3


def test_our_pixels_are_those_of_pillow_where_nothing_is_scaled_while_decoding(drawn):
    found = loader.pixels(drawn)
    assert found["mean"] < 0.5
    assert found["share_over_2"] < 0.01
    assert loader.pixels(loader.mosaics(drawn))["mean"] < 4, "decoded at half the size where that is enough"


def test_our_side_loads_all_pictures(drawn, tmp_path):
    folder = loader.write_tars(tmp_path / "tars", drawn, 64, 256)
    assert loader.load_ours(folder, 64, is_normalised=True) > 0


@pytest.mark.slow
def test_the_command_says_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    try:
        open_clip_environment.python_of()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.delenv("SETCLIP_REAL_DATA", raising=False)
    monkeypatch.setattr(loader, "SIZES", (256,))
    monkeypatch.setattr(sys, "argv", ["loader", "--quick", "--json", str(tmp_path / "a.json")])
    threads = torch.get_num_threads()
    loader.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "256 JPEGs of 256 pixels (drawn scenes), to 224; CPU time of one thread" in printed
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["256"]["times_faster"] > 1
    assert figures["goals"]["times_faster"] == 2.0

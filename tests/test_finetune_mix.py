"""Sums of runs, and towers mixed with those that a run began with: by hand, as open_clip loads them, and what is refused."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from finetune_material import command, words, write_pretrained, write_shards
from PIL import Image
from safetensors.torch import load_file

from eval_suite.model import model_to_evaluate
from eval_suite.retrieval import RetrievalConfig, evaluate
from finetune import ensemble as ensembles
from finetune.ensemble import EnsembleConfig, ensemble, open_run, part_of
from finetune.mix import MixConfig, mix, mixed
from setclip.checkpoint import load_model
from setclip.errors import InputError
from setclip.models.backbones import make_backbone
from setclip.models.set_model import HeadSettings, SetModel
from setclip.vocabulary import SPECIAL

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, a pretrained model, a run of two seeds whose towers learnt, and class folders."""
    folder = tmp_path_factory.mktemp("mix")
    write_shards(folder / "data", {"train": 64, "val": 20, "test": 20})
    write_pretrained(folder / "pretrained")
    command(words(folder, folder / "run", "mean", "--epochs", 2, "--seeds", 2, "--backbone.freeze", "none"))
    for name, colour in COLOURS.items():
        (folder / "classes" / name).mkdir(parents=True)
        for shade in range(3):
            pixels = np.full((32, 32, 3), colour, np.uint8) - np.uint8(10 * shade)
            Image.fromarray(pixels).save(folder / "classes" / name / f"{shade}.png")
    return folder


def scores(folder, data):
    """Returns the cosines of a run's vectors, computed here."""
    loaded, member = load_model(folder), open_run(folder)
    part = part_of(member, "test")
    from eval_suite.preprocess import model_pictures
    from finetune.features import Pictures, pixels_of

    pictures = Pictures(part, model_pictures(loaded))
    pixels = torch.stack([pictures[row, 0] for row in range(len(part))])
    with torch.no_grad():
        images = loaded.model.encode_image(pixels_of(pixels, loaded, torch.device("cpu")))
        texts = loaded.model.encode_text(loaded.tokenizer([t for texts in part.data.captions for t in texts]))
    return images.double() @ texts.double().T


def test_a_sum_of_runs_retrieves_what_the_mean_of_their_scores_ranks(place, tmp_path, capsys):
    out = ensemble(EnsembleConfig(runs=(place / "run",), out=tmp_path / "sum", device="cpu"))
    found = json.loads((out / "results.json").read_text())
    runs = [place / "run" / f"seed-{seed}" for seed in (0, 1)]
    mean = sum(scores(run, place / "data") for run in runs) / 2
    own = torch.arange(40) // 2
    first = mean.argmax(1)
    assert found["metrics"]["i2t_r1"]["value"] == pytest.approx(
        100 * (own[first] == torch.arange(20)).float().mean().item()
    )
    assert found["metrics"]["t2i_r1"]["value"] == pytest.approx(100 * (mean.argmax(0) == own).float().mean().item())
    assert [member["seed"] for member in found["details"]["members"]] == [0, 1]
    table = (out / "results.md").read_text()
    singles = [json.loads((run / "results.json").read_text())["metrics"]["rsum"]["value"] for run in runs]
    assert all(f"{value:.1f}" in table for value in (*singles, found["metrics"]["rsum"]["value"]))
    assert table.strip() in capsys.readouterr().out


def test_a_sum_stands_beside_a_row_that_says_what_does_not_compare(place, tmp_path):
    row = "dive-f30k-frcnn-bigru-ensemble"
    out = ensemble(EnsembleConfig(runs=(place / "run",), out=tmp_path / "sum", row=row, device="cpu", split="val"))
    text = (out / "results.md").read_text()
    assert "| rsum |" in text
    assert "| 509.3 |" in text
    assert "not of flickr30k test" in text
    assert (
        "the models that are summed are of plain, plain, the row's of dive-f30k-frcnn-bigru, dive-f30k-frcnn-bigru"
        in text
    )


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["run/seed-0"], "expected two or more runs, or one of several seeds, found .*seed-0"),
        (["run", "run/seed-0"], "expected each run once, found .*seed-0 twice"),
        (["run", "pretrained"], "expected a run of finetune.run at .*pretrained, found no config.yaml"),
    ],
)
def test_runs_that_cannot_be_summed_are_refused(place, tmp_path, runs, message):
    with pytest.raises(InputError, match=message):
        ensemble(EnsembleConfig(runs=tuple(place / run for run in runs), out=tmp_path / "sum", device="cpu"))


def test_runs_on_other_data_are_refused(place, monkeypatch, tmp_path):
    part = part_of(open_run(place / "run" / "seed-0"), "test")
    parts = iter([part, part.of(range(10), "test")])
    monkeypatch.setattr(ensembles, "part_of", lambda member, split: next(parts))
    with pytest.raises(InputError, match=r"runs on the same data, found .*\(20 pictures\) of .* and .*\(10\)"):
        ensemble(EnsembleConfig(runs=(place / "run",), out=tmp_path / "sum", device="cpu"))


def test_a_run_of_several_seeds_given_as_a_checkpoint_says_which_seeds_there_are(place):
    with pytest.raises(
        InputError, match=r"found one of 2 seeds; give one of .*seed-0, .*seed-1 \(`python -m finetune.ensemble"
    ):
        model_to_evaluate(str(place / "run"), "cpu")


# --- mixing


def test_mixing_moves_weights_on_a_line_and_leaves_whole_numbers():
    one, two = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([1.0, 6.0]), "n": torch.tensor(3)},
    )
    assert mixed(one, two, 0.25)["w"].tolist() == [0.25, 3.0]
    assert torch.equal(mixed(one, two, 1.0)["w"], two["w"])
    assert mixed(one, two, 0.25)["n"] == 3


def test_a_mixed_checkpoint_is_loaded_by_open_clip_and_the_table_has_before_mixed_and_after(place, monkeypatch, capsys):
    run = place / "run" / "seed-0"
    monkeypatch.setattr(
        sys, "argv",
        ["mix", str(run), "--alpha", "0.25", "--zeroshot", f"colours={place / 'classes'}", "--device", "cpu"],
    )  # fmt: skip
    from finetune.mix import main

    main()
    out = run / "mixed"
    before = load_file(place / "pretrained" / "checkpoints" / "step-00000001" / "model.safetensors")
    after = load_file(run / "checkpoints" / "chosen" / "model.safetensors")
    name = "visual.conv1.weight"
    expected = 0.75 * before[name].double() + 0.25 * after[f"backbone.clip.{name}"].double()
    model = open_clip.create_model(f"local-dir:{out / 'alpha-0.25'}")
    torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=1e-6, atol=1e-7)
    content = json.loads((out / "mix.json").read_text())
    assert [row["alpha"] for row in content["rows"]] == [0.0, 0.25, 1.0]
    assert all(0 <= row["zeroshot"]["colours"]["top1"] <= 100 for row in content["rows"])
    assert len({row["retrieval_by_head"]["rsum"] for row in content["rows"]}) == 3
    # the ends are the original's vectors and the run as it was
    validation = load_model(run).identity["validation"]["metrics"]
    assert content["rows"][-1]["retrieval_by_head"]["rsum"] == pytest.approx(validation["rsum"])

    def rsum(checkpoint):
        asked = RetrievalConfig(
            data=place / "data", split="val", checkpoint=str(checkpoint), gallery_queries=0, device="cpu", workers=0
        )
        return evaluate(asked).results.metrics["rsum"].value

    assert content["rows"][0]["retrieval_of_vectors"]["rsum"] == pytest.approx(rsum(place / "pretrained"))
    assert content["rows"][1]["retrieval_of_vectors"]["rsum"] == pytest.approx(rsum(out / "alpha-0.25"))
    assert content["rows"][1]["retrieval_by_head"]["rsum"] == pytest.approx(rsum(out / "alpha-0.25-head"))
    table = (out / "mix.md").read_text()
    assert re.search(r"\| before \(α = 0\) \|.*\n\| α = 0.25 \|.*\n\| fine-tuned \(α = 1\) \|", table)
    assert table.strip() in capsys.readouterr().out
    with pytest.raises(InputError, match=r"found .*mixed; remove it with --overwrite True"):
        mix(MixConfig(run=run, device="cpu"))


def test_frozen_towers_other_backbones_and_a_model_that_is_gone_are_refused(place, tmp_path, monkeypatch):
    command(words(place, tmp_path / "frozen", "mean", "--epochs", 1))
    with pytest.raises(InputError, match=r"expected a run whose towers learnt, found those of .*frozen as they were"):
        mix(MixConfig(run=tmp_path / "frozen", device="cpu"))
    run = place / "run" / "seed-1"
    with pytest.raises(InputError, match=r"what .*seed-1 began with; name it with --original"):
        mix(MixConfig(run=run, original=str(tmp_path / "none" / "there"), device="cpu"))
    with pytest.raises(ValueError, match="expected different shares between 0 and 1"):
        MixConfig(run=run, alpha=(1.0,))
    member = open_run(run)
    text = {"kind": "recurrent", "words": " ".join((*SPECIAL, "red")), "word_width": 4, "hidden_width": 8}
    towers = make_backbone({"kind": "towers", "image": {"kind": "regions", "width": 8}, "text": text})
    other = replace(member.loaded, model=SetModel(towers, HeadSettings(name="mean", width=4)))
    monkeypatch.setattr("finetune.mix.open_run", lambda folder: replace(member, loaded=other))
    with pytest.raises(InputError, match=r"expected towers of open_clip in .*, found backbone towers"):
        mix(MixConfig(run=run, device="cpu"))

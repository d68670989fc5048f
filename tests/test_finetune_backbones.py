"""Towers of timm, Hugging Face, recurrent ones and mixtures: they train, come back whole from a checkpoint, and go on exactly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from finetune_material import troubled, write_pretrained, write_shards
from huggingface_hub import constants
from PIL import Image
from regions_material import finetuned, write_bert
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eval_suite.preprocess import pillow_transform
from eval_suite.results import Results
from eval_suite.retrieval import RetrievalConfig, evaluate
from finetune import step
from finetune.config import BackboneConfig, NoiseConfig
from finetune.recipes import RECIPES
from finetune.run import finetune
from finetune.towers import glove_vectors
from setclip.checkpoint import checkpoints_of, load_model
from setclip.errors import InputError
from setclip.models.backbones import make_backbone
from setclip.models.backbones.hugging_face import HuggingFaceText, PieceTokenizer, make_encoder
from setclip.models.backbones.recurrent import Recurrent
from setclip.models.backbones.timm_tower import SHORT, TimmTower
from setclip.vocabulary import END, MASKED, PAD, SPECIAL, START, UNKNOWN, Vocabulary, WordTokenizer
from setclip.word_noise import DROP, KEEP, MASK, RANDOM, changes

WORDS = " ".join((*SPECIAL, *(f"w{i}" for i in range(55))))
CELLS = (("gru", "states"), ("bigru_concat", "states"), ("bigru", "embeddings"))
SMALL_NET = ("--backbone.image", "test_resnet", "--backbone.image-weights", "random", "--backbone.image-size", 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    write_shards(folder / "data", {"train": 80, "val": 20, "test": 20})
    write_pretrained(folder / "pretrained")
    write_bert(folder / "bert")
    save_file(timm.create_model("test_vit").state_dict(), folder / "other.safetensors")
    return folder


def losses_of(out):
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def recalls_of(results):
    return {name: metric.value for name, metric in results.metrics.items()}


def evaluated(out, **data):
    config = RetrievalConfig(checkpoint=str(out), split="test", gallery_queries=0, device="cpu", workers=0, **data)
    return recalls_of(evaluate(config).results)


# --- runs


@pytest.mark.parametrize(
    ("head", "towers"),
    [
        ("gpo", (*SMALL_NET, "--backbone.text", "bigru")),
        ("asa", (*SMALL_NET, "--backbone.maps", 3, "--backbone.text", "bigru_concat")),
        ("mean", ("--backbone.text", "gru", "--model", "PLACE/pretrained")),
        (
            "slot",
            (
                *("--backbone.image", "test_vit", "--backbone.image-weights", "random", "--backbone.image-size", 64),
                *("--backbone.text", "PLACE/bert", "--backbone.text-weights", "random", "--backbone.freeze", "none"),
                *(
                    "--noise.words",
                    0.2,
                    "--noise.regions",
                    0.2,
                    "--options",
                    "num_elements=2",
                    "blocks=1",
                    "head_width=8",
                ),
                *("--backbone.lr-factor", 1),
            ),
        ),
    ],
)
def test_towers_train_and_their_checkpoint_gives_the_same_recalls_without_what_they_were_made_of(
    place, tmp_path, head, towers
):
    shutil.copytree(place, tmp_path / "place")
    towers = [str(word).replace("PLACE", str(tmp_path / "place")) for word in towers]
    out = finetuned(tmp_path / "run", "--data", place / "data", *towers, head=head)
    losses = losses_of(out)
    assert sum(losses[-3:]) < sum(losses[:3])
    shutil.rmtree(tmp_path / "place")
    assert evaluated(out, data=place / "data") == recalls_of(Results.load(out / "results.json"))


def test_a_run_with_noise_and_dropout_that_breaks_off_ends_as_if_nothing_had_happened(place, tmp_path, monkeypatch):
    towers = (
        *(
            "--data",
            place / "data",
            *SMALL_NET,
            "--backbone.text",
            "bigru",
            "--backbone.dropout",
            0.2,
            "--captions-per-image",
            2,
        ),
        *(
            "--noise.words",
            0.3,
            "--noise.regions",
            0.3,
            "--backbone.unfreeze-epoch",
            1,
            "--backbone.text-lr-factor",
            0.5,
        ),
    )
    finetuned(tmp_path / "whole", *towers)
    compute = step.total_loss
    monkeypatch.setattr(step, "total_loss", troubled(compute, "SIGTERM", 7))  # in the middle of the second epoch
    with pytest.raises(SystemExit):
        finetuned(tmp_path / "run", *towers, "--resume", True)
    monkeypatch.setattr(step, "total_loss", compute)
    finetuned(tmp_path / "run", *towers, "--resume", True)
    one, two = (load_file(checkpoints_of(tmp_path / name)[-1] / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    first = checkpoints_of(tmp_path / "whole")[-1] / "optimizer.safetensors"
    steps = {name: int(value) for name, value in load_file(first).items() if name.startswith("step.")}
    assert steps["step.backbone.image_tower.trunk.bn1.weight"] == 5
    assert steps["step.backbone.text_tower.embedding.weight"] == 10


def test_a_run_goes_on_with_its_own_resizing_and_with_as_many_kept_features_where_pictures_are_varied(place, tmp_path):
    varied = ("--augment.kind", "resized_crop", "--backbone.resize", "squash", "--epochs", 1)
    towers = ("--data", place / "data", *SMALL_NET, "--backbone.text", "bigru", *varied)
    finetuned(tmp_path / "run", *towers)
    with pytest.raises(InputError, match=r"with other settings: towers was .*'resize': 'squash', .*, is .*'shortest'"):
        finetuned(tmp_path / "run", *towers, "--backbone.resize", "shortest", "--resume", True)
    with pytest.raises(InputError, match=r"with other settings: towers was .*'cache_gb': 4.0.*, is .*'cache_gb': 0.0"):
        finetuned(tmp_path / "run", *towers, "--backbone.cache-gb", 0, "--resume", True)


def test_frozen_towers_stay_but_a_recurrent_one_learns_and_batch_norm_keeps_its_statistics(place, tmp_path):
    net = timm.create_model("test_resnet", num_classes=10)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    towers = ("--data", place / "data", *SMALL_NET, "--backbone.text", "bigru", "--epochs", 1)
    found = {}
    for freeze in ("both", "none"):
        weights = ("--backbone.image-weights", tmp_path / "net.safetensors", "--backbone.freeze", freeze)
        out = finetuned(tmp_path / freeze, *towers, *weights)
        found[freeze] = load_file(checkpoints_of(out)[-1] / "model.safetensors")
    for name, value in net.state_dict().items():
        own = f"backbone.image_tower.trunk.{name}"
        if own not in found["both"]:
            assert name.startswith("fc.")
            continue
        assert torch.equal(found["both"][own], value)
        if "running" in name:
            assert torch.equal(found["none"][own], value)
    assert not torch.equal(found["none"]["backbone.image_tower.trunk.bn1.weight"], net.bn1.weight)
    name = "text_tower.gru.weight_hh_l0"
    torch.manual_seed(0)
    begun = make_backbone(load_model(tmp_path / "both").model.backbone.description).state_dict()
    assert not torch.equal(found["both"][f"backbone.{name}"], begun[name])


# --- features


def test_a_bigru_is_a_plain_loop_over_each_text_alone_and_padding_changes_nothing():
    tower = Recurrent(WORDS, "bigru", word_width=7, hidden_width=9).double().eval()
    tokens = tower.tokenizer(["w1 w2 w3 w4 w5", "w7", "w9 unknown w3"])
    features = tower(tokens)
    assert features.mask.sum(1).tolist() == [7, 3, 5]
    gru = tower.gru
    for row, length in enumerate([7, 3, 5]):
        words = tower.embedding(tokens[row, :length])
        directions = []
        for end in ("", "_reverse"):
            cell = torch.nn.GRUCell(7, 9).double()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(cell, name).data = getattr(gru, f"{name}_l0{end}").data
            state, states = torch.zeros(9).double(), []
            for word in words.flip(0) if end else words:
                state = cell(word, state)
                states.append(state)
            directions.append(torch.stack(states[::-1] if end else states))
        assert torch.allclose(features.local[row, :length], (directions[0] + directions[1]) / 2, atol=1e-12)
        assert torch.allclose(features.pooled[row], (directions[0][-1] + directions[1][0]) / 2, atol=1e-12)


def test_padded_batches_do_not_change_features_of_any_text_tower(place):
    own = AutoTokenizer.from_pretrained(place / "bert")
    config = json.loads((place / "bert" / "config.json").read_text())
    bert = HuggingFaceText(config, own.backend_tokenizer.to_str(), own.pad_token_id, own.mask_token_id, 24).eval()
    texts = ["red", "red green blue and white , a picture of red", ""]
    recurrent = [Recurrent(WORDS, cell, hidden_width=8, local=local) for cell, local in CELLS]
    for tower in (bert, *(each.eval() for each in recurrent)):
        together = tower(tower.tokenizer(texts))
        for row, text in enumerate(texts):
            alone = tower(tower.tokenizer([text]))
            number = alone.local.shape[1]
            assert together.mask[row].sum() == number == len(tower.words_of([text])[0])
            assert torch.allclose(together.local[row, :number], alone.local[0], atol=1e-5)
            assert torch.allclose(together.pooled[row], alone.pooled[0], atol=1e-5)
    assert bert.words_of(["red pictures"]) == [["red", "[UNK]", "[SEP]"]]


def test_an_encoder_is_float32_whatever_its_configuration_says(place, tmp_path):
    config = json.loads((place / "bert" / "config.json").read_text())
    encoder = make_encoder({**config, "dtype": "float16"})
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_maps_of_timm_are_the_last_blocks_finest_first_and_one_map_is_the_last():
    tower = TimmTower("resnet10t", 64, maps=3).eval()
    assert (tower.scales, tower.scale_widths) == ([(8, 8), (4, 4), (2, 2)], [128, 256, 512])
    pixels = torch.randn(1, 3, 64, 64)
    found = tower(pixels)
    one = TimmTower("resnet10t", 64).eval()
    one.load_state_dict(tower.state_dict())
    assert torch.equal(found.local[:, -4:], one(pixels).local)
    assert torch.allclose(one(pixels).local.mean(1), one(pixels).pooled, atol=1e-6)


def test_short_names_are_models_of_timm_that_have_weights():
    assert all(timm.get_pretrained_cfg(name).has_weights for name in SHORT.values())


def test_classic_resizing_takes_the_middle_224_of_256():
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 300, 400), dtype=np.uint8))
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((341, 256), Image.Resampling.BICUBIC)
    found = pillow_transform(224, resize_mode="classic")(picture)
    assert torch.equal(found, torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 16:240, 58:282])


# --- words


def test_a_vocabulary_is_that_of_the_captions_alone_by_count_then_alphabet():
    captions = ["A dog's bone.", "the dog runs .", "A cat; a dog", "zebra"]
    first, second = (Vocabulary.of_captions(order, 2) for order in (captions, captions[::-1]))
    assert first == second
    assert first.words == (*SPECIAL, "a", ".", "dog")
    tokenizer = WordTokenizer(first, length=5)
    assert tokenizer(["a <pad> dog", "dog runs"]).tolist() == [
        [START, 5, UNKNOWN, UNKNOWN, END],  # cut
        [START, 7, UNKNOWN, END, PAD],
    ]
    with pytest.raises(InputError, match="at least 9 times, found none among 10 different ones"):
        Vocabulary.of_captions(captions, 9)


def test_a_vocabulary_has_no_word_of_validation_or_test_captions(place, tmp_path):
    write_shards(tmp_path / "data", {"train": 40})
    write_shards(tmp_path / "other", {"val": 10}, captions=3, first=100)  # "now" stands in no training caption
    out = finetuned(tmp_path / "run", "--data", tmp_path / "data", "--val", tmp_path / "other", *SMALL_NET,
                    "--backbone.text", "bigru", "--epochs", 1)  # fmt: skip
    words = load_model(out).model.backbone.text_tower.tokenizer.vocabulary.words
    assert sorted(words[len(SPECIAL) :]) == ["and", "blue", "green", "red", "white"]


def test_words_change_at_the_stated_rates_and_by_the_draw_alone(tmp_path):
    drawn = np.array(changes([(1, epoch, 5) for epoch in range(400)], 50, 0.2))
    shares = [(drawn == what).mean() for what in (KEEP, MASK, RANDOM, DROP)]
    assert shares == pytest.approx([0.8, 0.1, 0.02, 0.08], abs=0.01)
    tokenizer = WordTokenizer(Vocabulary(tuple(WORDS.split(" "))))
    text = " ".join(f"w{i}" for i in range(50))
    noisy = tokenizer.noisy([text, text, "w1"], 0.5, [(1, 2), (1, 3), (1, 2)])
    assert torch.equal(noisy[:1, : (noisy[0] != PAD).sum()], tokenizer.noisy([text], 0.5, [(1, 2)]))
    assert not torch.equal(noisy[0], noisy[1])
    assert {START, END, MASKED} <= set(noisy[0].tolist())
    assert torch.equal(tokenizer.noisy([text], 0.0, [(1, 2)]), tokenizer([text]))


def test_all_pieces_of_a_word_change_alike(place):
    own = AutoTokenizer.from_pretrained(place / "bert")
    tokenizer = PieceTokenizer(own.backend_tokenizer.to_str(), own.pad_token_id, own.mask_token_id, 24)
    texts = ["red pictures picture picture"] * 200
    whole = own("red pictures pictpict pictureure")["input_ids"]
    assert tokenizer(["red pictures pictpict pictureure"])[0].tolist() == whole
    rows = tokenizer.noisy(texts, 0.5, [(i,) for i in range(200)])
    assert (rows[:, 0] == own.cls_token_id).all()
    assert {int(own.sep_token_id)} == {int(row[row != own.pad_token_id][-1]) for row in rows}
    special = {own.unk_token_id, own.pad_token_id}
    assert not any(special & set(row[row != own.pad_token_id].tolist()) - {own.unk_token_id} for row in rows)
    pieces = tokenizer.noisy(["pictureure"] * 100, 0.9, [(i,) for i in range(100)])
    kinds = {tuple(row[row != own.pad_token_id].tolist()) for row in pieces}
    start, end, mask = own.cls_token_id, own.sep_token_id, own.mask_token_id
    assert {(start, end), (start, mask, mask, end), tuple(own("pictureure")["input_ids"])} <= kinds


def test_word_vectors_are_taken_where_there_are_some_and_counted(tmp_path):
    vocabulary = Vocabulary.of_captions(["red dog runs"], 1)
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2 3\nother 4 5 6\nruns away 4 5 6\nred -1 0 .5\n")
    vectors, found = glove_vectors(path, vocabulary, 3)
    assert found == 2
    assert vectors[vocabulary.number("dog")].tolist() == [1, 2, 3]
    assert vectors.abs()[vocabulary.number("runs")].max() <= 0.1
    assert torch.equal(vectors, glove_vectors(path, vocabulary, 3)[0])
    with pytest.raises(InputError, match=r"line 1: expected a word and 2 numbers, found 3"):
        glove_vectors(path, vocabulary, 2)
    path.write_text("other 4 5 6\n")
    with pytest.raises(InputError, match="found none of 3"):
        glove_vectors(path, vocabulary, 3)


# --- what does not fit

NET = {"image": "test_resnet", "image_weights": "random", "image_size": 32, "text": "bigru", "min_count": 1}


def config_of(place, out, backbone, **values):
    """Returns settings with paths in texts put in."""

    def put(value):
        return value.replace("PLACE", str(place)) if isinstance(value, str) else value

    own = BackboneConfig(**{name: put(value) for name, value in backbone.items()})
    values = {name: put(value) for name, value in values.items()}
    return replace(RECIPES["plain"]("mean"), data=place / "data", out=out, device="cpu", backbone=own, **values)


@pytest.mark.parametrize(
    ("backbone", "values", "message"),
    [
        ({"image": "resnet153"}, {}, "unknown image tower 'resnet153'"),
        ({"image": "resnet152", "text": "bigru"}, {}, "image tower 'timm/resnet152.tv_in1k'.*HF_HUB_OFFLINE"),
        ({**NET, "text": "bert"}, {}, "text tower 'bert-base-uncased'.*hf download"),
        ({**NET, "text": "PLACE/bert"}, {}, "expected the tower .*weights random or a FILE"),
        ({**NET, "glove": Path("none.txt")}, {}, "expected word vectors at none.txt"),
        ({**NET, "text": "bert", "glove": Path("none.txt")}, {}, "expected --backbone.text bigru or .* found bert"),
        ({}, {"model": "PLACE/pretrained", "noise": NoiseConfig(words=0.2)}, "found open_clip's, which has none"),
        ({"image_weights": "random"}, {"model": "PLACE/pretrained"}, "expected the weights of --model"),
        ({"image_size": 64}, {"model": "PLACE/pretrained"}, r"pictures of the pretrained model \(32 pixels\)"),
        ({"image": "regions", "text": "bigru"}, {}, "found --backbone.image regions and no --regions"),
        (NET, {"regions": Path("regions")}, "found --backbone.image test_resnet and --regions regions"),
        ({**NET, "image_weights": "none.pt"}, {}, "found 'none.pt', which is no file"),
        ({**NET, "image_weights": "PLACE/bert/config.json"}, {}, "cannot be read as such"),
        ({**NET, "image_weights": "PLACE/other.safetensors"}, {}, "expected all weights of the image tower"),
        ({**NET, "maps": 3}, {"noise": NoiseConfig(regions=0.2)}, "expected one map for --noise.regions"),
        ({**NET, "image": "test_vit", "maps": 2}, {}, "expected 2 maps of different scales from timm's 'test_vit'"),
        ({**NET, "min_count": 9999}, {}, "lower --backbone.min-count"),
    ],
)
def test_what_does_not_fit_is_told_at_once(place, tmp_path, monkeypatch, backbone, values, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=message):
        finetune("plain", config_of(place, tmp_path / "run", backbone, **values))
    assert not (tmp_path / "run").exists()

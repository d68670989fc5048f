"""pretrain.export: open_clip and transformers load what it writes with equal features, means are means, cards tell the run."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from evaluation_samples import jpeg, write_class_folders
from material import MODEL_CFG, write_model, write_shards
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from eval_suite.zeroshot import ZeroShotConfig, evaluate
from pretrain.averaging import mean_weights
from pretrain.checkpoints import SaveConfig
from pretrain.config import tiny
from pretrain.export import ExportConfig, export, main
from pretrain.hugging_face import check_expressible, converted
from pretrain.model_card import CardFacts, differing_settings, model_card
from pretrain.run import train
from setclip.checkpoint import checkpoint_name, checkpoints_of, load_initial_weights, load_model, save_checkpoint
from setclip.config import command, to_dict
from setclip.errors import InputError
from setclip.images import MEAN, STD, eval_transform, normalize
from setclip.models.clip import build_clip, image_size_of, load_weights, model_config

TEXTS = ["a dog and a cat", "A  BOAT's   naïve café, 12 apples!!", "a very long text " * 10]


def model_cfg(vision=None, text=None, **top):
    cfg = copy.deepcopy(MODEL_CFG)
    cfg["vision_cfg"] |= {"layers": 2, **(vision or {})}
    cfg["text_cfg"] |= text or {}
    return cfg | top


def shaken(cfg, seed=0):
    """Returns a model in which no bias is 0 and no LayerNorm is the identity, so that a lost one shows."""
    torch.manual_seed(seed)
    model = build_clip(cfg, scalar_logit_scale=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.5)
    return model


def save(folder, cfg, seed=0, step=1, **description):
    """Writes a checkpoint of a shaken model; returns (model, checkpoint folder)."""
    model = shaken(cfg, seed)
    path = folder / "checkpoints" / checkpoint_name(step)
    save_checkpoint(path, model.state_dict(), cfg, {"step": step, "recipe": "tiny", **description})
    return model, path


def unit(features):
    return torch.nn.functional.normalize(features, dim=-1)


def images_for(cfg):
    size = image_size_of(build_clip(cfg))
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of six steps with three checkpoints; small.json and shards lie beside it."""
    place = tmp_path_factory.mktemp("export")
    write_shards(place / "shards")
    base = tiny()
    train(
        "tiny",
        dataclasses.replace(
            base,
            out=place / "run",
            data=dataclasses.replace(base.data, shards=place / "shards", workers=0, num_lanes=8),
            model=dataclasses.replace(base.model, name=str(write_model(place))),
            engine=dataclasses.replace(base.engine, device="cpu"),
            global_batch_size=16,
            steps=6,
            save=SaveConfig(every_steps=2, keep=3),
        ),
    )
    return place / "run"


# --- out


@pytest.mark.parametrize(
    "cfg",
    [
        model_cfg(),
        model_cfg(quick_gelu=True),
        model_cfg({"act_kwargs": {"approximate": "tanh"}}, {"act_kwargs": {"approximate": "tanh"}}),
        model_cfg(custom_text=True),
        model_cfg({"pool_type": "avg", "no_ln_pre": True}, init_logit_bias=-10.0),
        model_config("conv-tiny-64"),
    ],
    ids=["plain", "quick_gelu", "tanh", "custom_text", "siglip", "conv"],
)
def test_open_clip_loads_an_export_with_equal_features(tmp_path, cfg):
    ours, _ = save(tmp_path / "run", cfg)
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out"))
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    theirs.eval()
    loaded = load_model(tmp_path / "run")
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    assert torch.equal(tokens, loaded.tokenizer(TEXTS))
    with torch.no_grad():
        for encode in ("encode_image", "encode_text"):
            given = tokens if encode == "encode_text" else images_for(cfg)
            torch.testing.assert_close(getattr(theirs, encode)(given), getattr(ours, encode)(given), rtol=0, atol=1e-6)
    assert theirs.logit_scale.item() == 3.5
    assert (theirs.logit_bias is None) == ("init_logit_bias" not in cfg)
    assert theirs.visual.preprocess_cfg["mean"] == list(MEAN)
    assert theirs.visual.preprocess_cfg["interpolation"] == "bicubic"
    picture = Image.effect_noise((80, 60), 90).convert("RGB")
    size = cfg["vision_cfg"]["image_size"]
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(60, 80, 3).permute(2, 0, 1)
    expected = normalize(eval_transform(size)(pixels)[None], MEAN, STD)[0]
    torch.testing.assert_close(preprocess(picture), expected, rtol=0, atol=2.1 / 255 / min(STD))


@pytest.mark.parametrize(
    "cfg",
    [
        model_cfg(),
        model_cfg(quick_gelu=True),
        model_cfg({"act_kwargs": {"approximate": "tanh"}}),
        model_cfg(custom_text=True),
        model_cfg({"norm_kwargs": {"eps": 0.1}, "patch_dropout": 0.5, "image_size": [32, 32]}, {"mlp_ratio": 2.0}),
    ],
    ids=["plain", "quick_gelu", "tanh", "custom_text", "eps"],
)
def test_transformers_loads_an_export_with_equal_features_and_scores(tmp_path, cfg):
    ours, _ = save(tmp_path / "run", cfg)
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out", format="huggingface"))
    theirs, told = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())  # no weight missing, left over or of another shape
    theirs.eval()
    processor = CLIPProcessor.from_pretrained(out)
    texts = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    images = images_for(cfg)
    with torch.no_grad():
        image_features = ours.encode_image(images, normalize=True)
        text_features = ours.encode_text(open_clip.SimpleTokenizer(context_length=12)(TEXTS), normalize=True)
        found = theirs(**texts, pixel_values=images)
    torch.testing.assert_close(found.image_embeds, image_features, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.text_embeds, text_features, rtol=0, atol=1e-6)
    scores = ours.logit_scale.exp() * image_features @ text_features.T
    torch.testing.assert_close(found.logits_per_image, scores, rtol=0, atol=1e-4)


def test_transformers_prepares_pictures_and_texts_as_open_clip_does(tmp_path):
    save(tmp_path / "run", model_cfg())
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out", format="all"))
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    processor = CLIPProcessor.from_pretrained(out)
    picture = Image.effect_noise((80, 60), 90).convert("RGB")
    pixels = processor(images=picture, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(pixels, preprocess(picture), rtol=0, atol=2.1 / 255 / min(STD))
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    theirs = processor(text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids * theirs.attention_mask, tokens)


@pytest.mark.parametrize(
    ("cfg", "property"),
    [
        (model_cfg({"layers": [1, 1, 1, 1]}), r"vision_cfg\.layers = \[1, 1, 1, 1\] \(a ResNet\)"),
        (model_config("convnext_base"), r"vision_cfg\.timm_model_name = .* \(an image tower of timm\)"),
        (model_cfg({"ls_init_value": 0.1}), r"vision_cfg\.ls_init_value = 0\.1"),
        (model_cfg({"pool_type": "avg"}), r'vision_cfg\.pool_type = "avg"'),
        (model_cfg({"no_ln_pre": True}), r"vision_cfg\.no_ln_pre = true"),
        (model_cfg({"image_size": [32, 48]}), r"vision_cfg\.image_size = \[32, 48\]"),
        (model_cfg({"norm_kwargs": {"elementwise_affine": False}}), r"vision_cfg\.norm_kwargs"),
        (model_cfg(None, {"hf_model_name": "roberta-base"}), r"text_cfg\.hf_model_name .* \(a text tower of Hugging"),
        (model_cfg(None, {"pool_type": "last"}), r'text_cfg\.pool_type = "last"'),
        (model_cfg(None, {"proj_bias": True}), r"text_cfg\.proj_bias = true"),
        (model_cfg(None, {"vocab_size": 32000}), r"text_cfg\.vocab_size = 32000"),
        (model_cfg(init_logit_bias=-10.0), r"init_logit_bias = -10\.0 \(the bias of siglip\)"),
        (model_cfg(multimodal_cfg={"layers": 1}), r"multimodal_cfg = .* \(a decoder\)"),
    ],
)
def test_a_model_that_transformers_cannot_express_is_refused_by_property(cfg, property):
    with pytest.raises(InputError, match=rf"{property}.*use --format open_clip"):
        check_expressible(cfg, {})


def test_a_refused_format_leaves_nothing_behind(tmp_path):
    save(tmp_path / "run", model_cfg({"pool_type": "avg"}))
    with pytest.raises(InputError, match="CLIPModel can express"):
        export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "new" / "out", format="all"))
    assert not (tmp_path / "new").exists()


def test_resizing_that_transformers_does_not_know_is_refused():
    with pytest.raises(InputError, match=r'preprocess_cfg\.resize_mode = "longest"'):
        check_expressible(MODEL_CFG, {"resize_mode": "longest"})


def test_a_weight_without_a_place_in_transformers_is_refused():
    with pytest.raises(InputError, match=r"found visual\.transformer\.resblocks\.0\.ls_1\.gamma, for which"):
        converted({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(4)})


def test_the_largest_common_models_can_be_expressed_and_the_others_not():
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14-quickgelu", "ViT-H-14"):
        check_expressible(model_config(name), {})
    for name in (
        "RN50",
        "convnext_base",
        "ViT-B-16-SigLIP",
        "xlm-roberta-base-ViT-B-32",
        "EVA02-B-16",
        "coca_ViT-B-32",
    ):
        with pytest.raises(InputError, match="CLIPModel can express"):
            check_expressible(model_config(name), {})


def test_a_model_with_its_own_tokenizer_carries_it(tmp_path):
    save(tmp_path / "plain", model_cfg())
    tokenizer = export(ExportConfig(where=str(tmp_path / "plain"), out=tmp_path / "tokenizer", format="huggingface"))
    save(tmp_path / "run", model_cfg(None, {"hf_tokenizer_name": str(tokenizer)}))
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out"))
    shutil.rmtree(tokenizer)
    theirs = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    plain = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    assert isinstance(open_clip.get_tokenizer(f"local-dir:{out}"), open_clip.tokenizer.HFTokenizer)
    assert torch.equal(theirs.where(plain > 0, 0), plain)  # they pad otherwise


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_can_be_halved_and_scales_stay_exact(tmp_path, dtype):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    ours, _ = save(tmp_path / "run", model_cfg())
    whole = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "whole"))
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out", format="all", dtype=dtype))
    weights = load_file(out / "open_clip_model.safetensors")
    assert {name for name, tensor in weights.items() if tensor.dtype != kind} == {"logit_scale"}
    size = [(folder / "open_clip_model.safetensors").stat().st_size for folder in (out, whole)]
    assert size[0] < 0.52 * size[1]
    theirs = open_clip.create_model(f"local-dir:{out}").eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim:
                parameter.copy_(parameter.to(kind))
        images = images_for(MODEL_CFG)
        torch.testing.assert_close(theirs.encode_image(images), ours.encode_image(images), rtol=0, atol=1e-6)
    assert theirs.logit_scale.item() == 3.5
    assert CLIPModel.from_pretrained(out).dtype == kind


def test_batch_norm_statistics_stay_whole_when_weights_are_halved(tmp_path):
    save(tmp_path / "run", model_config("conv-tiny-64"))
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out", dtype="bf16"))
    kinds = {name.rpartition(".")[2]: t.dtype for name, t in load_file(out / "open_clip_model.safetensors").items()}
    assert kinds["running_var"] == kinds["running_mean"] == torch.float32
    assert kinds["num_batches_tracked"] == torch.int64
    assert kinds["weight"] == torch.bfloat16


def test_a_number_that_fp16_cannot_hold_is_an_error_and_writes_nothing(tmp_path):
    model = shaken(model_cfg())
    with torch.no_grad():
        model.ln_final.bias[0] = 1e6
    save_checkpoint(tmp_path / "model", model.state_dict(), model_cfg(), {"step": 1})
    with pytest.raises(InputError, match=r"expected weights that fp16 can hold, found 1e\+06 in ln_final\.bias"):
        export(ExportConfig(where=str(tmp_path / "model"), out=tmp_path / "out", dtype="fp16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# --- means


def test_the_last_checkpoints_of_a_run_are_averaged(trained, tmp_path):
    out = export(ExportConfig(where=str(trained), out=tmp_path / "out", average=("2",)))
    found = load_file(out / "open_clip_model.safetensors")
    one, two = (load_file(folder / "model.safetensors") for folder in checkpoints_of(trained)[1:])
    for name, tensor in found.items():
        expected = (one[name].double().numpy() + two[name].double().numpy()) / 2
        assert (tensor.numpy() == expected.astype("float32")).all(), name
    assert any((found[name] != two[name]).any() for name in found)
    described = json.loads((out / "setclip_config.json").read_text())
    assert described["averaged"]["steps"] == [4, 6]
    assert described["averaged"]["checkpoints"] == ["step-00000004", "step-00000006"]
    assert "The weights are the mean of 2 checkpoints, of steps 4, 6" in (out / "README.md").read_text()


def test_the_mean_is_taken_in_float64(tmp_path):
    folders = []
    for step, value in enumerate((1.0, 1e8, -1e8)):  # in float32 the 1 would be lost
        model = shaken(model_cfg())
        with torch.no_grad():
            model.ln_final.bias.fill_(value)
        folders.append(tmp_path / str(step))
        save_checkpoint(folders[-1], model.state_dict(), model_cfg(), {"step": step})
    assert mean_weights(folders)["ln_final.bias"].tolist() == pytest.approx([1 / 3] * 16, rel=1e-7)


def test_checkpoints_are_named_by_step_folder_and_best(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "best.json").write_text(json.dumps({"metric": "rsum", "value": 1.0, "step": 2}))
    copy_of = tmp_path / "kept"
    shutil.copytree(run / "checkpoints" / "step-00000006", copy_of)
    named = ("best", "step-00000004", str(copy_of))
    out = export(ExportConfig(where=str(run), out=tmp_path / "out", average=named))
    assert json.loads((out / "setclip_config.json").read_text())["averaged"]["steps"] == [2, 4, 6]
    best = export(ExportConfig(where=str(run), average=("best",)))
    assert best == run / "export"
    first = load_file(run / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(torch.equal(first[name], t) for name, t in load_file(best / "open_clip_model.safetensors").items())
    described = json.loads((best / "setclip_config.json").read_text())
    assert (described["step"], "averaged" in described) == (2, False)


def test_means_of_batch_norm_statistics_are_marked_as_approximate(tmp_path, capsys):
    cfg = model_config("conv-tiny-64")
    folders = []
    for step in (1, 2):
        model = shaken(cfg, step)
        for name, buffer in model.named_buffers():
            buffer.fill_(step) if "num_batches" in name else buffer.uniform_(0.5, 1.5)
        folders.append(tmp_path / "run" / "checkpoints" / checkpoint_name(step))
        save_checkpoint(folders[-1], model.state_dict(), cfg, {"step": step, "recipe": "tiny"})
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out", average=("2",)))
    one, two, mean = (
        load_file(p) for p in (*(f / "model.safetensors" for f in folders), out / "open_clip_model.safetensors")
    )
    names = {
        part: next(name for name in mean if name.endswith(part)) for part in ("running_var", "num_batches_tracked")
    }
    variance = names["running_var"]
    torch.testing.assert_close(mean[variance], (one[variance] + two[variance]) / 2)
    assert mean[names["num_batches_tracked"]] == 2
    assert "batch norm, whose statistics are averaged like weights" in capsys.readouterr().err
    assert "they are approximate" in (out / "README.md").read_text()


def test_more_checkpoints_than_there_are_is_an_error_that_says_what_there_is(trained, tmp_path):
    with pytest.raises(InputError, match=r"expected 4 checkpoints .* found 3 \(step-00000002, .*--save\.keep 4"):
        export(ExportConfig(where=str(trained), out=tmp_path / "out", average=("4",)))
    with pytest.raises(InputError, match=r"folders or `best`, found 'step-5'; the run has step-00000002"):
        export(ExportConfig(where=str(trained), out=tmp_path / "out", average=("step-00000002", "step-5")))
    with pytest.raises(InputError, match=r"expected .*best\.json for the best checkpoint, found none"):
        export(ExportConfig(where=str(trained), out=tmp_path / "out", average=("best", "step-00000002")))
    with pytest.raises(InputError, match=r"each checkpoint of --average once, found .*step-00000004 2 times"):
        export(ExportConfig(where=str(trained), out=tmp_path / "out", average=("step-00000004", "step-00000004")))


@pytest.mark.parametrize(
    ("cfg", "description", "told"),
    [
        (model_cfg({"layers": 1}), {}, "different model_cfg: "),
        (model_cfg(), {"recipe": "photos"}, 'different recipe: "tiny" and "photos"'),
        (model_cfg(), {"data": {"digest": "b"}}, 'different data: "a" and "b"'),
        (model_cfg(), {"loss": {"name": "hard"}}, 'different loss: {"name": "object_iou"} and {"name": "hard"}'),
    ],
)
def test_checkpoints_of_other_models_or_runs_are_not_averaged(tmp_path, cfg, description, told):
    plain = {"step": 1, "recipe": "tiny", "data": {"digest": "a"}, "loss": {"name": "object_iou"}}
    save_checkpoint(tmp_path / "one", shaken(model_cfg()).state_dict(), model_cfg(), plain)
    save_checkpoint(tmp_path / "two", shaken(cfg).state_dict(), cfg, plain | {"step": 2} | description)
    with pytest.raises(InputError, match=rf"(?s)checkpoints of one run to average.*{told}"):
        export(
            ExportConfig(
                where=str(tmp_path), out=tmp_path / "out", average=(str(tmp_path / "one"), str(tmp_path / "two"))
            )
        )


def test_runs_that_differ_in_their_seed_alone_are_not_averaged(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    names = ("step-00000002", str(other / "checkpoints" / "step-00000004"))
    with pytest.raises(InputError, match="different run: "):
        export(ExportConfig(where=str(trained), out=tmp_path / "out", average=names))
    kept = tmp_path / "kept"
    shutil.copytree(trained / "checkpoints" / "step-00000004", kept)
    state = json.loads((kept / "training_state.json").read_text())
    state["course"]["seed"] = 1
    (kept / "training_state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="different seed: 0 and 1"):
        export(ExportConfig(where=str(trained), out=tmp_path / "out", average=("step-00000002", str(kept))))


# --- what goes wrong


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    _, path = save(tmp_path / "run", model_cfg())
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    with pytest.raises(
        InputError, match=r"expected a whole checkpoint .* found that model\.safetensors has another checksum"
    ):
        export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out"))


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    model = shaken(model_cfg())
    with torch.no_grad():
        model.ln_final.bias[3] = float("nan")
    save_checkpoint(tmp_path / "model", model.state_dict(), model_cfg(), {"step": 1})
    with pytest.raises(InputError, match=r"found NaN or infinity in ln_final\.bias"):
        export(ExportConfig(where=str(tmp_path / "model"), out=tmp_path / "out"))


def test_only_an_earlier_export_is_replaced_and_only_when_asked(tmp_path):
    save(tmp_path / "run", model_cfg())
    plain = ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out", format="all")
    (tmp_path / "out").mkdir()  # empty
    export(plain)
    with pytest.raises(InputError, match=r"found an export at .*out; give --overwrite True or another --out"):
        export(plain)
    export(dataclasses.replace(plain, overwrite=True, format="open_clip"))
    assert not (tmp_path / "out" / "config.json").exists()  # nothing of the first is left
    for precious in (tmp_path / "run", tmp_path):
        with pytest.raises(InputError, match=r"or an earlier export at .* found something else; give another --out"):
            export(dataclasses.replace(plain, out=precious, overwrite=True))
    assert checkpoints_of(tmp_path / "run")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"expected a run, a checkpoint folder .* found no such folder"):
        export(ExportConfig(where=str(tmp_path / "none"), out=tmp_path / "out"))
    save(tmp_path / "run", model_cfg())
    theirs = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "theirs", format="huggingface"))
    with pytest.raises(InputError, match=r"expected .*theirs/open_clip_config\.json, found none"):
        export(ExportConfig(where=str(theirs), out=tmp_path / "out"))
    shutil.copytree(checkpoints_of(tmp_path / "run")[0], tmp_path / "alone")
    with pytest.raises(InputError, match=r"expected --out DIR for a checkpoint that is in no run"):
        export(ExportConfig(where=str(tmp_path / "alone")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"expected a run to export, found none under runs/"):
        export(ExportConfig())


def test_the_command_takes_the_newest_run_and_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    save(tmp_path / "runs" / "a", model_cfg(), step=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export"])
    command(main)
    told = capsys.readouterr().out
    assert "taking the newest, runs/a" in told
    assert "exported step 3 to runs/a/export" in told
    assert "README.md, open_clip_config.json, open_clip_model.safetensors, setclip_config.json" in told
    monkeypatch.setattr(sys, "argv", ["export", "a", "--average", "2"])
    with pytest.raises(SystemExit):
        command(main)
    assert "error: expected 2 checkpoints in runs/a, found 1" in capsys.readouterr().err


# --- the card


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_tells_the_run(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    colors = write_class_folders(tmp_path / "colors")
    evaluated = evaluate(ZeroShotConfig(data=colors, checkpoint=str(run), workers=0)).results
    evaluated.save(run / "results" / "zeroshot_colors.json")
    older = str(run / "checkpoints" / "step-00000002")
    evaluate(ZeroShotConfig(data=colors, checkpoint=older, workers=0)).results.save(run / "results" / "older.json")
    (run / "results" / "x.gallery.json").write_text("{}")
    (run / "results" / "other.json").write_text("[]")
    out = export(ExportConfig(where=str(run), out=tmp_path / "out", license="cc-by-4.0", format="all", name="colours"))
    head, card = front_matter((out / "README.md").read_text())
    assert head == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "setclip", "image-text-retrieval"],
        "license": "cc-by-4.0",
    }
    described = json.loads((run / "checkpoints" / "step-00000006" / "setclip_config.json").read_text())
    assert card.startswith("\n# colours\n")
    data = described["data"]
    assert f"{data['pairs_present']} present of {data['pairs_listed']} listed (98.5 %)" in card
    assert f"digest over the shards: `{data['digest']}`" in card
    assert "| steps | 6 |\n| samples seen | 96 |" in card
    assert "| loss | object_iou |" in card
    assert "| `--global-batch-size` | 256 | 16 |" in card
    assert "| `--data.shards` | None | shards |" in card  # of a place only the last part
    assert "| `--model.name` | conv-tiny-64 | small.json |" in card
    assert str(tmp_path) not in card + (out / "setclip_config.json").read_text()
    assert "--optim.lr" not in card  # as in the recipe
    assert "**zeroshot, colors (12 images, 4 classes)**" in card
    metric = evaluated.metrics["top1"]
    assert f"| run, step 6 | {metric.value:.1f} [{metric.interval_95[0]:.1f}, {metric.interval_95[1]:.1f}] |" in card
    assert "step 2 |" not in card
    assert metric.protocol in card
    assert "interval: Wilson" in card
    assert "published under: `cc-by-4.0`" in card
    assert f"- trained with Setclip {described['provenance']['setclip']}, commit" in card
    for loading in ("create_model_from_pretrained", "CLIPModel.from_pretrained", "--model.pretrained DIR"):
        assert loading in card


def test_results_of_other_weights_are_refused_and_those_of_a_mean_are_taken(trained, tmp_path):
    colors = write_class_folders(tmp_path / "colors")
    averaged = ExportConfig(where=str(trained), out=tmp_path / "out", average=("2",))
    out = export(averaged)
    assert "No evaluation of these weights was found." in (out / "README.md").read_text()
    results = evaluate(ZeroShotConfig(data=colors, checkpoint=str(trained), workers=0)).results
    results.save(tmp_path / "single.json")
    with pytest.raises(
        InputError,
        match=r"\(the mean of steps \[4, 6\]\), found in .*single\.json those of step 6; evaluate the export",
    ):
        export(dataclasses.replace(averaged, overwrite=True, results=(tmp_path / "single.json",)))
    identity = json.loads((out / "setclip_config.json").read_text())
    of_mean = dataclasses.replace(results, checkpoint={"where": "out", **identity})
    of_mean.save(tmp_path / "mean.json")
    export(dataclasses.replace(averaged, overwrite=True, results=(tmp_path / "mean.json",), dtype="bf16"))
    card = (out / "README.md").read_text()
    assert "| out, step 6 |" in card
    assert "The weights that were evaluated were fp32, those here are bf16." in card


def facts(**changes):
    plain = {
        "name": "x",
        "description": {"step": 1},
        "model_cfg": MODEL_CFG,
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
        "parameters": {"image tower": 1, "text tower": 1},
        "image_size": 32,
        "formats": ["huggingface"],
        "dtype": "fp32",
        "has_batch_norm": False,
        "license": None,
    }
    return CardFacts(**(plain | changes))


def test_the_licence_of_weights_is_left_open_and_the_datas_credits_are_named():
    credits = ["Pictures of A, CC BY-SA 4.0", "Names of B, MIT"]
    head, card = front_matter(model_card(facts(description={"data": {"credits": credits}})))
    assert "license" not in head
    assert head["library_name"] == "transformers"
    assert "No licence is stated here" in card
    assert all(f"- {credit}" in card for credit in credits)
    assert "open_clip.create_model" not in card  # only the format that is there


def test_a_checkpoint_of_others_has_a_card_that_says_what_is_not_known():
    card = model_card(facts(description={}))
    assert "The checkpoint does not tell what it was trained on." in card
    assert "The run's settings (config.yaml) were not beside the checkpoint" in card


def test_settings_that_differ_are_those_that_were_changed():
    config = tiny()
    assert differing_settings("tiny", to_dict(config)) == {}
    changed = dataclasses.replace(config, steps=7, optim=dataclasses.replace(config.optim, lr=0.5), out=Path("x"))
    assert differing_settings("tiny", to_dict(changed)) == {"steps": (500, 7), "optim.lr": (4e-3, 0.5)}
    assert differing_settings("gone", {}) is None


# --- in


@pytest.mark.parametrize("format", ["open_clip", "all"])  # in the latter model.safetensors is transformers'
def test_an_export_is_evaluated_and_trained_on_with_equal_features(tmp_path, format):
    ours, run = save(tmp_path / "run", model_cfg(), samples_seen=8)
    out = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "out", format=format))
    colors = write_class_folders(tmp_path / "colors")
    theirs, again = (evaluate(ZeroShotConfig(data=colors, checkpoint=str(p), workers=0)) for p in (run, out))
    assert {k: m.value for k, m in theirs.results.metrics.items()} == {
        k: m.value for k, m in again.results.metrics.items()
    }
    assert again.results.checkpoint["samples_seen"] == 8
    for where in (str(out), f"local-dir:{out}"):
        model = build_clip(model_cfg(), scalar_logit_scale=True).eval()
        load_weights(model, load_initial_weights(where, "small"), where)
        with torch.no_grad():
            images = images_for(MODEL_CFG)
            assert torch.equal(model.encode_image(images), ours.encode_image(images))
            assert torch.equal(load_model(where).model.encode_image(images), ours.encode_image(images))


def test_a_run_starts_from_an_export(trained, tmp_path):
    out = export(ExportConfig(where=str(trained), out=tmp_path / "out", average=("2",), format="all"))
    base = tiny()
    config = dataclasses.replace(
        base,
        out=tmp_path / "run",
        data=dataclasses.replace(base.data, shards=trained.parent / "shards", workers=0, num_lanes=8),
        model=dataclasses.replace(base.model, name=str(trained.parent / "small.json"), pretrained=str(out)),
        engine=dataclasses.replace(base.engine, device="cpu"),
        optim=dataclasses.replace(base.optim, lr=1e-12),
        global_batch_size=16,
        steps=1,
    )
    trained_on = load_file(train("tiny", config) / "model.safetensors")
    for name, tensor in load_file(out / "open_clip_model.safetensors").items():
        torch.testing.assert_close(trained_on[name], tensor, rtol=0, atol=1e-6)


def test_an_export_is_exported_again(tmp_path):
    save(tmp_path / "run", model_cfg())
    first = export(ExportConfig(where=str(tmp_path / "run"), out=tmp_path / "first", format="all"))
    again = export(ExportConfig(where=str(first), out=tmp_path / "again", format="all"))
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


# --- CLIP_benchmark

CLIP_BENCHMARK = """
import setclip  # lets torchvision be imported beside a CPU build of torch
from clip_benchmark.metrics import zeroshot_classification
# Version 1.6.2 calls float() on an array of one element, which numpy has refused since 2.4.
zeroshot_classification.float = lambda value: value.item() if hasattr(value, "item") else float(value)
from clip_benchmark.cli import main
main()
"""


def write_tars(place, names, each):
    """Writes a data set as CLIP_benchmark reads it: JPEGs of noisy colours."""
    (place / "test").mkdir(parents=True)
    (place / "classnames.txt").write_text("\n".join(names))
    (place / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c} thing")
    (place / "test" / "nshards.txt").write_text("1")
    pictures = place / "pictures"
    pictures.mkdir()
    with tarfile.open(place / "test" / "0.tar", "w") as tar:
        for number in range(each * len(names)):
            label = number % len(names)
            (pictures / f"{number:04d}.jpg").write_bytes(jpeg((30 * label + 20, 200 - 25 * label, 90), number))
            (pictures / f"{number:04d}.cls").write_text(str(label))
            for suffix in ("jpg", "cls"):
                tar.add(pictures / f"{number:04d}.{suffix}", f"{number:04d}.{suffix}")
    return place


@pytest.mark.slow
def test_clip_benchmarks_command_gives_the_accuracy_that_ours_gives(tmp_path):
    torch.manual_seed(0)
    model = build_clip(model_cfg())
    with torch.no_grad():  # so that its answers are not all alike
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(3)
            block.attn.out_proj.weight.mul_(3)
    run = tmp_path / "run" / "checkpoints" / checkpoint_name(1)
    save_checkpoint(run, model.state_dict(), model_cfg(), {"step": 1})
    out = export(ExportConfig(where=str(run), out=tmp_path / "out"))
    tars = write_tars(tmp_path / "tars", ("dog", "cat", "red car", "tree", "boat", "house"), each=15)
    given = f"--model local-dir:{out} --pretrained none --task zeroshot_classification --no_amp --num_workers 0"
    given += f" --dataset wds/own --dataset_root {tars} --output {tmp_path / 'theirs.json'}"
    subprocess.run(
        [sys.executable, "-c", CLIP_BENCHMARK, "eval", *given.split()],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    theirs = json.loads((tmp_path / "theirs.json").read_text())["metrics"]
    evaluated = evaluate(ZeroShotConfig(data=tars, checkpoint=str(run), workers=0))
    assert len(evaluated.predictions.unique()) >= 4
    ours = evaluated.results.metrics
    # As shares of 90 pictures, so not one is answered otherwise.
    assert theirs["acc1"] == pytest.approx(ours["top1"].value / 100, abs=1e-6)
    assert theirs["acc5"] == pytest.approx(ours["top5"].value / 100, abs=1e-6)
    assert theirs["mean_per_class_recall"] == pytest.approx(ours["mean_per_class"].value / 100, abs=1e-6)
    assert 0 < theirs["acc1"] < 1

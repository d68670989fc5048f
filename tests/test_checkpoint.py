"""Checkpoints: open_clip loads them by itself with equal features; other models' are refused; nothing is half written."""

import json

import open_clip
import pytest
import torch
from material import MODEL_CFG
from PIL import Image
from safetensors.torch import load_file

from setclip.checkpoint import (
    checkpoint_name,
    checkpoints_of,
    find_checkpoint,
    load_initial_weights,
    load_model,
    newest_run,
    save_checkpoint,
)
from setclip.errors import InputError
from setclip.images import decode_tensor, eval_transform, normalize
from setclip.models.clip import build_clip, load_weights, model_config, tokenizer_for

CONV_CFG = model_config("conv-tiny-64")


def save(folder, model_cfg=MODEL_CFG, step=1):
    torch.manual_seed(step)
    model = build_clip(model_cfg).eval()
    with torch.no_grad():
        model.logit_scale.fill_(3.5)
    path = folder / "checkpoints" / checkpoint_name(step)
    save_checkpoint(path, model.state_dict(), model_cfg, {"step": step, "recipe": "test"})
    return model, path


@pytest.mark.parametrize("model_cfg", [MODEL_CFG, CONV_CFG], ids=["vit", "conv"])
def test_open_clip_loads_it_with_equal_features(tmp_path, model_cfg):
    model, path = save(tmp_path, model_cfg)
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{path}")
    theirs.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{path}")(["a dog and a cat", "a boat"])
    assert torch.equal(tokens, tokenizer_for(model_cfg)(["a dog and a cat", "a boat"]))
    size = model_cfg["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs.encode_image(images), model.encode_image(images), rtol=0, atol=1e-6)
    assert theirs.logit_scale.shape == ()
    assert theirs.logit_scale.item() == 3.5
    assert preprocess(Image.new("RGB", (80, 60))).shape == (3, size, size)


def test_loading_gives_back_the_features(tmp_path):
    model, path = save(tmp_path)
    for where in (tmp_path, path, f"local-dir:{path}"):
        loaded = load_model(where)
        tokens = loaded.tokenizer(["a dog"])
        with torch.no_grad():
            assert torch.equal(loaded.model.encode_text(tokens), model.encode_text(tokens))
        assert loaded.image_size == 32
        assert loaded.identity["step"] == 1


def test_our_evaluation_transform_is_near_open_clips(tmp_path):
    """Both resize with antialiased bicubic; PIL works in steps of one grey level."""
    _, path = save(tmp_path)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{path}")
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 17, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, (96, 140), mode="bicubic").clamp(0, 1)[0]
    array = (smooth * 255).to(torch.uint8)
    theirs = preprocess(Image.fromarray(array.permute(1, 2, 0).numpy()))
    loaded = load_model(path)
    ours = normalize(eval_transform(32)(array)[None], loaded.mean, loaded.std)[0]
    # One grey level is 1/255/std, about 0.015.
    assert (ours - theirs).abs().max() < 0.032
    assert (ours - theirs).abs().mean() < 0.006


def test_training_starts_from_open_clips_own_file(tmp_path):
    """A state dict with a scalar logit_scale, as open_clip saves it, goes into a model that trains."""
    theirs = build_clip(MODEL_CFG, scalar_logit_scale=True)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pt")
    ours = build_clip(MODEL_CFG)
    load_weights(ours, load_initial_weights(str(tmp_path / "weights.pt"), "ViT-B-32"), "weights.pt")
    assert ours.logit_scale.shape == (1,)
    assert torch.equal(ours.text_projection, theirs.text_projection)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    _, path = save(tmp_path)
    other = build_clip({**MODEL_CFG, "embed_dim": 8})
    with pytest.raises(
        InputError, match=r"another model: 2 of \d+ entries differ, first .*shape \(.*16\) in the checkpoint"
    ):
        load_weights(other, load_file(path / "model.safetensors"), str(path))
    deeper = {**MODEL_CFG, "text_cfg": {**MODEL_CFG["text_cfg"], "layers": 2}}
    with pytest.raises(InputError, match=r"transformer\.resblocks\.1.*: not in the checkpoint"):
        load_weights(build_clip(deeper), load_file(path / "model.safetensors"), str(path))


def test_a_place_without_checkpoint_says_what_was_found(tmp_path):
    with pytest.raises(InputError, match="found a folder without checkpoints"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="found no such folder"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match=r"tag of ViT-B-32 as --model\.pretrained, found 'opnai'; tags: openai"):
        load_initial_weights("opnai", "ViT-B-32")


def test_an_unknown_model_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown model 'ViT-B-33', perhaps 'ViT-B-32'"):
        model_config("ViT-B-33")
    with pytest.raises(InputError, match="unknown model 'conv-tiny-84', perhaps 'conv-tiny-64'"):
        model_config("conv-tiny-84")


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path):
    def full_disk(folder):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / "checkpoints" / "step-00000001", {}, MODEL_CFG, {}, full_disk)
    assert checkpoints_of(tmp_path) == []
    assert not list((tmp_path / "checkpoints").iterdir())


def test_checkpoints_sort_by_step_and_runs_by_age(tmp_path):
    for run, step in (("a", 5), ("a", 20), ("b", 3)):
        save(tmp_path / run, step=step)
    assert [p.name for p in checkpoints_of(tmp_path / "a")] == ["step-00000005", "step-00000020"]
    assert newest_run(tmp_path) == tmp_path / "b"
    assert newest_run(tmp_path / "none") is None


def test_files_hold_no_pickle(tmp_path):
    _, path = save(tmp_path)
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".json", ".json", ".safetensors"]
    assert json.loads((path / "setclip_config.json").read_text())["recipe"] == "test"


def test_jpeg_decodes_to_what_pillow_sees(tmp_path):
    import io

    import numpy as np

    image = Image.fromarray(
        np.kron(np.random.default_rng(0).integers(0, 255, (5, 6, 3)), np.ones((8, 8, 1))).astype("uint8")
    )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    decoded = decode_tensor(buffer.getvalue())
    reference = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1)
    assert decoded.shape == (3, 40, 48)
    assert (decoded.int() - reference.int()).abs().max() <= 3

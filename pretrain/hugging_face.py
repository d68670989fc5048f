"""A plain ViT CLIP as Hugging Face's transformers keeps it: config.json, model.safetensors, tokenizer and image processor.

    DIR/config.json, model.safetensors             transformers.CLIPModel
    DIR/vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json    CLIPTokenizer
    DIR/preprocessor_config.json                   CLIPImageProcessor

Weights are only renamed, split and transposed, so features are equal. What transformers cannot express is refused by name.
transformers itself is not needed. Used by pretrain.export. Letter: D width.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from setclip.errors import InputError
from setclip.files import write_json
from setclip.images import MEAN, STD

WEIGHTS_NAME = "model.safetensors"
_START, _END = (
    "<|startoftext|>",
    "<|endoftext|>",
)  # transformers' names of what open_clip calls <start_of_text>, <end_of_text>

_TOP_LEVEL = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias")
# What is carried over, has no effect on features, or is a way to begin that the weights have left behind. The last LayerNorm
# before or after taking one token is the same. For each other setting the default alone can be expressed.
_VISION = (
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs"),
    *("patch_dropout", "pos_embed_type", "final_ln_after_pool"),
    *("attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
)
_TEXT = (
    *("context_length", "width", "heads", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"),
    *("pad_id", "eos_id", "final_ln_after_pool"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
)
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers

_MEANINGS = {
    "vision_cfg.timm_model_name": "an image tower of timm",
    "vision_cfg.layers": "a ResNet",
    "text_cfg.hf_model_name": "a text tower of Hugging Face",
    "text_cfg.hf_tokenizer_name": "another tokenizer than CLIP's",
    "init_logit_bias": "the bias of siglip",
    "multimodal_cfg": "a decoder",
}


def check_expressible(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> None:
    """Raises InputError that names each property which transformers' CLIPModel and its image processor do not have."""
    odd = _oddities(model_cfg, preprocess_cfg)
    if odd:
        told = "; ".join(f"{name} = {json.dumps(value)}" + _meaning(name) for name, value in odd.items())
        raise InputError(
            "expected a model that transformers' CLIPModel can express (a plain ViT and CLIP's text transformer), found "
            f"{told}; use --format open_clip, which keeps every model, and load it by open_clip"
        )


def _meaning(name: str) -> str:
    return f" ({_MEANINGS[name]})" if name in _MEANINGS else ""


def _oddities(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that cannot be expressed, by name."""
    odd = {name: value for name, value in model_cfg.items() if name not in _TOP_LEVEL}
    if model_cfg.get("init_logit_bias") is not None:
        odd["init_logit_bias"] = model_cfg["init_logit_bias"]
    for tower, kind, free in (
        ("vision_cfg", open_clip.CLIPVisionCfg, _VISION),
        ("text_cfg", open_clip.CLIPTextCfg, _TEXT),
    ):
        defaults, config = _defaults(kind), model_cfg[tower]
        for name, value in config.items():
            is_default = name in defaults and (value == defaults[name] or (not value and not defaults[name]))
            if name not in free and not is_default:
                odd[f"{tower}.{name}"] = value
        if _activation(model_cfg, tower) is None:
            odd[f"{tower}.act_kwargs"] = config["act_kwargs"]
        if _epsilon(model_cfg, tower) is None:
            odd[f"{tower}.norm_kwargs"] = config["norm_kwargs"]
    vision = model_cfg["vision_cfg"]
    if isinstance(vision.get("layers"), list | tuple):
        odd["vision_cfg.layers"] = vision["layers"]
    for name in ("image_size", "patch_size"):
        if isinstance(vision.get(name), list | tuple) and len(set(vision[name])) > 1:
            odd[f"vision_cfg.{name}"] = vision[name]
    if preprocess_cfg.get("resize_mode", "shortest") != "shortest":
        odd["preprocess_cfg.resize_mode"] = preprocess_cfg["resize_mode"]
    if preprocess_cfg.get("interpolation", "bicubic") not in _RESAMPLING:
        odd["preprocess_cfg.interpolation"] = preprocess_cfg["interpolation"]
    return odd


def _activation(model_cfg: Mapping[str, Any], tower: str) -> str | None:
    """Returns transformers' name of a tower's activation; None where it has none."""
    kwargs = model_cfg[tower].get("act_kwargs") or {}
    if model_cfg.get("quick_gelu"):
        return None if kwargs else "quick_gelu"
    if kwargs in ({}, {"approximate": "none"}):
        return "gelu"
    return "gelu_pytorch_tanh" if kwargs == {"approximate": "tanh"} else None


def _epsilon(model_cfg: Mapping[str, Any], tower: str) -> float | None:
    """Returns the epsilon of a tower's LayerNorms; None where they have other settings too."""
    kwargs = model_cfg[tower].get("norm_kwargs") or {}
    return float(kwargs.get("eps", 1e-5)) if set(kwargs) <= {"eps"} else None


def config_of(model_cfg: Mapping[str, Any], logit_scale: float, dtype: torch.dtype) -> dict[str, Any]:
    """Returns config.json of an expressible model; `logit_scale` as the weights have it (a logarithm)."""
    vision = {**_defaults(open_clip.CLIPVisionCfg), **model_cfg["vision_cfg"]}
    text = {**_defaults(open_clip.CLIPTextCfg), **model_cfg["text_cfg"]}
    tokenizer = open_clip.tokenizer.SimpleTokenizer()

    def tower(kind: str, name: str, heads: int, cfg: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model_type": kind,
            "hidden_size": cfg["width"],
            "intermediate_size": int(cfg["width"] * cfg["mlp_ratio"]),
            "num_hidden_layers": cfg["layers"],
            "num_attention_heads": heads,
            "hidden_act": _activation(model_cfg, name),
            "layer_norm_eps": _epsilon(model_cfg, name),
            "attention_dropout": 0.0,
            "projection_dim": model_cfg["embed_dim"],
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": str(dtype).removeprefix("torch."),
        "projection_dim": model_cfg["embed_dim"],
        "logit_scale_init_value": logit_scale,
        "text_config": {
            **tower("clip_text_model", "text_cfg", text["heads"], text),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,
        },
        "vision_config": {
            **tower("clip_vision_model", "vision_cfg", vision["width"] // vision["head_width"], vision),
            "image_size": _side(vision["image_size"]),
            "patch_size": _side(vision["patch_size"]),
            "num_channels": 3,
        },
    }


def _defaults(kind: Any) -> dict[str, Any]:
    return {entry.name: entry.default for entry in dataclasses.fields(kind)}


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OTHERS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "logit_scale": ("logit_scale", lambda x: x.reshape(())),
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", lambda x: x),
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", lambda x: x),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight", lambda x: x),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight", lambda x: x),  # their spelling
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias", lambda x: x),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", lambda x: x),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias", lambda x: x),
    "visual.proj": ("visual_projection.weight", lambda x: x.T),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", lambda x: x),
    "positional_embedding": ("text_model.embeddings.position_embedding.weight", lambda x: x),
    "ln_final.weight": ("text_model.final_layer_norm.weight", lambda x: x),
    "ln_final.bias": ("text_model.final_layer_norm.bias", lambda x: x),
    "text_projection": ("text_projection.weight", lambda x: x.T),
}
"""open_clip's name to transformers', and what becomes of the weight."""


def converted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of an expressible model by transformers' names. Raises InputError on one that has no place there."""
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = name.removeprefix("text.")  # of models with custom_text
        if plain in _OTHERS:
            theirs, change = _OTHERS[plain]
            result[theirs] = change(tensor).contiguous()
        else:
            result.update(_of_block(plain, tensor))
    return result


def _of_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the weights that one weight of a transformer block becomes: three of the joint query, key and value."""
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    number, _, rest = name.removeprefix("visual.").removeprefix("transformer.resblocks.").partition(".")
    place = f"{tower}.encoder.layers.{number}"
    part, _, kind = rest.rpartition(".")
    if number.isdecimal() and part in _BLOCK:
        return {f"{place}.{_BLOCK[part]}.{kind}": tensor}
    if number.isdecimal() and rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        thirds = tensor.chunk(3)
        return {f"{place}.self_attn.{x}_proj.{kind}": t.clone() for x, t in zip("qkv", thirds, strict=True)}
    raise InputError(
        f"expected weights of a plain ViT and CLIP's text transformer, found {name}, for which transformers' CLIPModel has no "
        "place; use --format open_clip"
    )


def write_hugging_face(
    folder: Path,
    weights: Mapping[str, Tensor],
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes the files into `folder`; `weights` are open_clip's, already of the type `dtype`."""
    write_json(folder / "config.json", config_of(model_cfg, float(weights["logit_scale"]), dtype))
    save_file(converted(weights), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    _write_tokenizer(folder, model_cfg["text_cfg"].get("context_length", 77))
    side = _side(model_cfg["vision_cfg"].get("image_size", 224))
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": _RESAMPLING[preprocess_cfg.get("interpolation", "bicubic")],
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(preprocess_cfg.get("mean", MEAN)),
            "image_std": list(preprocess_cfg.get("std", STD)),
        },
    )


def _write_tokenizer(folder: Path, context_length: int) -> None:
    """Writes CLIP's tokenizer as transformers reads it, from open_clip's."""
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    special = {tokenizer.sot_token_id: _START, tokenizer.eot_token_id: _END}
    vocabulary = {special.get(number, token): number for token, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    names = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "processor_class": "CLIPProcessor",
            "model_max_length": context_length,
            "do_lower_case": True,
            **names,
        },
    )

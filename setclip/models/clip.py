"""Builds open_clip models by name. Used by pretrain (fresh or from weights) and by `setclip.checkpoint` (evaluation).

`logit_scale` and `logit_bias` have shape [1] in every model that is trained, because DeepSpeed's ZeRO stages fail on
0-dimensional parameters (0.19.8: "self.dim() cannot be 0 to view Float as Byte"); files hold the scalars that open_clip
expects.
"""

import copy
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.lookup import look_up

_OWN_CONFIGS = Path(__file__).parent

logging.getLogger("open_clip").setLevel(logging.ERROR)


def model_config(name: str) -> dict[str, Any]:
    """Returns the open_clip configuration (embed_dim, vision_cfg, text_cfg) of a model name; ours or open_clip's.

    A path to a JSON file is taken as it is. Raises InputError with the nearest name.
    """
    if name.endswith(".json"):
        path = Path(name)
        if not path.exists():
            raise InputError(f"expected a model configuration at {path}, found no such file")
        return json.loads(path.read_text())
    own = {path.stem: path for path in _OWN_CONFIGS.glob("*.json")}
    if name in own:
        return json.loads(own[name].read_text())
    known = dict.fromkeys((*own, *open_clip.list_models()))
    look_up(known, name.replace("/", "-"), "model")
    return copy.deepcopy(open_clip.get_model_config(name))


def with_bias(model_cfg: Mapping[str, Any], wanted: bool) -> dict[str, Any]:
    """Returns a configuration whose model has a logit_bias, as siglip needs one, or has none.

    Where it says nothing else, they begin as SigLIP's (Zhai et al. 2023, arXiv 2303.15343): bias −10, scale 10.
    """
    config = {name: value for name, value in model_cfg.items() if name != "init_logit_bias" or value is not None}
    if wanted:
        return {"init_logit_bias": -10.0, "init_logit_scale": math.log(10), **config}
    config.pop("init_logit_bias", None)
    return config


def fit_bias(weights: Mapping[str, Tensor], model: torch.nn.Module, where: str) -> tuple[dict[str, Tensor], str | None]:
    """Returns weights that have a logit_bias where the model has one and only there, and what to tell the user of it.

    A scale that was trained without a bias does not go with a bias that begins: both then begin.
    """
    own, fitted = model.state_dict(), dict(weights)
    if "logit_bias" in own and "logit_bias" not in weights and "logit_scale" in weights:
        began = {name: own[name] for name in ("logit_bias", "logit_scale")}
        return fitted | began, (
            f"{where} has no logit_bias, which siglip needs: it begins at {float(began['logit_bias']):g}, and the scale at "
            f"{float(began['logit_scale'].exp()):g} instead of {float(fitted['logit_scale'].exp()):g}"
        )
    if "logit_bias" in weights and "logit_bias" not in own:
        value = float(fitted.pop("logit_bias"))
        return fitted, f"the logit_bias {value:g} of {where} is left out: only siglip has a use for it"
    return fitted, None


def build_clip(model_cfg: Mapping[str, Any], scalar_logit_scale: bool = False) -> torch.nn.Module:
    """Returns a freshly initialised CLIP (or CustomTextCLIP) in fp32 from an open_clip configuration.

    No weights are fetched. Draws from torch's global generator. `scalar_logit_scale` gives open_clip's own shape.
    """
    config: dict[str, Any] = copy.deepcopy(dict(model_cfg))
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        raise InputError("expected a CLIP model, found a CoCa one (multimodal_cfg); choose a model without a decoder")
    config["vision_cfg"]["timm_model_pretrained"] = False
    config["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    model = kind(**config, nonscalar_logit_scale=not scalar_logit_scale)
    model.output_dict = False
    return model


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copies `weights` into `model`, whichever shape each has of logit_scale and logit_bias.

    Raises InputError that names what is missing, unexpected or of another shape: a checkpoint of another model.
    """
    own = model.state_dict()
    weights = dict(weights)
    for name in ("logit_scale", "logit_bias"):
        if name in weights and name in own and weights[name].numel() == 1:
            weights[name] = weights[name].reshape(own[name].shape)
    faults = [f"{name}: not in the checkpoint" for name in own if name not in weights]
    faults += [f"{name}: not in the model" for name in weights if name not in own]
    faults += [
        f"{name}: shape {tuple(weights[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        raise InputError(
            f"{where} is a checkpoint of another model: {len(faults)} of {len(own)} entries differ, first "
            f"{'; '.join(faults[:3])}. Give the model that it was trained with (--model.name)"
        )
    model.load_state_dict(weights)


def image_size_of(model: torch.nn.Module) -> int:
    """Returns the side of the square pictures that the image tower takes, in pixels."""
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    return int(size[0] if isinstance(size, tuple | list) else size)


def tokenizer_for(config: Mapping[str, Any]) -> Any:
    """Returns the tokenizer of a configuration: callable, list of B texts → (B, L) int64, truncated and padded."""
    text = config["text_cfg"]
    length = text.get("context_length", 77)
    if name := text.get("hf_tokenizer_name"):
        kwargs = text.get("tokenizer_kwargs") or {}
        return open_clip.tokenizer.HFTokenizer(
            name, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **kwargs
        )
    return open_clip.tokenizer.SimpleTokenizer(context_length=length)

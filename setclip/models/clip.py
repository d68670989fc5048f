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

from setclip.errors import InputError, first_line
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


def build_clip(
    model_cfg: Mapping[str, Any],
    scalar_logit_scale: bool = False,
    pretrained_image: bool = False,
    pretrained_text: bool = False,
) -> torch.nn.Module:
    """Returns a freshly initialised CLIP (or CustomTextCLIP) in fp32 from an open_clip configuration.

    Draws from torch's global generator. `scalar_logit_scale` gives open_clip's own shape. No weights are fetched but for a tower
    of timm or Hugging Face that is to be pretrained. Raises InputError where a tower is not known or cannot be fetched.
    """
    config: dict[str, Any] = copy.deepcopy(dict(model_cfg))
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        raise InputError("expected a CLIP model, found a CoCa one (multimodal_cfg); choose a model without a decoder")
    config["vision_cfg"]["timm_model_pretrained"] = pretrained_image
    config["text_cfg"]["hf_model_pretrained"] = pretrained_text
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    try:
        model = kind(**config, nonscalar_logit_scale=not scalar_logit_scale)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise _cannot_build(config, error) from error
    model.output_dict = False
    _fit_to_config(model, config)
    return model


def _cannot_build(config: Mapping[str, Any], error: Exception) -> InputError:
    timm_name, text_name = (
        config[c].get(n) for c, n in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name"))
    )
    reason = first_line(error)
    if isinstance(error, OSError):  # what huggingface_hub and transformers raise
        return InputError(
            f"expected the text tower {text_name!r} or weights of {timm_name or text_name!r} in Hugging Face's cache or on the "
            f"Hub, found neither ({reason}); fetch them once where there is a network (`hf download NAME`) and share its "
            "cache (HF_HOME), or give the folder of a model as hf_model_name and hf_tokenizer_name"
        )
    towers = [f"timm's {timm_name!r}"] if timm_name else []
    towers += [f"Hugging Face's {text_name!r}"] if text_name else []
    return InputError(
        f"expected a model that open_clip can build, found that it cannot ({reason}); its towers are "
        f"{' and '.join(towers) or 'its own'}: look at vision_cfg and text_cfg"
    )


def _fit_to_config(model: torch.nn.Module, config: Mapping[str, Any]) -> None:
    """Checks the size of a timm tower, which open_clip takes as timm has it, and sets the texts' length, which it forgets."""
    trunk: Any = getattr(model.visual, "trunk", None)
    own = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    wanted = image_size_of(model)
    if own is not None and tuple(own) != (wanted, wanted) and getattr(trunk.patch_embed, "strict_img_size", True):
        raise InputError(
            f"expected pictures of {own[0]} pixels for timm's {config['vision_cfg']['timm_model_name']!r}, found image_size "
            f"{wanted} in vision_cfg; set it to {own[0]}, or name a model of timm's for {wanted} pixels"
        )
    if config["text_cfg"].get("hf_model_name"):
        model.context_length = config["text_cfg"].get("context_length", 77)


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
        try:
            return open_clip.tokenizer.HFTokenizer(
                name, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **kwargs
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"expected the tokenizer {name!r} in Hugging Face's cache, on the Hub or in a folder of that name, found none "
                f"({str(error).strip().splitlines()[0]}); fetch it once where there is a network (`hf download {name}`) and "
                "share its cache (HF_HOME), or give a folder as hf_tokenizer_name"
            ) from error
    return open_clip.tokenizer.SimpleTokenizer(context_length=length)

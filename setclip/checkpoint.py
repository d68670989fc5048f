"""The checkpoint folder: weights that open_clip loads by itself, what they were trained on, and training state beside.

    RUN/checkpoints/step-00000500/
        model.safetensors        fp32 weights by parameter name
        ema.safetensors          the same of their moving average, where the run keeps one (--ema.decay)
        open_clip_config.json    model_cfg and preprocess_cfg, as open_clip writes them
        setclip_config.json      step, samples seen, data, recipe, provenance
        training_state.json, optimizer.safetensors   (pretrain only: what a resume needs)
        checksums.json           SHA-256 of each of the others
        set_model.json           (finetune only: the backbone and the heads whose weights these are)

A fine-tuned run has RUN/checkpoints/chosen as well, the best on its validation data, which is what RUN then means.
A folder is written beside and renamed, so one that has its name is complete. No pickle. Written by pretrain, read by
eval_suite and by anything that starts from weights.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from setclip.errors import InputError
from setclip.files import replacing, sha256_of, write_json
from setclip.images import MEAN, STD
from setclip.log import say
from setclip.models.clip import build_clip, image_size_of, load_weights, model_config, tokenizer_for
from setclip.models.set_model import SetModel

WEIGHTS_NAME = "model.safetensors"
EMA_NAME = "ema.safetensors"
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
SETCLIP_CONFIG_NAME = "setclip_config.json"
CHECKSUMS_NAME = "checksums.json"
SET_MODEL_NAME = "set_model.json"
CHOSEN_NAME = "chosen"
"""Beside the step folders of a fine-tuned run: the checkpoint that validation chose."""
EXPORTED_WEIGHTS_NAME = "open_clip_model.safetensors"
"""The weights' name in folders for the Hub, where model.safetensors may be transformers'."""
CHECKPOINTS_FOLDER = "checkpoints"
_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to encode, with what encoding needs."""

    model: torch.nn.Module
    """In eval mode, fp32; `encode_image(x, normalize=True)` and `encode_text(tokens, normalize=True)` give (B, D), of a
    SetModel also sets, (B, K, D)."""
    tokenizer: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    identity: dict[str, Any]
    """Where it came from: where, model; for our checkpoints also step, samples_seen, recipe, data."""
    interpolation: str = "bicubic"
    """How pictures are resized: open_clip's `interpolation`."""
    resize_mode: str = "shortest"
    """To what: open_clip's `resize_mode`."""

    @property
    def takes_regions(self) -> bool:
        """Whether `encode_image` takes features of regions, (B, N, E) float, in place of pictures (`image_size` is then 0)."""
        return isinstance(self.model, SetModel) and self.model.backbone.takes_regions


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    model_cfg: Mapping[str, Any],
    description: Mapping[str, Any],
    extras: Callable[[Path], None] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder whole or not at all.

    `weights` are cast to fp32; `description` becomes setclip_config.json; `extras(folder)` writes further files.
    `preprocess`: how pictures are prepared; None: as our own models have it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_weights(temporary / WEIGHTS_NAME, weights)
        own = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}
        config = {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess or own)}
        write_json(temporary / OPEN_CLIP_CONFIG_NAME, config)
        write_json(temporary / SETCLIP_CONFIG_NAME, dict(description))
        if extras is not None:
            extras(temporary)
        write_json(temporary / CHECKSUMS_NAME, {file.name: sha256_of(file) for file in sorted(temporary.iterdir())})


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes weights as open_clip reads them: fp32, the scale and bias as scalars. For a folder that is being written."""
    plain = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        plain[name] = (tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor).contiguous().clone()
    save_file(plain, path, metadata={"format": "pt"})


def damage_of(folder: Path) -> str | None:
    """Returns what is wrong with the files of a checkpoint folder of ours, by its checksums; None if nothing is."""
    path = folder / CHECKSUMS_NAME
    try:
        checksums = json.loads(path.read_text(encoding="utf-8"))
        for name, expected in checksums.items():
            found = sha256_of(folder / name)
            if found != expected:
                return f"{name} has another checksum than {CHECKSUMS_NAME} says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS_NAME} or what it lists cannot be read ({error})"
    return None


def checkpoints_of(run: str | Path) -> list[Path]:
    """Returns the complete checkpoint folders of a run, oldest first."""
    found = (Path(run) / CHECKPOINTS_FOLDER).glob("step-*")
    return sorted((p for p in found if _STEP_FOLDER.fullmatch(p.name)), key=lambda p: int(p.name.split("-")[1]))


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a step."""
    return f"step-{step:08d}"


def newest_run(runs: str | Path = "runs") -> Path | None:
    """Returns the run folder under `runs` whose newest checkpoint is the youngest; None if none has one."""
    last = [(checkpoints_of(run)[-1].stat().st_mtime, run) for run in Path(runs).glob("*") if checkpoints_of(run)]
    return max(last)[1] if last else None


def find_checkpoint(where: str | Path) -> Path:
    """Returns the checkpoint folder for a run folder (the one that validation chose, else its newest) or a checkpoint folder.

    Raises InputError.
    """
    path = Path(where)
    if weights_path(path).exists():
        return path
    if weights_path(path / CHECKPOINTS_FOLDER / CHOSEN_NAME).exists():
        return path / CHECKPOINTS_FOLDER / CHOSEN_NAME
    if found := checkpoints_of(path):
        return found[-1]
    if seeds := sorted(path.glob("seed-*/checkpoints")):
        names = ", ".join(str(seed.parent) for seed in seeds)
        raise InputError(
            f"expected one run at {where}, found one of {len(seeds)} seeds; give one of {names} (`python -m finetune.ensemble "
            f"{where}` sums them)"
        )
    if path.exists():
        have = "a folder without checkpoints"
    elif "/" not in str(where):
        have = "neither a folder of that name nor an open_clip model"
    else:
        have = "no such folder"
    raise InputError(
        f"expected a run, a checkpoint folder or an open_clip model at {where}, found {have}; "
        "`python -m pretrain.run RECIPE` makes runs under runs/"
    )


def weights_path(folder: Path) -> Path:
    """Returns the weights file of a checkpoint folder: as exported for the Hub, else as training writes it (there or not)."""
    exported = folder / EXPORTED_WEIGHTS_NAME
    return exported if exported.exists() else folder / WEIGHTS_NAME


def load_model(where: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Loads a model for encoding.

    `where`: a run folder (its newest checkpoint), a checkpoint folder (ours, or any that has open_clip's config and
    weights), `local-dir:DIR`, an open_clip name (`ViT-B-32`: random weights, said so) or `NAME:TAG_OR_FILE`.
    """
    text = str(where)
    described: dict[str, Any] | None = None
    name, _, tag = text.partition(":")
    if name == "local-dir":
        text, name, tag = tag, "", ""
    if not Path(text).exists() and name in open_clip.list_models():
        model_cfg = model_config(name)
        if tag:
            source = open_clip.create_model(name, pretrained=tag)
            mean, std = source.visual.image_mean, source.visual.image_std
            preprocess = source.visual.preprocess_cfg
            weights = source.state_dict()
        else:
            say(f"{name}: no weights were asked for (NAME:TAG), so they are random")
            mean, std, preprocess = MEAN, STD, {}
            weights = build_clip(model_cfg).state_dict()
        identity = {"where": text, "model": name}
    else:
        folder = find_checkpoint(text)
        config = _read_json(folder / OPEN_CLIP_CONFIG_NAME)
        model_cfg, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
        mean = preprocess.get("mean", MEAN)
        std = preprocess.get("std", STD)
        weights = load_file(weights_path(folder))
        identity = {"where": str(folder), **read_description(folder)}
        if (folder / SET_MODEL_NAME).exists():
            described = _read_json(folder / SET_MODEL_NAME)
    model: torch.nn.Module
    if described is None:
        model = build_clip(model_cfg, scalar_logit_scale=True)
        image_size, tokenizer = image_size_of(model), tokenizer_for(model_cfg)
    else:
        model = SetModel.of_description(described)
        image_size, tokenizer = model.backbone.image_size, model.backbone.tokenizer
    load_weights(model, weights, text)
    model.eval().to(device)
    return LoadedModel(
        model,
        tokenizer,
        image_size,
        tuple(map(float, mean)),
        tuple(map(float, std)),
        identity,
        preprocess.get("interpolation") or "bicubic",
        preprocess.get("resize_mode") or "shortest",
    )


def load_initial_weights(where: str, model_name: str) -> dict[str, Tensor]:
    """Returns weights to start training from: a run or checkpoint folder, `local-dir:DIR`, a file, `hf-hub:USER/NAME`, or
    open_clip's tag. Raises InputError, also where they can be neither fetched nor found in the cache.
    """
    path = Path(where.removeprefix("local-dir:"))
    if path.is_dir():
        return load_file(weights_path(find_checkpoint(path)))
    if path.is_file():
        return dict(open_clip.factory.load_state_dict(str(path)))
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if where in tags:
        _check_activation(where, model_name)
        return _fetched(where, lambda: open_clip.create_model(model_name, pretrained=where))
    if where.startswith("hf-hub:"):
        return _fetched(where, lambda: open_clip.create_model(where))
    raise InputError(
        f"expected a run, checkpoint folder, weights file or open_clip tag of {model_name} as --model.pretrained, found "
        f"{where!r}; tags: {', '.join(tags) or 'none'}"
    )


def _fetched(where: str, create: Callable[[], torch.nn.Module]) -> dict[str, Tensor]:
    try:
        return create().state_dict()
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"expected the weights {where} in the cache or on the Hub, found neither ({str(error).strip().splitlines()[0]}); "
            "fetch them once where there is a network and share the cache (HF_HOME), or give a weights file or a folder"
        ) from error


def _check_activation(tag: str, model_name: str) -> None:
    """Raises InputError where weights were trained with the other GELU than the model has: they would load, and be worse."""
    wants = bool(open_clip.pretrained.get_pretrained_cfg(model_name, tag).get("quick_gelu", False))
    name = model_name.replace("/", "-")
    has = bool(model_config(model_name).get("quick_gelu", False))
    if wants != has:
        other = f"{name}-quickgelu" if wants else name.removesuffix("-quickgelu")
        advice = (
            f"--model.name {other}" if other in open_clip.list_models() else "a JSON file with the right quick_gelu"
        )
        raise InputError(
            f"expected a model with {'QuickGELU' if wants else 'GELU'} for the weights {tag!r}, found {name}; use {advice}"
        )


def read_description(folder: Path) -> dict[str, Any]:
    """Returns setclip_config.json of a checkpoint folder; empty for one that others wrote."""
    path = folder / SETCLIP_CONFIG_NAME
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"expected {path}, found none: {path.parent} is no checkpoint of Setclip or open_clip")
    return json.loads(path.read_text(encoding="utf-8"))

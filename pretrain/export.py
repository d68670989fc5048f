"""Exports a checkpoint for open_clip and for Hugging Face, with a model card made from the run.

    python -m pretrain.export runs/a --out exports/a                          # the newest checkpoint, for open_clip
    python -m pretrain.export runs/a --out exports/a --format all --dtype bf16
    python -m pretrain.export runs/a --out exports/a --average 3              # mean of the last three checkpoints
    python -m pretrain.export runs/a --out exports/a --average best           # the best one (--save.best)
    python -m pretrain.export runs/a --out exports/a --weights ema            # the moving average of the weights

    DIR/open_clip_model.safetensors, open_clip_config.json    open_clip: local-dir:DIR, and hf-hub: once it is uploaded
    DIR/config.json, model.safetensors, vocab.json, …         transformers: CLIPModel and CLIPProcessor
    DIR/setclip_config.json                                   what the weights were trained on
    DIR/README.md                                             the card

The folder is written beside and renamed. It can be uploaded as it is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from pretrain.averaging import (
    BATCH_NORM,
    check_same_run,
    chosen_checkpoints,
    describe_average,
    has_batch_norm,
    mean_weights,
    run_of,
)
from pretrain.hugging_face import check_expressible, write_hugging_face
from pretrain.model_card import CardFacts, model_card, results_for, settings_of
from setclip.checkpoint import (
    CHECKSUMS_NAME,
    EXPORTED_WEIGHTS_NAME,
    OPEN_CLIP_CONFIG_NAME,
    SETCLIP_CONFIG_NAME,
    damage_of,
    newest_run,
    read_description,
)
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import replacing, write_json
from setclip.images import MEAN, STD
from setclip.log import say, warn
from setclip.models.clip import build_clip, image_size_of, load_weights, tokenizer_for
from setclip.provenance import describe

CARD_NAME = "README.md"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ALWAYS_FP32 = ("logit_scale", "logit_bias", *BATCH_NORM)
_PREPROCESS = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is exported, and how."""

    where: Annotated[str | None, tyro.conf.Positional] = None
    """A run (its newest checkpoint), the name of a run under runs/, or a checkpoint folder. Default: the newest run."""
    out: Path | None = None
    """The folder to write. Default: export/ in the run."""
    format: Literal["open_clip", "huggingface", "all"] = "open_clip"
    """For open_clip (any model), for transformers (plain ViTs with CLIP's text transformer), or both in one folder."""
    weights: Literal["model", "ema"] = "model"
    """Those that were trained, or their moving average (of a run with --ema.decay)."""
    average: tuple[str, ...] = ()
    """K: the mean of the run's last K checkpoints. Or names (step-00000500, best) or folders of checkpoints of one run."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights; the logit scale and batch norm's statistics stay fp32."""
    name: str | None = None
    """Title of the card. Default: the run's name."""
    license: str | None = None
    """Licence of the weights, which is yours to choose, by its name on the Hub (apache-2.0, cc-by-4.0, …)."""
    results: tuple[Path, ...] = ()
    """Results files of these weights for the card, besides those in the run's results/."""
    overwrite: bool = False
    """Replace an earlier export at --out."""


@dataclass(frozen=True)
class Source:
    """What is exported, before its weights are read."""

    folders: list[Path]
    """Checkpoints, oldest first."""
    run: Path | None
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    description: dict[str, Any]


def export(config: ExportConfig) -> Path:
    """Does what the command does; returns the folder. Raises InputError, for all but the weights before they are read."""
    source = _source(config)
    out = _free_place(config, source)
    formats = ["open_clip", "huggingface"] if config.format == "all" else [config.format]
    if "huggingface" in formats:
        check_expressible(source.model_cfg, source.preprocess_cfg)
    check_same_run(source.folders)
    results = results_for(source.description, source.run, config.results)
    for folder in source.folders:
        damage = damage_of(folder) if (folder / CHECKSUMS_NAME).exists() else None
        if damage is not None:
            raise InputError(f"expected a whole checkpoint in {folder}, found that {damage}; export another one")
    weights = mean_weights(source.folders, config.weights == "ema")
    model = build_clip(source.model_cfg, scalar_logit_scale=True)
    load_weights(model, weights, str(source.folders[-1]))
    weights = cast(model.state_dict(), config.dtype)
    facts = CardFacts(
        name=config.name or (source.run or source.folders[-1]).resolve().name,
        description=source.description | {"export": {"dtype": config.dtype, **describe()}},
        model_cfg=source.model_cfg,
        preprocess_cfg=source.preprocess_cfg,
        parameters=_parameters(model),
        image_size=image_size_of(model),
        formats=formats,
        dtype=config.dtype,
        has_batch_norm=has_batch_norm(weights),
        license=config.license,
        settings=None if source.run is None else settings_of(source.run),
        results=results,
    )
    if facts.has_batch_norm and len(source.folders) > 1:
        warn(
            "the model has batch norm, whose statistics are averaged like weights: they are not those that the mean weights "
            "would give; evaluate the export before you use it"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.mkdir()
        for name in formats:
            if name == "open_clip":
                _write_open_clip(temporary, weights, source)
            else:
                write_hugging_face(temporary, weights, source.model_cfg, source.preprocess_cfg, _DTYPES[config.dtype])
        write_json(temporary / SETCLIP_CONFIG_NAME, facts.description)
        (temporary / CARD_NAME).write_text(model_card(facts), encoding="utf-8")
    return out


def cast(weights: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Returns the weights as `dtype` (fp32, bf16 or fp16), but for the logit scale and bias, batch norm's statistics and whole
    numbers. Raises InputError where a number does not fit.
    """
    result = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or name.endswith(_ALWAYS_FP32):
            result[name] = tensor
            continue
        result[name] = tensor.to(_DTYPES[dtype])
        if not bool(result[name].isfinite().all()):
            raise InputError(
                f"expected weights that {dtype} can hold, found {float(tensor.abs().max()):.4g} in {name}; use --dtype bf16 or "
                "fp32"
            )
    return result


def _source(config: ExportConfig) -> Source:
    where = _place(config.where)
    folders = chosen_checkpoints(where, config.average)
    for folder in folders:
        if not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
            raise InputError(
                f"expected {folder / OPEN_CLIP_CONFIG_NAME}, found none: {folder} is no checkpoint of Setclip or open_clip; give "
                "a run or a checkpoint folder"
            )
    newest = folders[-1]
    content = json.loads((newest / OPEN_CLIP_CONFIG_NAME).read_text(encoding="utf-8"))
    description = describe_average(folders)
    if config.weights == "ema":
        description["weights"] = "ema"
    if str(description.get("model", "")).endswith(".json"):  # a place on this machine is nobody else's business
        description["model"] = Path(description["model"]).name
    run = run_of(newest)
    return Source(
        folders,
        None if run == newest else run,
        content["model_cfg"],
        _PREPROCESS | content.get("preprocess_cfg", {}),
        description,
    )


def _place(where: str | None) -> Path:
    if where is None:
        run = newest_run()
        if run is None:
            raise InputError(
                "expected a run to export, found none under runs/; give a run or a checkpoint folder: "
                "`python -m pretrain.export RUN --out DIR`"
            )
        say(f"no run given: taking the newest, {run}")
        return run
    by_name = Path("runs") / where
    return by_name if not Path(where).exists() and by_name.is_dir() else Path(where)


def _free_place(config: ExportConfig, source: Source) -> Path:
    out = config.out
    if out is None:
        if source.run is None:
            raise InputError(
                f"expected --out DIR for a checkpoint that is in no run, found none for {source.folders[-1]}"
            )
        out = source.run / "export"
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return out
    if not (out.is_dir() and "export" in read_description(out)):
        raise InputError(
            f"expected a new folder or an earlier export at {out}, found something else; give another --out"
        )
    if not config.overwrite:
        raise InputError(f"expected a new folder, found an export at {out}; give --overwrite True or another --out")
    if any(folder.resolve() == out.resolve() for folder in source.folders):
        raise InputError(f"expected another folder than {out}, which is what is exported; give another --out")
    return out


def _write_open_clip(folder: Path, weights: Mapping[str, Tensor], source: Source) -> None:
    """Writes what open_clip loads from `local-dir:` and `hf-hub:`."""
    save_file(dict(weights), folder / EXPORTED_WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / OPEN_CLIP_CONFIG_NAME, {"model_cfg": source.model_cfg, "preprocess_cfg": source.preprocess_cfg})
    name = source.model_cfg["text_cfg"].get("hf_tokenizer_name")
    if name:  # of local-dir: open_clip takes the folder's own files, whatever the name
        tokenizer_for(source.model_cfg).save_pretrained(folder)
        if Path(name).exists():
            warn(
                f"hf_tokenizer_name is {name}, a place on this machine: before you upload the export, write the repository's "
                f"name into its {OPEN_CLIP_CONFIG_NAME}"
            )


def _parameters(model: torch.nn.Module) -> dict[str, int]:
    counts = {"image tower": 0, "text tower": 0}
    for name, parameter in model.named_parameters():
        counts["image tower" if name.startswith("visual.") else "text tower"] += parameter.numel()
    return counts


def main() -> None:
    """The command."""
    config: ExportConfig = parse(ExportConfig, description=__doc__)
    out = export(config)
    description = read_description(out)
    of = description.get("averaged", {}).get("checkpoints") or [f"step {description.get('step', 'unknown')}"]
    size = sum(file.stat().st_size for file in out.iterdir())
    say(
        f"exported {' + '.join(of)} to {out} ({size / 1e6:,.1f} MB): {', '.join(sorted(f.name for f in out.iterdir()))}"
    )


if __name__ == "__main__":
    command(main)

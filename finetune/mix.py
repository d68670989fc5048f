"""Mixes the towers of a fine-tuned run with those that it began with, so that zero-shot classification is kept (WiSE-FT).

    python -m finetune.mix runs/ft --alpha 0.5 --zeroshot scenes
    python -m finetune.mix runs/ft --alpha 0.25 0.5 0.75 --zeroshot cifar10 imagenet=/data/imagenet/val

    w = (1 − α) w₀ + α w₁ over the weights of both towers (Wortsman et al. 2022, arXiv 2109.01903)

For each α, and for 0 (as it was before) and 1 (as fine-tuning left it): zero-shot accuracy of the towers, RSUM of their vectors
and RSUM by the head, which stays as it was trained. RUN/mixed/alpha-A is a checkpoint that open_clip loads, alpha-A-head one with
the head; mix.json and mix.md hold the table. By default retrieval is measured on validation data, as an α is chosen by it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from eval_suite.datasets import ZERO_SHOT_DATASETS
from eval_suite.encode import encode_functions
from eval_suite.preprocess import model_pictures
from eval_suite.protocols import DIRECTIONS, RECALLS
from eval_suite.results import Results
from eval_suite.retrieval import KEPT_SCORES, score_of
from eval_suite.scores import remembered
from eval_suite.sharing import ALONE, alone_on
from eval_suite.zeroshot import ZeroShotConfig
from eval_suite.zeroshot import evaluate as evaluate_zeroshot
from finetune.data import Part
from finetune.ensemble import Member, open_run, part_of, score_of_run
from finetune.evaluate import results_of_score
from finetune.features import Pictures, picture_batches
from finetune.state import preprocess_of, write_set_model
from setclip import config as configuration
from setclip.checkpoint import LoadedModel, load_model, save_checkpoint
from setclip.distributed import World
from setclip.errors import InputError
from setclip.files import remove, replacing, write_json
from setclip.log import say
from setclip.models.backbones.open_clip_towers import OpenClipTowers
from setclip.provenance import describe

FOLDER = "mixed"
_CLIP = "clip."
"""Before the names of open_clip's weights in a backbone's"""
_AT_A_TIME = 128


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """What is mixed, and what is measured."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of finetune.run whose towers learnt (--backbone.freeze none, or --backbone.unfreeze-epoch)."""
    alpha: tuple[float, ...] = (0.5,)
    """Shares of the fine-tuned weights, between 0 and 1; both ends are measured anyway."""
    zeroshot: tuple[str, ...] = ()
    """Data sets of zero-shot classification: names, as `eval_suite.zeroshot` takes them, or NAME=PLACE."""
    original: str | None = None
    """The model that the run began with, where it no longer lies where it did: as --model of finetune.run."""
    split: Literal["val", "test"] = "val"
    """Data of the run for retrieval: val, by which an α may be chosen, or test."""
    templates: str | None = None
    """Prompts of zero-shot classification, as --templates of eval_suite.zeroshot."""
    allow_partial: bool = False
    """Measure zero-shot accuracy even if images are missing."""
    overwrite: bool = False
    """Remove what an earlier mixing wrote."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        if not self.alpha or not all(0 < alpha < 1 for alpha in self.alpha) or len(set(self.alpha)) < len(self.alpha):
            raise ValueError(
                f"expected different shares between 0 and 1 as --alpha, found {' '.join(map(str, self.alpha)) or 'none'}; 0.5 is "
                "usual"
            )


def mixed(original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Returns (1 − α) of the original weights and α of the tuned ones, by name; made in float64. Both are of one model."""
    return {
        name: value.double().lerp(tuned[name].double(), alpha).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in original.items()
    }


def towers_of_run(member: Member, where: str | None) -> tuple[LoadedModel, dict[str, Tensor], dict[str, Tensor]]:
    """Returns the model that a run began with, its weights, and those that fine-tuning left, by open_clip's names.

    Raises InputError where the towers are not open_clip's, or did not learn.
    """
    backbone = member.model.backbone
    if not isinstance(backbone, OpenClipTowers):
        raise InputError(
            f"expected towers of open_clip in {member.folder}, which alone classify without training, found backbone "
            f"{backbone.description.get('kind')}; fine-tune a model of pretrain.run or of open_clip"
        )
    begun = where or member.loaded.identity.get("from", {}).get("where")
    if begun is None:
        raise InputError(
            f"expected the model that {member.folder} began with, found no word of it; name it with --original"
        )
    try:
        source = load_model(begun)
    except InputError as error:
        raise InputError(f"{error}. It is what {member.folder} began with; name it with --original") from error
    original = {name: value.detach().cpu() for name, value in source.model.state_dict().items()}
    own = {name.removeprefix(_CLIP): v.detach().cpu().clone() for name, v in backbone.state_dict().items()}
    tuned = {name: value.reshape(original[name].shape) for name, value in own.items() if name in original}
    if tuned.keys() != original.keys() or any(own[name].numel() != value.numel() for name, value in original.items()):
        raise InputError(
            f"expected the model that {member.folder} began with, found another one at {begun}; name it with --original"
        )
    if all(torch.equal(tuned[name], original[name]) for name in original):
        raise InputError(
            f"expected a run whose towers learnt, found those of {member.folder} as they were at {begun}: there is nothing "
            "to mix, zero-shot classification is what it was; fine-tune with --backbone.freeze none"
        )
    return source, original, tuned


def mix(config: MixConfig) -> Path:
    """Does what the command does; returns the folder of the table. Raises InputError."""
    world = alone_on(config.device)
    member = open_run(config.run)
    out = config.run / FOLDER
    if out.exists() and not config.overwrite:
        raise InputError(f"expected no earlier mixing of the run, found {out}; remove it with --overwrite True")
    source, original, tuned = towers_of_run(member, config.original)
    part = part_of(member, config.split)
    sets = [_zeroshot_of(entry, config) for entry in config.zeroshot]
    remove(out)
    member.model.to(world.device)
    rows = []
    for alpha in (0.0, *sorted(config.alpha), 1.0):
        weights = mixed(original, tuned, alpha)
        place = out / f"alpha-{alpha:g}"
        _write(place, member, source, weights, alpha)
        clip = load_model(place, world.device)
        backbone = member.model.backbone
        own = backbone.state_dict()
        backbone.load_state_dict(
            {_CLIP + name: value.reshape(own[_CLIP + name].shape) for name, value in weights.items()}
        )
        if 0 < alpha < 1:
            _write_with_head(out / f"{place.name}-head", member, alpha)
        rows.append(
            {
                "alpha": alpha,
                "checkpoint": str(place),
                "zeroshot": {name: _of_zeroshot(replace(given, checkpoint=str(place))) for name, given in sets},
                "retrieval_of_vectors": _recalls(_vectors(clip, part, world)),
                "retrieval_by_head": _recalls(_by_head(member, part, world)),
            }
        )
    content = {
        "run": str(config.run),
        "original": str(source.identity["where"]),
        "data": {"name": part.name, "place": str(part.place), "split": part.split, "images": len(part)},
        "config": configuration.to_dict(config),
        "rows": rows,
        "provenance": describe(),
    }
    write_json(out / "mix.json", content)
    text = table_of(content)
    with replacing(out / "mix.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n\ntable: {out / 'mix.md'}\ncheckpoints: {out}/alpha-*")
    return out


def table_of(content: Mapping[str, Any]) -> str:
    """Returns Markdown of mix.json."""
    names = list(content["rows"][0]["zeroshot"])
    data = content["data"]
    heading = ["weights", *(f"zero-shot {name}, top-1 %" for name in names), "RSUM of vectors", "RSUM by head"]
    lines = [
        f"**{content['run']} mixed with {content['original']}; retrieval on {data['name']} {data['split']}**",
        "",
        f"| {' | '.join(heading)} |",
        f"| --- |{' ---: |' * (len(heading) - 1)}",
    ]
    for row in content["rows"]:
        alpha = row["alpha"]
        name = {0.0: "before (α = 0)", 1.0: "fine-tuned (α = 1)"}.get(alpha, f"α = {alpha:g}")
        numbers = [f"{row['zeroshot'][each]['top1']:.1f}" for each in names]
        numbers += [f"{row[each]['rsum']:.1f}" for each in ("retrieval_of_vectors", "retrieval_by_head")]
        lines.append(f"| {' | '.join([name, *numbers])} |")
    return "\n".join(lines)


# --- what is written


def _description(member: Member, alpha: float) -> dict[str, Any]:
    identity = member.loaded.identity
    return {
        "recipe": identity.get("recipe"),
        "model": f"{identity.get('model')}, towers mixed",
        "alpha": alpha,
        "mixed_of": {"fine_tuned": str(identity["where"]), "original": identity.get("from", {})},
        "data": identity.get("data"),
        "provenance": describe(),
    }


def _write(place: Path, member: Member, source: LoadedModel, weights: Mapping[str, Tensor], alpha: float) -> None:
    preprocess = preprocess_of(source.mean, source.std, source.interpolation, source.resize_mode)
    model_cfg = member.model.backbone.description["model"]
    save_checkpoint(place, weights, model_cfg, _description(member, alpha), None, preprocess)


def _write_with_head(place: Path, member: Member, alpha: float) -> None:
    """Writes the fine-tuned model as it is in memory, with mixed towers."""
    loaded, model = member.loaded, member.model
    more = {
        name: loaded.identity[name] for name in ("head", "inference", "similarity", "from") if name in loaded.identity
    }
    save_checkpoint(
        place,
        model.state_dict(),
        model.backbone.description["model"],
        {**_description(member, alpha), **more},
        lambda folder: write_set_model(folder, model),
        preprocess_of(loaded.mean, loaded.std, loaded.interpolation, loaded.resize_mode),
    )


# --- what is measured


def _zeroshot_of(entry: str, config: MixConfig) -> tuple[str, ZeroShotConfig]:
    name, _, place = entry.partition("=")
    return name, ZeroShotConfig(
        name=name if name in ZERO_SHOT_DATASETS or not place else None,
        data=Path(place) if place else None,
        templates=config.templates,
        allow_partial=config.allow_partial,
        device=config.device,
    )


def _of_zeroshot(config: ZeroShotConfig) -> dict[str, float]:
    found = evaluate_zeroshot(config).results
    return {name: metric.value for name, metric in found.metrics.items() if name in ("top1", "top5", "mean_per_class")}


def _by_head(member: Member, part: Part, world: World) -> Results:
    score = remembered(score_of_run(member, part, world), KEPT_SCORES)
    return results_of_score(score, part, ALONE, {}, {}, {}, 0.0)


def _vectors(loaded: LoadedModel, part: Part, world: World) -> Results:
    """Returns the results of the towers' own vectors, compared by their cosine."""
    pictures = Pictures(part, model_pictures(loaded))

    def batches() -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(part), _AT_A_TIME):
            yield [(row, 0) for row in range(start, min(start + _AT_A_TIME, len(part)))]

    image, text = encode_functions(loaded)
    score = score_of(image, text, picture_batches(pictures, batches(), None), part.data.captions)
    return results_of_score(remembered(score, KEPT_SCORES), part, ALONE, {}, {}, {}, 0.0)


def _recalls(found: Results) -> dict[str, float]:
    """Returns the recalls of the first protocol, and their sum."""
    prefix = found.headline[0].removesuffix("i2t_r1")
    values = {
        f"{direction}_{recall}": found.metrics[f"{prefix}{direction}_{recall}"].value
        for direction in DIRECTIONS
        for recall in RECALLS
    }
    return {**values, "rsum": sum(values.values())}


def main() -> None:
    """The command."""
    mix(configuration.parse(MixConfig, description=__doc__))


if __name__ == "__main__":
    configuration.command(main)

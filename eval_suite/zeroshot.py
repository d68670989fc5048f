"""Zero-shot classification: class names in prompts are the classifier.

    python -m eval_suite.zeroshot imagenet                                   # under $SETCLIP_DATA, newest run
    python -m eval_suite.zeroshot scenes --checkpoint runs/a --out a.json
    python -m eval_suite.zeroshot --data DIR --templates imagenet            # any folder of class folders
    srun python -m eval_suite.zeroshot imagenet --checkpoint runs/a          # the same on Slurm, one process

`zero_shot` is the evaluation as a function over encode functions; pretraining calls it on its way. Radford et al. 2021,
arXiv 2103.00020, section 3.1.4. Letters: N images, C classes, D width.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from eval_suite.datasets import TEMPLATES, class_names_of, objects_of, open_zero_shot
from eval_suite.encode import EncodeImage, EncodeText, encode_functions, encode_images, encode_texts
from eval_suite.images import FolderImages, image_batches
from eval_suite.metrics import (
    TIE_RULES,
    Ranks,
    chance_recall_at_k,
    class_counts,
    class_ranks,
    dot_scores,
    images_of_group,
    mean_per_class_accuracy,
    per_class_interval,
    recall_at_k,
    wilson_interval,
)
from eval_suite.model import model_to_evaluate
from eval_suite.results import Metric, Results, default_out, markdown_table
from setclip.config import command, parse, to_dict
from setclip.errors import InputError
from setclip.images import eval_transform
from setclip.log import say, warn
from setclip.lookup import look_up
from setclip.objects import read_objects

TIES = f"Of equal scores: {TIE_RULES['first_come']} (what argmax does)."


@dataclass(frozen=True)
class ZeroShotOutcome:
    """What an evaluation found."""

    metrics: dict[str, Metric]
    predictions: Tensor
    """(N,) int64, the predicted classes."""
    ranks: Ranks
    """Of the right class of each image."""


def zero_shot(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    images: Iterable[Tensor],
    labels: Tensor,
    class_names: Sequence[str],
    templates: Sequence[str],
    group_of_class: Sequence[str] | None = None,
    show_progress: bool = True,
) -> ZeroShotOutcome:
    """Classifies images by the class names in prompts.

    `images`: batches as `encode_image` takes them, in the order of `labels`, (N,) int64 in [0, C). `class_names`: C
    names. `templates`: prompts with `{}` for the name. `group_of_class`: C names of groups ("head", "middle", "tail"),
    for which top-1 is given too. `show_progress=False` where another progress bar is on the screen.

    Metrics, in percent: `top1`, `top5` (from six classes on), `mean_per_class`, `top1_GROUP`. Raises InputError where
    the counts do not fit or a feature is not finite.
    """
    prototypes = class_prototypes(encode_text, class_names, templates, show_progress)
    image_features = encode_images(encode_image, images, len(labels), show_progress)
    ranks, predictions = class_ranks(dot_scores(image_features, prototypes), labels, len(class_names))
    return ZeroShotOutcome(_metrics(ranks, labels, len(class_names), group_of_class), predictions, ranks)


def class_prototypes(
    encode_text: EncodeText, class_names: Sequence[str], templates: Sequence[str], show_progress: bool = True
) -> Tensor:
    """Returns (C, D) float32 of unit norm: of each class the mean over prompts of their unit features, normalised."""
    bare = [template for template in templates if "{}" not in template]
    if bare or not templates:
        raise InputError(f"expected templates with {{}} for the class name, found {bare or 'none'}; add it")
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = encode_texts(encode_text, prompts, show_progress=show_progress)
    means = features.unflatten(0, (len(class_names), len(templates))).mean(1)
    return torch.nn.functional.normalize(means, dim=-1)


def _metrics(ranks: Ranks, labels: Tensor, num_classes: int, group_of_class: Sequence[str] | None) -> dict[str, Metric]:
    is_correct = ranks.by("first_come") == 0
    metrics = {"top1": _top_k(ranks, torch.ones_like(labels, dtype=torch.bool), 1, num_classes, "images")}
    if num_classes > 5:
        metrics["top5"] = _top_k(ranks, torch.ones_like(labels, dtype=torch.bool), 5, num_classes, "images")
    metrics["mean_per_class"] = Metric(
        value=mean_per_class_accuracy(is_correct, labels),
        unit="%",
        protocol=f"Mean over the classes that have images of each class's top-1 accuracy, {num_classes:,} classes to "
        f"choose from. {TIES}",
        samples=len(class_counts(is_correct, labels)[1]),
        chance=100.0 / num_classes,
        interval_95=per_class_interval(is_correct, labels),
        interval_method="bootstrap, 1,000 draws, images resampled in their class",
        tie_variants=_variants(lambda rule: mean_per_class_accuracy(ranks.by(rule) == 0, labels)),
    )
    for group in dict.fromkeys(group_of_class or ()):
        of_group = images_of_group(labels, group_of_class or (), group)
        if bool(of_group.any()):
            metrics[f"top1_{group}"] = _top_k(ranks, of_group, 1, num_classes, f"images of {group} classes")
    return metrics


def _top_k(ranks: Ranks, chosen: Tensor, k: int, num_classes: int, what: str) -> Metric:
    num = int(chosen.sum())
    value = recall_at_k(ranks.by("first_come")[chosen], k)
    return Metric(
        value=value,
        unit="%",
        protocol=f"Share of the {what} whose right class is among the {k} best of {num_classes:,}. {TIES}",
        samples=num,
        chance=chance_recall_at_k(k, num_classes),
        interval_95=wilson_interval(value / 100.0 * num, num),
        interval_method="Wilson, images independent",
        tie_variants=_variants(lambda rule: recall_at_k(ranks.by(rule)[chosen], k)),
    )


def _variants(value_by) -> dict[str, float]:
    return {rule: value_by(rule) for rule in TIE_RULES if rule != "first_come"}


# --- the command


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """What is evaluated, on what, and where the results go."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Data set (imagenet, scenes), under $SETCLIP_DATA unless --data says otherwise."""
    data: Path | None = None
    """Folder of class folders. Without a name the folders' names are the class names."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    out: Path | None = None
    """Results file. Default: results/ of the run."""
    templates: str | None = None
    """Prompts: imagenet (80), simple (7), picture, or name (the bare name). Default: those of the data set."""
    class_names: Path | None = None
    """JSON file of class names: a list in the order of the folders, or folder to name."""
    objects: Path | None = None
    """objects.parquet for accuracy by head, middle and tail. Default: that of the data set, if it has one."""
    parser: str = "pos"
    """Whose objects of it count."""
    allow_partial: bool = False
    """Evaluate even if images are missing; the result is marked partial."""
    batch_size: int = 128
    """Images a batch."""
    workers: int | None = None
    """Processes that decode images; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""


def evaluate(config: ZeroShotConfig) -> Results:
    """Does what the command does but for writing. Raises InputError before the model is loaded where data are wrong."""
    dataset, found, is_partial = open_zero_shot(config.name, config.data, config.allow_partial)
    class_names = class_names_of(dataset, found.classes, config.class_names)
    template_name = config.templates or dataset.templates
    templates = look_up(TEMPLATES, template_name, "templates")
    groups = _groups(class_names, config.objects or objects_of(dataset, found), config.parser, bool(config.objects))
    if is_partial:
        have = len(found.labels.unique())
        warn(f"partial: {len(found.paths):,} images of {have:,} classes; all {len(class_names):,} names compete")
    loaded = model_to_evaluate(config.checkpoint, config.device)
    start = time.monotonic()
    batches = image_batches(
        FolderImages(found.paths, eval_transform(loaded.image_size)), config.batch_size, config.workers
    )
    outcome = zero_shot(*encode_functions(loaded), batches, found.labels, class_names, templates, groups)
    group_metrics = [f"top1_{group}" for group in ("head", "middle", "tail", "unseen")]
    wanted = [dataset.metric, *(name for name in ("top1", "top5") if name != dataset.metric), *group_metrics]
    return Results(
        evaluation="zeroshot",
        dataset={
            "name": config.name or found.folder.resolve().name,
            "place": str(found.folder),
            "images": len(found.paths),
            "classes": len(class_names),
            "classes_with_images": len(found.labels.unique()),
            "templates": template_name,
            "prompts": list(templates),
        },
        metrics=outcome.metrics,
        headline=[name for name in wanted if name in outcome.metrics],
        checkpoint=loaded.identity,
        config=to_dict(config),
        is_partial=is_partial,
        details={"groups": {name: groups.count(name) for name in dict.fromkeys(groups)}} if groups else {},
        seconds=round(time.monotonic() - start, 3),
    )


def _groups(class_names: Sequence[str], objects: Path | None, parser: str, is_asked: bool) -> list[str] | None:
    """Returns the group of each class; None, said, where a data set's own objects.parquet is not there."""
    if objects is None:
        return None
    if not objects.exists() and not is_asked:
        warn(f"no {objects}: no accuracy by head, middle and tail (`python -m data_prep.statistics {objects.parent}`)")
        return None
    table = read_objects(objects, parser)
    return [table.group_of(name.lower()) for name in class_names]


def main() -> None:
    """Runs the command."""
    config: ZeroShotConfig = parse(ZeroShotConfig, description=__doc__)
    results = evaluate(config)
    out = config.out or default_out("zeroshot", results.dataset["name"], results.checkpoint)
    results.save(out)
    say(f"\n{markdown_table([results])}\nresults: {out}")


if __name__ == "__main__":
    command(main)

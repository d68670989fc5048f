"""Zero-shot classification: class names in prompts are the classifier.

    python -m eval_suite.zeroshot imagenet                                   # under $SETCLIP_DATA, newest run
    python -m eval_suite.zeroshot cifar10 --checkpoint runs/a --out a.json
    python -m eval_suite.zeroshot food101 --data TARS --checkpoint ViT-B-32:openai
    python -m eval_suite.zeroshot --data DIR --templates imagenet            # any folder of class folders
    python -m eval_suite.zeroshot scenes --prototypes all                    # templates, descriptions, both
    torchrun --nproc-per-node 8 -m eval_suite.zeroshot imagenet              # all ranks share the work, as under srun

Data sets are found as class folders, as torchvision keeps them, or as CLIP_benchmark's tars; a number of images that is not
the published one is an error. `zero_shot` is the evaluation as a function over encode functions; pretraining calls it on
its way. Radford et al. 2021, arXiv 2103.00020, section 3.1.4. Letters: N images, C classes, D width.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from eval_suite.datasets import ZeroShotDataset, class_names_of, objects_of, open_zero_shot, templates_of
from eval_suite.encode import EncodeImage, EncodeText, encode_functions, encode_images
from eval_suite.image_sources import FoundImages, TransformedImages
from eval_suite.images import image_batches
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
from eval_suite.mistakes import class_table, confusions, example_pictures
from eval_suite.model import model_to_evaluate
from eval_suite.per_query import per_query_path, save_per_query
from eval_suite.preprocess import resizer_for
from eval_suite.prototypes import (
    KINDS,
    PREFIXES,
    DescribedClasses,
    Kind,
    all_prototypes,
    check_descriptions,
    class_prototypes,
    described,
)
from eval_suite.results import Metric, Results, default_out, markdown_table
from eval_suite.sharing import ALONE, join, together
from setclip import distributed
from setclip.config import command, parse, to_dict
from setclip.descriptions import read_descriptions
from setclip.distributed import World
from setclip.errors import InputError
from setclip.log import say, warn
from setclip.objects import ObjectTable, read_objects

TIES = f"{TIE_RULES['first_come'].capitalize()} (what argmax does)."


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
    world: World = ALONE,
) -> ZeroShotOutcome:
    """Classifies images by the class names in prompts.

    `images`: batches as `encode_image` takes them, in the order of `labels`, (N,) int64 in [0, C). `class_names`: C
    names. `templates`: prompts with `{}` for the name. `group_of_class`: C names of groups ("head", "middle", "tail"),
    for which top-1 is given too. `show_progress=False` where another progress bar is on the screen. The ranks of `world`
    share the encoding, and each returns the whole outcome.

    Metrics, in percent: `top1`, `top5` (from six classes on), `mean_per_class`, `top1_GROUP`. Raises InputError where
    the counts do not fit or a feature is not finite.
    """
    prototypes = class_prototypes(encode_text, class_names, templates, show_progress, world)
    image_features = encode_images(encode_image, images, len(labels), show_progress, world)
    return classify(image_features, prototypes, labels, group_of_class)


def classify(
    image_features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    group_of_class: Sequence[str] | None = None,
    kind: Kind = "templates",
) -> ZeroShotOutcome:
    """Returns the outcome for unit vectors of images, (N, D), and classes, (C, D); `kind` says what the latter are."""
    ranks, predictions = class_ranks(dot_scores(image_features, prototypes), labels, len(prototypes))
    note = "" if kind == "templates" else f" A class's vector: {KINDS[kind]}."
    return ZeroShotOutcome(_metrics(ranks, labels, len(prototypes), group_of_class, note), predictions, ranks)


def _metrics(
    ranks: Ranks, labels: Tensor, num_classes: int, group_of_class: Sequence[str] | None, note: str
) -> dict[str, Metric]:
    is_correct = ranks.by("first_come") == 0
    everything = torch.ones_like(labels, dtype=torch.bool)
    metrics = {"top1": _top_k(ranks, everything, 1, num_classes, "images", note)}
    if num_classes > 5:
        metrics["top5"] = _top_k(ranks, everything, 5, num_classes, "images", note)
    metrics["mean_per_class"] = Metric(
        value=mean_per_class_accuracy(is_correct, labels),
        unit="%",
        protocol=f"Mean over the classes that have images of each class's top-1 accuracy, {num_classes:,} classes to "
        f"choose from. {TIES}{note}",
        samples=len(class_counts(is_correct, labels)[1]),
        chance=100.0 / num_classes,
        interval_95=per_class_interval(is_correct, labels),
        interval_method="bootstrap, 1,000 draws, images resampled in their class",
        tie_variants=_variants(lambda rule: mean_per_class_accuracy(ranks.by(rule) == 0, labels)),
    )
    for group in dict.fromkeys(group_of_class or ()):
        of_group = images_of_group(labels, group_of_class or (), group)
        if bool(of_group.any()):
            metrics[f"top1_{group}"] = _top_k(ranks, of_group, 1, num_classes, f"images of {group} classes", note)
    return metrics


def _top_k(ranks: Ranks, chosen: Tensor, k: int, num_classes: int, what: str, note: str) -> Metric:
    num = int(chosen.sum())
    value = recall_at_k(ranks.by("first_come")[chosen], k)
    return Metric(
        value=value,
        unit="%",
        protocol=f"Share of the {what} whose right class is among the {k} best of {num_classes:,}. {TIES}{note}",
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
    """Data set (imagenet, cifar10, scenes, …), under $SETCLIP_DATA unless --data says otherwise."""
    data: Path | None = None
    """Place of the data set: class folders, torchvision's root, or CLIP_benchmark's tars. Without a name the folders' names,
    or the tars' classnames.txt, are the class names."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    out: Path | None = None
    """Results file. Default: results/ of the run."""
    templates: str | None = None
    """Prompts: imagenet (80), simple (7), picture, name (the bare name), or those of a data set (cifar, food101, …).
    Default: those of the data set, or those that tars bring."""
    class_names: Path | None = None
    """JSON file of class names: a list in the order of the folders, or folder to name."""
    prototypes: Literal["templates", "descriptions", "both", "tail", "all"] = "templates"
    """What stands for a class: its prompts, the description of how it looks, the mean of both, or the mean of both for
    classes of the tail only; all reports each."""
    descriptions: Path | None = None
    """descriptions.parquet, or its folder. Default: that of the data set, if it has one."""
    allow_undescribed: bool = False
    """Classes without a description keep the vector of their prompts, where others have one; results name them."""
    objects: Path | None = None
    """objects.parquet for accuracy by head, middle and tail. Default: that of the data set, if it has one."""
    parser: str = "pos"
    """Whose objects of it count."""
    allow_partial: bool = False
    """Evaluate even if images are missing; the result is marked partial."""
    resize: Literal["pillow", "torch"] = "pillow"
    """What resizes pictures: pillow gives exactly open_clip's pixels; torch values up to 2 of 255 apart, two to four times
    as fast."""
    batch_size: int = 128
    """Images a batch."""
    workers: int | None = None
    """Processes that decode images; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""
    timeout_minutes: float = 60.0
    """How long a rank waits for the others."""


@dataclass(frozen=True)
class Evaluated:
    """What the command writes."""

    results: Results
    keys: Sequence[str]
    """(N,) of the images."""
    labels: Tensor
    predictions: Tensor
    """(N,) int64, by the first kind of prototype."""
    further: dict[str, Tensor] = field(default_factory=dict)
    """(N,) predictions by the other kinds, by the names of their arrays."""


@dataclass(frozen=True)
class _Task:
    """What is known before the model is loaded."""

    dataset: ZeroShotDataset
    found: FoundImages
    is_partial: bool
    class_names: list[str]
    template_name: str
    templates: tuple[str, ...]
    objects: ObjectTable | None
    groups: list[str] | None
    kinds: tuple[Kind, ...]
    descriptions: DescribedClasses
    undescribed: list[str]


def evaluate(config: ZeroShotConfig, world: World = ALONE) -> Evaluated:
    """Does what the command does but for writing. Raises InputError, where data are wrong before the model is loaded.

    `world`: who shares the work; by default nobody.
    """
    with together(world):
        task = _task(config)
        loaded = model_to_evaluate(config.checkpoint, str(world.device) if world.size > 1 else config.device)
    start = time.monotonic()
    encode_image, encode_text = encode_functions(loaded)
    found = task.found
    images = TransformedImages(found.source, resizer_for(loaded, config.resize), loaded.image_size)
    prompts = class_prototypes(encode_text, task.class_names, task.templates, world=world)
    vectors = all_prototypes(task.kinds, prompts, encode_text, task.descriptions, task.groups, world)
    batches = image_batches(images, config.batch_size, config.workers)
    features = encode_images(encode_image, batches, len(found.labels), world=world)
    outcomes = {kind: classify(features, of, found.labels, task.groups, kind) for kind, of in vectors.items()}
    prefixes = PREFIXES if len(outcomes) > 1 else dict.fromkeys(PREFIXES, "")
    metrics = {prefixes[kind] + name: metric for kind, of in outcomes.items() for name, metric in of.metrics.items()}
    wanted = dict.fromkeys((task.dataset.metric, "top1", "top5", *(f"top1_{group}" for group in _GROUPS)))
    first, *others = outcomes
    results = Results(
        evaluation="zeroshot",
        dataset={
            "name": config.name or found.place.resolve().name,
            "place": str(found.place),
            "folder": str(found.folder),
            "layout": found.layout,
            "images": len(found.labels),
            "classes": len(task.class_names),
            "classes_with_images": len(found.labels.unique()),
            "templates": task.template_name,
            "prompts": list(task.templates),
        },
        metrics=metrics,
        headline=[prefixes[kind] + name for kind in outcomes for name in wanted if prefixes[kind] + name in metrics],
        checkpoint=loaded.identity,
        config=to_dict(config),
        is_partial=task.is_partial,
        details=_details(task, outcomes[first].predictions, world.size),
        seconds=round(time.monotonic() - start, 3),
    )
    further = {f"{PREFIXES[kind]}predictions": outcomes[kind].predictions for kind in others}
    return Evaluated(results, found.source.keys, found.labels, outcomes[first].predictions, further)


_GROUPS = ("head", "middle", "tail", "unseen")


def _task(config: ZeroShotConfig) -> _Task:
    dataset, found, is_partial = open_zero_shot(config.name, config.data, config.allow_partial)
    class_names = class_names_of(dataset, found, config.class_names)
    template_name, templates = templates_of(dataset, found, config.templates)
    say(
        f"{config.name or found.place.resolve().name}: {len(found.labels):,} images of {len(class_names):,} classes "
        f"({found.layout}) at {found.folder}"
    )
    if is_partial:
        have = len(found.labels.unique())
        warn(f"partial: {len(found.labels):,} images of {have:,} classes; all {len(class_names):,} names compete")
    objects_path = config.objects or objects_of(dataset, found)
    table = _objects(objects_path, config.parser, bool(config.objects))
    groups = None if table is None else [table.group_of(name.lower()) for name in class_names]
    kinds: tuple[Kind, ...] = tuple(KINDS) if config.prototypes == "all" else (config.prototypes,)
    texts, where = {}, ""
    if kinds != ("templates",):
        place = config.descriptions or (objects_path.parent if objects_path else None)
        if place is None:
            raise InputError(
                f"expected descriptions of the classes for --prototypes {config.prototypes}, found no --descriptions; give a "
                "descriptions.parquet (`python -m data_prep.describe DIR --model MODEL --of all` makes one)"
            )
        texts, where = read_descriptions(place).texts, str(place)
    descriptions = described(class_names, texts)
    undescribed = check_descriptions(kinds, descriptions, groups, config.allow_undescribed, where)
    return _Task(
        dataset,
        found,
        is_partial,
        class_names,
        template_name,
        templates,
        table,
        groups,
        kinds,
        descriptions,
        undescribed,
    )


def _objects(path: Path | None, parser: str, is_asked: bool) -> ObjectTable | None:
    """Returns how often objects are named in the training captions; None, said, where a data set's own is not there."""
    if path is None:
        return None
    if not path.exists() and not is_asked:
        warn(f"no {path}: no accuracy by head, middle and tail (`python -m data_prep.statistics {path.parent}`)")
        return None
    return read_objects(path, parser)


def _details(task: _Task, predictions: Tensor, num_ranks: int) -> dict[str, Any]:
    """Returns what reports draw: classes, confusions with examples, groups, and how prototypes came about."""
    found, groups = task.found, task.groups
    counts = None if task.objects is None else [task.objects.count_of(name.lower()) for name in task.class_names]
    mistaken = confusions(predictions, found.labels, task.class_names, found.source.keys)
    details: dict[str, Any] = {
        "classes": class_table(predictions, found.labels, task.class_names, groups, counts),
        "confusions": mistaken,
        "prototypes": {"kinds": {kind: KINDS[kind] for kind in task.kinds}, "without_description": task.undescribed},
        "ranks": num_ranks,
    }
    if groups:
        details["groups"] = {name: groups.count(name) for name in dict.fromkeys(groups)}
    if pictures := example_pictures(mistaken, found.source):
        details["pictures"] = pictures
    return details


def main() -> None:
    """Runs the command."""
    config: ZeroShotConfig = parse(ZeroShotConfig, description=__doc__)
    world = join(config.device, config.timeout_minutes)
    try:
        evaluated = evaluate(config, world)
        if world.rank == 0:
            _write(evaluated, config.out)
    finally:
        distributed.stop()


def _write(evaluated: Evaluated, out: Path | None) -> None:
    results = evaluated.results
    out = out or default_out("zeroshot", results.dataset["name"], results.checkpoint)
    save_per_query(
        per_query_path(out),
        kind="zeroshot",
        keys=evaluated.keys,
        correct=evaluated.predictions == evaluated.labels,
        labels=evaluated.labels,
        predictions=evaluated.predictions,
        about={
            "dataset": {"name": results.dataset["name"]},
            "classes": [entry["name"] for entry in results.details["classes"]],
            "is_partial": results.is_partial,
        },
        **evaluated.further,
    )
    results.save(out)
    say(f"\n{markdown_table([results])}\nresults: {out}\nimage by image: {per_query_path(out)}")


if __name__ == "__main__":
    command(main)

"""The experiment "labels-photos": soft labels on real photographs, from random weights, in four minutes a run.

Flickr8k train less the 1,000 pictures that choose, and COCO photographs where they are there; retrieval on Flickr8k
dev, zero-shot on CIFAR-10, whose ten classes so small a model hardly tells: an arm whose interval holds chance decides nothing.
"""

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.claims.corpus import CONTROL, LABELS, LOSS_DEFAULT, RSUM_MARGIN, TOP1_MARGIN
from benchmarks.claims.experiment import Arm, Claim, Experiment, Found, Measure, Options, Row
from benchmarks.claims.identity import shards_of
from benchmarks.claims.photographs import prepare_photographs, source_folder
from benchmarks.claims.pretraining import figures, pretrained, retrieval, with_settings, zero_shot
from data_prep.run import prepare as prepare_shards
from data_prep.sources.folder import FolderConfig
from pretrain.config import RECIPES, PretrainConfig
from setclip import config as configuration
from setclip.files import replacing
from setclip.manifest import MANIFEST_NAME

STEPS, BATCH = 90, 256
_FIRST = ("hard", "smoothing 0.2", "budget 0.2", "smoothing 0.5", "budget 0.5")
"""Arms that have all their seeds before the others begin."""
_RECALLS = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]


@dataclass(frozen=True)
class Photos:
    """What all runs take."""

    options: Options
    held_out: Path
    dev: Path
    cifar10: Path | None
    base: PretrainConfig


def prepare(work: Path, shared: Path, options: Options) -> Photos:
    """Makes the shards of Flickr8k and COCO, and unpacks CIFAR-10, as far as they are there and not made."""
    photographs = prepare_photographs(shared)
    folders = [str(photographs.train)]
    coco = source_folder() / "coco"
    if (coco / "photos.tar").exists():
        place = shared / "coco-photographs"
        if not (place / MANIFEST_NAME).exists():
            prepare_shards(
                "folder",
                FolderConfig(out=place, images=coco / "photos.tar", captions=coco / "photos.jsonl", processes=1),
            )
        folders.append(str(place))
    base = _config(options)
    base = replace(
        base,
        data=replace(base.data, shards=tuple(folders)),
        engine=replace(base.engine, device=options.device),
    )
    cifar10 = None if options.quick else _cifar10(shared)  # a minute
    return Photos(options, photographs.train, photographs.dev, cifar10, base)


def _config(options: Options) -> PretrainConfig:
    """Returns the settings of all runs, without places and device."""
    base = RECIPES["photos"]()
    return replace(
        base,
        data=replace(base.data, workers=0),
        global_batch_size=BATCH,
        steps=2 if options.quick else STEPS,
        save=replace(base.save, every_steps=20),
    )


def _made_of(photos: Photos) -> dict[str, Any]:
    return {"shards": shards_of(*(photos.base.data.shards or ()), photos.dev), "cifar10": photos.cifar10 is not None}


def _cifar10(shared: Path) -> Path | None:
    """Returns the class folders of CIFAR-10's test pictures; None where they are not among the data."""
    place, packed = shared / "cifar10", source_folder() / "cifar10" / "test.tar.gz"
    if not place.exists() and packed.exists():
        with replacing(place) as temporary:
            temporary.mkdir(parents=True)
            with tarfile.open(packed) as tar:
                tar.extractall(temporary, filter="data")
    return place if place.exists() else None


def run(photos: Photos, settings: Mapping[str, Any], seed: int, out: Path) -> Found:
    """Trains with an arm's loss, and evaluates."""
    place = pretrained("photos", with_settings(photos.base, settings, seed, out))
    device = photos.options.device
    values: dict[str, float | None] = {}
    chance, intervals = {}, {}
    reported = [retrieval(place, photos.dev, "dev", device)]
    if photos.cifar10 is not None:
        reported.append(zero_shot(place, device, data=photos.cifar10, templates="cifar"))
    for results in reported:
        for name, value, level, interval in figures(results):
            values[name] = value
            if level is not None:
                chance[name] = level
            if interval is not None:
                intervals[name] = interval
    held_out = {name: value for name, value, _, _ in figures(retrieval(place, photos.held_out, "val", device))}
    return Found(values=values, held_out=held_out, chance=chance, intervals=intervals, steps=photos.base.steps)


def experiment(options: Options) -> Experiment:
    """Returns the experiment."""
    arms: dict[str, Arm] = {name: LABELS[name] for name in (_FIRST[:1] if options.quick else _FIRST)}
    if not options.quick:
        arms |= {name: replace(arm, comes_last=True) for name, arm in LABELS.items() if name not in arms}
    source = "Zhang, Yan, Ding 2024 (AlignCLIP), CC3M, ImageNet zero-shot top-1"
    both = (("rsum", RSUM_MARGIN), ("top1", TOP1_MARGIN))
    claims = [
        Claim(text=text, source=told, better=better, worse=worse, measure=measure, margin=margin)
        for better, worse, text, told, measures in (
            ("budget 0.2", "smoothing 0.2", "Object-IoU beats label smoothing 0.2", f"{source}: 27.0 > 24.5", both),
            ("smoothing 0.2", "hard", "label smoothing 0.2 beats hard labels", f"{source}: 24.5 > 23.0", both),
            ("budget 0.2", "hard", "Object-IoU beats hard labels", f"{source}: 27.0 > 23.0", both),
            ("budget 0.5", "smoothing 0.5", "Object-IoU 0.5 beats smoothing 0.5", CONTROL, both[:1]),
            ("budget 0.1", "smoothing 0.1", "Object-IoU 0.1 beats smoothing 0.1", CONTROL, both[:1]),
            ("budget 0.2", "multi-positive", "Object-IoU beats several hard positives", CONTROL, both[:1]),
        )
        for measure, margin in measures
        if better in arms and worse in arms
    ]
    return Experiment(
        title="Object-IoU labels on photographs",
        question="Do soft labels by the overlap of objects help on real photographs with real captions?",
        about={
            "Data": "5,000 photographs of Flickr8k train × 5 captions, and those of COCO that were there (see Shards); "
            "1,000 others of Flickr8k train are held out; retrieval on Flickr8k dev (1,000 × 5), zero-shot on CIFAR-10's "
            "10,000 test pictures.",
            "Model": "recipe `photos`: a small ResNet at 96 pixels and two text blocks, from random weights.",
            "Training": f"{STEPS} steps of {BATCH} pairs, the recipe's settings for all arms.",
            "Choice": "nothing was chosen on what is reported. The defaults of the loss are chosen here, on "
            "the held-out pictures, and not on drawn scenes, which favour soft labels.",
        },
        limits=(
            "A few minutes of training on a few thousand photographs: models hardly learn more than scenes and "
            "frequent objects.",
        ),
        arms=arms,
        rows={name: Row(arm=name) for name in arms},
        measures={
            **{name: Measure(heading=f"{name[:3]} R@{name.rpartition('r')[2]}") for name in _RECALLS},
            "rsum": Measure(heading="RSUM"),
            "top1": Measure(heading="CIFAR-10 top-1"),
        },
        claims=claims,
        chosen_by="rsum",
        default=None if options.quick else LOSS_DEFAULT,
        seeds=1 if options.quick else 5,
        prepare=prepare,
        run=run,
        settings=configuration.to_dict(_config(options)),
        made_of=_made_of,
    )

"""Recipes that are of no paper's row: they hold for any head."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.config import BackboneConfig, FinetuneConfig, WeightsConfig
from finetune.losses import TripletConfig
from finetune.optim import FinetuneOptimConfig
from finetune.recipes.base import Recipe

_LOSSES: dict[str, dict[str, Any]] = {
    # DivE's code: 0.01 each (the slides print 1)
    "slot": {"weights": WeightsConfig(mmd=0.01, uniformity=0.01)},
    "transformer": {"weights": WeightsConfig(mmd=0.01, uniformity=0.01)},
    # PVSE's code
    "pie": {"weights": WeightsConfig(mmd=0.01, gram=0.1), "triplet": TripletConfig(margin=0.1)},
    # PCME's code, of COCO
    "pcme": {
        "weights": WeightsConfig(triplet=0.0, pcme=1.0, gaussian_kl=1e-5),
        "similarity_options": ("a=15", "b=15"),
    },
    # reconstructed: the paper's own weights were not to be had
    "dhset": {"weights": WeightsConfig(dhset_diversity=0.1), "triplet": TripletConfig(all_epochs=1.0)},
    "dhset_fragment": {"weights": WeightsConfig(dhset_diversity=0.1), "triplet": TripletConfig(all_epochs=1.0)},
    # VSE∞'s and LAPS's warm-up; SCAN has none
    "gpo": {"triplet": TripletConfig(all_epochs=1.0)},
    "laps": {"triplet": TripletConfig(all_epochs=1.0, ramp_epoch=0)},
}
"""What the systems add to or change of the triplet loss (margin 0.2, hardest negative, mean)."""


def plain(head: str | None) -> FinetuneConfig:
    """The losses of the head's own system, and our defaults for the rest."""
    head = head or "slot"
    return FinetuneConfig(head=head, **_LOSSES.get(head, {}))


_SMALL: dict[str, tuple[str, ...]] = {
    "slot": ("num_elements=4", "blocks=2", "heads=4", "head_width=64", "mlp_ratio=2"),
    "transformer": ("num_elements=4", "blocks=2", "heads=4", "head_width=64", "mlp_ratio=2"),
}


def photos(head: str | None) -> FinetuneConfig:
    """A few thousand photographs on a CPU (Flickr8k size), the towers of `pretrain.run photos` frozen: a few minutes.

    1,000 of the training pictures choose; the folder data/photos-dev tells. All negatives count: with the hardest alone, the sets
    of so small a model collapse to one point in the first epoch, and hardly come back.
    """
    config = plain(head)
    return replace(
        config,
        model="runs/photos",
        data=Path("data/photos"),
        hold_out=1000,
        test=Path("data/photos-dev"),
        width=256,
        options=_SMALL.get(config.head, ()),
        triplet=replace(config.triplet, mining="all"),
        backbone=BackboneConfig(freeze="both"),
        optim=FinetuneOptimConfig(lr=1e-3, warmup_share=0.05),
        batch_size=128,
        captions_per_image=2,
        epochs=6,
    )


GENERAL: dict[str, Recipe] = {"plain": plain, "photos": photos}

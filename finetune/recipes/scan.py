"""SCAN (Lee et al. 2018): the two models of each ensemble row."""

from finetune.recipes.base import PaperRecipe, Settings, stated
from finetune.recipes.parts import ADAM, DATASETS, REGIONS, bigru

STEEPNESS = {"f30k": {"i2t": 5.0, "t2i": 6.0}, "coco": {"i2t": 20.0, "t2i": 6.0}}
"""λ₂ of LSE"""
SHARPNESS = {"i2t": 4.0, "t2i": 9.0}
"""λ₁"""
LINEAR = "words pass one linear layer more than the source's"


def matching(data: str, direction: str, aggregation: str) -> Settings:
    """Returns the settings of SCAN's matching, which ASA shares."""
    lse = {"similarity_options.steepness_of_lse": stated(STEEPNESS[data][direction])} if aggregation == "lse" else {}
    return {
        "similarity_options.direction": stated(direction),
        "similarity_options.aggregation": stated(aggregation),
        "similarity_options.sharpness": stated(SHARPNESS[direction]),
        **lse,
    }


_SCAN: Settings = {
    "head": stated("scan"),
    "width": stated(1024),
    **REGIONS,
    **bigru(glove=None),
    "triplet.margin": stated(0.2),
    "triplet.mining": stated("hardest"),
    "triplet.reduction": stated("sum"),
    "captions_per_image": stated(1),
    "batch_size": stated(128),
    "optim.schedule": stated("steps"),
    "optim.decay": stated(0.1),
    "optim.clip_grad_norm": stated(2.0),
    **ADAM,
}

_RATES: dict[str, Settings] = {
    "f30k": {"optim.lr": stated(2e-4), "epochs": stated(30.0), "optim.decay_epochs": stated((15.0,))},
    "coco": {"optim.lr": stated(5e-4), "epochs": stated(20.0), "optim.decay_epochs": stated((10.0,))},
}

SCAN: dict[str, PaperRecipe] = {
    f"scan-{data}-frcnn-bigru-{direction}-{aggregation}": PaperRecipe(
        title=f"SCAN {direction[0]}-{direction[2]} {aggregation.upper()}, {title}, Faster R-CNN + BiGRU",
        settings={**_SCAN, **_RATES[data], **DATASETS[data], **matching(data, direction, aggregation)},
        notes=(LINEAR,),
    )
    for data, title in (("coco", "COCO"), ("f30k", "Flickr30K"))
    for direction, aggregation in (("t2i", "avg"), ("i2t", "lse"))
}

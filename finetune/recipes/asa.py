"""Multi-scale adaptive self-attention (ACML 2021) on Flickr30K: one scale (table 1) and both (table 2)."""

from finetune.recipes.base import PaperRecipe, Settings, derived, ours, stated
from finetune.recipes.parts import ADAM, DATASETS, GLOVE, RESNET152_OTHERS, bigru
from finetune.recipes.scan import LINEAR, matching

_ASA: Settings = {
    "head": stated("asa"),
    "width": stated(1024),
    "image_options.candidate_width": stated(2048),
    "similarity": stated("scan"),
    **RESNET152_OTHERS,
    "backbone.image_size": stated(224),
    "augment.kind": stated("resized_crop", "a random crop"),
    **bigru(),
    "backbone.freeze": stated("image"),
    "backbone.unfreeze_epoch": stated(20.0),
    "backbone.image_lr_factor": stated(1.0),
    "triplet.margin": stated(0.2),
    "triplet.mining": ours("hardest", "SCAN's"),
    "triplet.reduction": ours("sum", "SCAN's"),
    "captions_per_image": ours(1, "SCAN's"),
    "batch_size": stated(128),
    "epochs": derived(35.0, "20 with the CNN frozen, 15 with all"),
    "optim.lr": stated(5e-4),
    "optim.schedule": ours("steps"),
    "optim.decay_epochs": ours((15.0, 20.0), "the second stage begins at 20; the first decay is SCAN's"),
    "optim.rates": ours((5e-5, 2e-5), "2e-5 of the second stage is stated"),
    "optim.clip_grad_norm": stated(2.0),
    **ADAM,
    **DATASETS["f30k"],
}

_SCALES: dict[str, tuple[str, Settings]] = {
    "-14x14": ("14 × 14", {"backbone.maps": stated(2), "image_options.only": stated(0, "of the two maps the finer")}),
    "-7x7": ("7 × 7", {"backbone.maps": stated(1)}),
    "": ("14 × 14 and 7 × 7, maximum", {"backbone.maps": stated(2), "image_options.pool": stated("max")}),
    "-avgpool": ("14 × 14 and 7 × 7, average", {"backbone.maps": stated(2), "image_options.pool": stated("avg")}),
}

ASA: dict[str, PaperRecipe] = {
    f"asa-f30k-resnet152-bigru-{direction}-{aggregation}{name}": PaperRecipe(
        title=f"ASA {direction[0]}-{direction[2]} {aggregation.upper()}, Flickr30K, ResNet-152 + BiGRU, {title}",
        settings={**_ASA, **scales, **matching("f30k", direction, aggregation)},
        notes=(
            "the self-attention itself is a reconstruction (docs/heads.md)",
            "the source's two stages are one run, whose optimiser goes on",
            LINEAR,
            GLOVE,
        ),
    )
    for direction in ("i2t", "t2i")
    for aggregation in ("lse", "avg")
    for name, (title, scales) in _SCALES.items()
}

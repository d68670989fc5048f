"""LAPS (Fu et al. 2024) and DH-Set (Zhang et al. 2025) on CUB, with Swin and BERT."""

from finetune.recipes.base import PaperRecipe, Settings, as_of, derived, ours, stated
from finetune.recipes.parts import BERT, DATASETS, WORD_NOISE

_TOKENS = {224: 49, 384: 144}


def _swin(size: int) -> Settings:
    return {
        "backbone.image": stated(f"swin{size}"),
        "backbone.image_size": stated(size),
        "backbone.resize": stated("squash"),
        "augment.kind": stated("resized_crop"),
        "augment.scale": stated((0.6, 1.0)),
        "augment.flip": stated(True),
        "backbone.cache_gb": ours(0.0, "features that are kept would not vary with the crop"),
        "backbone.freeze": stated("none"),
        "backbone.image_lr_factor": stated(0.1),
        **BERT,
    }


_ROW = ("backbone.image", "backbone.image_size", "backbone.text")  # what a row itself names

_LAPS: Settings = {
    "head": stated("laps"),
    "width": stated(512),
    "options.normalise": stated(False),
    "similarity": stated("laps"),
    "similarity_options.width": stated(512),
    "similarity_options.keep": stated(0.8),
    "similarity_options.merge": stated(0.6),
    "triplet.margin": stated(0.2),
    "triplet.mining": stated("hardest"),
    "triplet.reduction": stated("sum"),
    "triplet.all_epochs": stated(1.0),
    "triplet.ramp_epoch": stated(0),
    "captions_per_image": stated(1),
    "batch_size": stated(64),
    "epochs": stated(30.0),
    "optim.lr": stated(2e-4),
    "optim.schedule": stated("steps"),
    "optim.decay_epochs": stated((9.0, 15.0, 20.0, 25.0)),
    "optim.decay": stated(0.3),
    "optim.weight_decay": stated(1e-4),
    "optim.clip_grad_norm": stated(2.0),
    **WORD_NOISE,
}

_FROM_LAPS = "LAPS's"

_DHSET: Settings = {
    "head": ours("dhset", "which of the two forms the row is of is not stated"),
    "width": ours(512, _FROM_LAPS),
    "text_options.num_elements": ours(4, "stated: at least 3"),
    "text_options.num_rows": ours(16),
    "text_options.sharpness": ours(50.0, "stated: a large constant"),
    "text_options.norm": ours("cos"),
    "inference": stated("hybrid"),
    "triplet.margin": ours(0.2, _FROM_LAPS),
    "triplet.mining": ours("hardest", _FROM_LAPS),
    "triplet.reduction": ours("mean"),
    "triplet.all_epochs": ours(1.0),
    "weights.dhset_diversity": ours(0.1),
    "dhset_diversity.eta": ours(1.0),
    "captions_per_image": ours(1, _FROM_LAPS),
    "batch_size": ours(64, _FROM_LAPS),
    "epochs": stated(30.0),
    "optim.lr": ours(2e-4, f"{_FROM_LAPS}; W and α ten times that"),
    "optim.schedule": ours("steps", _FROM_LAPS),
    "optim.decay_epochs": ours((9.0, 15.0, 20.0, 25.0), _FROM_LAPS),
    "optim.decay": ours(0.3, _FROM_LAPS),
    "optim.weight_decay": ours(1e-4, _FROM_LAPS),
    "optim.clip_grad_norm": ours(2.0, _FROM_LAPS),
    "noise.words": ours(0.2, _FROM_LAPS),
}

PATCHES: dict[str, PaperRecipe] = {
    **{
        f"laps-cub-swin{size}-bert": PaperRecipe(
            title=f"LAPS, CUB, Swin-{size} + BERT",
            settings={
                **as_of({**_LAPS, **_swin(size)}, "as on Flickr30K and COCO", but=(*_ROW, "head", "similarity")),
                **DATASETS["cub"],
                "similarity_options.num_patches": derived(tokens),
            },
            notes=(
                "settings are those of LAPS's code for Flickr30K and COCO: for CUB, by DH-Set's authors, none are stated",
                "the code's loss of the kept share is a constant, and left out",
            ),
        )
        for size, tokens in _TOKENS.items()
    },
    **{
        f"dhset-cub-swin{size}-bert": PaperRecipe(
            title=f"DH-Set, CUB, Swin-{size} + BERT",
            settings={**_DHSET, **as_of(_swin(size), _FROM_LAPS, but=_ROW), **DATASETS["cub"]},
            notes=("DH-Set itself is a reconstruction (docs/heads.md), and so are its settings but for the epochs",),
        )
        for size in _TOKENS
    },
}

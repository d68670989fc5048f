"""Systems built on PIE-Net: PVSE (Song and Soleymani 2019) and PCME (Chun et al. 2021)."""

from finetune.recipes.base import PaperRecipe, Settings, as_of, ours, remembered, stated
from finetune.recipes.parts import (
    ADAM,
    ADAMW_FOR_ADAMP,
    DATASETS,
    GLOVE,
    GLOVE_REMEMBERED,
    RESNET152,
    RESNET152_OTHERS,
    bigru,
)

_TITLES = {"coco": "COCO", "f30k": "Flickr30K"}

_PVSE: Settings = {
    "head": stated("pie"),
    "width": stated(1024),
    "options.num_elements": stated(2),
    "similarity": stated("mil"),
    **RESNET152,
    **bigru(concatenated=True),
    "backbone.words": stated("embeddings"),
    "backbone.freeze": remembered("image"),
    "triplet.margin": stated(0.1),
    "triplet.mining": stated("hardest"),
    "triplet.reduction": stated("mean"),
    "weights.mmd": stated(0.01),
    "weights.gram": stated(0.1),
    "mmd.kernel": stated("laplace"),
    "mmd.gamma": stated(0.5),
    "captions_per_image": stated(1),
    "batch_size": stated(256),
    "epochs": stated(30.0),
    "optim.lr": stated(2e-4),
    "optim.schedule": stated(
        "plateau", "of validation's RSUM, which is to grow: the source's looks for a fall by mistake"
    ),
    "optim.decay": stated(0.5),
    "optim.patience": stated(10),
    "optim.clip_grad_norm": remembered(2.0),
    **ADAM,
}

_PCME: Settings = {
    "head": stated("pcme"),
    "width": stated(1024),
    "options.num_samples": stated(7),
    "similarity": stated("match_prob_l2"),
    "similarity_options.a": stated(15.0, "where it begins"),
    "similarity_options.b": stated(15.0, "where it begins"),
    **RESNET152_OTHERS,
    **bigru(concatenated=True, glove=GLOVE_REMEMBERED),
    "backbone.words": stated("embeddings"),
    "backbone.freeze": stated("image"),
    "backbone.unfreeze_epoch": stated(30.0),
    "backbone.image_lr_factor": ours(0.1),
    "weights.triplet": stated(0.0),
    "weights.pcme": stated(1.0),
    "weights.gaussian_kl": stated(1e-5),
    "pcme.reduction": stated("sum"),
    "captions_per_image": stated(1),
    "batch_size": stated(128),
    "epochs": stated(60.0, "30 with the CNN frozen, 30 with all"),
    "optim.lr": stated(2e-4),
    "optim.schedule": stated("cosine"),
    "optim.weight_decay": ours(1e-4),
    "optim.clip_grad_norm": stated(2.0),
    "noise.words": stated(0.1, "dropped by the source; here some are masked or exchanged"),
}

# what the sources state of the system, whatever the data
_ALWAYS = ("head", "similarity", "backbone.image", "backbone.text", "backbone.words")
_PVSE_ALWAYS = (*_ALWAYS, "triplet", "weights", "mmd", "captions_per_image")
_PCME_ALWAYS = (*_ALWAYS, "options", "weights.triplet", "weights.pcme", "pcme", "captions_per_image")

_F30K = "of Flickr30K the settings were not to be had: they are those of COCO"

PIE_NETS: dict[str, PaperRecipe] = {
    **{
        f"pvse-{data}-resnet152-bigru": PaperRecipe(
            title=f"PVSE, {title}, ResNet-152 + BiGRU",
            settings={
                **(_PVSE if data == "coco" else as_of(_PVSE, "as on COCO", but=_PVSE_ALWAYS)),
                **DATASETS[data],
            },
            notes=("the source's Adam is AMSGrad", GLOVE, *((_F30K,) if data == "f30k" else ())),
        )
        for data, title in _TITLES.items()
    },
    **{
        f"pcme-{data}-resnet152-bigru": PaperRecipe(
            title=f"PCME, {title}, ResNet-152 + BiGRU",
            settings={
                **(_PCME if data == "coco" else as_of(_PCME, "as on COCO", but=_PCME_ALWAYS)),
                **DATASETS[data],
            },
            notes=(
                ADAMW_FOR_ADAMP,
                "the source erases parts of pictures (a fifth of them), which is left out",
                "the source's cosine begins anew with the second stage",
                GLOVE,
                *((_F30K,) if data == "f30k" else ()),
            ),
        )
        for data, title in _TITLES.items()
    },
}

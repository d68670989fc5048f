"""Systems of one vector a picture and a text: VSE++ (Faghri et al. 2018) and VSE∞ (Chen et al. 2021)."""

from finetune.recipes.base import PaperRecipe, Settings, as_of, derived, ours, remembered, stated
from finetune.recipes.parts import (
    ADAM,
    BERT,
    DATASETS,
    GLOVE,
    GLOVE_REMEMBERED,
    REGION_NOISE,
    REGIONS,
    RESNET152_OTHERS,
    RESNEXT101,
    WORD_NOISE,
    bigru,
)

_TITLES = {"coco": "COCO", "f30k": "Flickr30K"}

_VSEPP: Settings = {
    "head": stated("single", "the CNN's global feature through one layer; the GRU's last state"),
    "width": stated(1024),
    "image_options.normalise_input": stated(True),
    **RESNET152_OTHERS,
    "backbone.text": stated("gru"),
    "backbone.word_width": stated(300),
    "backbone.hidden_width": stated(1024),
    "backbone.min_count": remembered(4),
    "backbone.freeze": stated("image"),
    "backbone.unfreeze_epoch": remembered(30.0, "the source's second run"),
    "backbone.image_lr_factor": remembered(1.0),
    "backbone.text_lr_factor": stated(1.0),
    "triplet.margin": stated(0.2),
    "triplet.mining": stated("hardest"),
    "triplet.reduction": stated("sum"),
    "captions_per_image": stated(1),
    "batch_size": stated(128),
    "epochs": remembered(45.0, "30 with the CNN frozen, 15 with all"),
    "optim.lr": stated(2e-4),
    "optim.schedule": stated("steps"),
    "optim.decay_epochs": derived((15.0, 30.0)),
    "optim.rates": remembered((2e-5, 2e-5)),
    "optim.clip_grad_norm": stated(2.0),
    **ADAM,
}

_VSEINF: Settings = {
    "head": stated("gpo"),
    "width": stated(1024),
    "triplet.margin": stated(0.2),
    "triplet.mining": stated("hardest"),
    "triplet.reduction": stated("sum"),
    "triplet.all_epochs": stated(1.0),
    "captions_per_image": stated(1),
    "batch_size": stated(128),
    "epochs": stated(25.0),
    "optim.lr": stated(5e-4),
    "optim.schedule": stated("steps"),
    "optim.decay_epochs": stated((15.0,)),
    "optim.decay": stated(0.1),
    "optim.weight_decay": stated(1e-4),
    "optim.clip_grad_norm": remembered(2.0),
    **WORD_NOISE,
}

# the source's settings are of BERT; of the system itself are these
_VSEINF_ALWAYS = ("head", "width", "triplet", "captions_per_image", "noise")

_VSEINF_REGIONS: Settings = {
    **as_of(_VSEINF, "as with BERT", but=_VSEINF_ALWAYS),
    **REGIONS,
    **REGION_NOISE,
    **bigru(glove=GLOVE_REMEMBERED),
    "projection": stated("vseinf"),
}

_VSEINF_GRID: Settings = {
    **_VSEINF,
    **RESNEXT101,
    **BERT,
    "noise.regions": stated(0.2, "of places of the map: a share of up to 0.2, in four of five pictures"),
    "backbone.freeze": stated("image"),
    "backbone.unfreeze_epoch": stated(1.0),
    "backbone.image_lr_factor": stated(0.01),
    "triplet.ramp_epoch": stated(1),
    "precision": ours("bf16"),
}

_STEM = "the source never trains the CNN's stem and first blocks; here all of it learns, at a hundredth of the rate"

SINGLE_VECTORS: dict[str, PaperRecipe] = {
    **{
        f"vsepp-{data}-resnet152-gru": PaperRecipe(
            title=f"VSE++, {title}, ResNet-152 + GRU",
            settings={**_VSEPP, **DATASETS[data]},
            notes=(
                "the source's two runs are one run of two stages, whose optimiser goes on",
                "words of the test captions are not in the vocabulary, as they are in the source's",
                *(("the source's backbone of text is printed as BiGRU by DivE; VSE++ has a GRU of one direction",)),
            ),
        )
        for data, title in _TITLES.items()
    },
    **{
        f"vseinf-{data}-frcnn-bigru": PaperRecipe(
            title=f"VSE∞, {title}, Faster R-CNN + BiGRU", settings={**_VSEINF_REGIONS, **DATASETS[data]}, notes=(GLOVE,)
        )
        for data, title in _TITLES.items()
    },
    **{
        f"vseinf-{data}-resnext101-bert": PaperRecipe(
            title=f"VSE∞, {title}, ResNeXt-101 + BERT",
            settings={
                **_VSEINF_GRID,
                **DATASETS[data],
                **({"epochs": ours(25.0, "as on COCO")} if data == "f30k" else {}),
            },
            notes=(_STEM,),
        )
        for data, title in _TITLES.items()
    },
}

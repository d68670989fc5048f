"""Settings that several systems share: data sets, backbones and optimisers. Plain dicts; see `base`."""

from finetune.recipes.base import Settings, as_of, derived, ours, remembered, stated

DATASETS: dict[str, Settings] = {
    "f30k": {"dataset": stated("flickr30k")},
    "coco": {"dataset": stated("coco")},
    "cub": {
        "dataset": stated("cub"),
        "match": ours("class", "how pictures of one class count in training is not stated"),
    },
}

REGIONS: Settings = {
    "backbone.image": stated("regions", "36 regions of Faster R-CNN on Visual Genome, 2,048-d"),
    "backbone.freeze": derived("none", "the detector is not there; what maps its features learns"),
    "backbone.image_lr_factor": stated(1.0),
}

CROPS_224: Settings = {
    "backbone.image_size": stated(224),
    "backbone.resize": stated("classic"),
    "augment.kind": stated("resized_crop"),
    "augment.scale": stated((0.08, 1.0), "torchvision's own range"),
    "augment.flip": stated(True),
    "backbone.cache_gb": ours(0.0, "features that are kept would not vary with the crop"),
}

RESNET152: Settings = {"backbone.image": stated("resnet152"), **CROPS_224}
"""With the crops of PVSE's and DivE's code"""
RESNET152_OTHERS: Settings = {**RESNET152, **as_of(CROPS_224, "as PVSE and DivE have it")}
"""Of systems whose crops no source at hand states"""

RESNEXT101: Settings = {
    "backbone.image": stated("resnext101", "WSL, 32 × 8d; trained on Instagram"),
    "backbone.image_size": stated(512),
    "backbone.resize": stated("squash"),
    "augment.kind": stated("resized_crop"),
    "augment.scale": stated((0.36, 1.0), "a side of 0.6 to 1"),
    "augment.flip": stated(True),
    "backbone.cache_gb": ours(0.0, "features that are kept would not vary with the crop"),
}


def bigru(lr_factor: float = 1.0, concatenated: bool = False, glove: str | None = "GloVe") -> Settings:
    """Returns a BiGRU over words of 300 dimensions: directions averaged (SCAN, VSE∞, DivE), or concatenated (PVSE, PCME).

    `glove`: what words begin with, and how that is known; None: no source says so.
    """
    begins = "" if glove is None else f"{glove}, fine-tuned: give its file with --backbone.glove"
    return {
        "backbone.text": stated("bigru_concat" if concatenated else "bigru"),
        "backbone.word_width": stated(300, begins),
        "backbone.hidden_width": stated(1024),
        "backbone.text_lr_factor": stated(lr_factor) if lr_factor == 1.0 else derived(lr_factor, "rates of its groups"),
        "backbone.min_count": remembered(4),
    }


BERT: Settings = {
    "backbone.text": stated("bert", "bert-base-uncased"),
    "backbone.text_lr_factor": stated(0.1),
}

ADAM: Settings = {"optim.weight_decay": derived(0.0, "the source has Adam, which AdamW without decay is")}

WORD_NOISE: Settings = {"noise.words": stated(0.2)}
REGION_NOISE: Settings = {"noise.regions": stated(0.2)}

ADAMW_FOR_ADAMP = "the source has AdamP, which torch has not: AdamW stands for it"
GLOVE_REMEMBERED = "GloVe (remembered)"
GLOVE = "without --backbone.glove word vectors begin at random, where the source begins with GloVe"

"""The configuration of a fine-tuning run. docs: `python -m finetune.run --help`; recipes are in `finetune.recipes`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval_suite.feature_similarity import similarity_options_of
from finetune.losses import (
    LOSSES,
    DhSetDiversityConfig,
    HybridTripletConfig,
    MmdConfig,
    PcmeConfig,
    TripletConfig,
    UniformityConfig,
    Weighted,
)
from finetune.optim import FinetuneOptimConfig
from pretrain.bad_steps import GuardConfig
from pretrain.ema import EmaConfig
from pretrain.losses import LossConfig
from pretrain.trackers import TrackerConfig
from setclip.images import AugmentConfig
from setclip.models.backbones import RECURRENT
from setclip.models.set_model import HeadSettings, Inference

Frozen = Literal["both", "image", "text", "none"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What gives local features of pictures and texts, and how it learns."""

    image: str = "open_clip"
    """open_clip (the tower of --model), resnet152, resnext101, swin224, swin384, vit224, vit384, regions, or any timm name."""
    text: str = "open_clip"
    """open_clip (the tower of --model), bigru, bigru_concat, gru, bert, or any Hugging Face text encoder's name or folder."""
    image_weights: str = "pretrained"
    """pretrained, random, or a file of weights (safetensors or torch's)."""
    text_weights: str = "pretrained"
    """pretrained, random, or a file of weights; recurrent towers begin at random anyway."""
    image_size: int | None = None
    """Side of the pictures in pixels; None: the tower's own."""
    resize: Literal["own", "shortest", "squash", "classic"] = "own"
    """How pictures become square: shortest side and middle, both sides (squash), or 8/7 of it and middle (256 and 224)."""
    maps: int = 1
    """Last maps of a convolutional tower that are taken, side by side; more than one for the head asa."""
    word_width: int = 300
    """Of word embeddings (bigru, gru)."""
    hidden_width: int = 1024
    """Of a recurrent tower's words (bigru, gru)."""
    words: Literal["states", "embeddings"] = "states"
    """Local features of a recurrent tower: its states, or the words' embeddings in front of it (PVSE, PCME, DivE)."""
    dropout: float = 0.0
    """Of word embeddings and of a recurrent tower's words, in training."""
    min_count: int = 4
    """Times that a word stands in the training captions to be in the vocabulary (bigru, gru)."""
    glove: Path | None = None
    """Text file of word vectors, --backbone.word-width wide, with which words begin (bigru, gru)."""
    text_length: int = 128
    """Most tokens of a text, those around it included (not open_clip, whose model says it)."""
    freeze: Frozen = "both"
    """Towers that do not learn, or not until --backbone.unfreeze-epoch; what is never pretrained (GRU, regions) learns always."""
    unfreeze_epoch: float | None = None
    """Epoch from which all towers learn."""
    lr_factor: float = 0.1
    """Times the learning rate, for the towers."""
    image_lr_factor: float | None = None
    """The same of the image tower alone; None: --backbone.lr-factor, and 1 for regions."""
    text_lr_factor: float | None = None
    """The same of the text tower alone; None: --backbone.lr-factor, and 1 for recurrent ones."""
    cache_gb: float = 4.0
    """Largest size of features of frozen towers that are computed once and kept in memory, in 10⁹ bytes; 0: none are."""

    def __post_init__(self) -> None:
        for name in ("lr_factor", "cache_gb", "image_lr_factor", "text_lr_factor", "dropout"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"backbone.{name} must not be negative, found {getattr(self, name)}")
        for name in ("maps", "word_width", "hidden_width", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"backbone.{name} must be at least 1, found {getattr(self, name)}")
        if self.dropout >= 1:
            raise ValueError(f"backbone.dropout must be below 1, found {self.dropout}")
        if self.text_length < 3:
            raise ValueError(f"backbone.text_length must be at least 3, found {self.text_length}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"backbone.image_size must be at least 1, found {self.image_size}")

    @property
    def is_recurrent(self) -> bool:
        """Whether the text tower is a recurrent one."""
        return self.text in RECURRENT

    def lr_factors(self) -> tuple[float, float]:
        """Returns what the learning rate is multiplied by for (the image tower, the text tower)."""
        image, text = self.image_lr_factor, self.text_lr_factor
        usual_image = 1.0 if self.image == "regions" else self.lr_factor
        usual_text = 1.0 if self.is_recurrent else self.lr_factor
        return usual_image if image is None else image, usual_text if text is None else text

    def frozen_at(self, epoch: float) -> tuple[bool, bool]:
        """Returns whether (the image tower, the text tower) is frozen after so many epochs."""
        if self.unfreeze_epoch is not None and epoch >= self.unfreeze_epoch:
            return False, False
        is_image = self.freeze in ("both", "image") and self.image != "regions"
        return is_image, self.freeze in ("both", "text") and not self.is_recurrent


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """What is taken out of inputs in training, drawn anew at each epoch; 0: nothing."""

    words: float = 0.0
    """Share of words that are changed: of these 50 % become the mask token, 10 % a random word, 40 % are dropped."""
    regions: float = 0.0
    """Share of regions that are dropped; of places of a map or patches, a drawn share of at most so much of them."""

    def __post_init__(self) -> None:
        for name in ("words", "regions"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"noise.{name} must be from 0 to below 1, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """What each loss counts; 0: it is not computed. Their settings are flags of their own (--triplet.margin, …)."""

    triplet: float = 1.0
    """Triplet ranking loss."""
    triplet_hybrid: float = 0.0
    """The same on DH-Set's hybrid scores."""
    contrastive: float = 0.0
    """The losses of pretraining on scores of sets, by --contrastive.name."""
    pcme: float = 0.0
    """Soft contrastive loss, with --similarity match_prob_l2."""
    gaussian_kl: float = 0.0
    """Divergence of the Gaussians from the unit one (pcme)."""
    mmd: float = 0.0
    """Maximum mean discrepancy between elements of pictures and of texts."""
    uniformity: float = 0.0
    """Elements of a set apart (slot, transformer, pie)."""
    gram: float = 0.0
    """The same, PVSE's."""
    dhset_diversity: float = 0.0
    """Sub-spaces apart (dhset)."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run."""

    head: str = "slot"
    """slot, transformer, pie, pcme, dhset, dhset_fragment, asa, scan, laps, gpo, mean, max, or single (docs/heads.md)."""
    model: str | None = None
    """The pretrained model: a run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. None: the newest run."""
    data: Path | None = None
    """Folder of shards to train on; None: the data set of --dataset under $SETCLIP_DATA (data/)."""
    regions: Path | None = None
    """Folder of region features in SCAN's layout (train_ims.npy, train_caps.txt, dev_…, test_…), for --backbone.image regions."""
    region_captions: int = 5
    """Captions of each picture in --regions; of flickr30k and coco five anyway."""
    dataset: str | None = None
    """flickr30k, coco or cub, whose counts are checked, or any folder under $SETCLIP_DATA."""
    split: str = "train"
    """Split to train on."""
    val: Path | None = None
    """Folder of the validation data, on which the checkpoint is chosen; None: --data."""
    val_split: str | None = None
    """Its split; None: val or dev, whichever is there."""
    hold_out: int = 0
    """Take so many training pictures out of the training, as validation data, in place of --val; drawn by their keys alone."""
    test: Path | None = None
    """Folder of the test data; None: --data. It decides nothing."""
    test_split: str | None = None
    """Its split; None: test, dev or val, whichever is there and is not validation; none: no test."""
    out: Path | None = None
    """The run folder; None: runs/RECIPE-HEAD."""
    seeds: int = 1
    """Runs with seeds --seed, --seed + 1, …, in seed-N of the run folder; their mean and deviation are reported."""
    seed: int = 0
    """Decides new weights, order, augmentation, captions and dropout."""
    resume: bool = False
    """Go on from the newest whole checkpoint of the run folder, or begin where there is none."""
    overwrite: bool = False
    """Remove the run in the run folder and start anew."""
    allow_partial: bool = False
    """Train and evaluate even if images of a known data set are missing."""
    ranks: int | None = None
    """Processes that are expected; with another number the run does not start. None: what the launcher says."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: under autocast; weights, norms, softmaxes and losses stay fp32."""

    width: int = 1024
    """Of the elements of sets."""
    options: tuple[str, ...] = ()
    """Of the head, as num_elements=4 (docs/heads.md)."""
    image_options: tuple[str, ...] = ()
    """Of the image side alone."""
    text_options: tuple[str, ...] = ()
    """Of the text side alone."""
    similarity: str | None = None
    """Another similarity than the head's own."""
    similarity_options: tuple[str, ...] = ()
    """Its options, as alpha=16."""
    projection: Literal["vseinf", "dive"] | None = None
    """A residual MLP between regions and the image head, as VSE∞ and DivE have it; None: none."""
    inference: Inference | None = None
    """What evaluation compares: set, or hybrid (dhset, dhset_fragment; their default)."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)

    batch_size: int = 128
    """Pictures a step, over all ranks."""
    accumulate: int = 1
    """Micro-batches in which a rank's share of a step is encoded, twice each; the loss is that of the whole batch."""
    captions_per_image: int = 1
    """Captions of each, drawn anew at each epoch."""
    epochs: float = 30.0
    """Passes over the pictures."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(kind="none"))
    """Of pictures whose features are not cached."""
    workers: int | None = None
    """Processes that decode pictures, a rank, where features are not cached; None: by the number of cores."""
    match: Literal["instance", "class"] | None = None
    """class: pictures of the same class (CUB) are no negatives. None: class where the shards have classes."""
    shared_objects: float | None = None
    """Pairs whose objects have at least this IoU are no negatives either; None: all are."""
    objects: str = "pos"
    """Whose parsed objects that, and contrastive losses with soft targets, look at."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    triplet: TripletConfig = field(default_factory=TripletConfig)
    triplet_hybrid: HybridTripletConfig = field(default_factory=HybridTripletConfig)
    contrastive: LossConfig = field(default_factory=lambda: LossConfig(name="hard"))
    pcme: PcmeConfig = field(default_factory=PcmeConfig)
    mmd: MmdConfig = field(default_factory=MmdConfig)
    uniformity: UniformityConfig = field(default_factory=UniformityConfig)
    dhset_diversity: DhSetDiversityConfig = field(default_factory=DhSetDiversityConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: TrackerConfig = field(default_factory=TrackerConfig)

    eval_every: float = 1.0
    """Epochs between validations; the best one's weights are what the run gives."""
    eval_weights: Literal["model", "ema"] = "model"
    """Whose: of the weights in training, or of their moving average (--ema.decay)."""
    log_every_steps: int = 20
    """Steps between lines, over which they average."""
    save_every_minutes: float = 10.0
    """Minutes between checkpoints, beside one at each validation; 0: those alone."""
    keep: int = 1
    """Newest checkpoints that stay, beside the chosen one."""

    def __post_init__(self) -> None:
        for name in ("width", "batch_size", "captions_per_image", "accumulate", "log_every_steps", "keep", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.region_captions < 1:
            raise ValueError(f"region_captions must be at least 1, found {self.region_captions}")
        for name in ("epochs", "eval_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.hold_out < 0 or self.save_every_minutes < 0:
            raise ValueError("hold_out and save_every_minutes must not be negative")
        if self.hold_out and (self.val is not None or self.val_split is not None):
            raise ValueError("hold_out takes validation data from the training data; give it, or --val and --val-split")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: continue the run, or remove it")
        if self.eval_weights == "ema" and not self.ema.decay:
            raise ValueError("eval_weights ema needs a moving average; give --ema.decay, for example 0.999")

    def needs_objects(self) -> bool:
        """Returns whether a loss looks at parsed objects of captions."""
        has_target = bool(self.weights.contrastive) and self.contrastive.find_target().similarity is not None
        return self.shared_objects is not None or has_target

    def head_settings(self) -> HeadSettings:
        """Returns what builds the heads. Raises InputError on an option that is not NAME=VALUE."""
        return HeadSettings(
            name=self.head,
            width=self.width,
            options=similarity_options_of(self.options),
            image_options=similarity_options_of(self.image_options),
            text_options=similarity_options_of(self.text_options),
            similarity=self.similarity,
            similarity_options=similarity_options_of(self.similarity_options),
            inference=self.inference,
            projection=self.projection,
        )

    def terms(self) -> dict[str, Weighted]:
        """Returns the losses that count, with their settings."""
        settings: dict[str, Any] = {name: getattr(self, name, None) or term.config() for name, term in LOSSES.items()}
        weights = {name: getattr(self.weights, name) for name in LOSSES}
        return {name: Weighted(settings[name], weight) for name, weight in weights.items() if weight}

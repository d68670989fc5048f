"""The configuration of a pretraining run, and the named recipes. docs: `python -m pretrain.run RECIPE --help`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from pretrain.bad_steps import GuardConfig
from pretrain.checkpoints import SaveConfig
from pretrain.ema import EmaConfig
from pretrain.engine import EngineConfig
from pretrain.losses import LossConfig
from pretrain.model_options import ModelConfig
from pretrain.optim import OptimConfig
from pretrain.text_domains import TextConfig
from pretrain.trackers import LogConfig
from setclip.errors import InputError
from setclip.images import AugmentConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on. docs/formats.md describes shards and the data order."""

    shards: tuple[str, ...] | None = None
    """Folders or addresses (https://…, s3://…) with manifest.json; without, the recipe's dataset under $SETCLIP_DATA (data/)."""
    weights: tuple[float, ...] = ()
    """How often an epoch has each sample of each of several --data.shards; fractions: parts that change from epoch to epoch."""
    split: str = "train"
    """Of the manifest's splits."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_lanes: int = 256
    """Lanes of the data order; the number of ranks must divide it."""
    block_size: int | None = None
    """Samples read in one run; None: 512, less for small data so that lanes still mix."""
    window_blocks: int = 4
    """A lane shuffles within this many blocks."""
    workers: int | None = None
    """Loader processes a rank; None: the cores that the ranks leave over. 0 loads in the training process."""
    max_bad: float = 0.05
    """Stop when more than this share of the samples read cannot be used."""
    cache: Path | None = None
    """Where blocks of shards on a server are kept, on a local disk; None: setclip-blocks under ~/.cache."""
    cache_gb: float = 64.0
    """Room for them, in 10⁹ bytes, for all ranks of a machine together."""
    tries: int = 8
    """Times that a read from a server is tried, with growing pauses: 8 are about a minute of a server that is down."""
    stall_seconds: float = 30.0
    """Without a byte from a server, after which a read is tried again."""

    def __post_init__(self) -> None:
        if isinstance(self.shards, str | Path):  # from Python: one place is as good as a list of it
            object.__setattr__(self, "shards", (str(self.shards),))
        if self.tries < 1 or self.stall_seconds <= 0 or self.cache_gb <= 0:
            raise ValueError("data.tries must be at least 1, data.stall_seconds and data.cache_gb above 0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation along the way, on all ranks."""

    every_steps: int = 0
    """Evaluate after each of so many steps, and after the last; 0: never."""
    zeroshot: Path | None = None
    """Folder of class folders for zero-shot top-1; beside it objects.parquet gives head, middle and tail."""
    retrieval: Path | None = None
    """Shards for recalls; their split test, dev or val is taken."""
    weights: Literal["model", "ema"] = "model"
    """Whose figures: of the weights in training, or of their moving average (--ema.decay)."""

    def figures(self) -> list[str]:
        """Returns the names of the figures that may come out and are the better the higher; none without evaluation."""
        names: list[str] = []
        if self.every_steps and self.zeroshot is not None:
            groups = [f"top1_{group}" for group in ("head", "middle", "tail", "unseen")]
            names += [f"zeroshot_{name}" for name in ("top1", "top5", "mean_per_class", *groups)]
        if self.every_steps and self.retrieval is not None:
            names += ["rsum", *(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10))]
        return names


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run."""

    out: Path | None = None
    """The run folder; None: runs/RECIPE."""
    resume: bool = False
    """Continue from the newest whole checkpoint in the run folder."""
    change: bool = False
    """With --resume: go on with other settings of --optim, --loss, --steps or --epochs than the run was begun with."""
    overwrite: bool = False
    """Remove the run in the run folder and start anew."""
    check_memory: bool = True
    """Stop before anything is built where more memory is expected to be needed than there is; False only notes it."""
    dataset: str | None = None
    """Dataset by name under $SETCLIP_DATA, where --data.shards is not given."""
    objects: Literal["pos", "llm"] = "pos"
    """Whose object lists the loss uses: the part-of-speech parser's or the language model's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    global_batch_size: int = 4096
    """Pairs a step over all ranks and micro-batches: each is a negative of all others, or of its --loss.group-size."""
    epochs: float = 32.0
    """Passes over the data; --steps overrides it."""
    steps: int | None = None
    """Steps of the whole run."""
    seed: int = 0
    """Decides initial weights, data order, augmentation and caption choice."""
    log_every_steps: int = 50
    """Steps between lines in the log and in metrics.jsonl, over which they average."""
    log: LogConfig = field(default_factory=LogConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.save.best is not None and self.save.best not in self.eval.figures():
            there = ", ".join(self.eval.figures()) or "none, because --eval.every-steps or the data for it is not set"
            raise ValueError(
                f"--save.best must be a figure of the evaluation along the way, found {self.save.best!r}; figures: {there}"
            )
        if self.eval.weights == "ema" and not self.ema.decay:
            raise ValueError("eval.weights ema needs a moving average; give --ema.decay, for example 0.9998")
        if self.change and not self.resume:
            raise ValueError("change is for --resume True: it lets a run go on with other settings")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: continue the run, or remove it")

    def total_steps(self, num_samples: int) -> int:
        """Returns the optimizer steps of the run over `num_samples` samples an epoch. Raises InputError if none."""
        if num_samples < self.global_batch_size:
            raise InputError(
                f"expected at least one global batch of {self.global_batch_size} samples, found {num_samples}; "
                f"use --global-batch-size {max(1, num_samples // 4)} or more data"
            )
        steps = self.steps if self.steps is not None else int(self.epochs * num_samples // self.global_batch_size)
        if steps < 1:
            raise InputError(
                f"expected at least one step, found --steps {self.steps}, --epochs {self.epochs}; raise them"
            )
        return steps


def local_batch_size(
    global_batch_size: int, world_size: int, accumulation: int = 1, group_size: int | None = None
) -> int:
    """Returns the pairs a rank. Raises InputError with the nearest numbers where ranks, micro-batches or groups do not divide."""
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        near = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise InputError(
            f"global_batch_size {global_batch_size} is not a multiple of {world_size} ranks; nearest: {near}"
        )
    local = global_batch_size // world_size
    if local % accumulation:
        divisors = [n for n in range(1, local + 1) if local % n == 0]
        nearest = [max(n for n in divisors if n < accumulation), *[n for n in divisors if n > accumulation][:1]]
        raise InputError(
            f"{local} pairs a rank cannot be cut into {accumulation} equal micro-batches; nearest: --engine.accumulation "
            f"{' or '.join(map(str, nearest))}"
        )
    if group_size is not None and local % group_size:
        divisors = [n for n in range(2, local + 1) if local % n == 0]
        nearest = sorted(divisors, key=lambda n: abs(n - group_size))[:1]
        raise InputError(
            f"{local} pairs a rank cannot be cut into groups of {group_size} pairs, each of one rank; nearest: "
            f"--loss.group-size {nearest[0] if nearest else 'None'}"
        )
    return local


def tiny() -> PretrainConfig:
    """The embedded corpus on a CPU: a small convolutional CLIP, 500 steps in about four minutes on two cores."""
    return PretrainConfig(
        dataset="scenes",
        model=ModelConfig(name="conv-tiny-64"),
        data=DataConfig(augment=AugmentConfig(kind="shift")),
        optim=OptimConfig(lr=4e-3, weight_decay=0.1, warmup_share=0.1),
        global_batch_size=256,
        steps=500,
        log_every_steps=25,
        save=SaveConfig(every_steps=500),
    )


def photos() -> PretrainConfig:
    """A few thousand photographs on a CPU (Flickr8k size): a small convolutional CLIP at 96 pixels, under 20 minutes."""
    return PretrainConfig(
        model=ModelConfig(name="conv-small-96"),
        data=DataConfig(augment=AugmentConfig(kind="resized_crop", scale=(0.5, 1.0), flip=True)),
        optim=OptimConfig(lr=3e-3, weight_decay=0.2, warmup_share=0.1),
        global_batch_size=256,
        epochs=16,
        log_every_steps=20,
        save=SaveConfig(every_steps=200),
    )


def _at_scale(dataset: str, model: str) -> PretrainConfig:
    """ViT, batch 4096, 32 epochs, one epoch of warm-up would be 1/32: AlignCLIP's settings as far as reconstructed."""
    return PretrainConfig(
        dataset=dataset,
        model=ModelConfig(name=model),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_share=1 / 32),
        engine=EngineConfig(zero_stage=1, precision="bf16"),
        global_batch_size=4096,
        epochs=32,
    )


# Recipe to data set. Which of the two lists the papers mean by YFCC15M they do not say: the bare name is OpenAI's subset.
_CORPORA = {name: name for name in ("cc3m", "cc12m", "yfcc15m-clip", "yfcc15m-declip")} | {"yfcc15m": "yfcc15m-clip"}

RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "tiny": tiny,
    "photos": photos,
    **{name: partial(_at_scale, dataset, "ViT-B-32") for name, dataset in _CORPORA.items()},
    **{f"{name}-b16": partial(_at_scale, dataset, "ViT-B-16") for name, dataset in _CORPORA.items()},
}

"""The family of losses: what each row of targets gives, its parameters, and one plain dict of names.

A row gives `true` to its true pairs (its own, and those with an equal text), and `per_similarity` · f + `to_each` to each
other, where f is a similarity of the two object sets. So a row needs only the sum of f over its others. AlignCLIP (Zhang
et al., ACM MM 2024) states the idea of object_iou and its result; all formulas of object_iou are our reconstruction.
Letters: N pairs of the batch, K kinds of rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pretrain.losses.similarity import AtLeast, ExpIou, Iou, Similarity
from setclip.lookup import look_up


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss, and its parameters. What the chosen one does not use is announced when a run begins."""

    name: str = "object_iou"
    """hard, label_smoothing, object_iou, multi_positive, softclip, psd or siglip."""
    target: str | None = None
    """object_iou: budget (the default: 1 − β on the true pair, β by IoU), mix (1 − β on the true pair, β by IoU, the
    true pair's own included), l1 (IoU over its row's sum) or softmax (of IoU over a temperature). siglip: hard (the
    default) or iou (the label of another pair is β times its IoU)."""
    beta: float = 0.2
    """object_iou, budget: the mass that goes to other pairs that share objects; mix: the share of l1. softclip: the
    share of softmax. siglip, iou: the label of a pair with equal objects."""
    weights: Literal["none", "frequency"] = "none"
    """IoU of objects that count alike, or by log(captions / captions that name the object), from objects.parquet."""
    no_overlap: Literal["one_hot", "uniform"] = "one_hot"
    """object_iou, budget: what a row gets that shares no object with any other."""
    temperature: float = 0.05
    """object_iou, softmax, and softclip: what IoU is divided by."""
    threshold: float = 0.5
    """multi_positive: the IoU from which a pair counts as true; 1 is equal sets."""
    smoothing: float = 0.2
    """label_smoothing: α."""
    smoothing_split: Literal["others", "all"] = "others"
    """label_smoothing: α over the other pairs (PyramidCLIP), or over all (PyTorch)."""
    negatives_weight: float = 1.0
    """softclip: of the term on negatives alone."""
    hard_share: tuple[float, float] = (1.0, 0.2)
    """psd: the share of pairs with one-hot targets, first and last; a cosine leads from one to the other."""
    teacher_temperature: float = 0.1
    """psd: what the model's own cosines are divided by to make targets."""
    equal_texts: Literal["positives", "negatives"] = "positives"
    """What pairs with an equal text are to each other. CLIP takes them for negatives."""
    group_size: int | None = None
    """Contrast a pair with the others of its group of so many alone, of one rank and consecutive there; None: with all
    pairs of the step. At a rank's batch it is training without gathered features."""

    def __post_init__(self) -> None:
        self.find_target()
        for entry in dataclasses.fields(self):
            kind = get_type_hints(LossConfig)[entry.name]
            allowed = get_args(kind)
            if get_origin(kind) is Literal and getattr(self, entry.name) not in allowed:
                raise ValueError(
                    f"{entry.name} must be one of {', '.join(allowed)}, found {getattr(self, entry.name)!r}"
                )
        for name in ("beta", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), found {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], found {self.threshold}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive, found {self.temperature}")
        if not self.teacher_temperature >= 0.02:
            raise ValueError(f"teacher_temperature must be at least 0.02, found {self.teacher_temperature}")
        if len(self.hard_share) != 2 or not all(0 <= share <= 1 for share in self.hard_share):
            raise ValueError(f"hard_share must be two numbers in [0, 1], found {self.hard_share}")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, or a pair had no others; found {self.group_size}")
        if not self.negatives_weight >= 0:
            raise ValueError(f"negatives_weight must not be negative, found {self.negatives_weight}")
        if self.name == "softclip" and self.beta == 0:
            raise ValueError("softclip takes the logarithm of its targets: beta must be above 0, found 0")

    @property
    def full_name(self) -> str:
        """The name, with its target where there is a choice."""
        targets = LOSSES[self.name]
        return self.name if len(targets) == 1 else f"{self.name}/{self.target or next(iter(targets))}"

    def find_target(self) -> "Target":
        """Returns the entry of this name and target. Raises InputError with the nearest name."""
        targets = look_up(LOSSES, self.name, "loss")
        if "" in targets:
            return targets[""]
        return look_up(targets, self.target or next(iter(targets)), f"target of {self.name}")

    def ignored(self) -> dict[str, object]:
        """Returns the settings that differ from their defaults though this loss does not use them."""
        used = {"name", "equal_texts", "group_size", *self.find_target().uses}
        if len(LOSSES[self.name]) > 1:
            used.add("target")
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in used and value != defaults[name]}


@dataclass(frozen=True)
class Crowd:
    """What a row's others are like. (K,) each, a kind of rows."""

    true: Tensor
    """float64 ≥ 1: the number of true pairs"""
    others: Tensor
    """float64: the number of all other pairs"""
    overlaps: Tensor
    """bool: whether any of them shares an object with it"""
    total: Tensor
    """float64: the sum of the similarity over them"""


@dataclass(frozen=True)
class Rows:
    """What each kind of row gives, (K,) float64."""

    true: Tensor
    """To all its true pairs together"""
    per_similarity: Tensor
    to_each: Tensor


@dataclass(frozen=True)
class Target:
    """An entry of the family."""

    rows: Callable[[Crowd, LossConfig], Rows]
    """What each kind of row gives"""
    similarity: Callable[[LossConfig], Similarity] | None = None
    """None: all others are alike, whatever their objects"""
    uses: tuple[str, ...] = ()
    """The settings that it reads"""


def hard(crowd: Crowd, config: LossConfig) -> Rows:
    """One-hot: CLIP (Radford et al. 2021, arXiv 2103.00020). Stated."""
    none = torch.zeros_like(crowd.total)
    return Rows(torch.ones_like(crowd.total), none, none)


def label_smoothing(crowd: Crowd, config: LossConfig) -> Rows:
    """All other texts alike: PyramidCLIP (Gao et al. 2022, arXiv 2204.14095) states equal weights and 0.2.

    Split "others": 1 − α on the true pair, α/(N − 1) on each other; "all" (PyTorch's own): α/N on each, the true pair
    included. Which of them the papers mean is not stated.
    """
    counts = crowd.others if config.smoothing_split == "others" else crowd.others + crowd.true
    share = torch.where(crowd.others > 0, config.smoothing / counts.clamp_min(1), 0.0)
    return Rows(1 - share * crowd.others, torch.zeros_like(share), share)


def budget(crowd: Crowd, config: LossConfig) -> Rows:
    """1 − β on the true pair, β on the others in proportion to their IoU. Reconstructed.

    A row that overlaps no other text stays one-hot, or spreads β evenly (`no_overlap="uniform"`). β = 0.2 moves the
    same mass as label smoothing of 0.2 does, so the two differ only in where it goes.
    """
    spread = torch.where(
        crowd.overlaps, config.beta / crowd.total.where(crowd.overlaps, torch.ones_like(crowd.total)), 0.0
    )
    evenly = ~crowd.overlaps & (crowd.others > 0) & (config.no_overlap == "uniform")
    to_each = torch.where(evenly, config.beta / crowd.others.clamp_min(1), 0.0)
    return Rows(1 - config.beta * (crowd.overlaps | evenly).to(spread), spread, to_each)


def mix(crowd: Crowd, config: LossConfig) -> Rows:
    """(1 − β) of one-hot and β of `l1`. Reconstructed."""
    share = config.beta / (crowd.true + crowd.total)
    return Rows(1 - share * crowd.total, share, torch.zeros_like(share))


def l1(crowd: Crowd, config: LossConfig) -> Rows:
    """Similarity divided by its sum over the row, the true pair's being 1: the true pair's share falls as batches grow.

    Reconstructed. With a similarity of 0 and 1 it makes all pairs above the threshold equally true (multi_positive).
    """
    share = 1 / (crowd.true + crowd.total)
    return Rows(crowd.true * share, share, torch.zeros_like(share))


def softmax(crowd: Crowd, config: LossConfig) -> Rows:
    """Softmax of IoU over a temperature, the true pair's IoU being 1: never zero. Reconstructed."""
    floor = ExpIou(config.temperature).floor  # of exp((IoU − 1) / τ), where nothing is shared
    share = 1 / (crowd.true + crowd.others * floor + crowd.total)
    return Rows(crowd.true * share, share, share * floor)


def softclip(crowd: Crowd, config: LossConfig) -> Rows:
    """(1 − β) of one-hot and β of `softmax`; `pretrain.losses.softclip` says what is done with it.

    SoftCLIP (Gao et al. 2023, arXiv 2303.17561) states the idea; the variant that compares object tags, in our words.
    """
    rows = softmax(crowd, config)
    beta = config.beta
    return Rows(1 - beta + beta * rows.true, beta * rows.per_similarity, beta * rows.to_each)


def labels(crowd: Crowd, config: LossConfig) -> Rows:
    """Of siglip: labels between 0 and 1, which need not sum to 1. 1 for each true pair, β · IoU for each other.

    SigLIP (Zhai et al. 2023, arXiv 2303.15343) states β = 0; the soft labels are ours.
    """
    share = torch.full_like(crowd.total, config.beta)
    return Rows(crowd.true, share, torch.zeros_like(share))


def hard_labels(crowd: Crowd, config: LossConfig) -> Rows:
    """Of siglip: 1 for each true pair, 0 for each other. Stated."""
    none = torch.zeros_like(crowd.total)
    return Rows(crowd.true, none, none)


def _iou(config: LossConfig) -> Similarity:
    return Iou()


def _exp_iou(config: LossConfig) -> Similarity:
    return ExpIou(config.temperature)


LOSSES: Mapping[str, Mapping[str, Target]] = {
    "hard": {"": Target(hard)},
    "label_smoothing": {"": Target(label_smoothing, uses=("smoothing", "smoothing_split"))},
    "object_iou": {
        "budget": Target(budget, _iou, ("beta", "weights", "no_overlap")),
        "mix": Target(mix, _iou, ("beta", "weights")),
        "l1": Target(l1, _iou, ("weights",)),
        "softmax": Target(softmax, _exp_iou, ("weights", "temperature")),
    },
    "multi_positive": {"": Target(l1, lambda config: AtLeast(config.threshold), ("weights", "threshold"))},
    "softclip": {"": Target(softclip, _exp_iou, ("beta", "weights", "temperature", "negatives_weight"))},
    "psd": {"": Target(hard, uses=("hard_share", "teacher_temperature"))},
    "siglip": {"hard": Target(hard_labels), "iou": Target(labels, _iou, ("beta", "weights"))},
}
"""Loss name to target name to entry; "" is the only target of a loss that has no choice, the first is the default."""

"""Parameters, operations, encoding time and storage of each head, and the time of comparing what it makes; one thread.

    python -m benchmarks.heads [--quick True] [--backbone frcnn_bigru|resnet152_bigru|vit_bert] [--json FILE] [--table FILE]

Heads alone: features are random numbers in the backbone's shapes, so its own time is not in it. Operations are those of
matrix products (a multiplication and an addition are two), counted by PyTorch's FlopCounterMode while the heads run; that of
recurrent layers and of element-wise work is not. Times are CPU time, the median of the repeats.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from setclip.config import command, parse
from setclip.files import replacing, write_json
from setclip.log import say
from setclip.models.heads import HEADS, HeadOutput, HeadPair, SideWidths, make_pair
from setclip.provenance import describe


@dataclass(frozen=True)
class Backbone:
    """What a backbone gives of a sample."""

    num_patches: int
    image: SideWidths
    text: SideWidths
    num_words: int = 12
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a head's image side, by the head's name"""


BACKBONES = {
    # text of slots in DivE: word embeddings of 300; the mean of two GRU states
    "frcnn_bigru": Backbone(36, SideWidths(2_048, 1_024), SideWidths(300, 1_024)),
    "resnet152_bigru": Backbone(
        49,
        SideWidths(2_048, 2_048),
        SideWidths(300, 1_024),
        options={"asa": {"scales": [(14, 14), (7, 7)], "widths": [1_024, 2_048]}},
    ),
    "vit_bert": Backbone(196, SideWidths(768, 768), SideWidths(768, 768)),
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures heads."""

    quick: bool = False
    """Few samples and repeats, in seconds: times are rough."""
    backbone: Literal["frcnn_bigru", "resnet152_bigru", "vit_bert"] = "frcnn_bigru"
    """Whose shapes the features have."""
    width: int = 1_024
    """D, of embeddings."""
    repeats: int = 5
    """Measurements of each time."""
    json: Path | None = None
    """File for the figures."""
    table: Path | None = None
    """File for the table, Markdown."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.width < 1:
            raise ValueError(f"repeats and width must be at least 1, found {self.repeats} and {self.width}")


def measure(name: str, backbone: Backbone, width: int, batch: int, repeats: int) -> dict[str, Any]:
    """Returns the figures of a head: counts, and medians in milliseconds a sample and microseconds a pair."""
    torch.manual_seed(0)
    hybrid = "hybrid" if HEADS[name].has_hybrid else "set"
    pair = make_pair(
        name, backbone.image, backbone.text, width, image_options=backbone.options.get(name), inference=hybrid
    )
    pair.eval().requires_grad_(False)
    images = _features(backbone.num_patches, backbone.image, batch)
    if scales := backbone.options.get(name, {}).get("scales"):
        images = (torch.randn(batch, sum(r * c for r, c in scales), backbone.image.local), images[1])
    texts = _features(backbone.num_words, backbone.text, batch)
    image_sets, text_sets = _encode(pair.image, images), _encode(pair.text, texts)
    figures: dict[str, Any] = {
        "image_parameters": _parameters(pair.image),
        "text_parameters": _parameters(pair.text),
        "similarity_parameters": _parameters(pair.similarity),
        "image_flops": _flops(lambda: _encode(pair.image, images)) / batch,
        "text_flops": _flops(lambda: _encode(pair.text, texts)) / batch,
        "pair_flops": _flops(lambda: pair.scores(image_sets, text_sets)) / batch**2,
        "image_elements": image_sets.sets.shape[1],
        "text_elements": text_sets.sets.shape[1],
        "image_ms": 1e3 * _seconds(lambda: _encode(pair.image, images), repeats) / batch,
        "text_ms": 1e3 * _seconds(lambda: _encode(pair.text, texts), repeats) / batch,
        "pair_us": 1e6 * _seconds(lambda: pair.scores(image_sets, text_sets), repeats) / batch**2,
        "image_bytes": image_sets.sets[0].nbytes,
        "text_bytes": text_sets.sets[0].nbytes,
    }
    if pair.hybrid is not None:
        figures["hybrid_pair_us"] = _hybrid_seconds(pair, image_sets, text_sets, repeats) * 1e6 / batch**2
    return figures


def _hybrid_seconds(pair: HeadPair, images: HeadOutput, texts: HeadOutput, repeats: int) -> float:
    """Returns the seconds of comparing by the hybrid similarity; of the holistic form with vectors that are stored."""
    if images.sets.shape[1] > 1:
        return _seconds(lambda: pair.scores(images, texts, inference=True), repeats)
    vectors = pair.text.hybrid(texts.sets)  # type: ignore[operator]
    return _seconds(lambda: images.sets[:, 0] @ vectors.T, repeats)


def _features(count: int, widths: SideWidths, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, count, widths.local, generator=generator),
        torch.randn(batch, widths.pooled or 1, generator=generator),
    )


def _encode(head: torch.nn.Module, features: tuple[Tensor, Tensor]) -> HeadOutput:
    return head(features[0], None, features[1] if head.takes_global else None)


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Returns the median CPU time of a call, of calls that take turns long enough to be measured."""
    work()
    taken = []
    for _ in range(repeats):
        start, calls = time.process_time(), 0
        while time.process_time() - start < 0.02:
            work()
            calls += 1
        taken.append((time.process_time() - start) / calls)
    return statistics.median(taken)


def table_of(figures: dict[str, dict[str, Any]]) -> str:
    """Returns the figures as a Markdown table."""
    lines = [
        "| head | parameters, image + text (million) | operations, image / text (million) | encoding, image / text (ms) | "
        "elements, image × text | storage, image / text (kB) | comparing a pair (µs) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in figures.items():
        extra = f" + {f['similarity_parameters'] / 1e6:.2f}" if f["similarity_parameters"] > 1000 else ""
        hybrid = f", hybrid {_short(f['hybrid_pair_us'])}" if "hybrid_pair_us" in f else ""
        lines.append(
            f"| {name} | {f['image_parameters'] / 1e6:.2f} + {f['text_parameters'] / 1e6:.2f}{extra} "
            f"| {_short(f['image_flops'] / 1e6)} / {_short(f['text_flops'] / 1e6)} "
            f"| {_short(f['image_ms'])} / {_short(f['text_ms'])} | {f['image_elements']} × {f['text_elements']} "
            f"| {_short(f['image_bytes'] / 1e3)} / {_short(f['text_bytes'] / 1e3)} | {_short(f['pair_us'])}{hybrid} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    """Returns a number with three digits at least."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    backbone = BACKBONES[config.backbone]
    batch, repeats = (4, 1) if config.quick else (32, config.repeats)
    figures = {}
    with torch.no_grad():
        for name in HEADS:
            figures[name] = measure(name, backbone, config.width, batch, repeats)
    table = table_of(figures)
    say(
        f"{config.backbone}: {backbone.num_patches} image inputs of {backbone.image.local}, {backbone.num_words} words of "
        f"{backbone.text.local}, D = {config.width}, batches of {batch}, {repeats} repeats, one thread"
    )
    say(table)
    if config.json is not None:
        about = {"backbone": config.backbone, "width": config.width, "batch": batch, "repeats": repeats}
        write_json(config.json, {**about, "heads": figures, "provenance": describe()})
    if config.table is not None:
        with replacing(config.table) as place:
            place.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    command(main)

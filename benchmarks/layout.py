"""What it brings that pictures lie channels last before a tower of convolutions: forward and backward of a batch, CPU time.

    python -m benchmarks.layout [--quick] [--json FILE]

The models of the recipes `tiny` and `photos` in fp32 on one thread, both layouts turn by turn. "channels last" is what
`pretrain.engine` does.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from setclip.config import command, parse
from setclip.files import write_json
from setclip.log import say
from setclip.models.clip import build_clip, image_size_of, model_config

MODELS = ("conv-tiny-64", "conv-small-96")
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures both layouts."""

    quick: bool = False
    """Small batches, two repeats."""
    repeats: int = 7
    """Steps of each layout, of which the median counts."""
    json: Path | None = None
    """File for the figures."""


def seconds(model: torch.nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> float:
    """Returns the CPU time of a forward and backward pass."""
    start = time.process_time()
    output = model(images, tokens)
    (output[0] @ output[1].T).square().mean().backward()
    taken = time.process_time() - start
    model.zero_grad()
    return taken


def measure(name: str, pairs: int, repeats: int) -> dict[str, float]:
    """Returns the median seconds of each layout; the first pass of each is not counted."""
    torch.manual_seed(0)
    model = build_clip(model_config(name)).train()
    size = image_size_of(model)
    images, tokens = torch.randn(pairs, 3, size, size), torch.randint(1, 400, (pairs, model.context_length))
    taken: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(repeats + 1):
        for layout, memory_format in LAYOUTS.items():
            taken[layout].append(seconds(model, images.contiguous(memory_format=memory_format), tokens))
    return {layout: statistics.median(values[1:]) for layout, values in taken.items()}


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    pairs, repeats = (64, 2) if config.quick else (256, config.repeats)
    found = {}
    for name in MODELS:
        taken = measure(name, pairs, repeats)
        ratio = taken["channels first"] / taken["channels last"]
        found[name] = {"pairs": pairs, "seconds": taken, "ratio": ratio}
        told = ", ".join(f"{layout} {value:.3f} s" for layout, value in taken.items())
        say(f"{name}, {pairs} pairs: {told}; {ratio:.2f} times")
    if config.json is not None:
        write_json(config.json, found)


if __name__ == "__main__":
    command(main)

"""Time and memory of the Object-IoU loss against open_clip's hard loss, on the objects of real captions.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.loss [--quick True] [--json FILE]

DIR/captions holds cc3m_val_first8000, laion_10k, coco_val2014_30k and flickr30k (.tsv.gz, the caption in the last column).
Times are CPU seconds of one thread, forward and backward, the least of some repeats that take turns; "soft" makes its
targets, "targets ready" has them, "soft part" makes and applies them. Features are drawn at random (D = 512, fp32), each
image near its text. Memory is the peak of a process of its own above its inputs.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import setclip  # noqa: F401 (before torchvision, which open_clip imports)

# isort: split
import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from benchmarks.parsing import corpus
from data_prep.parse_pos import PosParser
from pretrain.loader import pad_objects
from pretrain.losses import BatchSets, LossConfig, contrastive_loss, prepare_targets
from setclip.config import command, parse
from setclip.files import write_json
from setclip.log import say

GOALS = {
    "time": {4_096: 0.70, 8_192: 0.70, 16_384: 0.65},
    "memory": {16_384: 0.10},
    "soft_over_hard": {8_192: 1.10, 16_384: 1.05, 32_768: 1.03},
    "growth": 6.0,
}
WIDTH, SCALE = 512, 1 / 0.07
WEB = ("cc3m_val_first8000", "laion_10k", "coco_val2014_30k")
LOSSES = {"hard": LossConfig(name="hard"), "soft": LossConfig()}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures the loss."""

    quick: bool = False
    """Small batches only, in under a minute: figures are not those of the goals."""
    sizes: tuple[int, ...] = (4_096, 8_192, 16_384)
    """Batches on which open_clip's loss is measured too."""
    largest: int = 32_768
    """The batch on which only ours are measured; 0: none."""
    repeats: int = 3
    """Measurements of the smallest batch; half as many for each doubling, one at least."""
    json: Path | None = None
    """File for the figures."""
    memory_of: str | None = None
    """Used by the benchmark itself: prints the peak memory of one loss (open_clip, hard or soft) on --sets FILE."""
    sets: Path | None = None
    """Used by the benchmark itself: padded ids, written by torch.save."""


def web_sets(size: int) -> Tensor:
    """Returns the padded objects of the first captions of three corpora, shuffled together."""
    captions = [caption for name in WEB for caption in corpus(name)]
    random.Random(0).shuffle(captions)
    return pad_objects(PosParser().parse(captions[:size]))


def merged_sets(size: int) -> Tensor:
    """Returns the padded objects of images of Flickr30k, those of their five captions together."""
    path = Path(os.environ["SETCLIP_REAL_DATA"]) / "captions" / "flickr30k.tsv.gz"
    captions: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            name, caption = line.rstrip("\n").split("\t")
            captions.setdefault(name, []).append(caption)
    parser = PosParser()
    chosen = list(captions.values())[:size]
    found = iter(parser.parse([caption for of_image in chosen for caption in of_image]))
    return pad_objects([[name for _ in of_image for name in next(found)] for of_image in chosen])


def features(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns unit image and text features, (N, 512) each, and the logit scale, all with gradient."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(size, WIDTH, generator=generator)
    images = texts + torch.randn(size, WIDTH, generator=generator)
    images, texts = (torch.nn.functional.normalize(side, dim=1).requires_grad_() for side in (images, texts))
    return images, texts, torch.tensor(SCALE, requires_grad=True)


def ways(objects: Tensor) -> dict[str, Callable[[], Any]]:
    """Returns name to one forward and backward pass. "ready" has its targets made beforehand."""
    images, texts, scale = features(len(objects))
    reference = ClipLoss()
    sets = BatchSets(objects, objects)
    ready = {name: prepare_targets(sets, config) for name, config in LOSSES.items()}

    def ours(name: str, prepared: Any) -> Callable[[], Any]:
        def run() -> None:
            output = contrastive_loss(images, texts, scale, sets, LOSSES[name], prepared=prepared)
            torch.autograd.grad(output.loss, (images, texts, scale))

        return run

    def soft_part() -> None:
        targets = prepare_targets(sets, LOSSES["soft"]).targets.to(torch.float32)
        targets.times_texts(texts.detach())
        targets.times_images(images.detach())

    return {
        "open_clip": lambda: torch.autograd.grad(reference(images, texts, scale), (images, texts, scale)),
        "hard": ours("hard", ready["hard"]),
        "soft": ours("soft", None),
        "soft, targets ready": ours("soft", ready["soft"]),
        "soft part": soft_part,
    }


def seconds(each: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of each way and repeat. The ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(repeats):
        for name, work in each.items():
            start = time.process_time()
            work()
            found[name].append(time.process_time() - start)
    return found


def print_peak_memory(name: str, objects: Tensor) -> None:
    """Runs one loss once and prints the peak of resident memory above the inputs, in bytes."""
    ways(objects[:256])[name]()  # what the libraries take at first use
    images, texts, scale = features(len(objects))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    if name == "open_clip":
        loss = ClipLoss()(images, texts, scale)
    else:
        loss = contrastive_loss(images, texts, scale, BatchSets(objects, objects), LOSSES[name]).loss
    torch.autograd.grad(loss, (images, texts, scale))
    say(str(_status("VmHWM") - before))


def _status(name: str) -> int:
    """Returns a size of this process in bytes, as Linux says it: VmRSS now, VmHWM its peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def peak_memory(name: str, objects: Tensor, scratch: Path) -> int:
    """Returns bytes above the inputs, measured in a process of its own."""
    path = scratch / "sets.pt"
    torch.save(objects, path)
    arguments = [sys.executable, "-m", "benchmarks.loss", "--memory-of", name, "--sets", str(path)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(name: str, objects: Tensor, repeats: int, with_open_clip: bool) -> dict[str, Any]:
    """Measures one batch and says what it found."""
    each = ways(objects)
    if not with_open_clip:
        del each["open_clip"]
    found = seconds(each, repeats)
    least = {way: min(values) for way, values in found.items()}
    ratios = {
        "soft_over_hard": least["soft"] / least["hard"],
        "soft_over_hard_targets_ready": least["soft, targets ready"] / least["hard"],
        "soft_part_over_hard": least["soft part"] / least["hard"],
    }
    if with_open_clip:
        ratios |= {f"{way} over open_clip": least[way] / least["open_clip"] for way in least if way != "open_clip"}
    mean = float((objects >= 0).sum(1).double().mean())
    say(f"{name}, N = {len(objects):,}, {mean:.1f} objects a caption, {repeats} repeats")
    for way, values in found.items():
        against = f"   {least[way] / least['open_clip']:.3f} of open_clip" if with_open_clip else ""
        say(f"    {way:20} {least[way]:8.3f} s ({max(values):.3f} at most){against}")
    say(
        f"    soft over hard {ratios['soft_over_hard']:.3f}; targets ready {ratios['soft_over_hard_targets_ready']:.3f}"
    )
    return {"n": len(objects), "objects": mean, "cpu_seconds": found, "ratios": ratios}


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    if config.memory_of is not None and config.sets is not None:
        print_peak_memory(config.memory_of, torch.load(config.sets))
        return
    sizes = (1_024, 2_048) if config.quick else config.sizes
    largest = 0 if config.quick else config.largest
    objects = web_sets(max(*sizes, largest))
    merged = merged_sets(sizes[0])
    figures: dict[str, Any] = {"goals": GOALS, "web": []}
    for number, size in enumerate(sizes):
        figures["web"].append(measure("web captions", objects[:size], max(1, config.repeats >> number), True))
    if largest:
        figures["web"].append(measure("web captions", objects[:largest], 1, False))
    figures["merged"] = measure("five captions an image", merged, config.repeats, True)

    soft_part = {entry["n"]: min(entry["cpu_seconds"]["soft part"]) for entry in figures["web"]}
    if 8_192 in soft_part and 32_768 in soft_part:
        figures["growth"] = soft_part[32_768] / soft_part[8_192]
        say(f"growth of the soft part from 8,192 to 32,768: {figures['growth']:.2f}; goal {GOALS['growth']:g}")
    with TemporaryDirectory() as scratch:
        memory = {way: peak_memory(way, objects[: sizes[-1]], Path(scratch)) for way in ("open_clip", "hard", "soft")}
    figures["memory"] = {"n": sizes[-1], "bytes": memory, "ratio": memory["soft"] / memory["open_clip"]}
    say(
        f"peak memory above inputs, N = {sizes[-1]:,}: "
        + ", ".join(f"{way} {peak / 2**20:,.0f} MiB" for way, peak in memory.items())
        + f"; ratio {figures['memory']['ratio']:.3f}"
    )
    say(f"goals: {json.dumps(GOALS)}")
    if config.json is not None:
        write_json(config.json, figures)


if __name__ == "__main__":
    command(main)

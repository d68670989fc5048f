"""Time and memory of the Object-IoU loss against open_clip's hard loss, on the objects of real captions.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.loss [--quick True] [--json FILE] [--plot FILE]

DIR/captions holds cc3m_val_first8000, laion_10k, coco_val2014_30k and flickr30k (.tsv.gz, the caption in the last column).
Times are CPU seconds of one thread, forward and backward, the least of some repeats that take turns; "soft" makes its
targets, "targets ready" has them, "soft part" makes and applies them; "weighted" counts rare objects more (by the batch's
own frequencies). Features are drawn at random (D = 512, fp32), each
image near its text. Memory is the peak of a process of its own above its inputs.
"""

import gzip
import json
import math
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
from pretrain.losses import BatchSets, LossConfig, ObjectWeights, contrastive_loss, prepare_targets
from setclip.config import command, parse
from setclip.files import replacing, write_json
from setclip.log import say

GOALS = {
    "time": {4_096: 0.70, 8_192: 0.70, 16_384: 0.65},
    "memory": {16_384: 0.10},
    "soft_over_hard": {8_192: 1.10, 16_384: 1.05, 32_768: 1.03},
    "growth": 6.0,
}
WIDTH, SCALE = 512, 1 / 0.07
WEB = ("cc3m_val_first8000", "laion_10k", "coco_val2014_30k")
LOSSES = {"hard": LossConfig(name="hard"), "soft": LossConfig(), "weighted": LossConfig(weights="frequency")}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures the loss."""

    quick: bool = False
    """Small batches only, in under a minute: figures are not those of the goals."""
    sizes: tuple[int, ...] = (2_048, 4_096, 8_192, 16_384)
    """Batches on which open_clip's loss is measured too."""
    largest: int = 32_768
    """The batch on which only ours are measured; 0: none."""
    repeats: int = 4
    """Measurements of the smallest batch; half as many for each doubling, one at least."""
    json: Path | None = None
    """File for the figures."""
    plot: Path | None = None
    """Picture of time and memory against N, .svg or .png."""
    memory_of: str | None = None
    """Used by the benchmark itself: prints the peak memory of one loss (open_clip, hard, soft, weighted) on --sets FILE."""
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
    sets, weights = BatchSets(objects, objects), weights_of(objects)
    ready = {name: prepare_targets(sets, config, weights) for name, config in LOSSES.items()}

    def ours(name: str, prepared: Any) -> Callable[[], Any]:
        def run() -> None:
            output = contrastive_loss(images, texts, scale, sets, LOSSES[name], weights=weights, prepared=prepared)
            torch.autograd.grad(output.loss, (images, texts, scale))

        return run

    def soft_part() -> None:
        targets = prepare_targets(sets, LOSSES["soft"]).groups[0].targets.to(torch.float32)
        targets.times_texts(texts.detach())
        targets.times_images(images.detach())

    each = {
        "open_clip": lambda: torch.autograd.grad(reference(images, texts, scale), (images, texts, scale)),
        "hard": ours("hard", ready["hard"]),
        "soft": ours("soft", None),
        "soft, targets ready": ours("soft", ready["soft"]),
        "weighted": ours("weighted", None),
        "weighted, targets ready": ours("weighted", ready["weighted"]),
    }
    if ready["soft"].groups[0].targets.tiles is None:  # which have no part that could be timed alone
        each["soft part"] = soft_part
    return each


def weights_of(objects: Tensor) -> ObjectWeights:
    """Returns log(captions / captions that name an object), counted in the batch."""
    ids, counts = torch.unique(objects[objects >= 0], return_counts=True)
    return ObjectWeights(ids, (len(objects) / counts.double()).log(), math.log(len(objects)))


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
        sets = BatchSets(objects, objects)
        loss = contrastive_loss(images, texts, scale, sets, LOSSES[name], weights=weights_of(objects)).loss
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
        "weighted_over_hard": least["weighted"] / least["hard"],
    }
    if with_open_clip:
        ratios |= {f"{way} over open_clip": least[way] / least["open_clip"] for way in least if way != "open_clip"}
    mean = float((objects >= 0).sum(1).double().mean())
    say(f"{name}, N = {len(objects):,}, {mean:.1f} objects a caption, {repeats} repeats")
    for way, values in found.items():
        against = f"   {least[way] / least['open_clip']:.3f} of open_clip" if with_open_clip else ""
        say(f"    {way:20} {least[way]:8.3f} s ({max(values):.3f} at most){against}")
    say(
        f"    soft over hard {ratios['soft_over_hard']:.3f}; targets ready {ratios['soft_over_hard_targets_ready']:.3f}; "
        f"weighted over hard {ratios['weighted_over_hard']:.3f}"
    )
    return {"n": len(objects), "objects": mean, "cpu_seconds": found, "ratios": ratios}


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    if config.memory_of is not None and config.sets is not None:
        print_peak_memory(config.memory_of, torch.load(config.sets))
        return
    sizes = (512, 1_024) if config.quick else config.sizes
    largest = 0 if config.quick else config.largest
    objects = web_sets(max(*sizes, largest))
    merged = merged_sets(sizes[-1])
    figures: dict[str, Any] = {"goals": GOALS, "web": [], "merged": []}
    for number, size in enumerate(sizes):
        figures["web"].append(measure("web captions", objects[:size], max(1, config.repeats >> number), True))
    if largest:
        figures["web"].append(measure("web captions", objects[:largest], 1, False))
    for size in sizes[1::2]:
        figures["merged"].append(measure("five captions an image", merged[:size], 1, True))

    soft_part = {entry["n"]: min(entry["cpu_seconds"]["soft part"]) for entry in figures["web"]}
    if 8_192 in soft_part and 32_768 in soft_part:
        figures["growth"] = soft_part[32_768] / soft_part[8_192]
        say(f"growth of the soft part from 8,192 to 32,768: {figures['growth']:.2f}; goal {GOALS['growth']:g}")
    with TemporaryDirectory() as scratch:
        figures["memory"] = [
            {
                "n": size,
                "bytes": {
                    way: peak_memory(way, objects[:size], Path(scratch))
                    for way in ("open_clip", *LOSSES)
                    if way != "open_clip" or size != largest
                },
            }
            for size in (sizes[-1:] if config.quick else (*sizes, *([largest] if largest else [])))
        ]
    for entry in figures["memory"]:
        peaks = entry["bytes"]
        if "open_clip" in peaks:
            entry["ratio"] = peaks["soft"] / peaks["open_clip"]
        say(
            f"peak memory above inputs, N = {entry['n']:,}: "
            + ", ".join(f"{way} {peak / 2**20:,.0f} MiB" for way, peak in peaks.items())
            + (f"; soft over open_clip {entry['ratio']:.3f}" if "ratio" in entry else "")
        )
    say(f"goals: {json.dumps(GOALS)}")
    if config.json is not None:
        write_json(config.json, figures)
    if config.plot is not None:
        draw(figures, config.plot)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draws time and memory against N."""
    import matplotlib.pyplot as plt

    names = {
        "open_clip": "open_clip, hard",
        "hard": "ours, hard",
        "soft": "ours, Object-IoU",
        "weighted": "ours, weighted IoU",
    }
    plt.switch_backend("agg")
    with plt.rc_context({"svg.hashsalt": "loss", "font.size": 9}):
        figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for way, label in names.items():
            of_time = [(e["n"], min(e["cpu_seconds"][way])) for e in figures["web"] if way in e["cpu_seconds"]]
            of_memory = [(e["n"], e["bytes"][way] / 2**20) for e in figures["memory"] if way in e["bytes"]]
            for axis, points in ((time_axis, of_time), (memory_axis, of_memory)):
                axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=label, base=2)
        parts = [(e["n"], min(e["cpu_seconds"]["soft part"])) for e in figures["web"]]
        time_axis.loglog(*zip(*parts, strict=True), "--", color="grey", label="its soft part alone", base=2)
        time_axis.set(title="forward and backward, one thread", xlabel="pairs N", ylabel="CPU seconds")
        memory_axis.set(title="peak above the inputs", xlabel="pairs N", ylabel="MiB")
        time_axis.legend(frameon=False)
        for axis in (time_axis, memory_axis):
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        with replacing(path) as temporary:
            figure.savefig(
                temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
            )
        plt.close(figure)


if __name__ == "__main__":
    command(main)

"""How fast zero-shot classification is against CLIP_benchmark's, on the same checkpoint and tars, in CPU time of one thread.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.zeroshot [--quick] [--json FILE]

10,000 pictures of 32 × 32 pixels (CIFAR-10's test images from DIR/cifar10/test.tar.gz; without DIR generated ones) are packed
as CLIP_benchmark's tars. Both sides then go from checkpoint and tars to accuracy, turn by turn: one thread, no further
processes, batches of 128, fp32 (CLIP_benchmark: --no_amp), the prompts of the tars. Accuracy must be equal to 1e-6; answers
that differ are counted, also for our faster resizing, whose pixels differ a little.

CLIP_benchmark 1.6.2's own `accuracy` fails with numpy 2.4 (float() of an array of one element), so its parts are called, up to
its scores, and accuracies are counted from these.
"""

import contextlib
import io
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch

import setclip  # noqa: F401 (first: it makes torchvision importable on CPU-only machines, and clip_benchmark imports that)

# isort: split
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification as peer
from clip_benchmark.models import load_clip
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.utils.data import DataLoader

from eval_suite.datasets import TEMPLATES
from eval_suite.zeroshot import ZeroShotConfig, evaluate
from setclip.checkpoint import save_checkpoint
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say
from setclip.models.clip import build_clip, model_config

GOAL_TIMES_FASTER = 1.5
GOAL_ACCURACY = 1e-6  # as a share
BATCH_SIZE = 128
SHARDS = 2

MODELS: dict[str, dict[str, Any]] = {
    "vit-48": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 128, "layers": 2, "head_width": 64},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
    },
    "conv-tiny-64": model_config("conv-tiny-64"),
}
"""Name to configuration; weights are random, which is as fast as trained ones. Resizing to 48 pixels rounds, to 64 not."""

Picture = tuple[bytes, int]
"""JPEG and label."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compares zero-shot classification with CLIP_benchmark's."""

    quick: bool = False
    """1,000 pictures, one model, one repeat: for a look."""
    repeats: int = 5
    """Measurements of each side."""
    json: Path | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Side:
    """One evaluation of one side."""

    seconds: float
    """CPU time."""
    top1: float
    mean_per_class: float
    """Shares."""
    predictions: Tensor
    """(N,) int64."""


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"goals": {"times_faster": GOAL_TIMES_FASTER, "accuracy": GOAL_ACCURACY}}
    with tempfile.TemporaryDirectory() as folder:
        names, found, source = pictures(1_000 if config.quick else 10_000)
        tars = write_tars(Path(folder) / "tars", found, names, TEMPLATES["cifar"])
        say(f"{len(found):,} pictures ({source}), CPU time of one thread")
        for name in list(MODELS)[: 1 if config.quick else None]:
            checkpoint = write_model(Path(folder) / name, name)
            figures[name] = compare(checkpoint, tars, len(found), 1 if config.quick else config.repeats)
            _say_figures(name, figures[name])
    if config.json is not None:
        write_json(config.json, {**figures, "pictures": source})


def pictures(count: int) -> tuple[list[str], list[Picture], str]:
    """Returns (class names, `count` pictures, where they are from): as many of each class."""
    root = os.environ.get("SETCLIP_REAL_DATA")
    if root is None:
        return _generated(count)
    path = Path(root) / "cifar10" / "test.tar.gz"
    if not path.is_file():
        raise InputError(
            f"expected CIFAR-10's test images in {path}, found no such file; set SETCLIP_REAL_DATA rightly or not at all"
        )
    by_class: dict[str, list[bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)) is not None:
                by_class.setdefault(Path(member.name).parent.name, []).append(file.read())
    names = sorted(by_class)
    each = count // len(names)
    chosen = [(data, label) for label, name in enumerate(names) for data in by_class[name][:each]]
    return names, chosen, "CIFAR-10, test"


def _generated(count: int) -> tuple[list[str], list[Picture], str]:
    names = ["red", "green", "blue", "grey", "black", "white", "yellow", "pink", "brown", "orange"]
    random = np.random.default_rng(0)
    colors = random.integers(40, 216, (len(names), 3))
    found = []
    for number in range(count):
        label = number * len(names) // count
        noise = random.integers(-40, 40, (8, 8, 3)).repeat(4, 0).repeat(4, 1)
        found.append((simplejpeg.encode_jpeg((colors[label] + noise).astype(np.uint8), 90, "RGB"), label))
    return names, found, "generated"


def write_tars(place: Path, found: Sequence[Picture], names: Sequence[str], templates: Sequence[str]) -> Path:
    """Writes CLIP_benchmark's tars, with names and prompts; returns `place`."""
    folder = place / "test"
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * len(found) // SHARDS, (shard + 1) * len(found) // SHARDS):
                data, label = found[number]
                for extension, content in (("jpg", data), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "nshards.txt").write_text(f"{SHARDS}\n")
    (place / "classnames.txt").write_text("\n".join(names) + "\n")
    lines = [template.replace("{}", "{c}") for template in templates]
    (place / "zeroshot_classification_templates.txt").write_text("\n".join(lines) + "\n")
    return place


def write_model(run: Path, name: str) -> Path:
    """Writes a checkpoint with random weights; returns its folder."""
    torch.manual_seed(0)
    folder = run / "checkpoints" / "step-00000001"
    save_checkpoint(folder, build_clip(MODELS[name]).state_dict(), MODELS[name], {"step": 1, "recipe": name})
    return folder


def compare(checkpoint: Path, tars: Path, num_pictures: int, repeats: int) -> dict[str, Any]:
    """Returns the figures of one model: images per CPU second of each side, accuracies, and answers that differ."""
    theirs, ours, fast = [], [], []
    for _ in range(repeats):  # turn by turn, so that a noisy minute hits all
        theirs.append(evaluate_peer(checkpoint, tars))
        ours.append(evaluate_ours(checkpoint, tars, "pillow"))
        fast.append(evaluate_ours(checkpoint, tars, "torch"))

    def per_second(sides: Sequence[Side]) -> float:
        return num_pictures / statistics.median(side.seconds for side in sides)

    return {
        "images_per_second": {
            "clip_benchmark": per_second(theirs),
            "ours": per_second(ours),
            "ours, --resize torch": per_second(fast),
        },
        "times_faster": statistics.median(a.seconds / b.seconds for a, b in zip(theirs, ours, strict=True)),
        "times_faster_torch": statistics.median(a.seconds / b.seconds for a, b in zip(theirs, fast, strict=True)),
        "top1": {"clip_benchmark": theirs[0].top1, "ours": ours[0].top1, "ours, --resize torch": fast[0].top1},
        "mean_per_class": {"clip_benchmark": theirs[0].mean_per_class, "ours": ours[0].mean_per_class},
        "answers_that_differ": {
            "ours": int((theirs[0].predictions != ours[0].predictions).sum()),
            "ours, --resize torch": int((theirs[0].predictions != fast[0].predictions).sum()),
        },
    }


def evaluate_peer(checkpoint: Path, tars: Path) -> Side:
    """Evaluates as `clip_benchmark eval --dataset wds/… --no_amp --num_workers 0` does, up to its scores."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        start = time.process_time()
        model, transform, tokenizer = load_clip(
            model_type="open_clip", model_name=f"local-dir:{checkpoint}", pretrained="", cache_dir=None, device="cpu"
        )
        model.eval()
        dataset = build_dataset("wds/benchmark", root=str(tars), transform=transform, split="test")
        loader = DataLoader(dataset.batched(BATCH_SIZE), batch_size=None, shuffle=False, num_workers=0)
        classes = peer.zero_shot_classifier(model, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
        logits, labels = peer.run_classification(model, classes, loader, "cpu", amp=False)
        predictions = logits.argmax(axis=1)
        top1 = float((predictions == labels).double().mean())
        mean_per_class = float(balanced_accuracy_score(labels, predictions))
        return Side(time.process_time() - start, top1, mean_per_class, predictions)


def evaluate_ours(checkpoint: Path, tars: Path, resize: Literal["pillow", "torch"]) -> Side:
    """Evaluates as `python -m eval_suite.zeroshot --data TARS` does."""
    config = ZeroShotConfig(data=tars, checkpoint=str(checkpoint), batch_size=BATCH_SIZE, workers=0, resize=resize)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.process_time()
        evaluated = evaluate(config)
        seconds = time.process_time() - start
    metrics = evaluated.results.metrics
    return Side(seconds, metrics["top1"].value / 100, metrics["mean_per_class"].value / 100, evaluated.predictions)


def _say_figures(name: str, found: dict[str, Any]) -> None:
    say(f"\n{name:28}images/s       top-1  answers that differ")
    for side, rate in found["images_per_second"].items():
        differing = found["answers_that_differ"].get(side)
        say(
            f"  {side:24}{rate:10,.0f}{100 * found['top1'][side]:10.4f} %{'' if differing is None else f'{differing:12}'}"
        )
    gap = max(abs(found[metric]["ours"] - found[metric]["clip_benchmark"]) for metric in ("top1", "mean_per_class"))
    reached = "reached" if found["times_faster"] >= GOAL_TIMES_FASTER else "MISSED"
    say(
        f"  times faster: {found['times_faster']:.2f} (goal {GOAL_TIMES_FASTER}: {reached}), with --resize torch "
        f"{found['times_faster_torch']:.2f}"
    )
    say(f"  largest difference of accuracies: {gap:.1e} (goal {GOAL_ACCURACY}: {_kept(gap)})")


def _kept(gap: float) -> str:
    return "reached" if gap <= GOAL_ACCURACY else "MISSED"


if __name__ == "__main__":
    command(main)

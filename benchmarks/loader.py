"""How many images a second one core loads, against open_clip's own reader, on the same tars, to 224 pixels.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.loader [--quick] [--json FILE]

Photographs (DIR/photos_open; without DIR drawn scenes) are packed as tars that both sides read: once those of 256 × 256
pixels with their own bytes, once pictures of 512 × 512 pixels, each four of the former side by side (so that detail is as
dense as in a photograph, and not that of an enlarged one), as JPEG of quality 95. Each side goes from tars to batches of 64
pictures and tokens: reading, decoding, random resized crop (0.9 to 1 of the area, bicubic, antialiased), tokenising,
collating; one process, one thread, no further processes, CPU time. open_clip runs its `open_clip_train.data` with
`image_transform`, in its own environment (`python -m benchmarks.open_clip_environment`). It gives normalised floats; ours
gives uint8, normalised on the model's device, so the time with normalisation on the CPU is told as well. Our side also draws
captions and gives objects' ids.
"""

import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.open_clip_environment import python_of
from data_prep import own_environment
from data_prep.sources.scenes import ScenesConfig, scene_maker
from pretrain.data_order import DataOrder
from pretrain.loader import Loader, SamplePipeline
from pretrain.sources import open_sources
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.images import MEAN, STD, Augment, AugmentConfig, crop_box, normalize
from setclip.log import say
from setclip.manifest import Manifest
from setclip.models.clip import model_config, tokenizer_for
from setclip.provenance import describe
from setclip.shards import KEY_LENGTH, Sample, ShardWriter, key_of

GOAL_TIMES_FASTER = 2.0
SIZES = (256, 512)
IMAGE_SIZE = 224
BATCH_SIZE = 64
SHARDS = 4
LANES, BLOCK_SIZE = 16, 16  # as many samples a lane and block as 4 million have in 256 lanes and blocks of 256
QUALITY = 95  # of pictures that are made here; img2dataset's default


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compares the loader with open_clip's."""

    quick: bool = False
    """256 pictures, one repeat: for a look."""
    repeats: int = 5
    """Measurements of each side."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    """The command."""
    config = parse(BenchmarkConfig, description=__doc__)
    torch.set_num_threads(1)
    samples, repeats = (256, 1) if config.quick else (1024, config.repeats)
    python = python_of()
    small, source = pictures()
    figures: dict[str, Any] = {"goals": {"times_faster": GOAL_TIMES_FASTER}, "provenance": describe()}
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            chosen = small if size == SIZES[0] else mosaics(small)
            folder = write_tars(Path(scratch) / str(size), chosen, samples, size)
            say(f"\n{samples:,} JPEGs of {size} pixels ({source}), to {IMAGE_SIZE}; CPU time of one thread")
            figures[str(size)] = {
                "kilobytes": sum(map(len, chosen)) / len(chosen) / 1e3,
                **compare(python, folder, samples, repeats),
                "pixels": pixels(chosen[: 32 if config.quick else 200]),
            }
            _say_figures(figures[str(size)])
    if config.json is not None:
        write_json(config.json, {**figures, "pictures": source, "samples": samples, "repeats": repeats})


def pictures() -> tuple[list[bytes], str]:
    """Returns JPEGs of 256 × 256 pixels, and where they are from."""
    size = SIZES[0]
    root = os.environ.get("SETCLIP_REAL_DATA")
    if root is None:
        return _drawn(64, size), "drawn scenes"
    folder = Path(root) / "photos_open" / "images"
    found = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    found = [data for data in found if Image.open(io.BytesIO(data)).size == (size, size)]
    if not found:
        raise InputError(
            f"expected photographs of {size} × {size} pixels in {folder}, found none; set SETCLIP_REAL_DATA rightly or not at all"
        )
    return found, f"{len(found)} photographs"


def mosaics(small: Sequence[bytes]) -> list[bytes]:
    """Returns JPEGs of twice the side, each of four pictures."""
    found = []
    for number in range(len(small)):
        parts = [np.asarray(Image.open(io.BytesIO(small[(number + k) % len(small)])).convert("RGB")) for k in range(4)]
        found.append(_jpeg(np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])))
    return found


def _drawn(count: int, size: int) -> list[bytes]:
    defaults = ScenesConfig(out=Path())
    maker = scene_maker(defaults.nouns, defaults.size, defaults.seed)
    scenes = [Image.fromarray(maker.scene("train", number).pixels) for number in range(count)]
    return [_jpeg(np.asarray(scene.resize((size, size), Image.Resampling.LANCZOS))) for scene in scenes]


def _jpeg(pixels: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


def write_tars(folder: Path, chosen: Sequence[bytes], samples: int, size: int) -> Path:
    """Writes shards with an index and a manifest, which open_clip reads as tars; returns the folder."""
    folder.mkdir(parents=True)
    infos = []
    for shard in range(SHARDS):
        with ShardWriter(folder / f"train-{shard:05d}.tar") as writer:
            for number in range(shard, samples, SHARDS):
                data = chosen[number % len(chosen)]
                caption = f"a photograph of number {number} with a dog on the beach beside two children and a red ball"
                writer.add(
                    Sample(
                        key=f"{number:0{KEY_LENGTH}x}",
                        image=data,
                        image_ext="jpg",
                        captions=[caption],
                        objects={"pos": [["ball", "beach", "child", "dog"]]},
                        width=size,
                        height=size,
                        sha256=key_of(data)[1],
                    )
                )
        infos.append(writer.info)
    Manifest(
        source="benchmark", shards=infos, pairs_listed=samples, pairs_present=samples, parsers={"pos": "benchmark"}
    ).save(folder)
    return folder


def compare(python: Path, folder: Path, samples: int, repeats: int) -> dict[str, Any]:
    """Returns images per CPU second of each side, and how many times ours is as fast."""
    theirs, ours, normalised = [], [], []
    for _ in range(repeats):  # turn by turn, so that a noisy minute hits all
        theirs.append(load_theirs(python, folder, samples))
        ours.append(load_ours(folder, samples, is_normalised=False))
        normalised.append(load_ours(folder, samples, is_normalised=True))

    def times(of_ours: Sequence[float]) -> float:
        return statistics.median(b / a for a, b in zip(theirs, of_ours, strict=True))

    return {
        "images_per_second": {
            "open_clip": statistics.median(theirs),
            "ours": statistics.median(ours),
            "ours, normalised on the CPU": statistics.median(normalised),
        },
        "times_faster": times(ours),
        "times_faster_normalised": times(normalised),
        "each": {"open_clip": theirs, "ours": ours, "ours, normalised on the CPU": normalised},
    }


def load_theirs(python: Path, folder: Path, samples: int) -> float:
    """Returns open_clip's images per CPU second."""
    settings = {
        "tars": str(folder / f"train-{{00000..{SHARDS - 1:05d}}}.tar"),
        "samples": samples,
        "batch_size": BATCH_SIZE,
        "image_size": IMAGE_SIZE,
        "workers": 0,
    }
    asked, told = folder / "settings.json", folder / "told.json"
    asked.write_text(json.dumps(settings), encoding="utf-8")
    own_environment.run(
        [str(python), "-m", "benchmarks.open_clip_loader", str(asked), str(told)],
        "run open_clip's reader",
        "make its environment again (python -m benchmarks.open_clip_environment)",
        own_environment.clean_variables(),
    )
    found = json.loads(told.read_text(encoding="utf-8"))
    return found["images"] / found["seconds"]


def load_ours(folder: Path, samples: int, is_normalised: bool) -> float:
    """Returns our images per CPU second."""
    sources = open_sources([str(folder)], (), "train")
    order = DataOrder(tuple(shard.samples for shard in sources.shards), 0, LANES, BLOCK_SIZE)
    tokenizer = tokenizer_for(model_config("ViT-B-32"))
    pipeline = SamplePipeline(sources.open(BLOCK_SIZE), Augment(AugmentConfig(), IMAGE_SIZE), tokenizer, "pos", 0)
    start = time.process_time()
    batches = iter(Loader(order, pipeline, BATCH_SIZE))
    count = 0
    for batch in islice(batches, samples // BATCH_SIZE):
        count += len(batch)
        if is_normalised:
            normalize(batch.images, MEAN, STD)
    return count / (time.process_time() - start)


def pixels(chosen: Sequence[bytes]) -> dict[str, float]:
    """Returns how our pixels differ from those of torchvision's crop of the same place on Pillow's picture (open_clip's)."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    augment = Augment(AugmentConfig(), IMAGE_SIZE)
    differences = []
    for number, data in enumerate(chosen):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = crop_box(image.height, image.width, augment.config, number)
        size = [IMAGE_SIZE, IMAGE_SIZE]
        theirs = np.asarray(resized_crop(image, *box, size, InterpolationMode.BICUBIC)).astype(int)
        ours = augment.decode(data, number).permute(1, 2, 0).numpy().astype(int)
        differences.append(np.abs(ours - theirs).ravel())
    every = np.concatenate(differences)
    return {"mean": float(every.mean()), "largest": int(every.max()), "share_over_2": float((every > 2).mean())}


def _say_figures(found: dict[str, Any]) -> None:
    for side, rate in found["images_per_second"].items():
        say(f"  {side:32}{rate:8,.0f} images/s")
    reached = "reached" if found["times_faster"] >= GOAL_TIMES_FASTER else "MISSED"
    say(
        f"  times faster: {found['times_faster']:.2f} (goal {GOAL_TIMES_FASTER}: {reached}), with normalisation on the CPU "
        f"{found['times_faster_normalised']:.2f}"
    )
    of = found["pixels"]
    say(
        f"  pixels against the same crop by Pillow: {of['mean']:.2f} of 255 on average, at most {of['largest']}, "
        f"{100 * of['share_over_2']:.2f} % more than 2"
    )


if __name__ == "__main__":
    command(main)

"""Small real inputs for the tests of evaluation: a model, class folders and shards, made on the spot."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from setclip.checkpoint import LoadedModel, checkpoint_name, load_model, save_checkpoint
from setclip.manifest import Manifest
from setclip.models.clip import build_clip
from setclip.shards import Sample, ShardWriter, key_of

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (120, 120, 120)}


def write_run(runs: Path, name: str, step: int = 3) -> Path:
    """Writes a run folder with one checkpoint of a small random model; returns the run folder."""
    torch.manual_seed(step)
    data = {"source": "folder", "pairs_present": 90, "pairs_listed": 100}
    description = {"step": step, "samples_seen": 8 * step, "recipe": "tiny", "data": data}
    folder = runs / name / "checkpoints" / checkpoint_name(step)
    save_checkpoint(folder, build_clip(MODEL_CFG).state_dict(), MODEL_CFG, description)
    return runs / name


def small_model(tmp_path: Path) -> LoadedModel:
    """Returns the model of a fresh run."""
    return load_model(write_run(tmp_path / "runs", "small"))


def jpeg(color: tuple[int, int, int], seed: int) -> bytes:
    """Returns a JPEG of 40 × 36 pixels: the colour with noise, so that no two seeds give the same bytes."""
    noise = np.random.default_rng(seed).integers(-20, 20, (36, 40, 3))
    return simplejpeg.encode_jpeg(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8), 90, "RGB")


def write_class_folders(folder: Path, num_per_class: int = 3, names: tuple[str, ...] = tuple(COLORS)) -> Path:
    """Writes `num_per_class` JPEGs for each name, in folders of these names."""
    colors = list(COLORS.values())
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(num_per_class):
            (folder / name / f"{i}.jpg").write_bytes(jpeg(colors[label % len(colors)], 100 * label + i))
    return folder


def write_shards(folder: Path, num_samples: int = 12, captions_each: int = 2, split: str = "test") -> Path:
    """Writes two shards and their manifest."""
    folder.mkdir(parents=True)
    infos = []
    for part in range(2):
        with ShardWriter(folder / f"{split}-{part:05d}.tar", split=split) as writer:
            for i in range(part, num_samples, 2):
                color = list(COLORS)[i % 4]
                image = jpeg(COLORS[color], i)
                key, sha256 = key_of(image)
                captions = [f"a {color} picture, number {i}, text {c}" for c in range(captions_each)]
                objects = {"pos": [["picture"]] * captions_each}
                writer.add(
                    Sample(
                        key=key,
                        image=image,
                        image_ext="jpg",
                        captions=captions,
                        objects=objects,
                        width=40,
                        height=36,
                        sha256=sha256,
                    )
                )
        infos.append(dataclasses.replace(writer.info))
    total = sum(info.captions for info in infos)
    Manifest(source="folder", shards=infos, pairs_listed=total, pairs_present=total).save(folder)
    return folder


def color_of_image(images: torch.Tensor) -> torch.Tensor:
    """An encode function without a network: the mean colour of each image, (B, 3)."""
    return images.float().mean((2, 3)) - 110


def color_of_text(texts: list[str]) -> torch.Tensor:
    """The text side of `color_of_image`: the colour that a text names, (B, 3)."""
    return torch.tensor([next(rgb for name, rgb in COLORS.items() if name in text) for text in texts]).float() - 110


def write_captioned(
    folder: Path,
    captions: Sequence[Sequence[str]],
    extras: Sequence[Mapping[str, Any]],
    split: str = "test",
    **manifest: Any,
) -> Path:
    """Writes shards of images of 40 × 36 pixels, one for each list of captions, with further entries of their JSON."""
    folder.mkdir(parents=True)
    infos = []
    half = (len(captions) + 1) // 2
    for part, rows in enumerate((range(half), range(half, len(captions)))):
        with ShardWriter(folder / f"{split}-{part:05d}.tar", split=split) as writer:
            for row in rows:
                image = jpeg(list(COLORS.values())[row % len(COLORS)], row)
                key, sha256 = key_of(image)
                sample = Sample(
                    key=key,
                    image=image,
                    image_ext="jpg",
                    captions=list(captions[row]),
                    objects={},
                    width=40,
                    height=36,
                    sha256=sha256,
                    extra=dict(extras[row]),
                )
                writer.add(sample)
        infos.append(dataclasses.replace(writer.info))
    total = sum(info.captions for info in infos)
    Manifest(source="folder", shards=infos, pairs_listed=total, pairs_present=total, **manifest).save(folder)
    return folder

"""Small real shards and models for the tests of training, made on the spot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from setclip.manifest import Manifest
from setclip.shards import Sample, ShardWriter, key_of

NOUNS = ("dog", "cat", "car", "tree", "boat", "house", "ball", "bird")

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_model(folder: Path) -> Path:
    """Writes the configuration of a very small ViT CLIP without batch norm; returns its path."""
    path = folder / "small.json"
    path.write_text(json.dumps(MODEL_CFG))
    return path


def picture(number: int, side: int = 40) -> bytes:
    """Returns a JPEG whose colours depend on `number`; no two are alike."""
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.kron(coarse, np.ones((side // 4, side // 4, 1), np.uint8))), 95
    )


def sample(number: int, captions: int = 2) -> Sample:
    """Returns a sample with one or two objects a caption."""
    image = picture(number)
    key, sha256 = key_of(image)
    lists = [[NOUNS[(number + c) % 8], *([NOUNS[(number * 3) % 8]] if number % 3 else [])] for c in range(captions)]
    return Sample(
        key=key,
        image=image,
        image_ext="jpg",
        captions=[f"a {' and a '.join(names)}, number {number}" for names in lists],
        objects={"pos": [sorted(set(names)) for names in lists]},
        width=40,
        height=40,
        sha256=sha256,
    )


def write_shards(folder: Path, sizes: tuple[int, ...] = (20, 13, 31), split: str = "train", first: int = 0) -> Path:
    """Writes one shard of each size, and the manifest; the samples are numbered from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    infos, number = [], first
    for shard, size in enumerate(sizes):
        with ShardWriter(folder / f"{split}-{shard:05d}.tar", split=split) as writer:
            for _ in range(size):
                writer.add(sample(number))
                number += 1
        infos.append(writer.info)
    pairs = sum(info.captions for info in infos)
    Manifest(
        source="folder", shards=infos, pairs_listed=pairs + 2, pairs_present=pairs, parsers={"pos": "test 1"}
    ).save(folder)
    return folder


def damage_image(folder: Path, shard: str, row: int) -> str:
    """Overwrites a stored image with zeros, as a bad disk would; returns the sample's key."""
    import pyarrow.parquet as pq

    index = pq.read_table((folder / shard).with_suffix(".idx")).to_pylist()[row]
    with open(folder / shard, "r+b") as file:
        file.seek(index["image_offset"])
        file.write(b"\0" * index["image_size"])
    return index["key"]

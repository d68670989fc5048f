"""Shards of real or drawn pictures to train on. Used by benchmarks.train and benchmarks.train_gpu."""

import io
import json
import os
from pathlib import Path

import PIL.Image

from data_prep.parse_pos import PosParser
from data_prep.sources.scenes import ScenesConfig, scene_maker
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.shards import KEY_LENGTH, Sample, ShardWriter, key_of

SIDE = 256
QUALITY = 90  # of drawn pictures
_DRAWN = 300

Pair = tuple[bytes, int, int, list[str]]
"""JPEG, width, height, captions."""


def write_shards(folder: Path, samples: int, num_shards: int) -> str:
    """Writes shards of `samples` pictures, repeated as often as needed, with parsed objects; returns where they are from."""
    pairs, source = pictures()
    parser = PosParser()
    objects = iter(parser.parse([caption for *_, captions in pairs for caption in captions]))
    lists = [[next(objects) for _ in captions] for *_, captions in pairs]
    folder.mkdir(parents=True)
    infos = []
    for shard in range(num_shards):
        with ShardWriter(folder / f"train-{shard:05d}.tar") as writer:
            for number in range(shard, samples, num_shards):
                data, width, height, captions = pairs[number % len(pairs)]
                writer.add(
                    Sample(
                        key=f"{number:0{KEY_LENGTH}x}",  # a picture that is repeated is another sample each time
                        image=data,
                        image_ext="jpg",
                        captions=captions,
                        objects={"pos": lists[number % len(pairs)]},
                        width=width,
                        height=height,
                        sha256=key_of(data)[1],
                    )
                )
        infos.append(writer.info)
    total = sum(info.captions for info in infos)
    Manifest(
        source="benchmark", shards=infos, pairs_listed=total, pairs_present=total, parsers={"pos": parser.version}
    ).save(folder)
    return f"{source}, {sum(len(p[0]) for p in pairs) / len(pairs) / 1e3:.1f} kB on average"


def pictures() -> tuple[list[Pair], str]:
    """Returns photographs of up to SIDE pixels from $SETCLIP_REAL_DATA/photos_open, else scenes of the embedded corpus."""
    root = os.environ.get("SETCLIP_REAL_DATA")
    if root is None:
        return _drawn(_DRAWN), f"{_DRAWN} scenes enlarged to {SIDE} pixels"
    listed = Path(root) / "photos_open" / "captions.jsonl"
    if not listed.is_file():
        raise InputError(
            f"expected photographs listed in {listed}, found none; set SETCLIP_REAL_DATA rightly or not at all"
        )
    pairs: list[Pair] = []
    for line in listed.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        data = (listed.parent / entry["file_name"]).read_bytes()
        pairs.append((data, entry["width"], entry["height"], entry["captions"]))
    return pairs, f"{len(pairs)} photographs of up to {SIDE} pixels"


def _drawn(count: int) -> list[Pair]:
    defaults = ScenesConfig(out=Path())
    maker = scene_maker(defaults.nouns, defaults.size, defaults.seed)
    pairs: list[Pair] = []
    for number in range(count):
        scene, encoded = maker.scene("train", number), io.BytesIO()
        picture = PIL.Image.fromarray(scene.pixels).resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
        picture.save(encoded, "JPEG", quality=QUALITY)
        pairs.append((encoded.getvalue(), SIDE, SIDE, [scene.caption]))
    return pairs

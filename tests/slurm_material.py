"""What the tests of the job scripts begin with: the embedded corpus as downloaded tars of CC12M."""

import json
import tarfile
from pathlib import Path

import simplejpeg
from prep_material import add

from data_prep.sources.scenes import SceneMaker


def write_raw(folder: Path, tars: int = 8, samples: int = 24) -> Path:
    """Writes tars as ready-made ones of CC12M are named, the last one for validation; returns the folder."""
    folder.mkdir(parents=True)
    maker = SceneMaker(nouns=60, size=48, seed=0)
    for number in range(tars):
        split = "train" if number < tars - 1 else "validation"
        with tarfile.open(folder / f"cc12m-{split}-{number % (tars - 1):04d}.tar", "w") as tar:
            for row in range(samples):
                scene = maker.scene("train", number * samples + row)
                key = f"{number:04d}{row:05d}"
                add(tar, f"{key}.jpg", simplejpeg.encode_jpeg(scene.pixels, 90))
                add(tar, f"{key}.json", json.dumps({"caption": scene.caption}).encode())
                add(tar, f"{key}.txt", scene.caption.encode())
    return folder

"""Retrieval on real photographs from random weights: hard labels against Object-IoU, on Flickr8k on a CPU.

    SETCLIP_REAL_DATA=DIR python -m benchmarks.photos [--quick] [--json FILE] [--out DIR]

DIR/flickr8k holds {train,dev}.tar of JPEGs and {train,dev}.jsonl of {"file_name", "captions"}. Trains on train (6,000
photographs × 5 captions), reports on dev (1,000 × 5). The goal is five times chance at R@10: that the pipeline works.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arms import compare, markdown, mean
from data_prep.run import prepare
from data_prep.sources.folder import FolderConfig
from setclip.config import command, parse
from setclip.errors import InputError
from setclip.files import write_json
from setclip.log import say
from setclip.manifest import MANIFEST_NAME

ARMS = {"hard": ["--loss.name", "hard"], "object-iou-0.2": ["--loss.name", "object_iou"]}
METRICS = {
    **{f"i2t_r{k}": f"i2t R@{k}" for k in (1, 5, 10)},
    "i2t_medr": "i2t Med r",
    **{f"t2i_r{k}": f"t2i R@{k}" for k in (1, 5, 10)},
    "t2i_medr": "t2i Med r",
}
TIMES_CHANCE = 5


@dataclass(frozen=True, kw_only=True)
class PhotosConfig:
    """Compares hard labels and Object-IoU on photographs."""

    quick: bool = False
    """Three steps: under a minute, shows that it runs."""
    out: Path = Path("runs/benchmarks/photos")
    """Shards and runs; runs that are finished there are not run again."""
    seeds: int = 1
    """Seeds per arm."""
    jobs: int = 2
    """Runs at a time; they share the cores."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    """The command."""
    config = parse(PhotosConfig, description=__doc__)
    root = os.environ.get("SETCLIP_REAL_DATA")
    if not root or not (Path(root) / "flickr8k" / "train.tar").exists():
        raise InputError(
            f"expected flickr8k/train.tar under $SETCLIP_REAL_DATA, found {root or 'the variable unset'}; "
            "set it to the folder that holds flickr8k/"
        )
    out = config.out / "quick" if config.quick else config.out
    for split in ("train", "dev"):
        source = Path(root) / "flickr8k"
        if not (out / split / MANIFEST_NAME).exists():
            prepare(
                "folder",
                FolderConfig(
                    out=out / split,
                    images=source / f"{split}.tar",
                    captions=source / f"{split}.jsonl",
                    split=split,
                    overwrite=True,
                ),
            )
    results = compare(
        out,
        ARMS,
        range(1 if config.quick else config.seeds),
        [
            "photos",
            "--data.shards",
            str(out / "train"),
            "--data.workers",
            "0",
            *(["--steps", "3"] if config.quick else []),
        ],
        {"retrieval": ["eval_suite.retrieval", "--data", str(out / "dev")]},
        config.jobs,
    )
    say(f"\n{markdown(results, METRICS)}")
    chance = results["hard"][0]["chance"]
    for arm in results:
        for metric in ("i2t_r10", "t2i_r10"):
            times = mean(results, arm, metric) / chance[metric]
            verdict = "reached" if times >= TIMES_CHANCE else "MISSED"
            say(f"{arm} {metric}: {times:.1f} times chance, goal {TIMES_CHANCE} {verdict}")
    if config.json is not None:
        write_json(config.json, {"goals": {"times_chance_at_10": TIMES_CHANCE}, "results": results})


if __name__ == "__main__":
    command(main)

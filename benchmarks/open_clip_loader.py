"""Times open_clip's own reader of tars, in its own environment. Used by benchmarks.loader.

    python -m benchmarks.open_clip_loader SETTINGS.json OUT.json

SETTINGS: tars (as open_clip's --train-data takes them), samples, batch_size, image_size, workers. OUT: the CPU seconds of this
process for one epoch, the images that came, and their mean (so that all was computed).
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import setclip  # noqa: F401 (before torchvision, which open_clip imports)

# isort: split
import open_clip
import torch
from open_clip_train.data import get_wds_dataset

from setclip.images import MEAN, STD


def main() -> None:
    """The command."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    args = argparse.Namespace(
        train_data=settings["tars"],
        train_num_samples=settings["samples"],
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=settings["batch_size"],
        workers=settings["workers"],
        world_size=1,
        seed=0,
    )
    warnings.simplefilter("ignore")
    transform = open_clip.image_transform(settings["image_size"], is_train=True, mean=MEAN, std=STD)
    found = get_wds_dataset(args, transform, is_train=True, floor=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    count, total = 0, 0.0
    start = time.process_time()
    for images, tokens in found.dataloader:
        assert images.shape[0] == tokens.shape[0]
        count += len(images)
        total += float(images[0].mean())
    seconds = time.process_time() - start
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "images": count, "mean": total}), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Runs pretrain.run as it is and keeps its batches, so that another trainer can be given the same.

    torchrun --nproc-per-node 2 -m benchmarks.recorded_run FOLDER [--repeat] FLAGS-OF-pretrain.run

Each rank writes the pictures and tokens of its batches to FOLDER/batches-RANK.pt. With --repeat that is the first alone, which
is then given at every step: steps without reading. Used by benchmarks.train and benchmarks.train_gpu.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import pretrain.training
from pretrain import run
from pretrain.loader import Batch, Loader
from setclip.config import command

_batches: list[dict[str, Tensor]] = []


class RecordingLoader(Loader):
    """The loader of a run, which keeps what it gives."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            _batches.append({"images": batch.images, "tokens": batch.tokens})
            yield batch


class RepeatingLoader(Loader):
    """The loader of a run, which gives its first batch at every step."""

    def __iter__(self) -> Iterator[Batch]:
        batch = next(super().__iter__())
        self.close()
        _batches.append({"images": batch.images, "tokens": batch.tokens})
        yield from itertools.repeat(batch)


def main() -> None:
    """The command."""
    _batches.clear()
    folder = Path(sys.argv.pop(1))
    repeats = sys.argv[1:2] == ["--repeat"]
    if repeats:
        del sys.argv[1]
    pretrain.training.Loader = RepeatingLoader if repeats else RecordingLoader  # type: ignore[misc]
    run.main()
    torch.save(_batches, folder / f"batches-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    command(main)

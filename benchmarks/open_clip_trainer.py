"""Starts open_clip's own trainer, by torchrun in its own environment. Used by benchmarks.train and benchmarks.train_gpu.

    torchrun --nproc-per-node 2 -m benchmarks.open_clip_trainer FLAGS-OF-open_clip_train.main
    torchrun --nproc-per-node 2 -m benchmarks.open_clip_trainer --replay FOLDER [--times N] FLAGS

All that is ours here: torchvision can be imported beside a CPU build of torch (`setclip`); on a CPU, torch's
DistributedDataParallel is not given a list of devices, which the trainer always does and torch refuses there; and with
--replay the trainer is given batches that a run of ours has left in FOLDER (benchmarks.recorded_run), instead of its own
reader's, each batch N times. Model, optimizer, schedule, loss and step are the trainer's; each rank then writes the losses
of its steps to FOLDER/open_clip-RANK.json.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import setclip  # noqa: F401 (before torchvision, which open_clip imports)

# isort: split
import open_clip_train.main as trainer
import torch
from open_clip_train.data import DataInfo, SharedEpoch
from torch import Tensor

from setclip.images import MEAN, STD, normalize


class _OnAnyDevice(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: list[torch.device], **options: Any):
        on_gpu = device_ids[0].type == "cuda"
        super().__init__(module, device_ids=device_ids if on_gpu else None, **options)


class Replay:
    """What the trainer takes for its data loader."""

    def __init__(self, path: Path, ranks: int, times: int):
        self._batches: list[dict[str, Tensor]] = torch.load(path)
        self._times = times
        self.num_batches = times * len(self._batches)
        self.num_samples = times * ranks * sum(len(batch["tokens"]) for batch in self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batches:
            images = normalize(batch["images"], MEAN, STD)
            for _ in range(self._times):
                yield images, batch["tokens"]


def replay(folder: Path, args: list[str]) -> None:
    """Runs the trainer on one rank's batches and writes its losses, which it does not log of all ranks."""
    times = 1
    if args[:1] == ["--times"]:
        times, args = int(args[1]), args[2:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    losses: list[Tensor] = []  # read at the end: no step waits for the device
    make_loss = trainer.create_loss

    def recorded_loss(args: Any) -> torch.nn.Module:
        loss = make_loss(args)
        loss.register_forward_hook(lambda module, inputs, output: losses.append(output["contrastive_loss"].detach()))
        return loss

    trainer.create_loss = recorded_loss
    trainer.get_data = lambda *_, **__: {
        "train": DataInfo(Replay(folder / f"batches-{rank}.pt", ranks, times), shared_epoch=SharedEpoch())
    }
    # Data must be named, or the trainer makes no optimizer.
    if trainer.main(["--train-data", "replayed", *args]):
        raise SystemExit("the trainer refused; it says above why")
    (folder / f"open_clip-{rank}.json").write_text(json.dumps([loss.item() for loss in losses]), encoding="utf-8")


def main(args: list[str]) -> None:
    """The command."""
    torch.nn.parallel.DistributedDataParallel = _OnAnyDevice  # type: ignore[assignment, misc]
    if args[:1] == ["--replay"]:
        replay(Path(args[1]), args[2:])
    else:
        raise SystemExit(trainer.main(args))


if __name__ == "__main__":
    main(sys.argv[1:])

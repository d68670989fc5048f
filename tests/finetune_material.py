"""Small real shards whose captions say what the pictures show, a small pretrained model, and a run of finetune on ranks."""

import itertools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ranks  # noqa: F401 (says what the processes are forked with)
import simplejpeg
import torch
from material import MODEL_CFG

from setclip.checkpoint import save_checkpoint
from setclip.hashing import permutation
from setclip.manifest import Manifest
from setclip.models.clip import build_clip
from setclip.shards import Sample, ShardWriter, key_of

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
COMBINATIONS = list(itertools.product(COLOURS, repeat=4))


def sample(number: int, captions: int = 2, **extra: Any) -> Sample:
    """Returns a picture of four coloured quarters, and captions that name them."""
    colours = COMBINATIONS[int(permutation(len(COMBINATIONS), 1)[number])]
    cells = np.array([COLOURS[name] for name in colours], np.uint8).reshape(2, 2, 3)
    image = simplejpeg.encode_jpeg(np.ascontiguousarray(np.kron(cells, np.ones((16, 16, 1), np.uint8))), 95)
    key, sha256 = key_of(image)
    texts = [" ".join(colours), " and ".join(colours), "now " + " ".join(colours)][:captions]
    return Sample(
        key=key,
        image=image,
        image_ext="jpg",
        captions=texts,
        objects={"pos": [sorted(set(colours))] * captions},
        width=32,
        height=32,
        sha256=sha256,
        extra=extra,
    )


def write_shards(folder: Path, splits: dict[str, int], captions: int = 2, first: int = 0) -> Path:
    """Writes one shard of each split with so many pictures, all different, and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    infos, number = [], first
    for split, size in splits.items():
        with ShardWriter(folder / f"{split}-00000.tar", split=split) as writer:
            for _ in range(size):
                writer.add(sample(number, captions))
                number += 1
        infos.append(writer.info)
    pairs = sum(info.captions for info in infos)
    manifest = Manifest(
        source="folder", shards=infos, pairs_listed=pairs, pairs_present=pairs, parsers={"pos": "test 1"}
    )
    manifest.save(folder)
    return folder


def write_pretrained(run: Path) -> Path:
    """Writes a run whose checkpoint holds a very small model, as it begins; returns the run's folder."""
    torch.manual_seed(7)
    weights = build_clip(MODEL_CFG).state_dict()
    description = {"step": 1, "samples_seen": 1, "recipe": "test", "model": "small"}
    save_checkpoint(run / "checkpoints" / "step-00000001", weights, MODEL_CFG, description)
    return run


def words(place: Path, out: Path, head: str, *more: Any) -> list[str]:
    """Returns the arguments of a short run: 5 steps an epoch, 4 epochs."""
    small = ["--options", "num_elements=2", "blocks=1", "heads=2", "head_width=16", "dropout=0.1"]
    own = small if head in ("slot", "transformer") else []
    arguments = [
        "--head", head, "--model", place / "pretrained", "--data", place / "data", "--out", out, "--width", 32,
        "--batch-size", 32, "--epochs", 4, "--optim.lr", 3e-3, "--log-every-steps", 1, "--device", "cpu", *own, *more,
    ]  # fmt: skip
    return [str(argument) for argument in arguments]


def command(arguments: list[str]) -> None:
    """Runs the command in this process with these words; errors come as they are."""
    from finetune.run import main

    before, sys.argv = sys.argv, ["finetune.run", *arguments]
    try:
        main()
    finally:
        sys.argv = before


class Killed(Exception):
    """Stands in for a kill where a test runs in one process: nothing is saved on the way out."""


def troubled(compute: Callable[..., Any], trouble: str, at: int, times: int = 1) -> Callable[..., Any]:
    """Returns the loss's function with trouble at its `at`-th call (from 1), of `forked`; "raise" raises Killed."""
    counts = itertools.count(1)

    def called(*args: Any) -> Any:
        found = compute(*args)
        if not at <= next(counts) < at + times:
            return found
        if trouble == "raise":
            raise Killed
        if trouble == "nan":
            return type(found)(found.loss * float("nan"), found.parts)
        os.kill(os.getpid(), getattr(signal, trouble))
        return found

    return called


def forked(
    arguments: list[str], said: Path, world_size: int = 1, trouble: str | None = None, at: int = 1, times: int = 1
) -> list[int | None]:
    """Runs the command on ranks in processes of their own; returns their exit statuses.

    `trouble` on rank 0 before step `at` (from 1): SIGKILL, SIGTERM, or nan, in the loss of so many steps.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, arguments, str(said), trouble, at, times))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _rank(
    rank: int, world_size: int, port: int, arguments: list[str], said: str, trouble: str | None, at: int, times: int
) -> None:
    output = os.open(f"{said}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(1)
    from finetune import step
    from setclip import config

    if trouble is not None and rank == 0:
        step.total_loss = troubled(step.total_loss, trouble, at, times)  # type: ignore[assignment]
    config.command(lambda: command(arguments))

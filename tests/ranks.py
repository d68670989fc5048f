"""Runs a function on several gloo processes on this machine, for tests of what happens between ranks."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from setclip import distributed

# The processes are forked from one that has imported this already, and has nothing else of the tests' process.
mp.set_forkserver_preload(["setclip", "pretrain.run", "eval_suite.retrieval", "eval_suite.zeroshot", "finetune.run"])


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns what `function(*args)` returns on each of `world_size` processes, in rank order.

    The function must be importable (top level) and joins the process group itself, as the commands do.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run,
            (world_size, port, folder, dict(os.environ), function, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # the default of a command
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        distributed.stop()
    except BaseException:
        traceback.print_exc()
        raise

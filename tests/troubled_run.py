"""A training run in processes of its own, with trouble at an exact moment on one rank. Used by tests of pretrain.

`run_with(trouble, recipe arguments, world_size)` forks the ranks, lets them train, and returns their exit statuses.
"""

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ranks  # noqa: F401 (says what the processes are forked with)
import torch

KINDS = ("start", "reading", "step", "saving", "renaming")


@dataclass(frozen=True)
class Trouble:
    """What happens on which rank, right before the `number`-th event (from 1) of `at`."""

    act: str
    """kill, stop (the process), SIGTERM, SIGUSR1, hang, nan (in the loss), full (the disk)"""
    at: str = "step"
    number: int = 1
    rank: int = 0
    times: int = 1
    """nan, full: for so many events"""


def start(
    trouble: Trouble | None, arguments: Sequence[Any], world_size: int, said: Path
) -> list[multiprocessing.process.BaseProcess]:
    """Starts the ranks; what they print goes to `said`.RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    words = [str(word) for word in arguments]
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, trouble, words, str(said)))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes: Sequence[multiprocessing.process.BaseProcess], seconds: float = 120.0) -> list[int | None]:
    """Waits for the ranks; once one has failed the others are given some seconds, as launchers do. Returns the statuses."""
    ends = time.monotonic() + seconds
    while any(p.is_alive() for p in processes):
        assert time.monotonic() < ends, "the run does not end"
        if any(p.exitcode not in (None, 0) for p in processes):
            ends = min(ends, time.monotonic() + 20)
            if any(p.exitcode == -signal.SIGKILL for p in processes):
                for process in processes:
                    process.kill()
        time.sleep(0.02)
    return [p.exitcode for p in processes]


def run_with(trouble: Trouble | None, arguments: Sequence[Any], world_size: int, said: Path) -> list[int | None]:
    """Returns the exit status of each rank; a signal's number is negative."""
    return ended(start(trouble, arguments, world_size, said))


def _rank(rank: int, world_size: int, port: int, trouble: Trouble | None, arguments: list[str], said: str) -> None:
    output = os.open(f"{said}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default of a command
    from pretrain import run
    from setclip.config import command

    if trouble is not None and trouble.rank == rank:
        _plant(trouble)
    sys.argv = ["pretrain.run", *arguments]
    command(run.main)


def _plant(trouble: Trouble) -> None:
    """Puts the trouble into what the run calls."""
    from pretrain import checkpoints, loader, training
    from setclip import files

    counts = itertools.count(1)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            number = next(counts)
            if trouble.number <= number < trouble.number + trouble.times:
                result = _act(trouble.act)
                if result is not None:
                    return result(function(*arguments, **named))
            return function(*arguments, **named)

        return called

    if trouble.at == "start":
        training.build_for_training = before(training.build_for_training)
    elif trouble.at == "reading":
        loader.SamplePipeline.__call__ = before(loader.SamplePipeline.__call__)  # type: ignore[method-assign]
    elif trouble.at == "step":
        training.contrastive_loss = before(training.contrastive_loss)
    elif trouble.at == "saving":
        checkpoints.write_state = before(checkpoints.write_state)
    elif trouble.at == "renaming":
        files.os.replace = before(os.replace)  # type: ignore[attr-defined]
    else:
        raise ValueError(trouble.at)


def _act(act: str) -> Callable[[Any], Any] | None:
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif act.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, act))
    elif act == "hang":
        time.sleep(1000)
    elif act == "full":
        raise OSError(28, "No space left on device")
    elif act == "nan":
        return _with_nan
    return None


def _with_nan(output: Any) -> Any:
    import dataclasses

    return dataclasses.replace(output, loss=output.loss * float("nan"))

"""Work that several processes do at once, for the test of `benchmarks.claims.jobs`; importable by a spawned process."""

import os
import signal
import time
from pathlib import Path

from pretrain.stopping import Stopped, StopRequest


def meet(folder: Path, number: int) -> None:
    """Leaves a file, and waits until as many processes have."""
    print("one of several", flush=True)
    (folder / f"here-{os.getpid()}").touch()
    ends = time.monotonic() + 60
    while len(list(folder.glob("here-*"))) < number:
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)
    with open(folder / "calls", "a") as file:
        file.write(f"{os.getpid()}\n")


def fail_on_the_second(folder: Path) -> None:
    """Fails in the process that comes second, before the first has ended."""
    try:
        (folder / "first").mkdir()
    except FileExistsError:
        (folder / "second").mkdir()
        raise ValueError("no more room") from None
    ends = time.monotonic() + 60
    while not (folder / "second").exists():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)


def train_until_asked(folder: Path) -> None:
    """As a training does: notes the signal, saves, and stops."""
    with StopRequest() as request:
        (folder / f"trains-{os.getpid()}").touch()
        ends = time.monotonic() + 60
        while request.signal is None:
            assert time.monotonic() < ends, "waited in vain"
            time.sleep(0.05)
        (folder / f"saved-{os.getpid()}").touch()
    raise Stopped(request.signal)


def ask_to_stop(parent: int, folder: Path, number: int) -> None:
    """Sends a process the signal that Slurm sends, once so many train."""
    ends = time.monotonic() + 60
    while len(list(folder.glob("trains-*"))) < number:
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)
    os.kill(parent, signal.SIGUSR1)


def say_threads() -> None:
    """Says how many threads a process of several has."""
    import torch

    print(torch.get_num_threads(), flush=True)

"""Several processes that share an experiment's runs, a part of the cores each. Used by `benchmarks.claims.run` (--jobs)."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NoReturn

from data_prep.parallel import die_with_parent
from pretrain.stopping import EXIT_STOPPED, Stopped, run_to_its_end
from setclip.config import command
from setclip.log import say

_LAST = 15  # lines of a failed process's log
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(task: Callable[[], object], jobs: int, logs: Path) -> list[str]:
    """Calls `task` in `jobs` new processes at once; returns what to say of those that failed.

    `task` can be pickled, and takes what no other call of it holds. The first process speaks here, the others into `logs`.
    On SIGTERM and SIGUSR1 all are asked to stop, which saves a training, and `Stopped` is raised, as it is where one of them
    was asked.
    """
    logs.mkdir(parents=True, exist_ok=True)
    front = f"{socket.gethostname()}-{os.getpid()}"  # machines may share the folder
    places = [None, *(logs / f"{front}-{number}.log" for number in range(2, jobs + 1))]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_as_job, args=(task, place, os.getpid())) for place in places]
    begun: list[BaseProcess] = []
    with _asked_to_stop_raises():
        try:
            with _cores_shared_by(jobs):
                for process in processes:
                    process.start()
                    begun.append(process)
            if jobs > 1:
                say(f"{jobs} processes share the runs; what the others say: {', '.join(map(str, places[1:]))}")
            told: set[int] = set()
            while any(process.is_alive() for process in begun):
                for number, process in enumerate(begun):
                    if process.exitcode and number not in told:
                        told.add(number)
                        say(
                            f"note: process {number + 1} of {jobs} has ended with status {process.exitcode}; the others go on"
                        )
                time.sleep(0.1)
        finally:
            for process in begun:
                process.terminate()  # SIGTERM: a training saves
                process.join()
    statuses = [process.exitcode for process in begun]
    if EXIT_STOPPED in statuses:
        raise Stopped("a signal to one of the processes")
    return [_failure(number + 1, status, places[number]) for number, status in enumerate(statuses) if status]


def _failure(number: int, status: int | None, log: Path | None) -> str:
    said = f"process {number} ended with status {status}"
    if log is None or not log.exists():
        return said
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST:]
    return f"{said}; the end of {log}:\n  " + "\n  ".join(lines)


@contextmanager
def _cores_shared_by(jobs: int) -> Iterator[None]:
    """New processes have their part of the threads, unless the user has said how many."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    added = [] if any(name in os.environ for name in _THREADS) else _THREADS
    os.environ.update(dict.fromkeys(added, threads))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _asked_to_stop_raises() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_job(task: Callable[[], object], log: Path | None, parent: int) -> None:
    die_with_parent(parent)
    if log is not None:
        with open(log, "w") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    command(lambda: run_to_its_end(task))

"""Several processes that share an experiment's runs, a part of the cores each. Used by `benchmarks.claims.run` (--jobs)."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from data_prep.parallel import die_with_parent
from setclip.errors import InputError
from setclip.log import say

_LAST = 15  # lines of a failed process's log


def in_processes(task: Callable[[], object], jobs: int, logs: Path) -> None:
    """Calls `task` here and in `jobs` - 1 further processes at once, and here once more when all have ended.

    `task` can be pickled, and takes what no other call of it holds; what waits for something that another call makes is left
    for the last one. What the others say goes to `logs`. Raises InputError where one of them fails.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    torch.set_num_threads(threads)
    logs.mkdir(parents=True, exist_ok=True)
    places = [logs / f"{number}.log" for number in range(2, jobs + 1)]
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_as_job, args=(task, place, os.getpid(), threads)) for place in places]
    for each in others:
        each.start()
    say(f"{jobs} processes share the runs; what the others say: {', '.join(map(str, places))}")
    try:
        task()
        for each in others:
            each.join()
    finally:
        for each in others:
            each.terminate()  # SIGTERM: a run saves
            each.join()
    for each, place in zip(others, places, strict=True):
        if each.exitcode:
            lines = place.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST:]
            raise InputError(
                f"expected {jobs} processes to end well, found one with status {each.exitcode}; the end of {place}:\n  "
                + "\n  ".join(lines)
            )
    task()


def _as_job(task: Callable[[], object], log: Path, parent: int, threads: int) -> None:
    die_with_parent(parent)
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(threads)
    task()

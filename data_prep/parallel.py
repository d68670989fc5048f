"""Runs tasks in this process or in several; results come back in the order of the tasks either way.

Used by `data_prep.run` and by sources that check their input. Processes are spawned, not forked: spaCy's libraries and
whatever else this process has loaded may hold threads, which a fork does not survive.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from setclip.log import Meter

T = TypeVar("T")


def num_processes(wanted: int) -> int:
    """Returns `wanted`, or for 0 the number of CPUs that this job may use."""
    return wanted or len(os.sched_getaffinity(0))


def run_tasks(
    tasks: Sequence[Callable[[], T]], processes: int, description: str, sizes: Sequence[int], unit: str = "samples"
) -> list[T]:
    """Returns what the tasks return, in their order. `sizes` says how far each brings the progress line.

    A task is a top-level function or a partial of one. The first exception of a task ends the others and is raised.
    """
    processes = min(num_processes(processes), len(tasks))
    results: list[T] = []
    meter = Meter(sum(sizes), description, unit)
    try:
        if processes <= 1:
            for task, size in zip(tasks, sizes, strict=True):
                results.append(task())
                meter.update(size)
        else:
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                for result, size in zip(pool.imap(_call, tasks), sizes, strict=True):
                    results.append(result)
                    meter.update(size)
    finally:
        meter.close()
    return results


def _call(task: Callable[[], T]) -> T:
    return task()

"""Runs tasks in this process or in several; results come back in the order of the tasks either way.

Used by `data_prep.run`, `data_prep.merge` and the commands that go over shards. Processes are spawned, not forked:
spaCy's libraries and whatever else this process has loaded may hold threads, which a fork does not survive.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from setclip.errors import InputError
from setclip.log import Meter

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1


def num_processes(wanted: int) -> int:
    """Returns `wanted`, or for 0 the number of CPUs that this job may use."""
    return wanted or len(os.sched_getaffinity(0))


def run_tasks(
    tasks: Sequence[Callable[[], T]],
    processes: int,
    description: str,
    sizes: Sequence[int],
    unit: str = "samples",
    seen: Callable[[T], str] | None = None,
) -> list[T]:
    """Returns what the tasks return, in their order. `sizes` says how far each brings the progress line.

    A task is a top-level function or a partial of one. `seen` gets each result as it comes and returns a note for the
    progress line. The first exception, of a task or of `seen`, ends the others and is raised.
    """
    processes = min(num_processes(processes), len(tasks))
    results: list[T] = []
    meter = Meter(sum(sizes), description, unit)

    def take(result: T, size: int) -> None:
        results.append(result)
        meter.update(size, note=seen(result) if seen else "")

    try:
        if processes <= 1:
            for task, size in zip(tasks, sizes, strict=True):
                take(task(), size)
        else:
            with contextlib.closing(_in_processes(tasks, processes)) as made:
                for result, size in zip(made, sizes, strict=True):
                    take(result, size)
    finally:
        meter.close()
    return results


def _in_processes(tasks: Sequence[Callable[[], T]], processes: int) -> Generator[T, None, None]:
    """Yields the results in order. Raises InputError where the system has killed a process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, die_with_parent, (os.getpid(),)) as pool:
        left = iter(tasks)
        waiting = deque(pool.submit(_call, task) for task in itertools.islice(left, 2 * processes))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(_call, task) for task in itertools.islice(left, 1))
                yield result
        except BrokenProcessPool as error:
            raise InputError(
                f"expected {processes} processes to do their work, found one of them killed, most often because memory was "
                "short; give the job more of it or fewer --processes, and start again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def die_with_parent(parent: int) -> None:
    """Has the kernel end this process when its parent is killed: a restarted job must not meet its own orphans."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: an orphan ends with its task
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _call(task: Callable[[], T]) -> T:
    return task()

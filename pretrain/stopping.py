"""Ends a run that is asked to end: SIGTERM or SIGUSR1 on any rank, and all save at the same step. Used by the loop.

Slurm sends one of them before the time limit and when a job is preempted (`#SBATCH --signal=USR1@120`). The command then exits
with a status of its own, on which a batch script can act: the run is whole, and the same command with --resume True goes on.
"""

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType

from setclip import distributed
from setclip.log import duration, say

EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop and has saved: EX_TEMPFAIL, "try again"."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run has saved and stops because it was asked to."""


class StopRequest:
    """Notes the signals while it is entered; in the main thread only, elsewhere it notes nothing."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal that came."""

    def __enter__(self) -> "StopRequest":
        self._before = {}
        for number in _SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name


def run_to_its_end(training: Callable[[], object]) -> None:
    """Calls it and says how long it took; where it was stopped, ends the program with EXIT_STOPPED."""
    start, status = time.monotonic(), 0
    try:
        training()
    except Stopped as stopped:
        say(f"stopped by {stopped}")
        status = EXIT_STOPPED
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # The training that an exception's frames hold is gone by now. Freed after the process group was left, what is wrapped
        # for it waits for a thread of gloo's that waits for it: of 17 stopped runs on two ranks 4 then never ended.
        gc.collect()
        distributed.stop()
    if status:
        sys.exit(status)
    say(f"done in {duration(time.monotonic() - start)}")


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """Called in a loader's process: a signal for the job's process group must not end what the last step needs."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

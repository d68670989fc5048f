"""Runs a command, and ends it with all its processes as soon as the process that asked for it is gone. Used by processes.

An engine is several processes; those of a driver that was killed would stay, hold the GPU and write into a later run.
Nothing but Python's library is imported here, and the file is run by its path:

    python -P guard.py COMMAND [ARGUMENT …]    # as leader of a process group, standard input a pipe from the asker

The pipe closes when the asker ends, however it ends; then the whole group is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1


def _end_with_asker() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _die_with_guard() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(command: list[str]) -> int:
    # Open files are passed on: the command holds its asker's lock for as long as it lives.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False, preexec_fn=_die_with_guard)
    threading.Thread(target=_end_with_asker, daemon=True).start()
    status = process.wait()
    return status if status >= 0 else 128 - status


match __name__:
    case "__main__":
        sys.stdout.flush()
        os._exit(_run(sys.argv[1:]))  # the thread would keep Python from ending in peace

"""Processes of vLLM that never outlive us. Used by the runners that start an engine."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

GUARD = Path(__file__).with_name("guard.py")

_LINES_OF_LOG = 12


@contextlib.contextmanager
def guarded(
    command: Sequence[str],
    env: Mapping[str, str],
    log: BinaryIO,
    keep_open: Sequence[int] = (),
    output: BinaryIO | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts a command in a process group of its own; what is left of the group at the end of the block is killed.

    The group ends as well when this process is killed. Standard error goes to `log`, standard output to `output` (None
    makes it a pipe), and the file descriptors `keep_open` are open in the command too. The status is the command's; 128 + n
    where signal n ended it.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", str(GUARD), *command],
        stdin=subprocess.PIPE,
        stdout=output or subprocess.PIPE,
        stderr=log,
        env=dict(env),
        pass_fds=tuple(keep_open),
        start_new_session=True,  # a Ctrl-C is ours alone, and all its processes can be killed at once
    )
    # Children that outlive the command hold its standard output open, so a reader would wait for its end for ever.
    threading.Thread(target=_end_group, args=(process,), daemon=True).start()
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_of(log: Path) -> str:
    """Returns the last lines of a log."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 14)))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-_LINES_OF_LOG:])

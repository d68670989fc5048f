"""Runs commands of Python one after another, each in a process of its own, without importing the libraries each time.

Those of a stage are forked from a process that has imported what stages share (torch and open_clip: seconds of CPU time), and
then do what `python -m` does: the module is run as __main__, with the words as sys.argv. Used by `setclip.demo`.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence

_SHARED = ["setclip.checkpoint"]
_LIGHT = ("data_prep",)
"""Packages that need none of it."""


class Steps:
    """Runs commands. They are forked on Linux alone; elsewhere each is a Python of its own, as `python -c CODE` always is."""

    def __init__(self, environment: Mapping[str, str] | None = None):
        """`environment`: variables that hold where the caller's environment has none of that name."""
        for name, value in (environment or {}).items():
            os.environ.setdefault(name, value)
        self._context = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
        if self._context is not None:
            self._context.set_forkserver_preload(_SHARED)

    def run(self, arguments: Sequence[str]) -> int:
        """Runs `python *arguments` with its output passed through; returns its exit status."""
        if self._context is None or arguments[0] != "-m" or arguments[1].partition(".")[0] in _LIGHT:
            return subprocess.run([sys.executable, *arguments], check=False).returncode
        process = self._context.Process(target=_as_python, args=(arguments[1], list(arguments[2:]), dict(os.environ)))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode


def _as_python(module: str, words: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # a child has its parent's; a command of its own the default
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

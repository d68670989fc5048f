"""A command's imports with few garbage collections: less CPU time until its first line.

torch, open_clip and DeepSpeed make two million objects that stay; with Python's own thresholds the collector looks through
them again and again while they come, and finds nothing. What was imported is then frozen (`gc.freeze`) until the program
ends, which spares the training's own collections looking at it, and forked loaders copying it.

`begin_if_command()` is called by `setclip/__init__.py` and does nothing in other people's programs; `end()` by
`setclip.config.command`. The tests begin and end it around their own making.
"""

import atexit
import gc
import sys

_PACKAGES = ("setclip", "data_prep", "pretrain", "finetune", "eval_suite")
"""Not the benchmarks: a peer that one of them runs has Python's own settings, and so have we beside it."""
_MANY = 100_000
_before: tuple[int, int, int] | None = None


def is_our_command(words: list[str]) -> bool:
    """Whether an interpreter's command line (sys.orig_argv) is `python -m` of one of our modules."""
    left = iter(words[1:])
    for word in left:
        if word == "-m":
            return next(left, "").partition(".")[0] in _PACKAGES
        if word in ("-X", "-W"):
            next(left, "")
        elif not word.startswith("-") or word.startswith("-c"):  # a script or code, and what it is told
            return False
    return False


def begin_if_command() -> None:
    """Lets the collector wait, where this is one of our commands."""
    if is_our_command(sys.orig_argv):
        begin()


def begin() -> None:
    """Lets the collector wait until `end()`; nothing where it waits already."""
    global _before
    if _before is None:
        _before = gc.get_threshold()
        gc.set_threshold(_MANY, *_before[1:])


def end() -> None:
    """Takes what is there as staying, and sets the collector's thresholds as they were; nothing where none began."""
    global _before
    if _before is not None:
        gc.freeze()
        atexit.register(gc.unfreeze)  # triton's binding looks for leaks at the end, and says a page of them
        gc.set_threshold(*_before)
        _before = None

"""What belongs to one process, in objects that forked processes inherit. Used by remote, disk_cache and pretrain.blocks."""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator

_lock = threading.Lock()


@contextlib.contextmanager
def this_process() -> Iterator[None]:
    """Holds a lock of this process, for short things; a forked process finds it open, whatever a thread of its parent did."""
    with _lock:
        yield


def at_end(owner: object, close: Callable[[], object]) -> None:
    """Calls `close` when `owner` is gone, in this process alone: a forked one must not close what its parent uses."""
    process = os.getpid()
    weakref.finalize(owner, lambda: close() if os.getpid() == process else None)


def _renew() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew)

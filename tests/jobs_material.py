"""Work that several processes do at once, for the test of `benchmarks.claims.jobs`; importable by a spawned process."""

import os
import time
from pathlib import Path


def meet(folder: Path, number: int) -> None:
    """Leaves a file, and waits until as many processes have."""
    print("one of several", flush=True)
    (folder / f"here-{os.getpid()}").touch()
    ends = time.monotonic() + 60
    while len(list(folder.glob("here-*"))) < number:
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)
    with open(folder / "calls", "a") as file:
        file.write(f"{os.getpid()}\n")


def fail_elsewhere(parent: int) -> None:
    """Fails in every process but one."""
    if os.getpid() != parent:
        raise ValueError("no more room")

"""Notices a rank that hangs: names it with its stack, and ends the job instead of waiting for ever. Used by the loop.

Each rank has a thread that tells the others, through a small store of its own, at which step and in what work the rank is and
since when. A rank without progress for `--guard.hang-minutes` writes the stacks of all its threads to hang/rank-R.txt in the run
folder; the lowest rank that still speaks compares all, prints who holds the others up, and every rank ends with EXIT_HUNG.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from setclip import distributed
from setclip.distributed import World

EXIT_HUNG = 70
"""Exit status of a run that hung (EX_SOFTWARE)."""

FOLDER = "hang"
WORK = ("reading data", "encoding", "stepping", "logging", "evaluating", "saving")
"""What a rank can be at, in the order of a step. All but the first two wait for the other ranks."""


@dataclass(frozen=True)
class Beat:
    """What a rank tells."""

    rank: int
    host: str
    pid: int
    step: int
    work: str
    since: float
    """Seconds since it began this work, when it told."""
    told: float
    """Wall time at which it told, by its own clock."""


class Watchdog:
    """`at(step, work)` at each change of work; `pause` while nothing is expected to move; `close` at the end."""

    def __init__(self, folder: Path, world: World, seconds: float):
        self._folder, self._world, self._seconds = folder, world, seconds
        self._now = (0, WORK[0], time.monotonic())
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if seconds <= 0:
            return
        self._every = min(10.0, seconds / 5)
        self._store: dist.Store = self._make_store()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _make_store(self) -> dist.Store:
        if self._world.size == 1:
            return dist.HashStore()
        host, limit = os.environ["MASTER_ADDR"], timedelta(seconds=self._every)
        first = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if self._world.rank == 0 else None
        port = distributed.broadcast(None if first is None else first.port)
        store = first or dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        store.set_timeout(limit)
        return store

    def at(self, step: int, work: str) -> None:
        """Notes that `work` on `step` begins."""
        self._now = (step, work, time.monotonic())

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            if self._tell() > self._seconds:
                self._end()

    def _tell(self) -> float:
        """Tells the others where this rank is; returns the seconds for which it has been there."""
        step, work, began = self._now
        since = time.monotonic() - began
        beat = Beat(self._world.rank, socket.gethostname(), os.getpid(), step, work, since, time.time())
        # Rank 0 keeps the store: what is wrong with it is said when this rank's own time is up.
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set(str(self._world.rank), json.dumps(asdict(beat)))
        return since

    def _end(self) -> None:
        folder = self._folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self._world.rank:05d}.txt"
        with open(path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(self._every)  # the others may see it a little later
        self._tell()
        beats = self._heard()
        speaker = min(beats, default=self._world.rank)
        if self._world.rank == speaker:
            text = verdict(beats, self._world.size, self._seconds, self._every, path.parent)
            print(f"error: {text}", file=sys.stderr, flush=True)
        time.sleep(self._every)  # no rank ends, and takes the store away, before all have looked
        os._exit(EXIT_HUNG)

    def _heard(self) -> dict[int, Beat]:
        """Returns the beats of the ranks that still tell."""
        beats = {}
        for rank in range(self._world.size):
            try:
                beat = Beat(**json.loads(self._store.get(str(rank))))
            except (RuntimeError, dist.DistError):
                continue
            if time.time() - beat.told < 5 * self._every:
                beats[rank] = beat
        return beats


def verdict(beats: Mapping[int, Beat], world_size: int, seconds: float, every: float, folder: Path) -> str:
    """Returns what to say of a run that has hung: which ranks hold the others up.

    `beats` are those of the ranks that still tell where they are; the others are stopped, dead or out of reach.
    """
    silent = [rank for rank in range(world_size) if rank not in beats]
    lines = [f"no progress for {seconds:,.0f} s; the run ends (its stacks: {folder})"]
    if silent:
        lines.append(
            f"rank {', '.join(map(str, silent))} has not been heard of for {5 * every:,.0f} s: its process is stopped or "
            "dead, or its node is out of reach"
        )
    else:
        places = {rank: (beat.step, WORK.index(beat.work)) for rank, beat in beats.items()}
        first = min(places.values())
        behind = [beats[rank] for rank in sorted(beats) if places[rank] == first]
        if len(behind) == len(beats):
            lines.append(
                f"all ranks are {behind[0].work} at step {behind[0].step:,}: look at the network, or at the stacks"
            )
        else:
            lines += [
                f"rank {b.rank} (host {b.host}, process {b.pid}) holds the others up: {b.work} for step {b.step:,} since "
                f"{b.since:,.0f} s; its stack: {folder / f'rank-{b.rank:05d}.txt'}"
                for b in behind
            ]
    return "\n  ".join(lines)

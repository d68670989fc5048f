"""What a rank has of its machine: cores and memory. Used by the loop, the checks before it and pretrain.doctor."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from setclip import distributed


@dataclass(frozen=True)
class MachineShare:
    """What of the machine is this rank's."""

    ranks: int
    """On this machine, with this one"""
    cores: int
    """That this rank may keep busy; its own, or its part of those that it shares with other ranks"""


def share_of_machine() -> MachineShare:
    """Returns this rank's share. Collective: torchrun gives all ranks of a machine all cores, Slurm each task its own."""
    name, cores = socket.gethostname(), _cores()
    here = [of_rank for place, of_rank in distributed.gather_objects((name, cores)) if place == name]
    sharers = sum(not cores.isdisjoint(of_rank) for of_rank in here)
    return MachineShare(len(here), max(1, len(cores) // sharers))


def _cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def available_memory(device: torch.device, ranks_here: int = 1) -> int:
    """Returns the bytes that this rank may use on its device.

    Of a GPU what is free, with what this process has of it already; on a CPU the rank's share of what the machine, or the job's
    control group, still has.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available
    for limit, used in _cgroup_limits():
        free = min(free, limit - used)
    return max(0, free) // ranks_here


def _cgroup_limits() -> list[tuple[int, int]]:
    """Returns (limit, in use) in bytes of this process's control groups that limit memory (Slurm's, containers')."""
    found = []
    root = Path("/sys/fs/cgroup")
    listed = Path("/proc/self/cgroup")
    for line in listed.read_text().splitlines() if listed.exists() else []:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        place = base / path.strip("/")
        for folder in (place, *place.parents):
            values = [_number(folder / name) for name in names]
            if values[0] is not None and values[1] is not None:
                # Pages of files count as in use; the kernel gives them up when memory is asked for.
                names_of_files = ("inactive_file", "active_file")
                cached = sum(_statistic(folder / "memory.stat", name) for name in names_of_files)
                found.append((values[0], max(0, values[1] - cached)))
            if folder == base:
                break
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get(name, 0))

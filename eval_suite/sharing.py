"""Sharing an evaluation among all ranks, so that the result is that of one process, bit for bit.

What one process would do, in its order, is cut into runs of whole pieces (batches, blocks of scores), one run a rank; no
piece is padded, split or done twice, so each is computed in the shape in which one process computes it. Features are put
together again in order, counts are summed as whole numbers. A user's mistake on one rank is raised on all, so that none
waits. Used by the evaluations; training passes the World that it has.

`join` is for commands: under torchrun or srun with several processes it joins them, else there is nothing to join.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from setclip import distributed
from setclip.distributed import World
from setclip.errors import InputError

ALONE = World()
"""One process: nothing is shared, whatever process group there is."""


def join(device: str = "auto", timeout_minutes: float = 60.0) -> World:
    """Returns this process's place among those that a launcher started; one process joins no group.

    `timeout_minutes`: how long a rank waits for the others, which may have slower disks. Raises InputError where several
    ranks are to use one given GPU.
    """
    if distributed.read_environment()[1] > 1:
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(
                f"expected --device auto, cpu or cuda with several ranks (each takes the GPU of its number), found {device}"
            )
        return distributed.start(device, timeout_minutes)
    return alone_on(device)


def alone_on(device: str) -> World:
    """Returns one process on a device; "auto" takes CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return World(device=torch.device(device))


def own_run(num_pieces: int, world: World) -> slice:
    """Returns which of the pieces are this rank's: runs in rank order, whose lengths differ by at most one."""
    return slice(world.rank * num_pieces // world.size, (world.rank + 1) * num_pieces // world.size)


@contextlib.contextmanager
def together(world: World) -> Iterator[None]:
    """Raises on every rank the InputError that any rank met inside; of several that of the lowest rank.

    Every rank must come here, and what is inside must not wait for other ranks.
    """
    if world.size == 1:
        yield
        return
    message = None
    try:
        yield
    except InputError as error:
        message = str(error)
    found = distributed.gather_objects(message)
    rank = next((rank for rank, text in enumerate(found) if text is not None), None)
    if rank is not None:
        raise InputError(found[rank] if len(set(found)) == 1 else f"{found[rank]} (on rank {rank} of {world.size})")


def gathered(own: Tensor, world: World) -> Tensor:
    """Returns all ranks' rows in rank order, on the CPU, from this rank's (rows, …); ranks may have none."""
    return own if world.size == 1 else distributed.gather_rows(own, world.device)


def summed(own: Tensor, world: World) -> Tensor:
    """Returns the sum over ranks of counts, (…) int64: exact in any order."""
    return own if world.size == 1 else distributed.reduce_over_ranks(own, "sum", world.device)


def largest(own: Tensor, world: World) -> Tensor:
    """Returns the largest over ranks of each entry: exact in any order."""
    return own if world.size == 1 else distributed.reduce_over_ranks(own, "max", world.device)

"""Ranks: who we are (torchrun's or Slurm's variables), and the few collectives that training needs.

Gradients: `gather_with_gradient` sums over ranks in its backward pass, so a loss that is the mean over this rank's B
pairs, averaged over ranks by the engine, has exactly the gradient of the mean over all G = B·W pairs.
Used by pretrain, finetune and eval_suite. Letters: B pairs on this rank, W ranks, G pairs over all ranks.
"""

import datetime
import os
import subprocess
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from setclip.errors import InputError

T = TypeVar("T")

# torch 2.13 renames collectives that DeepSpeed 0.19 calls each step.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def read_environment(environment: MutableMapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Returns (rank, world size, local rank); torchrun's variables, else Slurm's, else one process.

    Slurm's are written into RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, where torch looks. A Slurm job
    step of several tasks is needed for that: inside a plain `sbatch` shell there is one process.
    """
    if "RANK" in environment:
        missing = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environment]
        if missing:
            raise InputError(f"RANK is set, but not {', '.join(missing)}; start with torchrun or srun, or unset RANK")
    elif int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in environment:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment.setdefault("MASTER_ADDR", _first_slurm_host(environment["SLURM_STEP_NODELIST"]))
        # From the job and step ids, so that two jobs on a node do not meet.
        port = 20_000 + (int(environment["SLURM_JOB_ID"]) * 17 + int(environment["SLURM_STEP_ID"])) % 20_000
        environment.setdefault("MASTER_PORT", str(port))
    return tuple(int(environment.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # type: ignore[return-value]


def _first_slurm_host(nodes: str) -> str:
    """Returns the first host of Slurm's list; `node[1-4,7]` is expanded by scontrol."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def start(device: str = "auto", timeout_minutes: float = 10.0) -> World:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and returns this process's place.

    One process joins a group of its own too, so that engines find one. `device`: "auto", "cpu" or "cuda".
    """
    rank, size, local_rank = read_environment()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("expected a CUDA device (--device cuda), found none; use --device cpu")
        count = torch.cuda.device_count()
        # Slurm's --gpus-per-task=1 shows each task one GPU, which then is number 0 for each of them.
        index = 0 if count == 1 else local_rank
        if index >= count:
            raise InputError(
                f"expected a GPU for local rank {local_rank}, found {count} GPUs; start fewer ranks a node"
            )
        torch.cuda.set_device(index)
        place = torch.device("cuda", index)
    else:
        place = torch.device(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        backend = "nccl" if place.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=size)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(rank, size, local_rank, place)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Returns the number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: T, source: int = 0) -> T:
    """Returns rank `source`'s value on every rank (anything that pickles, small)."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Returns every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of a detached tensor over ranks."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def gather(local: Tensor) -> Tensor:
    """Returns (G, …) from each rank's (B, …), in rank order, without gradient. B must be the same on all ranks."""
    if world_size() == 1:
        return local.detach()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    return torch.cat(parts)


def gather_rows(local: Tensor, device: torch.device) -> Tensor:
    """Returns all ranks' rows in rank order, on the CPU, from each rank's (rows, …), without gradient and padding.

    Ranks may have different numbers of rows, or none (what follows the rows is then taken from the others). `device` is
    where the collective wants its tensors (`World.device`).
    """
    if world_size() == 1:
        return local.detach().cpu()
    described = gather_objects((tuple(local.shape), local.dtype))
    shape, dtype = next((entry for entry in described if entry[0][0]), described[0])
    kinds = {(each[1:], kind) for each, kind in described if each[0]}
    assert len(kinds) <= 1, f"ranks have rows of different kinds: {kinds}"
    parts = []
    for source, ((rows, *_), _) in enumerate(described):
        if rows == 0:
            continue
        is_own = source == dist.get_rank()
        part = (
            local.detach().to(device).contiguous() if is_own else torch.empty(rows, *shape[1:], dtype=dtype).to(device)
        )
        # NCCL and gloo have no broadcast of truth values.
        part = part.to(torch.uint8) if dtype == torch.bool else part
        dist.broadcast(part, source)
        parts.append(part.cpu())
    return torch.cat(parts).to(dtype) if parts else torch.empty(0, *shape[1:], dtype=dtype)


def reduce_over_ranks(value: Tensor, how: Literal["sum", "max"], device: torch.device) -> Tensor:
    """Returns the sum or the largest over ranks of each entry, on the CPU; of whole numbers and of "max" it is exact."""
    if world_size() == 1:
        return value
    value = value.detach().clone().to(device)
    dist.all_reduce(value, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return value.cpu()


def gather_with_gradient(local: Tensor) -> Tensor:
    """Returns (G, …) from each rank's (B, …), in rank order; its backward pass sums the gradients of all ranks."""
    return local if world_size() == 1 else _Gather.apply(local)


def sum_with_gradient(local: Tensor) -> Tensor:
    """Returns the sum over ranks of a tensor of one shape; its backward pass sums the gradients of all ranks."""
    return local if world_size() == 1 else _Sum.apply(local)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.detach().clone().contiguous()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        return gather(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        rank = dist.get_rank()
        return gradient[rank * ctx.rows : (rank + 1) * ctx.rows]

"""How well the hardware is used: model FLOPs, the peak of the device, and memory. Used by the loop.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the FLOPs that the model needs by
its definition, a second, over the device's peak. What is computed twice to save memory (gradient checkpointing,
micro-batches with a feature cache) does not count, so it compares runs however they are cut up.
"""

import multiprocessing
import re
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from setclip.models.clip import image_size_of

PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H800 PCIE": 756e12,
    "H800": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}
"""Words of a GPU's name to its bf16 FLOPs a second on tensor cores, dense, by its data sheet; the first match is taken.
"""

_GIVE = " (--log.peak-tflops gives it)"
_BACKWARD = 2  # times the forward pass: the gradients of inputs and of weights cost one each


def peak_flops(name: str) -> float | None:
    """Returns the bf16 peak of a GPU by its name ("NVIDIA H200"), in FLOPs a second; None where it is not known."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    if "MIG" in words:  # a part of one
        return None
    return next((peak for wanted, peak in PEAK_FLOPS.items() if words.issuperset(wanted.split())), None)


def training_flops(model: torch.nn.Module) -> float:
    """Returns the FLOPs of the forward and backward pass of one pair.

    Counted by torch on tensors without content, so the model's weights, buffers and random state stay as they are, and
    it takes well under a second of a large model. A tower without a trainable weight has a forward pass only; the loss
    is not counted.
    """
    size = image_size_of(model)
    state = {name: value.detach().to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    pairs = 2  # batch norm refuses a single one
    images = torch.empty(pairs, 3, size, size, device="meta")
    length: Any = model.context_length
    tokens = torch.empty(pairs, length, dtype=torch.int64, device="meta")
    total = 0.0
    for inputs, is_image in (((images, None), True), ((None, tokens), False)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, state, inputs)
        is_trained = any(p.requires_grad for n, p in model.named_parameters() if n.startswith("visual.") == is_image)
        total += counter.get_total_flops() / pairs * (1 + _BACKWARD * is_trained)
    return total


@dataclass(frozen=True)
class Utilisation:
    """What MFU is computed from."""

    flops_per_pair: float
    """Forward and backward."""
    peak_flops: float
    """Of one device, a second."""

    def mfu(self, pairs_per_second: float) -> float:
        """Returns the share, 0 to 1, of a device's peak that the model's FLOPs take at this rate of one device."""
        return pairs_per_second * self.flops_per_pair / self.peak_flops


def utilisation_of(
    model: torch.nn.Module, precision: str, device: torch.device, peak_tflops: float | None = None
) -> Utilisation | str:
    """Returns what MFU is computed from, or why there is none: on CPUs, in fp32, and on GPUs whose peak is not known.

    `peak_tflops`: the peak of one device in 10^12 FLOPs a second, which is then taken as it is.
    """
    if peak_tflops is not None:
        peak: float | None = peak_tflops * 1e12
    elif device.type != "cuda":
        return f"on CPUs, whose peak is not known{_GIVE}"
    elif precision != "bf16":
        return f"in {precision}: the peaks that are known are those of bf16{_GIVE}"
    else:
        name = torch.cuda.get_device_name(device)
        peak = peak_flops(name)
        if peak is None:
            return f"on {name}, whose peak is not known{_GIVE}"
    assert peak is not None
    try:
        return Utilisation(training_flops(model), peak)
    except (NotImplementedError, RuntimeError) as error:
        return f"for this model: its FLOPs cannot be counted ({str(error).splitlines()[0]})"


def gpu_memory(device: torch.device) -> int | None:
    """Returns the most bytes that were allocated on this rank's GPU since the process began; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def host_memory() -> tuple[int, int]:
    """Returns the bytes in memory of (this process, its loader processes together), without pages of files.

    Pages of files are the shards that a process has mapped: they grow with what it reads, and the system takes them
    back.
    """
    loaders = [child.pid for child in multiprocessing.active_children()]
    return _resident(psutil.Process()), sum(_resident_of(pid) for pid in loaders if pid is not None)


def _resident_of(pid: int) -> int:
    try:
        return _resident(psutil.Process(pid))
    except psutil.Error:  # it has just ended
        return 0


def _resident(process: psutil.Process) -> int:
    found = process.memory_info()
    return found.rss - getattr(found, "shared", 0)  # only Linux tells them apart

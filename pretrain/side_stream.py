"""Work beside the towers: what needs no features, as targets do not, is done while a GPU encodes. Used by the loop."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class SideStream:
    """A CUDA stream beside the main one; on a CPU, work is simply done.

    Once a step the side stream waits for the main one (`begin`), then the main one for the side stream (the end of
    `run`), so neither is given memory that the other still reads. That is why tensors may cross without record_stream:
    what `work` reads must be held until `run` returns, and what it returns be used before the next `begin`.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> None:
        """Marks the place that `run` waits for: behind what its work reads, before what it should not wait for."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def run(self, work: Callable[[], T]) -> T:
        """Returns what `work` returns, which the main stream will find ready. `work` may wait for its own kernels."""
        if self._stream is None:
            return work()
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

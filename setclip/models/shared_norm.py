"""BatchNorm whose statistics in training are of all ranks' rows, on CPU and GPU (torch's own SyncBatchNorm has no CPU path).

So ranks give what one process gives. Each rank may have another number of rows. Used by heads that have a BatchNorm.
Letters: R rows, C width.
"""

import torch
from torch import Tensor, nn

from setclip import distributed


class SharedBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of rows (R, C), by name of weights and buffers too. In training a collective."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        count = distributed.reduce_over_ranks(torch.tensor(float(len(input))), "sum", input.device).to(input)
        mean = distributed.sum_with_gradient(input.sum(0)) / count
        centred = input - mean
        variance = distributed.sum_with_gradient(centred.square().sum(0)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)

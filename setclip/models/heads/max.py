"""The largest value of each dimension over the inputs as one vector."""

import torch
from torch import Tensor

from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import projection, unit


class Max(SetHead):
    """Sets of one element, (B, 1, D): inputs are brought to width D by a linear layer, where it differs."""

    def __init__(self, in_width: int, width: int = 1024, global_width: int | None = None):
        super().__init__(in_width, width, global_width)
        self.projection = projection(in_width, width)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        values = self.projection(local)
        if mask is not None:
            values = values.masked_fill(~mask[..., None], -torch.inf)
        return HeadOutput(unit(values.amax(1))[:, None])

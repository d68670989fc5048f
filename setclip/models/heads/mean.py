"""The mean of the inputs as one vector."""

from torch import Tensor

from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import mean_of_inputs, projection, unit


class Mean(SetHead):
    """Sets of one element, (B, 1, D): the mean, brought to width D by a linear layer where it differs, which is the mean of
    inputs brought to it.
    """

    def __init__(self, in_width: int, width: int = 1024, global_width: int | None = None):
        super().__init__(in_width, width, global_width)
        self.projection = projection(in_width, width)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        return HeadOutput(unit(self.projection(mean_of_inputs(local, mask).to(local.dtype)))[:, None])

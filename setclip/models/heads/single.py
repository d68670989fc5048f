"""The global feature as one vector: what CLIP and VSE++ (Faghri et al. 2018) compare."""

from torch import Tensor

from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import projection, unit


class Single(SetHead):
    """Sets of one element, (B, 1, D): the global feature, brought to width D by a linear layer where it differs.

    `normalise_input`: to unit norm before the layer too, as VSE++ has it of pictures (stated).
    """

    takes_global = needs_global = True

    def __init__(
        self, in_width: int, width: int = 1024, global_width: int | None = None, normalise_input: bool = False
    ):
        super().__init__(in_width, width, global_width)
        assert global_width is not None
        self.projection = projection(global_width, width)
        self.normalise_input = normalise_input

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        assert global_features is not None
        values = unit(global_features).to(global_features.dtype) if self.normalise_input else global_features
        return HeadOutput(unit(self.projection(values))[:, None])

"""Every input as an element of the set: what fragment matching (SCAN, LAPS, DH-Set's fragment form) compares."""

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import exact, projection, unit


class Local(SetHead):
    """Sets of all inputs, K = N, each through one linear layer (always: D may equal E) and of unit norm.

    `add_global`: the global feature, through a layer of its own where its width differs, is the last element. `normalise`:
    off, elements keep their norms, for the similarity `laps` alone.
    """

    takes_global = True

    def __init__(
        self,
        in_width: int,
        width: int = 1024,
        global_width: int | None = None,
        add_global: bool = False,
        normalise: bool = True,
    ):
        super().__init__(in_width, width, global_width if add_global else None)
        self.takes_global, self.normalise = add_global, normalise
        self.projection = nn.Linear(in_width, width)
        if add_global:
            if global_width is None:
                raise InputError(
                    "expected a global_width with add_global, found none; give it, or leave out add_global"
                )
            self.global_projection = projection(global_width, width)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        sets = self._elements(self.projection(local), mask)
        if global_features is None:
            return HeadOutput(sets, mask)
        last = self._elements(self.global_projection(global_features))[:, None]
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        return HeadOutput(torch.cat((sets, last), 1), mask)

    def _elements(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.normalise:
            return unit(values, mask)
        return exact(values) if mask is None else exact(values).masked_fill(~mask[..., None], 0.0)

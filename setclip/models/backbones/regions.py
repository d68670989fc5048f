"""An image "tower" that has no weights: features of regions, computed before by a detector, are the local features.

The global feature, for heads that want one, is their mean (reconstructed). Letters: B pictures, N regions, E their width.
"""

from typing import Any

from torch import Tensor

from setclip.errors import InputError
from setclip.models.backbones.base import Features, ImageTower
from setclip.models.heads import SideWidths


class Regions(ImageTower):
    """`width`: E, that of the files."""

    image_size = 0

    def __init__(self, width: int):
        super().__init__()
        self.widths = SideWidths(width, width)

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "regions", "width": self.widths.local}

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Features:
        """Returns the features of regions (B, N, E); `mask` (B, N) bool, True where there is one."""
        if inputs.ndim != 3 or inputs.shape[2] != self.widths.local:
            raise InputError(
                f"expected features of regions {self.widths.local} wide, (pictures, regions, {self.widths.local}), found shape "
                f"{tuple(inputs.shape)}; give features of the detector that the model was trained with"
            )
        local = inputs.float()
        if mask is None:
            return Features(local, None, local.mean(1))
        local = local.masked_fill(~mask[..., None], 0.0)
        return Features(local, mask, local.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))

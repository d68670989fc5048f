"""Image towers of timm: places of a convolutional net's last map or maps, or tokens of a ViT or Swin; no projection.

Letters: B pictures, S their side, N places, E width.
"""

from typing import Any

import timm
import torch
from torch import Tensor

from setclip.errors import InputError, first_line
from setclip.models.backbones.base import Features, ImageTower, places_of
from setclip.models.heads import SideWidths, side_by_side

SHORT: dict[str, str] = {
    # stated: VSE++, DivE and ASA take torchvision's ResNet-152 of ImageNet
    "resnet152": "resnet152.tv_in1k",
    # stated: VSE∞ takes the ResNeXt-101 32x8d that learnt from hashtags (WSL)
    "resnext101": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k",
    # stated: LAPS takes microsoft/swin-base-patch4-window7-224 and google/vit-base-patch16-224-in21k
    "swin224": "swin_base_patch4_window7_224.ms_in1k",
    "vit224": "vit_base_patch16_224.orig_in21k",
    # reconstructed: that it is 384 pixels is stated, which weights is not
    "swin384": "swin_base_patch4_window12_384.ms_in1k",
    "vit384": "vit_base_patch16_384.orig_in21k_ft_in1k",
}
"""Names of ours for those of timm, weights included"""


class TimmTower(ImageTower):
    """`name`: of timm. `image_size`: None: the model's own. `maps`: last maps that are taken, finest first, side by side."""

    def __init__(self, name: str, image_size: int | None = None, maps: int = 1):
        super().__init__()
        self.name, self.maps = name, maps
        self.trunk: Any = make_trunk(name, image_size)
        own = timm.data.resolve_model_data_config(self.trunk)["input_size"]
        self.image_size = image_size or int(own[-1])
        self._measure()

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "timm", "name": self.name, "image_size": self.image_size, "maps": self.maps}

    def forward(self, inputs: Tensor) -> Features:
        if self.maps > 1:
            last, maps = self._maps(inputs)
            return Features(side_by_side(maps), None, self._pooled(last))
        found = self.trunk.forward_features(inputs)
        return Features(places_of(self.trunk, found), None, self._pooled(found))

    def _maps(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns (what comes out in the end, the last maps (B, E, rows, columns), finest first)."""
        return self.trunk.forward_intermediates(pixels, indices=self.maps, output_fmt="NCHW")

    def _pooled(self, found: Tensor) -> Tensor:
        return self.trunk.forward_head(found, pre_logits=True)

    @torch.no_grad()
    def _measure(self) -> None:
        """Sees widths and scales by giving the net something."""
        was_training = self.trunk.training
        self.trunk.eval()
        pixels = torch.zeros(1, 3, self.image_size, self.image_size)
        try:
            if self.maps > 1:
                _, maps = self._maps(pixels)
                self.scales = [(int(each.shape[2]), int(each.shape[3])) for each in maps]
                self.scale_widths = [int(each.shape[1]) for each in maps]
                if len(maps) != self.maps or len(set(self.scales)) != self.maps:
                    raise ValueError(f"it gives maps of {self.scales} places")
            found = self(pixels)
        except (AttributeError, AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            what = f"{self.maps} maps of different scales" if self.maps > 1 else "local features"
            raise InputError(
                f"expected {what} from timm's {self.name!r} for pictures of {self.image_size} pixels, found none "
                f"({first_line(error)}); take another model, "
                "size (--backbone.image-size) or number of --backbone.maps"
            ) from error
        self.trunk.train(was_training)
        if found.local.ndim != 3 or found.pooled is None or found.pooled.ndim != 2:
            raise InputError(
                f"expected local features (B, N, E) and a global one from timm's {self.name!r}, found shapes "
                f"{tuple(found.local.shape)} and {None if found.pooled is None else tuple(found.pooled.shape)}; take another"
            )
        self.widths = SideWidths(found.local.shape[2], found.pooled.shape[1])


def make_trunk(name: str, image_size: int | None, **more: Any) -> torch.nn.Module:
    """Returns a model of timm without classifier, random but for what `more` says. Raises InputError on an unknown name.

    Models whose tokens have places (ViT, Swin) are made for the size; others take any.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:4]
        raise InputError(
            f"unknown image tower {name!r}; expected open_clip, regions, {', '.join(SHORT)} or a model of timm"
            + (f", as {', '.join(near)}" if near else "")
        )
    own = timm.get_pretrained_cfg(name)
    differs = image_size is not None and (own is None or image_size != own.input_size[-1])
    try:
        if differs:
            try:
                return timm.create_model(name, num_classes=0, img_size=image_size, **more)
            except TypeError:  # a net that takes pictures of any size
                pass
        return timm.create_model(name, num_classes=0, **more)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"expected timm to build {name!r}{f' for {image_size} pixels' if differs else ''}, found that it cannot "
            f"({first_line(error)}); take another name (its "
            "weights are what stands behind the dot) or --backbone.image-size"
        ) from error

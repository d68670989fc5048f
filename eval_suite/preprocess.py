"""How pictures become the square that a model takes: by Pillow, as open_clip does it, or by torchvision on tensors.

Both resize the short side (bicubic, antialiased) and crop the centre, on uint8. Values differ by at most 2 of 255 in about
one of 200, which turns a few answers of ten thousand; so Pillow's are the default everywhere, and the fast way is asked for.
Used by all evaluations. Letters: H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from setclip.checkpoint import LoadedModel
from setclip.errors import InputError
from setclip.images import Transform, eval_transform
from setclip.lookup import look_up

_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Resizer:
    """One way to resize."""

    make: Callable[[int], Transform]
    """Image size to a function (3, H, W) uint8 → (3, size, size) uint8."""
    takes_batches: bool
    """Whether that function takes (…, 3, H, W) too, in less time than one by one."""


def pillow_transform(image_size: int, interpolation: str = "bicubic", resize_mode: str = "shortest") -> Transform:
    """Returns a function (3, H, W) uint8 → (3, image_size, image_size) uint8: exactly the pixels of open_clip's transform.

    `resize_mode`: "shortest" crops the centre, "squash" does not keep the ratio of the sides, "classic" crops the centre of a
    picture whose short side is 8/7 of the size (224 of 256), which open_clip does not know. Raises InputError for others.
    """
    if resize_mode not in ("shortest", "squash", "classic") or interpolation not in _INTERPOLATIONS:
        raise InputError(
            f"expected a model whose pictures are resized by {' or '.join(_INTERPOLATIONS)} to the shortest side or squashed, "
            f"found {interpolation!r} and {resize_mode!r} in its preprocess_cfg; this is not built"
        )

    def transform(image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        short, long = min(height, width), max(height, width)
        if resize_mode == "squash":
            size = (image_size, image_size)
        else:
            side = round(image_size * 8 / 7) if resize_mode == "classic" else image_size
            other = int(side * long / short)
            size = (side, other) if width <= height else (other, side)
        if size != (width, height):
            array = image.permute(1, 2, 0).contiguous().numpy()
            resized = Image.fromarray(array).resize(size, _INTERPOLATIONS[interpolation])
            image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if size != (image_size, image_size):
            image = F.center_crop(image, [image_size, image_size])
        return image.contiguous()

    return transform


RESIZERS: dict[str, Resizer] = {
    "pillow": Resizer(pillow_transform, takes_batches=False),
    "torch": Resizer(eval_transform, takes_batches=True),
}
"""By name; for a model of open_clip's default preprocessing (bicubic, shortest side)."""


def resizer_for(loaded: LoadedModel, name: str = "pillow") -> Resizer:
    """Returns how a model's pictures are resized, as its preprocess_cfg says. Raises InputError where `name` cannot do that."""
    resizer = look_up(RESIZERS, name, "resize")
    if (loaded.interpolation, loaded.resize_mode) == ("bicubic", "shortest"):
        return resizer
    if name != "pillow":
        raise InputError(
            f"expected a model resized bicubically to the shortest side for --resize {name}, found {loaded.interpolation!r} and "
            f"{loaded.resize_mode!r}; use --resize pillow"
        )
    return replace(
        resizer, make=partial(pillow_transform, interpolation=loaded.interpolation, resize_mode=loaded.resize_mode)
    )


def model_pictures(loaded: LoadedModel) -> Transform:
    """Returns the function that makes a model's pictures: (3, H, W) uint8 → (3, size, size) uint8.

    Raises InputError for a model that takes features of regions.
    """
    if loaded.takes_regions:
        raise InputError(
            f"expected a model that takes pictures, found {loaded.identity.get('where')}, which takes features of regions; "
            "evaluate it with `python -m eval_suite.retrieval --regions DIR --split test` (diagnostics has --regions too)"
        )
    return resizer_for(loaded).make(loaded.image_size)

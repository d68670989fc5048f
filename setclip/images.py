"""Pictures as tensors: decoding, augmentation on uint8, normalisation on the device. Used by training and evaluation.

Everything up to the batch stays uint8 (a quarter of the bytes between processes); `normalize` runs on the model's
device. Letters: B images, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from setclip.decode import decode_rgb
from setclip.hashing import hash_u64

Transform = Callable[[Tensor], Tensor]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of RGB in 0–1; OpenAI's CLIP and open_clip's default. All models that are trained here use them."""


def decode_tensor(data: bytes, min_size: int | None = None) -> Tensor:
    """Returns the image as (3, H, W) uint8; `min_size` as in `decode_rgb`. Raises DecodeError."""
    array = decode_rgb(data, min_size)
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array).permute(2, 0, 1)


def eval_transform(image_size: int) -> Transform:
    """Returns a function (…, 3, H, W) uint8 → (…, 3, image_size, image_size) uint8: short side resized, centre cropped.

    Bicubic with antialiasing, as open_clip's evaluation transform does on PIL images; values differ from Pillow's by at
    most 2. Pictures of one size can be given together: the same values, and for small ones in a seventh of the time.
    """

    def transform(image: Tensor) -> Tensor:
        if image.shape[-2:] == (image_size, image_size):
            return image.contiguous()
        if min(image.shape[-2:]) != image_size:
            image = F.resize(image, [image_size], InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(image, [image_size, image_size]).contiguous()

    return transform


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training pictures vary. Drawn from (seed, epoch, key), so it depends on no rank, worker or resume."""

    kind: Literal["resized_crop", "shift", "none"] = "resized_crop"
    """resized_crop: a random part, resized (open_clip's default); shift: a few pixels sideways; none: as evaluated."""
    scale: tuple[float, float] = (0.9, 1.0)
    """resized_crop: share of the area that is kept. open_clip's default is 0.9 to 1."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """resized_crop: aspect ratio of the crop, width over height."""
    flip: bool = False
    """Mirror half of the pictures. Off by default: captions say "left" and signs carry text."""
    pixels: int = 4
    """shift: the largest shift, in pixels of the model's image size, edges repeated."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must hold two shares of the area, 0 < low <= high <= 1; found {self.scale}")


class Augment:
    """A training transform: (3, H, W) uint8 and the sample's words → (3, image_size, image_size) uint8."""

    def __init__(self, config: AugmentConfig, image_size: int):
        self.config, self.image_size = config, image_size
        self._eval = eval_transform(image_size)

    def __call__(self, image: Tensor, *words: int) -> Tensor:
        """Returns the augmented picture; `words` (seed, epoch, hash of the key) decide the draw."""
        config, size = self.config, self.image_size
        # Four draws in [0, 1): numpy in one call is far cheaper than seeding torch's generator for each sample.
        u = hash_u64(*words, np.arange(5)).astype(np.float64) / 2.0**64
        if config.kind == "resized_crop":
            top, left, height, width = _crop_box(image.shape[1], image.shape[2], config.scale, config.ratio, u)
            image = F.resized_crop(
                image, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
            )
        else:
            image = self._eval(image)
            if config.kind == "shift":
                dy, dx = (int(v * (2 * config.pixels + 1)) for v in u[:2])
                steps = torch.arange(size) - config.pixels  # beyond the edge the edge repeats
                image = image[:, (steps + dy).clamp(0, size - 1)][:, :, (steps + dx).clamp(0, size - 1)]
        return image.flip(2) if config.flip and u[4] < 0.5 else image


def _crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], u: np.ndarray
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of a random crop; a shape that does not fit is cut to the picture."""
    area = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + u[1] * (np.log(ratio[1]) - np.log(ratio[0])))
    crop_width = min(width, max(1, round(np.sqrt(area * aspect))))
    crop_height = min(height, max(1, round(np.sqrt(area / aspect))))
    top, left = int(u[2] * (height - crop_height + 1)), int(u[3] * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns (B, 3, H, W) float32 on the device of `images` ((B, 3, H, W) uint8): scaled to 0–1, mean and std applied."""
    scale = torch.tensor(std, device=images.device).mul(255.0)[:, None, None]
    offset = torch.tensor(mean, device=images.device).mul(255.0)[:, None, None]
    return images.to(torch.float32).sub_(offset).div_(scale)

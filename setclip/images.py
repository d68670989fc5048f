"""Pictures as tensors: decoding, augmentation on uint8, normalisation on the device. Used by training and evaluation.

Everything up to the batch stays uint8 (a quarter of the bytes between processes); `normalize` runs on the model's
device. Letters: B images, H height, W width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from setclip.decode import decode_rgb, image_size
from setclip.hashing import hash_numbers

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

    def decode(self, data: bytes, *words: int) -> Tensor:
        """Returns the augmented picture of an image file's bytes. Raises DecodeError.

        A JPEG is decoded at a smaller scale where the part of it that is wanted keeps at least the pixels that it gives: the box
        is drawn on the whole picture, so that it does not depend on the scale.
        """
        if self.config.kind != "resized_crop":
            return self(decode_tensor(data, min_size=self.image_size), *words)
        width, height = image_size(data)
        u = _draws(*words)
        box = _crop_box(height, width, self.config.scale, self.config.ratio, u)
        needed = self.image_size / min(box[2:])
        image = decode_tensor(data, min_size=math.ceil(needed * min(height, width)) if needed < 1 else None)
        return self._crop(image, _scaled(box, height, width, *image.shape[1:]), u)

    def __call__(self, image: Tensor, *words: int) -> Tensor:
        """Returns the augmented picture; `words` (seed, epoch, hash of the key) decide the draw."""
        config, size = self.config, self.image_size
        u = _draws(*words)
        if config.kind == "resized_crop":
            return self._crop(image, _crop_box(image.shape[1], image.shape[2], config.scale, config.ratio, u), u)
        image = self._eval(image)
        if config.kind == "shift":
            dy, dx = (int(v * (2 * config.pixels + 1)) for v in u[:2])
            steps = torch.arange(size) - config.pixels  # beyond the edge the edge repeats
            image = image[:, (steps + dy).clamp(0, size - 1)][:, :, (steps + dx).clamp(0, size - 1)]
        return self._flip(image, u)

    def _crop(self, image: Tensor, box: tuple[int, int, int, int], u: Sequence[float]) -> Tensor:
        size = [self.image_size, self.image_size]
        image = F.resized_crop_image(image, *box, size, InterpolationMode.BICUBIC, antialias=True)
        return self._flip(image, u)

    def _flip(self, image: Tensor, u: Sequence[float]) -> Tensor:
        return image.flip(2) if self.config.flip and u[4] < 0.5 else image


def _scaled(
    box: tuple[int, int, int, int], height: int, width: int, new_height: int, new_width: int
) -> tuple[int, int, int, int]:
    """Returns a box of a picture in the same picture of another size, at whole pixels."""
    if (height, width) == (new_height, new_width):
        return box
    top, bottom = (round(edge * new_height / height) for edge in (box[0], box[0] + box[2]))
    left, right = (round(edge * new_width / width) for edge in (box[1], box[1] + box[3]))
    return top, left, max(1, bottom - top), max(1, right - left)


def crop_box(height: int, width: int, config: AugmentConfig, *words: int) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of the part of a picture that `resized_crop` takes for these words."""
    return _crop_box(height, width, config.scale, config.ratio, _draws(*words))


def _draws(*words: int) -> list[float]:
    """Returns five numbers in [0, 1): far cheaper than seeding torch's generator for each sample."""
    return [(number >> 11) * 2.0**-53 for number in hash_numbers(5, *words)]


def _crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], u: Sequence[float]
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of a random crop; a shape that does not fit is cut to the picture."""
    area = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
    aspect = math.exp(math.log(ratio[0]) + u[1] * (math.log(ratio[1]) - math.log(ratio[0])))
    crop_width = min(width, max(1, round(math.sqrt(area * aspect))))
    crop_height = min(height, max(1, round(math.sqrt(area / aspect))))
    top, left = int(u[2] * (height - crop_height + 1)), int(u[3] * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns (B, 3, H, W) float32 on the device of `images` ((B, 3, H, W) uint8): scaled to 0–1, mean and std applied."""
    scale = torch.tensor(std, device=images.device).mul(255.0)[:, None, None]
    offset = torch.tensor(mean, device=images.device).mul(255.0)[:, None, None]
    return images.to(torch.float32).sub_(offset).div_(scale)

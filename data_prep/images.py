"""What happens to one image on its way into a shard: it is checked, and made smaller if it is larger than asked for.

JPEG, PNG and WebP are taken, by content; anything else is dropped, however well it could be read: each further format
is one more parser that strangers' bytes go through. Images that are small enough keep their bytes. Larger ones become
JPEG: decoded by libjpeg-turbo at 1/2, 1/4 or 1/8 where that is still large enough, which skips most of the work, then
resized by OpenCV where that is not yet the wanted size.

Pixels are what `setclip.decode.decode_rgb` gives, here and when the shards are read: transparency on white, no EXIF
orientation, no colour profile. An image that is resized loses its EXIF data; its pixels stay in their stored order.
"""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_prep.image_structure import ImageKind, is_complete, kind_of, read_size
from data_prep.plan import Dropped, PrepareConfig
from setclip.decode import MAX_PIXELS, DecodeError, decode_rgb

cv2.setNumThreads(1)  # processes share out the cores already

MAX_BYTES = 50_000_000
"""Larger files are refused, here and by sources before they read them: a photograph of MAX_PIXELS seldom has more."""

NOT_AN_IMAGE = "not JPEG, PNG or WebP"
TOO_SMALL = "image smaller than --min-side"
TOO_ELONGATED = "image more elongated than --max-aspect"

_JPEG_MAX_SIDE = 65_500  # libjpeg's limit


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """The part of PrepareConfig that images obey; its docstrings define the fields."""

    short_side: int
    jpeg_quality: int
    check: Literal["structure", "decode"]
    min_side: int
    max_aspect: float

    @classmethod
    def from_config(cls, config: PrepareConfig) -> "ImageRules":
        """Returns the rules in a preparation's settings."""
        return cls(
            short_side=config.short_side,
            jpeg_quality=config.jpeg_quality,
            check=config.check,
            min_side=config.min_side,
            max_aspect=config.max_aspect,
        )


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it goes into a shard."""

    data: bytes
    ext: ImageKind
    """By content."""
    width: int
    """In pixels, as stored (EXIF orientation is not applied)."""
    height: int
    resized: bool
    """Whether `data` was made here; else it is the source's."""


def prepare_image(data: bytes, rules: ImageRules) -> Image | Dropped:
    """Returns the image that goes into the shard, or why there is none; raises nothing, whatever the bytes are.

    `rules.min_side` and `rules.max_aspect` are of the source.
    """
    kind = kind_of(data)
    if kind is None:
        return Dropped(NOT_AN_IMAGE) if data else _unreadable("empty file")
    if len(data) > MAX_BYTES:
        return _unreadable("too many bytes")
    try:
        width, height = read_size(data, kind)
        if width * height > MAX_PIXELS:
            return _unreadable("too many pixels")
        if min(width, height) == 0:
            return _unreadable("no pixels")
        if min(width, height) < rules.min_side:
            return Dropped(TOO_SMALL, "filtered")
        if rules.max_aspect and max(width, height) > rules.max_aspect * min(width, height):
            return Dropped(TOO_ELONGATED, "filtered")
        if not is_complete(data, kind):
            return _unreadable("truncated")
        if 0 < rules.short_side < min(width, height):
            return _resized(data, width, height, rules)
        if rules.check == "decode":
            decode_rgb(data)
    except DecodeError as error:
        return _unreadable(str(error))
    return Image(data, kind, width, height, False)


def _resized(data: bytes, width: int, height: int, rules: ImageRules) -> Image:
    """Returns the image with its short side at `rules.short_side` pixels.

    Both sides are scaled by the same factor and the long one is rounded down: what is over, less than a pixel of the
    result, is cut off at the right or bottom, so nothing is stretched.
    """
    short, target = min(width, height), rules.short_side
    size = (width * target // short, height * target // short)
    if max(size) > _JPEG_MAX_SIDE:
        raise DecodeError("too long for a JPEG")
    eighths = next(n for n in (1, 2, 4, 8) if short * n >= 8 * target)
    pixels = decode_rgb(data, min_size=-(-short * eighths // 8), eighths=True)
    if pixels.shape[:2] == (height, width):
        eighths = 8  # Pillow decoded it
    elif pixels.shape[:2] != (-(-height * eighths // 8), -(-width * eighths // 8)):
        raise DecodeError("header of another size")
    if short * eighths == 8 * target:
        pixels = np.ascontiguousarray(pixels[: size[1], : size[0]])
    else:
        per_pixel = short * eighths / (8 * target)  # decoded pixels per pixel of the result
        pixels = _shrink(pixels, size, per_pixel, cv2.INTER_AREA if eighths == 8 else cv2.INTER_CUBIC)
    # 4:2:0 and the exact DCT: what OpenCV does, and so most published data sets. (The fast DCT gained nothing.)
    encoded = simplejpeg.encode_jpeg(pixels, rules.jpeg_quality, "RGB", "420", fastdct=False)
    return Image(encoded, "jpg", *size, True)


def _shrink(pixels: NDArray[np.uint8], size: tuple[int, int], per_pixel: float, interpolation: int) -> NDArray[Any]:
    """Returns `pixels` at `size` by one of OpenCV's filters (a third of the time of Pillow's).

    Of the whole picture each pixel is the mean over its area, as img2dataset makes it. A picture that was decoded at half
    size or less holds no finer detail that could alias; there the mean, of fewer than two pixels, would only blur it.
    """
    height, width = pixels.shape[:2]
    right, bottom = (min(round(side * per_pixel), most) for side, most in zip(size, (width, height), strict=True))
    return cv2.resize(pixels[:bottom, :right], size, interpolation=interpolation)


def _unreadable(reason: str) -> Dropped:
    return Dropped(f"unreadable image ({reason})")

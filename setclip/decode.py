"""Image bytes to an RGB array, without torch. Used by data preparation (checks) and by the loaders of training and evaluation.

JPEG goes through simplejpeg (libjpeg-turbo); anything else, and the rare JPEG that it refuses (CMYK), through Pillow.
"""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 100_000_000  # larger pictures are refused: a few kilobytes can claim gigapixels

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class DecodeError(ValueError):
    """An image that cannot be used; the message is a short reason that can be counted ("truncated", …)."""


def decode_rgb(data: bytes, min_size: int | None = None) -> NDArray[np.uint8]:
    """Returns the image as (height, width, 3) uint8 RGB.

    With `min_size` a JPEG may be decoded at 1/2, 1/4 or 1/8 scale, as long as its short side stays at least `min_size`
    pixels, which saves most of the work for large photographs. Raises DecodeError.
    """
    if data[:2] == b"\xff\xd8":
        width, height = image_size(data)
        try:
            if min_size is not None and min(width, height) >= 2 * min_size:
                return simplejpeg.decode_jpeg(data, "RGB", min_height=min_size, min_width=min_size)
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            if "Unsupported color conversion" not in str(error):
                reason = "truncated" if "premature" in str(error).lower() else "unreadable JPEG"
                raise DecodeError(reason) from error
    with _open(data) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise DecodeError("truncated" if "truncated" in str(error) else "unreadable image") from error


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) from the header without decoding. Raises DecodeError."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise DecodeError("unreadable JPEG") from error
    else:
        with _open(data) as image:
            width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError("too many pixels")
    return width, height


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DecodeError("empty file")
    try:
        with warnings.catch_warnings():  # Pillow warns of large images; our own limit decides
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise DecodeError("too many pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DecodeError("not an image") from error

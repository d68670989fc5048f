"""Image bytes to an RGB array, without torch. Used by data preparation (checks) and by the loaders of training and evaluation.

JPEG goes through simplejpeg (libjpeg-turbo); the rest, and the rare JPEG that it refuses (CMYK, odd headers), through Pillow.
"""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 100_000_000  # larger pictures are refused: a few kilobytes can claim gigapixels

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # few parsers for strangers' bytes

# What libjpeg-turbo stops at, in strict mode at the first warning, and Pillow does not: CMYK, and odd values that no
# decoder uses (the second is what some telephones write). Pillow still notices where pixels are missing.
_FOR_PILLOW = (
    "Unsupported color conversion",
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code",
)


class DecodeError(ValueError):
    """An image that cannot be used; the message is a short reason that can be counted ("truncated", …)."""


def decode_rgb(data: bytes, min_size: int | None = None, *, eighths: bool = False) -> NDArray[np.uint8]:
    """Returns the image as (height, width, 3) uint8 RGB.

    With `min_size` a JPEG whose short side is at least twice that may be decoded at a smaller scale, as long as its
    short side stays at least `min_size` pixels, which saves most of the work for large photographs; with `eighths` also
    a smaller one (which saves the work of resizing, not of decoding).

    Transparent pictures stand on white. Of 16 bits the upper eight are taken, of an animation the first picture. EXIF
    orientation and colour profiles are ignored, as open_clip's loader does. Raises DecodeError.
    """
    if data[:2] == b"\xff\xd8":
        width, height = image_size(data)
        scaled = min_size is not None and min(width, height) >= (min_size if eighths else 2 * min_size)
        smallest = {"min_height": min_size, "min_width": min_size} if scaled else {}
        try:
            return simplejpeg.decode_jpeg(data, "RGB", **smallest)
        except ValueError as error:
            if not any(reason in str(error) for reason in _FOR_PILLOW):
                reason = "truncated" if "premature" in str(error).lower() else "unreadable JPEG"
                raise DecodeError(reason) from error
    with warnings.catch_warnings():  # Pillow warns of odd files; whether the pixels can be had decides
        warnings.simplefilter("ignore")
        with _open(data) as image:
            try:
                return _rgb(image)
            except MemoryError:
                raise
            except Exception as error:  # damaged files make Pillow raise nearly anything
                raise DecodeError("truncated" if "truncated" in str(error) else "unreadable image") from error


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) from the header without decoding. Raises DecodeError."""
    size = _jpeg_size(data) if data[:2] == b"\xff\xd8" else None
    if size is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(data) as image:
                size = image.size
    width, height = size
    if width * height > MAX_PIXELS:
        raise DecodeError("too many pixels")
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (width, height), None where Pillow must look."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if any(reason in str(error) for reason in _FOR_PILLOW):
            return None
        raise DecodeError("unreadable JPEG") from error
    return int(width), int(height)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError("too many pixels")
    if image.mode.startswith("I;16"):  # Pillow would cut values at 255 instead of scaling them
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DecodeError("empty file")
    try:
        return Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except Image.DecompressionBombError as error:
        raise DecodeError("too many pixels") from error
    except MemoryError:
        raise
    except Exception as error:
        raise DecodeError("not an image") from error

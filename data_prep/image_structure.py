"""What the bytes of a JPEG, PNG or WebP say without being decoded: the kind, the size, whether the file is complete.

For data_prep.images: some microseconds an image, where decoding takes hundreds. PNG and WebP are read here rather than
with Pillow, which allocates memory for the claimed size of a WebP when it opens it.
"""

import struct
import zlib
from typing import Literal

from setclip.decode import DecodeError, image_size

ImageKind = Literal["jpg", "png", "webp"]

_END_OF_IMAGE = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # JPEG markers that stand alone

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # colour type to bits


def kind_of(data: bytes) -> ImageKind | None:
    """Returns what `data` is by its first bytes, None if it is no JPEG, PNG or WebP. Names lie."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:8] == _PNG_SIGNATURE:
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def read_size(data: bytes, kind: ImageKind) -> tuple[int, int]:
    """Returns (width, height) in pixels. Raises DecodeError where the header is not whole or not valid."""
    return {"jpg": image_size, "png": _png_size, "webp": _webp_size}[kind](data)


def is_complete(data: bytes, kind: ImageKind) -> bool:
    """Whether a file with a valid header has the marks of its end. What comes after them is not looked at.

    JPEG: an end-of-image marker after the start of the first scan (one before it belongs to a thumbnail). Trailing
    bytes are common in photographs: padding, a second picture, a video. PNG: the last chunk. WebP: the size in the
    header. A hole in the middle is not seen.
    """
    if kind == "jpg":
        scan = _first_scan(data)
        return scan is not None and data.rfind(_END_OF_IMAGE, scan) >= 0
    if kind == "png":
        return b"IDAT" in data and data.rfind(_PNG_END) > 0
    return len(data) >= int.from_bytes(data[4:8], "little") + 8


def _first_scan(data: bytes) -> int | None:
    """Returns the offset of the marker where a JPEG's pixels begin, None where the file ends before."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:  # decoders look for the next marker, and so do we
            position = data.find(b"\xff", position)
            if position < 0:
                return None
            continue
        marker = data[position + 1]
        if marker == _START_OF_SCAN:
            return position
        if marker in (0x00, 0xFF):  # a fill byte or a stuffed one
            position += 1 if marker else 2
        elif marker in _WITHOUT_LENGTH:
            position += 2
        else:
            position += 2 + (data[position + 2] << 8) + data[position + 3]
    return None


def _png_size(data: bytes) -> tuple[int, int]:
    if len(data) < 33:
        raise DecodeError("truncated")
    length, name, width, height, depth, colour, compression, method, interlace, checksum = struct.unpack_from(
        ">I4sIIBBBBBI", data, 8
    )
    is_valid = (length, name, compression, method) == (13, b"IHDR", 0, 0) and interlace <= 1
    if not is_valid or depth not in _PNG_DEPTHS.get(colour, ()) or zlib.crc32(data[12:29]) != checksum:
        raise DecodeError("unreadable PNG")
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """See RFC 9649: a lossy frame (2.5), a lossless one (3.4), or the canvas of an extended file (2.7)."""
    if len(data) < 30:
        raise DecodeError("truncated")
    chunk, content = data[12:16], data[20:30]
    if chunk == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X":
        return int.from_bytes(content[4:7], "little") + 1, int.from_bytes(content[7:10], "little") + 1
    raise DecodeError("unreadable WebP")

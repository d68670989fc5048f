"""What happens to one image on its way into a shard: what passes, what is resized and how well, what is dropped."""

import io
import os
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import simplejpeg

from data_prep import images
from data_prep.images import NOT_AN_IMAGE, TOO_ELONGATED, TOO_SMALL, Image, ImageRules, prepare_image
from data_prep.plan import Dropped, PrepareConfig
from setclip.decode import DecodeError, decode_rgb, image_size

REAL_DATA = os.environ.get("SETCLIP_REAL_DATA")
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def rules(**settings) -> ImageRules:
    defaults = {"short_side": 64, "jpeg_quality": 95, "check": "structure", "min_side": 0, "max_aspect": 0.0}
    return ImageRules(**{**defaults, **settings})


def scene(width: int, height: int) -> np.ndarray:
    """A smooth colourful picture with some edges, (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    picture = np.stack([x / width * 255, y / height * 255, 127 + 120 * np.sin(x / 17) * np.cos(y / 23)], -1)
    picture[height // 3 : height // 2, width // 4 : width // 2] = (200, 30, 60)
    return picture.astype(np.uint8)


def encoded(kind: str, picture: np.ndarray | PIL.Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(buffer, KINDS[kind], **options)
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


def reason(data: bytes, **settings) -> str:
    dropped = prepare_image(data, rules(**settings))
    assert isinstance(dropped, Dropped)
    return dropped.reason


def prepared(data: bytes, **settings) -> Image:
    image = prepare_image(data, rules(**settings))
    assert isinstance(image, Image), image
    return image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short_side", [0, 40, 41])
@pytest.mark.parametrize("check", ["structure", "decode"])
def test_images_that_are_small_enough_keep_their_bytes(kind, short_side, check):
    data = encoded(kind, scene(50, 40))
    assert prepared(data, short_side=short_side, check=check) == Image(data, kind, 50, 40, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lossless", [True, False])
def test_sizes_are_read_from_every_kind_of_header(kind, lossless):
    for mode, exif in (("RGB", b""), ("RGBA", b""), ("RGB", b"Exif\0\0" + bytes(30))):
        if kind == "jpg" and mode == "RGBA":
            continue
        picture = PIL.Image.fromarray(scene(301, 41)).convert(mode)
        data = encoded(kind, picture, lossless=lossless, exif=exif)
        image = prepared(data, check="decode")
        assert (image.width, image.height, image.ext) == (301, 41, kind)


def test_the_kind_is_that_of_the_content():
    assert reason(b"") == "unreadable image (empty file)"
    for data in (b"<html>404</html>", b"\0" * 100, b"\xff", b"RIFF\0\0\0\0WAVE", b"\x89PNG\r\n"):
        assert reason(data) == NOT_AN_IMAGE
    for other in ("GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        PIL.Image.fromarray(scene(20, 20)).save(buffer, other)
        assert prepare_image(buffer.getvalue(), rules()) == Dropped(NOT_AN_IMAGE, "bad")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [(65, 65), (70, 140), (128, 128), (127, 190), (129, 300), (171, 128), (193, 192), (256, 999), (515, 512), (80, 70)],
)
def test_larger_images_become_jpeg_of_the_short_side_without_being_stretched(kind, size):
    width, height = size
    data = encoded(kind, scene(width, height), **({"quality": 98, "subsampling": 0} if kind == "jpg" else {}))
    image = prepared(data, jpeg_quality=98)
    short = min(size)
    assert (image.ext, image.resized) == ("jpg", True)
    assert (image.width, image.height) == (width * 64 // short, height * 64 // short)
    assert image_size(image.data) == (image.width, image.height)
    box = (0, 0, image.width * short / 64, image.height * short / 64)
    whole = PIL.Image.fromarray(decode_rgb(data))
    exact = np.asarray(whole.resize((image.width, image.height), PIL.Image.Resampling.BICUBIC, box=box))
    assert psnr(decode_rgb(image.data), exact) > 31  # edges of colour at 4:2:0
    moved = np.roll(exact, 1, axis=1)
    assert psnr(decode_rgb(image.data), exact) > psnr(decode_rgb(image.data), moved) + 3


def test_resized_images_have_the_quality_asked_for_and_half_the_colour_resolution():
    data = encoded("jpg", scene(300, 200), quality=90)
    for quality in (60, 95):
        image = prepared(data, jpeg_quality=quality)
        assert simplejpeg.decode_jpeg_header(image.data)[3] == "420"
        theirs = PIL.Image.open(io.BytesIO(encoded("jpg", scene(8, 8), quality=quality)))
        assert PIL.Image.open(io.BytesIO(image.data)).quantization == theirs.quantization
    assert prepared(data) == prepared(data)


def test_progressive_greyscale_and_cmyk_jpegs_are_resized():
    picture = PIL.Image.fromarray(scene(200, 150))
    for data in (
        encoded("jpg", picture, progressive=True),
        encoded("jpg", picture.convert("L")),
        encoded("jpg", picture.convert("CMYK")),
    ):
        image = prepared(data)
        assert (image.width, image.height) == (85, 64)
        box = (0, 0, 85 * 150 / 64, 150)
        exact = np.asarray(PIL.Image.fromarray(decode_rgb(data)).resize((85, 64), box=box))
        assert psnr(decode_rgb(image.data), exact) > 31
        assert prepared(data, short_side=0, check="decode").data == data


def test_transparency_stands_on_white_whether_an_image_is_resized_or_not():
    rgba = np.zeros((100, 100, 4), np.uint8)
    rgba[:, 50:] = (255, 0, 0, 255)
    picture = PIL.Image.fromarray(rgba)
    palette = picture.quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    for data in (
        encoded("png", picture),
        encoded("png", palette),
        encoded("png", palette, transparency=b"\0\xff\xff\xff"),
        encoded("webp", picture, lossless=True),
        encoded("png", picture.convert("LA")),
    ):
        small = decode_rgb(prepared(data).data)
        assert small[:, :25].min() > 245
        assert (decode_rgb(prepared(data, short_side=0).data)[:, :50] == 255).all()


def test_sixteen_bits_are_scaled_and_not_cut():
    ramp = (np.arange(100, dtype=np.uint32) * 655).astype(np.uint16)
    data = encoded("png", PIL.Image.fromarray(np.tile(ramp, (100, 1))))
    assert data[24:26] == b"\x10\x00"
    for image in (prepared(data, short_side=0), prepared(data, short_side=99)):
        row = decode_rgb(image.data)[50, :, 0].astype(int)
        assert row[0] < 8
        assert row[-1] > 245
        assert abs(row[50] - 128) < 8


def test_orientation_is_kept_where_bytes_pass_and_ignored_where_they_are_made():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = encoded("jpg", scene(200, 100), exif=exif.tobytes())
    assert prepared(data, short_side=0).data == data
    image = prepared(data)
    assert (image.width, image.height) == (128, 64)
    assert PIL.Image.open(io.BytesIO(image.data)).getexif().get(0x0112) is None


def test_size_and_shape_filter_the_source():
    data = encoded("png", scene(300, 100))
    assert prepare_image(data, rules(min_side=101)) == Dropped(TOO_SMALL, "filtered")
    assert prepare_image(data, rules(max_aspect=2.99)) == Dropped(TOO_ELONGATED, "filtered")
    assert isinstance(prepare_image(data, rules(min_side=100, max_aspect=3.0)), Image)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_claims_of_gigapixels_are_refused_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "decode_rgb", lambda *_, **__: pytest.fail("decoded"))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0))
    assert reason(png + chunk(b"IDAT", b"") + chunk(b"IEND", b"")) == "unreadable image (too many pixels)"
    jpeg = bytearray(encoded("jpg", scene(16, 16)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
    assert reason(bytes(jpeg)) == "unreadable image (too many pixels)"
    webp = bytearray(encoded("webp", PIL.Image.fromarray(scene(16, 16)).convert("RGBA"), exif=b"Exif\0\0ab"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff" * 6
    assert reason(bytes(webp)) == "unreadable image (too many pixels)"


def test_files_of_too_many_bytes_are_refused(monkeypatch):
    data = encoded("jpg", scene(16, 16))
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    assert reason(data) == "unreadable image (too many bytes)"


def test_what_jpeg_cannot_hold_is_dropped():
    data = encoded("png", PIL.Image.new("1", (130_000, 2)))
    assert prepared(data, short_side=1).width == 65_000
    data = encoded("png", PIL.Image.new("1", (140_000, 2)))
    assert reason(data, short_side=1) == "unreadable image (too long for a JPEG)"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short_side", [0, 16])
def test_wherever_a_file_is_cut_it_is_noticed(kind, short_side):
    data = encoded(kind, scene(60, 50))
    for length in range(1, len(data), 7):
        dropped = reason(data[:length], short_side=short_side)
        assert dropped.startswith("unreadable image (") or (dropped == NOT_AN_IMAGE and length < 12), length
    assert reason(data[:-20], short_side=short_side) == "unreadable image (truncated)"


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_photograph():
    thumbnail = encoded("jpg", scene(30, 20))
    data = encoded("jpg", scene(300, 200))
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Exif\0\0" + thumbnail
    whole = data[:2] + segment + data[2:]
    assert prepared(whole, short_side=0).data == whole
    assert reason(whole[: len(whole) // 2], short_side=0) == "unreadable image (truncated)"


def test_bytes_after_the_end_are_no_damage():
    for kind in KINDS:
        data = encoded(kind, scene(60, 50))
        for trailing in (b"\0" * 999, encoded("jpg", scene(8, 8)), b"ftypmp42" * 100, b"\xff"):
            assert prepared(data + trailing, check="decode").data == data + trailing


def test_fill_bytes_between_segments_and_standalone_markers_are_passed_over():
    data = encoded("jpg", scene(60, 50))
    tables = data.index(b"\xff\xdb")
    odd = data[:tables] + b"\xff\xff\xff" + data[tables:]
    assert prepared(odd, check="decode").data == odd


def test_odd_scan_parameters_that_decoders_ignore_are_ignored():
    data = bytearray(encoded("jpg", scene(60, 50)))
    scan = data.index(b"\xff\xda")
    data[scan + 13] = 17  # "successive approximation" in a JPEG that is not progressive
    with pytest.raises(ValueError, match="Invalid SOS parameters"):
        simplejpeg.decode_jpeg(bytes(data))
    assert prepared(bytes(data), check="decode").data == data
    assert prepared(bytes(data), short_side=20).width == 24
    cut = bytes(data[: -len(data) // 4])
    with pytest.raises(DecodeError, match="truncated"):
        decode_rgb(cut)


def test_an_unknown_adobe_transform_is_no_reason_to_refuse():
    data = bytearray(encoded("jpg", PIL.Image.fromarray(scene(60, 50)).convert("CMYK")))
    adobe = data.index(b"Adobe\0")
    data[adobe + 11] = 77
    assert prepared(bytes(data), check="decode").data == data
    assert prepared(bytes(data), short_side=20).width == 24


def test_a_hole_inside_is_found_by_decoding_only():
    data = bytearray(encoded("jpg", scene(200, 200), quality=98))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    assert prepared(bytes(data), short_side=0, check="structure").data == data
    assert reason(bytes(data), short_side=0, check="decode").startswith("unreadable image (")
    assert reason(bytes(data)).startswith("unreadable image (")
    png = bytearray(encoded("png", scene(100, 100)))
    png[len(png) // 2] ^= 255
    assert prepared(bytes(png), short_side=0, check="structure").data == png
    assert reason(bytes(png), short_side=0, check="decode").startswith("unreadable image (")


REASONS = {
    NOT_AN_IMAGE,
    *(
        f"unreadable image ({what})"
        for what in (
            "empty file",
            "header of another size",
            "no pixels",
            "not an image",
            "too long for a JPEG",
            "too many pixels",
            "truncated",
            "unreadable JPEG",
            "unreadable PNG",
            "unreadable WebP",
            "unreadable image",
        )
    ),
}


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(min(len(result) + 1, rng.choice([40, 700, 1 << 30])))
        match rng.randrange(6):
            case 0:
                result[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                result[place : place + 2] = rng.choice([b"\0\0", b"\xff\xff", b"\xff\xd9", b"\xff\xda"])
            case 2:
                del result[max(place, 20) :]
            case 3:
                result[place:place] = rng.randbytes(rng.randrange(1, 50))
            case 4:
                del result[place : place + rng.randrange(1, 50)]
            case 5:  # the beginning of one file with the rest of another
                other = rng.choice(others)
                result[:place] = other[:place]
    return bytes(result)


def png_with_valid_checksums(data: bytes) -> bytes:
    """Damage inside chunks reaches the decoder only where the checksums fit."""
    result, position = bytearray(data), 8
    while position + 12 <= len(result):
        length = int.from_bytes(result[position : position + 4], "big")
        end = position + 8 + length
        if end + 4 > len(result):
            break
        result[end : end + 4] = struct.pack(">I", zlib.crc32(result[position + 4 : end]))
        position = end + 4
    return bytes(result)


def specimens() -> list[bytes]:
    picture = PIL.Image.fromarray(scene(48, 40))
    palette = picture.quantize(16)
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a scene"
    return [
        encoded("jpg", picture, exif=exif.tobytes()),
        encoded("jpg", picture, progressive=True, quality=98),
        encoded("jpg", picture.convert("CMYK")),
        encoded("jpg", picture.convert("L")),
        encoded("png", picture),
        encoded("png", palette, transparency=bytes(range(16)), exif=exif.tobytes()),
        encoded("png", picture.convert("LA")),
        encoded("png", PIL.Image.fromarray(np.full((40, 48), 999, np.uint16))),
        encoded("webp", picture, exif=exif.tobytes()),
        encoded("webp", picture.convert("RGBA"), lossless=True),
        encoded("webp", picture, save_all=True, append_images=[picture.rotate(90)]),
    ]


@pytest.mark.parametrize("number", range(len(specimens())))
def test_no_damage_raises_and_every_reason_is_known(number):
    whole = specimens()
    kept = dropped = 0
    for seed in range(150):
        rng = random.Random(seed * 100 + number)
        data = mutated(whole[number], whole, rng)
        if data[:4] == b"\x89PNG" and seed % 2:
            data = png_with_valid_checksums(data)
        for settings in ({"short_side": 0, "check": "decode"}, {"short_side": 16}, {"short_side": 0}):
            result = prepare_image(data, rules(**settings))
            if isinstance(result, Dropped):
                assert (result.reason in REASONS, result.kind) == (True, "bad"), result.reason
                dropped += 1
            else:
                kept += 1
                assert result.width >= 1
                if settings != {"short_side": 0}:
                    assert decode_rgb(result.data).shape == (result.height, result.width, 3)
    assert min(kept, dropped) > 20


def test_the_rules_are_those_of_a_preparation(tmp_path):
    config = PrepareConfig(out=tmp_path, short_side=99, jpeg_quality=77, check="decode", min_side=3, max_aspect=4)
    expected = ImageRules(short_side=99, jpeg_quality=77, check="decode", min_side=3, max_aspect=4)
    assert ImageRules.from_config(config) == expected


@pytest.mark.skipif(not REAL_DATA, reason="SETCLIP_REAL_DATA is not set")
def test_no_real_photograph_is_refused():
    root = Path(REAL_DATA or "")
    count = 0
    for path in sorted((root / "photos_open" / "images").iterdir()):
        image = prepared(path.read_bytes(), short_side=0, check="decode")
        assert not image.resized
        assert min(prepared(path.read_bytes(), short_side=100).data[:2]) == 0xD8
        count += 1
    for name in ("coco/photos.tar", "flickr8k/dev.tar"):
        with tarfile.open(root / name) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                assert prepared(data, short_side=256).data == data
                count += 1
    assert count > 3_000

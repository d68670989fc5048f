"""How the objects of the embedded corpus look, in words made of their own drawings: colours and shape. For the text domains.

AlignCLIP has a language model describe objects. Here no model is asked: a sentence says the two colours that cover
most of a drawing and its shape, so it is true of the pictures, and the experiment needs nothing but this package. It
says less than a model would.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.sources.scene_art import SIZE_STEPS, Art
from data_prep.sources.scene_words import vocabulary
from setclip.descriptions import DESCRIPTIONS_NAME, Description, DescriptionTable, write_descriptions

MODEL = "drawn colours and shapes (no language model)"

_COLOURS = {
    "red": (214, 45, 60),
    "orange": (245, 145, 45),
    "yellow": (255, 205, 80),
    "green": (100, 160, 70),
    "blue": (65, 140, 215),
    "purple": (150, 100, 190),
    "pink": (240, 150, 180),
    "brown": (150, 95, 60),
    "gray": (150, 160, 170),
    "white": (240, 243, 246),
    "black": (40, 45, 50),
}
_SECOND = 0.15  # the least share of a second colour that is named


def describe_nouns(folder: Path, nouns: int) -> Path:
    """Writes descriptions.parquet of the corpus's nouns into `folder`; returns its place."""
    words = vocabulary(nouns)
    art = Art([noun.code for noun in words], 64, "twemoji")
    rows = []
    for row, noun in enumerate(words):
        colours, see_through = art.sprite(row, SIZE_STEPS - 1)  # see-through: 256 less opacity
        rows.append(Description(noun.name, appearance(colours, see_through[..., 0] < 16), (), "drawings-1"))
    path = folder / DESCRIPTIONS_NAME
    write_descriptions(path, DescriptionTable(MODEL, "pos", "all", rows))
    return path


def appearance(pixels: NDArray, seen: NDArray[np.bool_]) -> str:
    """Returns a sentence on a drawing, (H, W, 3), that covers the places `seen`, (H, W)."""
    names = list(_COLOURS)
    distance = np.linalg.norm(
        pixels[seen][:, None].astype(np.float32) - np.array(list(_COLOURS.values()), np.float32), axis=-1
    )
    shares = np.bincount(distance.argmin(1), minlength=len(names)) / max(1, int(seen.sum()))
    first, second = np.argsort(-shares, kind="stable")[:2]
    colours = names[first] + (f" and {names[second]}" if shares[second] >= _SECOND else "")
    return f"it is {colours}, {_shape(seen)}"


def _shape(seen: NDArray[np.bool_]) -> str:
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    filled = seen.sum() / (height * width)
    if height > 1.25 * width:
        outline = "taller than wide"
    elif width > 1.25 * height:
        outline = "wider than tall"
    else:
        outline = "about as wide as tall"
    return f"{outline} and {'compact' if filled > 0.7 else 'thin' if filled < 0.4 else 'with open parts'}"

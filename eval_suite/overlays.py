"""Pictures of what heads look at: attention of slots over a photograph, and the dimensions of sub-spaces.

Functions from arrays, for the heads of fine-tuning and for anything else that has attention over a grid of patches or
profiles over dimensions. Letters: K slots (or sub-spaces), N patches, D width, H height, W width of a picture.
"""

from typing import Literal

import matplotlib
import numpy as np
import simplejpeg
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from setclip import plots, report
from setclip.errors import InputError

_STRENGTH = 0.75  # of the colour where attention is highest


def attention_overlays(
    photo: NDArray[np.uint8],
    attention: ArrayLike,
    grid: tuple[int, int],
    scale: Literal["each", "common"] = "each",
) -> list[NDArray[np.uint8]]:
    """Returns K pictures, (H, W, 3) uint8: the photograph in grey, with colour where a slot looks.

    `photo`: (H, W, 3) uint8, the very square that the model saw (`eval_transform`), else patches and picture do not fit.
    `attention`: (K, N), not negative, N = rows × columns of `grid`, row by row. "each" slot is shown against its own
    highest value, or all against the highest of all ("common"), which shows slots that look nowhere.
    """
    weights = _array(attention, "attention", "(K, N)", 2)
    if weights.shape[1] != grid[0] * grid[1]:
        raise InputError(
            f"expected attention over {grid[0]} × {grid[1]} = {grid[0] * grid[1]} patches, found {weights.shape[1]}; leave "
            "out the class token, and give the grid as (rows, columns)"
        )
    if weights.min() < 0:
        raise InputError(f"expected attention that is not negative, found {weights.min():g}; take it after the softmax")
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
        raise InputError(f"expected a photograph (H, W, 3) uint8, found {photo.shape} {photo.dtype}; convert it")
    height, width = photo.shape[:2]
    grey = photo.astype(np.float64) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    colormap = matplotlib.colormaps["inferno"]
    overlays = []
    for slot in weights:
        highest = slot.max() if scale == "each" else weights.max()
        share = slot.reshape(grid) / highest if highest > 0 else np.zeros(grid)
        fine = Image.fromarray(share.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        level = np.clip(np.asarray(fine, np.float64), 0, 1)
        opacity = _STRENGTH * level[..., None]
        color = 255 * colormap(0.25 + 0.65 * level)[..., :3]
        overlays.append(np.round((1 - opacity) * grey[..., None] + opacity * color).astype(np.uint8))
    return overlays


def attention_cards(
    photo: NDArray[np.uint8],
    attention: ArrayLike,
    grid: tuple[int, int],
    caption: str,
    scale: Literal["each", "common"] = "each",
) -> list[report.SampleCard]:
    """Returns the photograph and its overlays as cards for a report; each says where its slot looks most."""
    weights = _array(attention, "attention", "(K, N)", 2)
    overlays = attention_overlays(photo, weights, grid, scale)
    cards = [report.SampleCard(_embedded(photo, caption), caption, [], note="as the model sees it")]
    for number, (slot, overlay) in enumerate(zip(weights, overlays, strict=True), 1):
        row, column = divmod(int(slot.argmax()), grid[1])
        total = slot.sum()
        share = slot.max() / total if total > 0 else 0.0
        where = f"most at row {row + 1}, column {column + 1} of {grid[0]} × {grid[1]}: {100 * share:.0f} %"
        cards.append(
            report.SampleCard(
                _embedded(overlay, f"attention of slot {number}: {caption}"), f"slot {number}", [], note=where
            )
        )
    return cards


def profile_picture(profiles: ArrayLike, title: str) -> Markup:
    """Returns the profiles of sub-spaces, (K, D), not negative, as stripes of colour.

    Dimensions are ordered by the sub-space that weighs them most, and by that weight, so that sub-spaces with
    dimensions of their own show as blocks along the diagonal, and equal ones as equal stripes.
    """
    values = _profiles(profiles)
    order = np.lexsort((-values.max(0), values.argmax(0)))
    names = [f"sub-space {number}" for number in range(1, len(values) + 1)]
    return plots.heat_rows(values[:, order].tolist(), names, "dimension, by its strongest sub-space", title)


def profile_cosines(profiles: ArrayLike) -> NDArray[np.float64]:
    """Returns the (K, K) cosines between profiles (K, D): 0 where two share no dimension."""
    values = _profiles(profiles)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(
            f"expected profiles with weights, found none in sub-space {int((lengths == 0).argmax()) + 1}; check them"
        )
    unit = values / lengths
    return unit @ unit.T


def key_overlap(profiles: ArrayLike, top: int = 100) -> NDArray[np.float64]:
    """Returns (K, K): the share of the `top` largest dimensions of one sub-space that another has too.

    `top` is at most D; of equal weights the lower dimension counts.
    """
    values = _profiles(profiles)
    top = min(top, values.shape[1])
    is_key = np.zeros(values.shape, bool)
    np.put_along_axis(is_key, np.argsort(-values, axis=1, kind="stable")[:, :top], True, axis=1)
    return (is_key[:, None] & is_key[None]).sum(-1) / top


def overlap_picture(overlap: ArrayLike, title: str) -> Markup:
    """Returns a (K, K) matrix of numbers from 0 to 1 (`profile_cosines`, `key_overlap`) as a drawing."""
    values = _array(overlap, "overlap", "(K, K)", 2)
    if values.shape[0] != values.shape[1]:
        raise InputError(f"expected a square matrix, found {values.shape}; give one row and column a sub-space")
    return plots.square_matrix(values.tolist(), [str(number) for number in range(1, len(values) + 1)], title)


def _profiles(profiles: ArrayLike) -> NDArray[np.float64]:
    values = _array(profiles, "profiles", "(K, D)", 2)
    if values.min() < 0:
        raise InputError(
            f"expected profiles that are not negative, found {values.min():g}; take them after the activation"
        )
    return values


def _array(values: ArrayLike, what: str, shape: str, ndim: int) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != ndim or 0 in array.shape or not np.isfinite(array).all():
        raise InputError(f"expected finite {what} {shape}, found shape {array.shape}; check it")
    return array


def _embedded(pixels: NDArray[np.uint8], alt: str) -> report.Picture:
    return report.picture(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=88), "jpg", alt)

"""Whether the elements of a set differ, and what each of them is good for: diagnostics of sets of embeddings.

Kim et al. 2023 (DivE, arXiv 2211.08251). Used by the command of diagnostics and by anything that trains sets. Letters:
N samples, K elements of a set, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval_suite.protocols import Setting, whole_gallery
from eval_suite.results import Metric
from eval_suite.scores import MakeScore, remembered
from setclip.errors import InputError

MOST_ELEMENTS = 16
"""Of sets, for each of which retrieval is run."""
_AT_A_TIME = 512  # sets whose float64 copies are in memory at a time


@dataclass(frozen=True)
class CircularVariance:
    """How far the elements of sets lie apart: 0 where all are the same, towards 1 where they cancel."""

    of_sets: Tensor
    """(N,) float64, 1 minus the length of each set's mean."""

    @property
    def log_of_mean(self) -> float | None:
        """Natural logarithm of the mean over sets; None where every set has collapsed to a point."""
        mean = self.of_sets.mean().item()
        return math.log(mean) if mean > 0 else None

    @property
    def mean_of_logs(self) -> float | None:
        """Mean over sets of the natural logarithm; None where a set has collapsed, as its logarithm is −∞."""
        return None if self.num_collapsed else self.of_sets.log().mean().item()

    @property
    def num_collapsed(self) -> int:
        """Sets whose elements are all the same."""
        return int((self.of_sets == 0).sum())


def circular_variance(sets: Tensor) -> CircularVariance:
    """Returns 1 − ‖mean of the unit elements‖ of each set, computed in float64.

    `sets`: (N, K, D); elements are brought to unit norm, zero vectors are elements that are not there. Raises
    InputError on a set without elements.
    """
    if sets.ndim != 3:
        raise InputError(f"expected sets (N, K, D), found shape {tuple(sets.shape)}; a single vector has no variance")
    there = sets.any(-1)
    counts = there.sum(1)
    if not len(sets) or int(counts.min()) == 0:
        raise InputError(
            f"expected sets with elements, found {int((counts == 0).sum())} of {len(sets)} without; check them"
        )
    blocks = zip(sets.split(_AT_A_TIME), there.split(_AT_A_TIME), strict=True)
    return CircularVariance(torch.cat([_variances(*block) for block in blocks]))


def _variances(sets: Tensor, there: Tensor) -> Tensor:
    """Returns (N,) float64 of sets and where they have elements, (N, K)."""
    counts = there.sum(1)
    unit = torch.nn.functional.normalize(sets.double(), dim=-1)
    lengths = (unit.sum(1) / counts[:, None]).norm(dim=-1)
    # 1 − ‖m‖ loses all digits where elements are nearly the same. With unit elements 1 − ‖m‖² is the sum of the squared
    # distances of all pairs over K², and 1 − ‖m‖ = (1 − ‖m‖²) / (1 + ‖m‖).
    squares = torch.zeros(len(sets), dtype=torch.float64)
    for first in range(sets.shape[1]):
        pairs = there[:, first, None] & there[:, first + 1 :]
        squares += ((unit[:, first, None] - unit[:, first + 1 :]).square().sum(-1) * pairs).sum(1)
    return squares / counts.double().square() / (1 + lengths)


def element_contribution(
    image_sets: Tensor,
    text_sets: Tensor,
    image_of_text: Tensor,
    make_score: MakeScore,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Metric]]:
    """Returns the metrics of retrieval with all elements, "all", and with one kept: "image 1", …, "text 1", ….

    One element of one side is kept against all elements of the other. `image_sets` (N, K, D), `text_sets` (N', K', D);
    `image_of_text` (N',) int64 is the image that each text belongs to; `make_score` makes the Score of the similarity,
    and must take sets of different sizes. Raises InputError where a set lacks the element that is to be kept.
    """
    for what, sets in (("image", image_sets), ("text", text_sets)):
        if sets.ndim != 3:
            raise InputError(
                f"expected {what} sets (N, K, D), found shape {tuple(sets.shape)}; single vectors have one element"
            )
        if not bool(sets.any(-1).all()):
            raise InputError(
                f"expected {what} sets of one size, found some with fewer elements; which element is kept would then mean "
                "different things"
            )
    kept = {"all": (image_sets, text_sets)}
    kept |= {f"image {k + 1}": (image_sets[:, k : k + 1], text_sets) for k in range(image_sets.shape[1])}
    kept |= {f"text {k + 1}": (image_sets, text_sets[:, k : k + 1]) for k in range(text_sets.shape[1])}
    setting = Setting(resamples=resamples, seed=seed)
    return {
        name: whole_gallery(remembered(make_score(*sides)), image_of_text, len(image_sets), setting).metrics
        for name, sides in kept.items()
    }


def without_contribution(make_score: MakeScore, images: Tensor, texts: Tensor) -> list[str]:
    """Returns why the contribution of elements cannot be told of such features; nothing where it can."""
    if images.ndim == texts.ndim == 2:
        return [
            "What one element finds: a picture and a caption have one vector each, so there are no elements to compare."
        ]
    if 2 in (images.ndim, texts.ndim):
        side = "pictures" if images.ndim == 2 else "captions"
        return [f"What one element finds: {side} have a single vector, of which none can be left out."]
    if not bool(images.any(-1).all() and texts.any(-1).all()):
        return [
            "What one element finds: sets have different sizes, so that one element of them means different things."
        ]
    if max(images.shape[1], texts.shape[1]) > MOST_ELEMENTS:
        return [
            f"What one element finds: of sets of {images.shape[1]} and {texts.shape[1]} elements this is not told, as retrieval "
            f"is run for each; at most {MOST_ELEMENTS}."
        ]
    try:
        check_similarity(make_score, images[:1], texts[:1])
    except InputError as error:
        return [f"What one element finds: {error}."]
    return []


def check_similarity(make_score: MakeScore, images: Tensor, texts: Tensor) -> None:
    """Raises InputError where a similarity does not compare such sets, or one element of a side with all of the other."""
    if images.ndim == texts.ndim == 2:
        return
    images, texts = (each[:1].unsqueeze(1) if each.ndim == 2 else each[:1] for each in (images, texts))
    for image_set, text_set in ((images, texts), (images[:, :1], texts), (images, texts[:, :1])):
        try:
            make_score(image_set, text_set)(slice(0, 1), slice(0, 1))
        except InputError as error:
            name = getattr(make_score, "name", None) or "another"
            raise InputError(
                f"expected a similarity that compares sets of {images.shape[1]} and {texts.shape[1]} elements, and one element "
                f"of a side with all of the other, as the contribution of elements asks; found {name} ({error}); take "
                "smooth_chamfer, chamfer, mil or avg with --similarity, or leave it out"
            ) from error


def contribution_rows(
    found: Mapping[str, Mapping[str, Metric]], names: Sequence[str] = ("i2t_r1", "t2i_r1", "rsum")
) -> list[list[str]]:
    """Returns rows for a table: what is kept, and each metric with the difference from all elements."""
    rows = []
    for kept, metrics in found.items():
        cells = [f"{metrics[name].value:.1f}" for name in names]
        if kept != "all":
            cells = [
                f"{cell} ({metrics[n].value - found['all'][n].value:+.1f})"
                for cell, n in zip(cells, names, strict=True)
            ]
        rows.append([kept, *cells])
    return rows

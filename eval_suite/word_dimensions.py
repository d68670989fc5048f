"""Which dimensions of the embedding carry a word: the dimensions with the largest products over the word's pairs.

Zhang et al. 2025 (DH-Set, CVPR), section 1. For each pair of an image-side vector u and a text-side vector v of the same
word, s = u ⊙ v; the largest entries of s are marked, marks are counted a dimension, and divided by all marks. Which
pairs are taken is not stated there; `pairs_of_word` is ours. Letters: N pairs, D width.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from setclip.errors import InputError

THRESHOLD = 0.015
"""Level above which that paper marks dimensions in its figure."""


@dataclass(frozen=True)
class WordDimensions:
    """How the marks of a word's pairs lie over the dimensions."""

    word: str
    probabilities: Tensor
    """(D,) float64, marks of a dimension over all marks, falling; they sum to 1."""
    dimensions: Tensor
    """(D,) int64, the dimension of each."""
    num_pairs: int
    top: int
    """Marks a pair: min(asked, D)."""
    threshold: float

    @property
    def marked(self) -> Tensor:
        """The dimensions above the threshold, int64."""
        return self.dimensions[self.probabilities > self.threshold]

    @property
    def common(self) -> Tensor:
        """The dimensions that are among the top of at least half of the pairs, int64."""
        return self.dimensions[self.probabilities >= 0.5 * self.ceiling - 1e-12]

    @property
    def uniform(self) -> float:
        """The level if no dimension were better than another, 1/D."""
        return 1.0 / len(self.probabilities)

    @property
    def ceiling(self) -> float:
        """The highest level that there can be, 1/top: that of a dimension which every pair marks."""
        return 1.0 / self.top

    @property
    def notes(self) -> list[str]:
        """What limits the reading."""
        notes = []
        if self.top == len(self.probabilities):
            notes.append(
                f"all {self.top} dimensions are among the top of each pair, so all are level; take a smaller top"
            )
        elif self.ceiling <= self.threshold:
            notes.append(
                f"no level can be above 1/{self.top} = {self.ceiling:.4g}, so the threshold {self.threshold:g} marks "
                f"nothing; it can be reached with a top below {1 / self.threshold:.0f}"
            )
        return notes


def word_dimensions(
    word: str, image_vectors: Tensor, text_vectors: Tensor, top: int = 100, threshold: float = THRESHOLD
) -> WordDimensions:
    """Returns the dimensions that carry `word`, from its pairs, (N, D) float each; of equal products the lower dimension."""
    if image_vectors.shape != text_vectors.shape or image_vectors.ndim != 2 or not len(image_vectors):
        raise InputError(
            f"expected pairs of vectors (N, D) of {word!r}, found {tuple(image_vectors.shape)} and "
            f"{tuple(text_vectors.shape)}; take a word that captions have"
        )
    if top < 1:
        raise InputError(f"expected at least one dimension a pair, found a top of {top}; the paper takes 100")
    width = image_vectors.shape[1]
    top = min(top, width)
    products = image_vectors.double() * text_vectors.double()
    largest = torch.sort(products, dim=1, descending=True, stable=True).indices[:, :top]
    levels = largest.flatten().bincount(minlength=width).double() / (len(products) * top)
    values, dimensions = torch.sort(levels, descending=True, stable=True)
    return WordDimensions(word, values, dimensions, len(products), top, threshold)


def pairs_of_word(word: str, captions: Sequence[str]) -> list[int]:
    """Returns the numbers of the captions that have the word as a whole, in any case; "traffic light" is a word too."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    return [number for number, caption in enumerate(captions) if pattern.search(caption)]


def frequent_words(objects_of_captions: Iterable[Iterable[str]], num: int) -> list[str]:
    """Returns the objects that most captions name, the most frequent first; of equal ones by name."""
    counts: dict[str, int] = {}
    for names in objects_of_captions:
        for name in set(names):
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts, key=lambda name: (-counts[name], name))[:num]

"""Which texts of a batch belong to which images, and which pairs are no negatives of each other. Used by the losses.

Letters: B images, T texts, M objects of a caption (padded).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from setclip.errors import InputError


@dataclass(frozen=True)
class Pairs:
    """The matches of a batch: each text has one image, each image one text at least. No gradient."""

    image_of_text: Tensor
    """(T,) int64: the row of each text's image"""
    image_ids: Tensor | None = None
    """(B,) int64: equal where two rows hold the same image (loaders that draw captions do that); None: all differ"""
    excluded: Tensor | None = None
    """(B, T) bool: pairs that are no negatives of each other for another reason (a class in common, shared objects)"""

    @staticmethod
    def of_captions(num_images: int, per_image: int, device: torch.device | str | None = None) -> "Pairs":
        """Returns the matches of images with `per_image` texts each, which follow each other."""
        return Pairs(torch.arange(num_images, device=device).repeat_interleave(per_image))

    def check(self, scores: Tensor) -> None:
        """Raises InputError where these are not the pairs of scores (B, T)."""
        if scores.ndim != 2 or self.image_of_text.shape != scores.shape[1:] or not scores.numel():
            raise InputError(
                f"expected scores (B, T) of {len(self.image_of_text)} texts, found {tuple(scores.shape)}; give images "
                "as rows and texts as columns"
            )
        for name, values, shape in (
            ("image_ids", self.image_ids, (len(scores),)),
            ("excluded", self.excluded, tuple(scores.shape)),
        ):
            if values is not None and tuple(values.shape) != shape:
                raise InputError(f"expected {name} of shape {shape}, found {tuple(values.shape)}; one entry for each")
        low, high = int(self.image_of_text.min()), int(self.image_of_text.max())
        if low < 0 or high >= len(scores):
            raise InputError(
                f"expected images of texts in 0 to {len(scores) - 1}, found {low} to {high}; they are rows of the batch"
            )

    def matches(self, num_images: int) -> Tensor:
        """Returns (B, T) bool, True at each text's own image."""
        rows = torch.arange(num_images, device=self.image_of_text.device)
        return rows[:, None] == self.image_of_text

    def same_image(self, num_images: int) -> Tensor:
        """Returns (B, T) bool, True where the text describes this image, be it of another row."""
        if self.image_ids is None:
            return self.matches(num_images)
        return self.image_ids[:, None] == self.image_ids[self.image_of_text]

    def negatives(self, num_images: int, same_image_negatives: bool = False) -> Tensor:
        """Returns (B, T) bool: pairs that are negatives. `same_image_negatives`: texts of the same image in another row,
        too, as historic code has it.
        """
        matched = self.matches(num_images) if same_image_negatives else self.same_image(num_images)
        return ~matched if self.excluded is None else ~(matched | self.excluded)

"""What all similarities of sets share: the interface, its checks, and the two families.

A `VectorSimilarity` makes one vector of each set, and scores are inner products. A `GridSimilarity` looks at the inner
products of all pairs of elements, Ki × Kt of them for each pair of sets, and reduces them to one score.
Letters: N samples (Ni images, Nt texts), K elements in a set (Ki, Kt), D width.
"""

import torch
from torch import Tensor, nn

from setclip.errors import InputError


class SetSimilarity(nn.Module):
    """How alike two sets are; higher is more alike."""

    elements_of_word: int | None = None
    """Text elements side by side that are one word, where words that are masked can as well not be there; None: they cannot."""

    def forward(
        self,
        image_sets: Tensor,
        text_sets: Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the scores of all pairs, (Ni, Nt) float32, with gradient to the sets and to what is learned.

        `image_sets`: (Ni, Ki, D) and `text_sets`: (Nt, Kt, D), floating point of unit norm, which is the caller's
        promise (DH-Set's text elements excepted). Work is in float32 also under autocast and for bf16 and fp16
        sets, in float64 for float64 ones. Masks, (Ni, Ki) and (Nt, Kt) bool, are True where there is an element; None:
        everywhere. What a masked place holds has no influence and gets no gradient. Raises InputError on shapes or
        masks that do not fit, and on a set without element.
        """
        images, texts = self.checked(image_sets, text_sets, image_mask, text_mask)
        with torch.autocast(images.device.type, enabled=False):
            return self.score(images, texts, image_mask, text_mask)

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Returns what `forward` does, of sets that `checked` gave."""
        raise NotImplementedError

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        """Raises InputError where this similarity has no meaning for sets of these sizes."""

    def checked(
        self, image_sets: Tensor, text_sets: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns both sides in the dtype of the work, zero where masked. Raises InputError as `forward` says."""
        check_sets(image_sets, text_sets, image_mask, text_mask)
        self.check_sizes(image_sets.shape[1], text_sets.shape[1])
        dtype = work_dtype(image_sets, text_sets)
        return filled(image_sets, image_mask, dtype), filled(text_sets, text_mask, dtype)


class VectorSimilarity(SetSimilarity):
    """The inner product of one vector a set."""

    def image_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (Ni, D') of image sets that `checked` gave."""
        raise NotImplementedError

    def text_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (Nt, D') of text sets that `checked` gave."""
        raise NotImplementedError

    def divisor(self, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor | None:
        """Returns what the inner products are divided by, (Ni, Nt) float64 or what broadcasts to it, where it depends on
        the pair; None: nothing.
        """
        return None

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        scores = self.image_vectors(images, image_mask) @ self.text_vectors(texts, text_mask).T
        divisor = self.divisor(image_mask, text_mask)
        return scores if divisor is None else scores / divisor.to(scores.dtype)


class GridSimilarity(SetSimilarity):
    """A reduction of the inner products of all elements of one set with all of the other; symmetric in the two."""

    grid_scale: float = 1.0
    """What `reduce_in_place` expects the inner products to be multiplied by."""

    def image_elements(self, sets: Tensor) -> Tensor:
        """Returns the vectors, (…, D'), whose inner products with those of `text_elements` fill the grid."""
        return sets

    def text_elements(self, sets: Tensor) -> Tensor:
        """Returns the other side of `image_elements`."""
        return sets

    def reduce(self, grid: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Returns scores, (Ni, Nt), of inner products, (Ni, Ki, Kt, Nt): the texts stand innermost, so that a
        reduction over either set adds up long runs of memory. Masks as `forward` takes them. Differentiable.
        """
        raise NotImplementedError

    def reduce_in_place(
        self, grid: Tensor, bound: float, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Returns the same without gradient, of inner products times `grid_scale`, and may overwrite them.

        `bound`: no inner product is larger in size. To give equal scores for equal inner products wherever they stand in
        the grid, sums go through `sum_over`, and of PyTorch's functions `exp2` and `sigmoid` are not used: they differ
        in the last bit where a vector of the processor is not full.
        """
        return self.reduce(grid, image_mask, text_mask)

    def steepness(self) -> float | None:
        """Returns the most by which a score changes when no inner product changes by more than 1; None: no such number.

        With it, scores of rounded elements bound the true ones (eval_suite/two_stage.py).
        """
        return None

    def rounding(self, num_elements: int) -> float:
        """Returns the most by which `reduce_in_place` errs in float32, of at most `num_elements` elements a set and
        inner products up to 1 in size; only where there is a `steepness`.
        """
        raise NotImplementedError

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        images, texts = self.image_elements(images), self.text_elements(texts)
        shape = (images.shape[0], images.shape[1], texts.shape[1], texts.shape[0])
        return self.reduce((images.flatten(0, 1) @ planes(texts)).view(shape), image_mask, text_mask)


# --- pieces that the similarities and the blocks share

UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""


def planes(texts: Tensor) -> Tensor:
    """Returns text elements, (Nt, Kt, D), as the columns of a matrix, (D, Kt·Nt), a plane of texts for each element."""
    return texts.transpose(0, 1).reshape(-1, texts.shape[-1]).T


def across(image_mask: Tensor | None, text_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the masks, (Ni, Ki) and (Nt, Kt), in shapes that go with a grid: (Ni, Ki, 1, 1) and (1, 1, Kt, Nt)."""
    images = None if image_mask is None else image_mask[:, :, None, None]
    return images, None if text_mask is None else text_mask.T[None, None]


def sum_over(values: Tensor, dim: int) -> Tensor:
    """Returns the sum along `dim`, slice by slice: faster than `sum` for few slices, and always in the same order."""
    first, *rest = values.unbind(dim)
    for part in rest:
        first = first + part
    return first


def mean_over(values: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """Returns the mean along `dim` of what the mask, in a shape that goes with `values`, leaves."""
    if mask is None:
        return sum_over(values, dim) / values.shape[dim]
    return sum_over(values.masked_fill(~mask, 0.0), dim) / mask.sum(dim)


def work_dtype(*sides: Tensor) -> torch.dtype:
    """Returns float64 if any side is, else float32."""
    return torch.float64 if any(side.dtype == torch.float64 for side in sides) else torch.float32


def filled(sets: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns sets, (N, K, D), in this dtype, with zeros where the mask, (N, K), is False."""
    sets = sets.to(dtype)
    return sets if mask is None else sets.masked_fill(~mask[:, :, None], 0.0)


def check_sets(
    image_sets: Tensor, text_sets: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None
) -> None:
    """Raises InputError where sets and masks are not as `SetSimilarity.forward` takes them."""
    for what, sets in (("image", image_sets), ("text", text_sets)):
        if sets.ndim != 3 or 0 in sets.shape[1:] or not sets.is_floating_point():
            raise InputError(
                f"expected {what} sets of shape (N, K, D), floating point, found {tuple(sets.shape)} of {sets.dtype};"
                " single vectors become sets of one element by unsqueeze(1)"
            )
    if image_sets.shape[2] != text_sets.shape[2]:
        raise InputError(
            f"expected image and text sets of one width, found {image_sets.shape[2]} and {text_sets.shape[2]}; "
            "take both from one model"
        )
    for what, sets, mask in (("image", image_sets, image_mask), ("text", text_sets, text_mask)):
        if mask is None:
            continue
        if mask.dtype != torch.bool or mask.shape != sets.shape[:2]:
            raise InputError(
                f"expected a mask of {what} sets of shape {tuple(sets.shape[:2])}, bool, found {tuple(mask.shape)} of "
                f"{mask.dtype}; it is True where a set has an element"
            )
        is_empty = ~mask.any(1)
        if bool(is_empty.any()):
            raise InputError(
                f"expected an element in each {what} set, found none in {int(is_empty.sum())} of {len(sets)} (first: "
                f"number {int(is_empty.nonzero()[0])}); leave such samples out"
            )

"""Similarities that come down to one vector a set: cosine, average, diagonal, and DH-Set's two.

The mean of inner products is the inner product of means, so none of these needs the inner products of all pairs of
elements. Used through the dict of `setclip.similarity`. Letters: N samples, K elements, D width.
"""

from typing import Literal

import torch
from torch import Tensor

from setclip.errors import InputError
from setclip.similarity.base import VectorSimilarity, mean_over

Norm = Literal["cos", "none"]


class Cosine(VectorSimilarity):
    """cos(e, e') of sets of one element."""

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        if num_image_elements != 1 or num_text_elements != 1:
            raise InputError(
                f"expected sets of one element for cosine, found {num_image_elements} in image and "
                f"{num_text_elements} in text sets; take avg, chamfer or smooth_chamfer"
            )

    def image_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return sets[:, 0]

    def text_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return sets[:, 0]


class Average(VectorSimilarity):
    """The mean of cos(e, e') over all pairs of elements: the inner product of the sets' means."""

    def image_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return _mean(sets, mask)

    def text_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return _mean(sets, mask)


class Diagonal(VectorSimilarity):
    """The mean of cos(e_i, e'_i): elements of one number correspond. Only those count that both sets have."""

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        if num_image_elements != num_text_elements:
            raise InputError(
                f"expected sets of one size for diagonal, found {num_image_elements} elements in image and "
                f"{num_text_elements} in text sets; take chamfer or maxpair"
            )

    def image_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return sets.flatten(1)

    def text_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return sets.flatten(1) / sets.shape[1]

    def divisor(self, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor | None:
        if image_mask is None and text_mask is None:
            return None
        one = image_mask if image_mask is not None else text_mask
        assert one is not None
        everywhere = one.new_ones(1, one.shape[1])  # broadcasts over the side without mask
        images, texts = (everywhere if mask is None else mask for mask in (image_mask, text_mask))
        shared = (images.double() @ texts.double().T) / one.shape[1]
        if not bool(shared.all()):
            raise InputError(
                "expected for diagonal that any two sets share the number of an element, found a pair of sets that "
                "share none; fill the sets from the front, or take chamfer"
            )
        return shared


class _DhSet(VectorSimilarity):
    """`norm`: "cos" makes cosines (the default of the reconstruction), "none" plain inner products."""

    def __init__(self, norm: Norm = "cos"):
        super().__init__()
        if norm == "l2":
            raise InputError(
                "expected norm cos or none, found l2; it needs the rows of the head's importance matrices, which a set "
                "no longer holds"
            )
        if norm not in ("cos", "none"):
            raise InputError(f"expected norm cos or none, found {norm!r}; the default is cos")
        self.norm = norm

    def extra_repr(self) -> str:
        return f"norm={self.norm}"

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        if num_image_elements != 1:
            raise InputError(
                f"expected image sets of one element, which all sub-spaces share, for DH-Set's similarities, found "
                f"{num_image_elements}; give the image's holistic vector as (N, 1, D)"
            )

    def image_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return self._unit(sets[:, 0])

    def _unit(self, vectors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1) if self.norm == "cos" else vectors


class DhSet(_DhSet):
    """(1/k) Σ_i cos(v, w_i), which training uses: a reconstruction of Zhang et al. 2025 (DH-Set, CVPR), Eq. 10.

    v is the image's one vector, w_i = cⁱ ⊙ u_i the text's vector in sub-space i, weighted by the sub-space's
    dimensions; of any norm. The paper's own formula was not to be had. Because v is shared, this is the inner product
    of v and one vector of the text, too.
    """

    def text_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return _mean(self._unit(sets), mask)


class DhSetHybrid(_DhSet):
    """cos(v, Σ_i w_i), which inference uses: a reconstruction of Zhang et al. 2025 (DH-Set, CVPR), Eq. 12.

    With norm "none" it is k times `DhSet`'s with norm "none".
    """

    def text_vectors(self, sets: Tensor, mask: Tensor | None) -> Tensor:
        return self._unit(sets.sum(1))  # masked elements are zero


def _mean(sets: Tensor, mask: Tensor | None) -> Tensor:
    return mean_over(sets, 1, None if mask is None else mask[:, :, None])

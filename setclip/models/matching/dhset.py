"""DH-Set's matching that needs more than sets: the fragment form, and X-Dim's normalisation. Reconstructed throughout.

`DhSetFragment`, of images' inputs v_q and words with vectors w_pi in K sub-spaces, u_p = Σ_i w_pi (stated in words:
Zhang et al. 2025, CVPR, supplement, section 7; formulas ours):

    a_pq = softmax_q(τ · unit_p[LeakyReLU₀.₁(tanh cos(v_q, u_p))]),  v̂_p = unit(Σ_q a_pq v_q)
    word: (1/K) Σ_i cos(v̂_p, w_pi) in training ("set"), cos(v̂_p, u_p) at inference ("hybrid");  score: mean over words

`DhSetRows`, of holistic vectors v and u_i and sub-spaces' rows W̃ (Zhang et al. 2023, X-Dim, literally):

    yⁱ = W̃ⁱ (v ⊙ u_i),  score = (1/K) Σ_i (1/√R) Σ_j yⁱ_j / ‖yⁱ‖
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.matching.fragments import EPSILON, checked_range, grid_of, lengths_over_images, mean_along
from setclip.models.pieces import check_choice
from setclip.models.subspaces import SubSpaces
from setclip.similarity import SetSimilarity
from setclip.similarity.vectors import DhSetHybrid

Inference = Literal["set", "hybrid"]


class DhSetFragment(SetSimilarity):
    """Image sets are inputs, text sets `num_elements` vectors a word, side by side, as `dhset_fragment` heads make them.

    `scale` τ at the start, learned where `learns_scale`; SCAN's fixed 9 is the alternative. `norm` "none": inner products
    of v̂_p in place of cosines, which makes the two scores proportional.
    """

    def __init__(
        self,
        num_elements: int = 4,
        scale: float = 1 / 0.07,
        learns_scale: bool = True,
        norm: Literal["cos", "none"] = "cos",
        inference: Inference = "set",
    ):
        super().__init__()
        check_choice("norm", norm, ("cos", "none"))
        check_choice("inference", inference, ("set", "hybrid"))
        self.num_elements, self.norm, self.inference = num_elements, norm, inference
        self.elements_of_word = num_elements
        start = torch.tensor(checked_range("scale", scale))
        if learns_scale:
            self.scale = nn.Parameter(start)
        else:
            self.register_buffer("scale", start)

    def extra_repr(self) -> str:
        return f"num_elements={self.num_elements}, norm={self.norm}, inference={self.inference}"

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        if num_text_elements % self.num_elements:
            raise InputError(
                f"expected text sets of {self.num_elements} elements a word, found {num_text_elements}; give the sets of a "
                "dhset_fragment head of as many sub-spaces"
            )

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        return self.score_as(self.inference, images, texts, image_mask, text_mask)

    def score_as(
        self,
        inference: Inference,
        images: Tensor,
        texts: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
    ) -> Tensor:
        """Returns the scores of an inference. "hybrid" makes no product with each sub-space's vectors."""
        elements = texts.unflatten(1, (-1, self.num_elements))  # (Nt, M, K, D)
        words = elements.sum(2)
        word_mask = None if text_mask is None else text_mask.unflatten(1, (-1, self.num_elements))[..., 0].T[None]
        products = grid_of(images, words)  # (Ni, N, M, Nt)
        word_lengths = _lengths(words).T  # (M, Nt)
        tilted = torch.nn.functional.leaky_relu((products / word_lengths).tanh(), 0.1)
        # masked words are zero, and so count nothing in the lengths over words
        logits = self.scale.to(tilted) * torch.nn.functional.normalize(tilted, dim=2, eps=EPSILON)
        if image_mask is not None:
            logits = logits.masked_fill(~image_mask[:, :, None, None], -torch.inf)
        attention = logits.softmax(1)
        lengths = lengths_over_images(attention, images)  # (Ni, M, Nt)
        if inference == "hybrid":
            scores = (attention * products).sum(1) / lengths
            if self.norm == "cos":
                scores = scores / word_lengths
        else:
            scores = torch.zeros_like(lengths)
            for element in elements.unbind(2):
                of_element = (attention * grid_of(images, element)).sum(1) / lengths
                if self.norm == "cos":
                    of_element = of_element / _lengths(element).T
                scores = scores + of_element / self.num_elements
        return mean_along(scores, 1, word_mask)


class DhSetRows(SetSimilarity):
    """Image sets of one vector v, text sets of u_i: those of a `dhset` head with norm "l2", whose `subspaces` these are.

    They stay the head's: this module has no parameters of its own. `inference` "hybrid": cos(v, Σ_i cⁱ ⊙ u_i).
    """

    def __init__(self, subspaces: SubSpaces, inference: Inference = "set"):
        super().__init__()
        check_choice("inference", inference, ("set", "hybrid"))
        self._of_head = (subspaces,)  # in a tuple, so that it is not registered, and saved, twice
        self.inference: Inference = inference

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        expected = len(self._of_head[0].alpha)
        if num_image_elements != 1 or num_text_elements != expected:
            raise InputError(
                f"expected image sets of 1 element and text sets of {expected}, found {num_image_elements} and "
                f"{num_text_elements}; give the sets of the dhset head"
            )

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        return self.score_as(self.inference, images, texts, image_mask, text_mask)

    def score_as(
        self,
        inference: Inference,
        images: Tensor,
        texts: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
    ) -> Tensor:
        """Returns the scores of an inference."""
        if inference == "hybrid":
            weighted = self._of_head[0].profiles().to(texts) * texts
            return DhSetHybrid().score(images, weighted, image_mask, text_mask)
        rows = self._of_head[0]().to(texts)  # (K, R, D)
        num, num_rows, _ = rows.shape
        # ⟨w, v ⊙ u⟩ = ⟨v, w ⊙ u⟩
        directions = (rows * texts[:, :, None]).flatten(0, 2)  # (Nt·K·R, D)
        y = (images[:, 0] @ directions.T).view(len(images), len(texts), num, num_rows)
        of_subspaces = torch.nn.functional.normalize(y, dim=-1).sum(-1) / math.sqrt(num_rows)
        return mean_along(of_subspaces, 2, None if text_mask is None else text_mask[None])


class StoredRows(DhSetRows):
    """The same for evaluation, with rows of its own, which a checkpoint fills; options are those of the sub-spaces."""

    def __init__(
        self,
        width: int,
        num_elements: int = 4,
        num_rows: int = 16,
        sharpness: float = 50.0,
        row_activation: Literal["sigmoid", "identity", "softplus"] = "sigmoid",
        unit_rows: bool = True,
    ):
        subspaces = SubSpaces(num_elements, width, num_rows, sharpness, row_activation, unit_rows)
        super().__init__(subspaces)
        self.subspaces = subspaces


class HybridOf(SetSimilarity):
    """The hybrid scores of another similarity, with which it shares what is learned."""

    def __init__(self, trained: DhSetFragment | DhSetRows):
        super().__init__()
        self._trained = (trained,)
        self.elements_of_word = trained.elements_of_word

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        self._trained[0].check_sizes(num_image_elements, num_text_elements)

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        return self._trained[0].score_as("hybrid", images, texts, image_mask, text_mask)


def _lengths(vectors: Tensor) -> Tensor:
    """Returns the lengths of (…, D), (…)."""
    return torch.linalg.vector_norm(vectors, dim=-1).clamp_min(EPSILON)

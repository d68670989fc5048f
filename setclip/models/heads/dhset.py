"""DH-Set, holistic form: one image vector, and a text vector in each of K sub-spaces (Zhang et al. 2025, CVPR).

    image: v = pooled inputs, of unit norm, shared by all sub-spaces (stated)
    text:  u_i = unit(FC_i(u)),  w_i = cⁱ ⊙ u_i,  i = 1 … K (FC_i and the place of cⁱ: our reconstruction)

What is compared in training, (1/K) Σ_i cos(v, w_i), and at inference, cos(v, Σ_i w_i), are the similarities `dhset_set` and
`dhset_hybrid`. The hybrid vector Σ_i w_i can stand alone: one vector a text, K times less work and storage. Because v is
shared, without norms both are the same but for a factor K. Letters: B samples, N inputs, E their width, K sub-spaces, R rows
of each, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.heads.gpo import Gpo
from setclip.models.heads.max import Max
from setclip.models.heads.mean import Mean
from setclip.models.heads.single import Single
from setclip.models.pieces import check_choice, exact, unit
from setclip.models.subspaces import SubSpaces

Pool = Literal["mean", "max", "gpo", "global"]
POOLS: dict[str, type[SetHead]] = {"mean": Mean, "max": Max, "gpo": Gpo, "global": Single}
MATRIX_RATE = 10.0
"""Times the common learning rate: at the common one sub-spaces collapse to one profile."""


class DhSetImage(SetHead):
    """Sets of one element, (B, 1, D). `pool`: how inputs become one vector; "global" takes the global feature."""

    takes_global = True

    def __init__(self, in_width: int, width: int = 1024, global_width: int | None = None, pool: Pool = "mean"):
        check_choice("pool", pool, tuple(POOLS))
        super().__init__(in_width, width, global_width)
        self.takes_global = pool == "global"
        self.global_width = global_width if self.takes_global else None
        self.pool = POOLS[pool](in_width, width, global_width)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        return HeadOutput(self.pool.encode(local, mask, global_features).sets)


class DhSetText(SetHead):
    """Sets of `num_elements` vectors w_i, not of unit norm. `auxiliary`, with gradient, for the diversity loss:
    "profiles" c, (K, D), and "weighted", the w_i.

    `pool`: how words become the sentence's vector u. `norm` "cos" and "none" are those of the similarity; "l2": X-Dim's, whose
    rows the similarity needs (`setclip.models.matching.DhSetRows`): the elements are then u_i, without profile.
    `num_rows`, `sharpness`, `row_activation`, `unit_rows`: of `SubSpaces`.
    """

    takes_global = True

    def __init__(
        self,
        in_width: int,
        width: int = 1024,
        global_width: int | None = None,
        num_elements: int = 4,
        pool: Pool = "mean",
        norm: Literal["cos", "none", "l2"] = "cos",
        num_rows: int = 16,
        sharpness: float = 50.0,
        row_activation: Literal["sigmoid", "identity", "softplus"] = "sigmoid",
        unit_rows: bool = True,
    ):
        check_choice("pool", pool, tuple(POOLS))
        check_choice("norm", norm, ("cos", "none", "l2"))
        super().__init__(in_width, width, global_width)
        self.takes_global = pool == "global"
        self.global_width = global_width if self.takes_global else None
        self.norm = norm
        self.pool = POOLS[pool](in_width, width, global_width)
        self.subspaces = SubSpaces(num_elements, width, num_rows, sharpness, row_activation, unit_rows)
        self.into = nn.Linear(width, num_elements * width)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        sentence = self.pool.encode(local, mask, global_features).sets[:, 0]
        return self.of_vectors(sentence)

    def of_vectors(self, sentences: Tensor) -> HeadOutput:
        """Returns the sets of vectors u, (B, D)."""
        elements = unit(self.into(sentences.to(self.into.weight.dtype)).unflatten(-1, (-1, self.width)))
        profiles = self.subspaces.profiles()
        weighted = profiles * elements
        sets = elements if self.norm == "l2" else weighted
        return HeadOutput(sets, auxiliary={"profiles": profiles, "weighted": weighted})

    def learning_rate_factors(self) -> dict[str, float]:
        return {"subspaces.weight": MATRIX_RATE, "subspaces.alpha": MATRIX_RATE}

    def without_weight_decay(self) -> set[str]:
        return {"subspaces.weight", "subspaces.alpha"}

    def hybrid(self, sets: Tensor, hard: bool = False) -> Tensor:
        """Returns the hybrid vectors Σ_i w_i, (B, D) of unit norm, of sets (B, K, D) of this head: what is exported.

        `hard`: of each dimension only the sub-space counts that weighs it most, the literal mixing of key dimensions.
        """
        return hybrid_of(sets, self.subspaces.profiles(), is_weighted=self.norm != "l2", hard=hard)


def hybrid_of(sets: Tensor, profiles: Tensor, is_weighted: bool = True, hard: bool = False) -> Tensor:
    """Returns unit vectors (…, D) of sets (…, K, D) and profiles (K, D); see `DhSetText.hybrid`."""
    if sets.shape[-2:] != profiles.shape:
        raise InputError(
            f"expected sets of {profiles.shape[0]} elements of width {profiles.shape[1]}, found {tuple(sets.shape[-2:])}; "
            "give the sets of this head"
        )
    weighted = exact(sets) if is_weighted else exact(sets) * profiles
    if hard:
        weighted = weighted * torch.nn.functional.one_hot(profiles.argmax(0), len(profiles)).T
    return unit(weighted.sum(-2))

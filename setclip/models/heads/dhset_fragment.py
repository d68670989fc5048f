"""DH-Set, fragment form: all inputs of the image, and of each word a vector in each of K sub-spaces (Zhang et al. 2025).

Images take the head `local`. Attention over their inputs, with the words' hybrid vectors, is the similarity's business
(`setclip.models.matching.DhSetFragment`). Stated in words (CVPR 2025, supplement, section 7); formulas are our reconstruction.
Letters: B samples, N words, E their width, K sub-spaces, D width.
"""

from torch import Tensor

from setclip.models.heads.base import HeadOutput
from setclip.models.heads.dhset import DhSetText
from setclip.models.pieces import unit


class DhSetFragmentText(DhSetText):
    """Sets of N · K vectors w_i, the K of a word side by side, masked where the word is. Options as of `DhSetText`, of
    which `pool` and norm "l2" have no meaning here.
    """

    def __init__(
        self,
        in_width: int,
        width: int = 1024,
        global_width: int | None = None,
        num_elements: int = 4,
        num_rows: int = 16,
        sharpness: float = 50.0,
        row_activation: str = "sigmoid",
        unit_rows: bool = True,
    ):
        super().__init__(
            in_width,
            width,
            global_width,
            num_elements,
            num_rows=num_rows,
            sharpness=sharpness,
            row_activation=row_activation,  # type: ignore[arg-type]
            unit_rows=unit_rows,
        )

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        words = unit(self.pool.projection(local), mask)  # type: ignore[operator]
        out = self.of_vectors(words)
        sets = out.sets
        if mask is not None:
            sets = sets.masked_fill(~mask[..., None, None], 0.0)
            mask = mask.repeat_interleave(sets.shape[2], 1)
        return HeadOutput(sets.flatten(1, 2), mask, auxiliary={**out.auxiliary, "weighted": sets.flatten(1, 2)})

"""LAPS: patches that matter for a text are kept, the others fused, the kept ones merged (Fu et al. 2024, CVPR).

For each text, with patches v, their mean v̄ and the mean word ū:

    significance = cos(v, v̄) + cos(v, ū), without gradient;  the ⌈ρN⌉ most significant patches are kept
    fused = Σ over the others of softmax(significance) v;  merged = W v over the kept, W = softmax over patches of MLP(v)
    score = max–mean matching of {merged, fused, class token} with the words

⌊βρN⌋ merged patches; the MLP is LN, Linear D → D/5, GELU, Linear; all come to unit norm before they are compared. Stated by the
authors' code, whose patches and words have any norm until then: those of a `local` head with normalise=False.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from setclip.errors import InputError
from setclip.models.matching.fragments import checked_range, mean_along
from setclip.models.matching.max_mean import MaxMean
from setclip.similarity import SetSimilarity


class Laps(SetSimilarity):
    """`width` D and `num_patches` N of what is compared; `keep` ρ; `merge` β: 0.5 and 0.4 for ViT, 0.8 and 0.6 for Swin.

    `class_token`: the last image element is one, and is not selected from (head `local` with `add_global`). Texts go one by
    one, and with gradient each is made again in the backward pass: no tensor is larger than (Ni, ρN, D).
    """

    elements_of_word = 1

    def __init__(self, width: int, num_patches: int, keep: float = 0.5, merge: float = 0.4, class_token: bool = False):
        super().__init__()
        for name, value in (("keep", keep), ("merge", merge)):
            if checked_range(name, value) > 1:
                raise InputError(f"expected {name} of at most 1, found {value}; LAPS has 0.5 and 0.4 for ViT")
        self.num_patches, self.class_token = num_patches, class_token
        self.num_kept = min(num_patches, math.ceil(keep * num_patches))
        self.num_merged = max(1, math.floor(keep * merge * num_patches))
        hidden = max(1, width // 5)
        self.to_weights = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, self.num_merged)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.matching = MaxMean()

    def extra_repr(self) -> str:
        return f"num_patches={self.num_patches}, kept={self.num_kept}, merged={self.num_merged}"

    def check_sizes(self, num_image_elements: int, num_text_elements: int) -> None:
        expected = self.num_patches + self.class_token
        if num_image_elements != expected:
            raise InputError(
                f"expected image sets of {expected} elements for laps, found {num_image_elements}; give num_patches as the "
                "backbone has them, and class_token where there is one"
            )

    def score(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
        if image_mask is not None and not bool(image_mask.all()):
            raise InputError(
                "expected patches in all places for laps, found masked ones; take max_mean for sets of several sizes"
            )
        patches = images[:, : self.num_patches]
        directions = _unit(patches).detach()
        own = (directions * _unit(patches.mean(1)).detach()[:, None]).sum(-1)  # (Ni, N)
        means = _unit(mean_along(texts, 1, None if text_mask is None else text_mask[..., None])).detach()
        columns = []
        for number, mean in enumerate(means):
            words = _unit(texts[number : number + 1])
            mask = None if text_mask is None else text_mask[number : number + 1]
            significance = own + directions @ mean
            if torch.is_grad_enabled():
                column = checkpoint(
                    self._of_text, images, significance, words, mask, use_reentrant=False, preserve_rng_state=False
                )
            else:
                column = self._of_text(images, significance, words, mask)
            columns.append(column)
        return torch.cat(columns, 1)

    def _of_text(self, images: Tensor, significance: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the scores of all images with one text, (Ni, 1)."""
        patches, last = images.split((self.num_patches, images.shape[1] - self.num_patches), 1)
        order = significance.sort(dim=1, descending=True, stable=True).indices
        kept, others = order.split((self.num_kept, self.num_patches - self.num_kept), 1)
        kept_patches = _rows(patches, kept)
        weights = (self.scale.to(images) * self.to_weights(kept_patches)).softmax(1)
        parts = [weights.transpose(1, 2) @ kept_patches]
        if others.shape[1]:
            shares = significance.gather(1, others).softmax(1)
            parts.append(shares[:, None] @ _rows(patches, others))
        elements = _unit(torch.cat((*parts, last), 1))
        return self.matching.score(elements, words, None, mask)


def _rows(patches: Tensor, places: Tensor) -> Tensor:
    return patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2]))


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)

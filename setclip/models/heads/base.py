"""What all heads share: the interface and its checks.

A head makes a set of embeddings of one side (image or text) from what a backbone gives: local features (patches, regions,
words) and, if there is one, a global feature. Letters: B samples, N local features of one sample (padded), E their width,
F width of the global feature, K elements in a set, D their width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from setclip.errors import InputError


@dataclass(frozen=True)
class HeadOutput:
    """What a head makes of a batch."""

    sets: Tensor
    """(B, K, D) float32 (float64 of a float64 head), unit norm, text elements of DH-Set excepted; zero where masked"""
    mask: Tensor | None = None
    """(B, K) bool, True where there is an element; None: everywhere"""
    attention: Tensor | None = None
    """(B, K, N) without gradient, for pictures: what each element takes of each input; rows sum to 1. None where the
    head has no such weights."""
    residuals: Tensor | None = None
    """(B, K, D) elements before the global feature is added, of any norm: what diversity losses look at; None: the
    head has none"""
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the head's losses and diagnostics need, by names that its docstring lists"""


class SetHead(nn.Module):
    """Makes sets of embeddings. Every head is built as `Head(in_width, width, global_width, **options)`.

    `in_width` E; `width` D; `global_width` F, or None where the backbone gives no global feature.
    """

    takes_global = False
    """Whether the head has a use for a global feature; else one may be given and changes nothing"""
    needs_global = False
    """Whether the head has no meaning without it"""
    reads_padding = False
    """Whether padded places are left as they come, as historic behaviour may want"""

    def __init__(self, in_width: int, width: int = 1024, global_width: int | None = None):
        super().__init__()
        for name, value in (("in_width", in_width), ("width", width), ("global_width", global_width)):
            if value is not None and value < 1:
                raise InputError(f"expected a {name} of at least 1, found {value}; give the backbone's width")
        if self.needs_global and global_width is None:
            raise InputError(
                f"expected a global_width for {type(self).__name__}, which is built upon the global feature, found none; "
                "give the width of the backbone's pooled feature"
            )
        self.in_width, self.width = in_width, width
        self.global_width = global_width if self.takes_global else None

    def forward(self, local: Tensor, mask: Tensor | None = None, global_features: Tensor | None = None) -> HeadOutput:
        """Returns the sets of a batch.

        `local`: (B, N, E) floating point. `mask`: (B, N) bool, True where there is an input; None: everywhere.
        `global_features`: (B, F), of a head that takes them exactly where it was built with a `global_width`. What a
        masked place holds, and how many there are, has no influence. Softmaxes, norms and DH-Set's mask are in float32
        at least, also under autocast. Raises InputError on shapes that do not fit and on a sample without input.
        """
        self._check(local, mask, global_features)
        if mask is not None and not self.reads_padding:
            local = local.masked_fill(~mask[..., None], 0.0)
        if global_features is not None:
            global_features = self._as_weights(global_features) if self.takes_global else None
        return self.encode(self._as_weights(local), mask, global_features)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        """Returns what `forward` does, of inputs that were checked."""
        raise NotImplementedError

    def learning_rate_factors(self) -> dict[str, float]:
        """Returns what the common learning rate is multiplied by, of parameters by name; 1 where none is named."""
        return {}

    def without_weight_decay(self) -> set[str]:
        """Returns names of parameters that must not decay, beside vectors and scalars."""
        return set()

    def _as_weights(self, values: Tensor) -> Tensor:
        """Returns values in the dtype of the weights; under autocast, which sees to that itself, as they are."""
        parameter = next(self.parameters(), None)
        if parameter is None or torch.is_autocast_enabled(values.device.type):
            return values
        return values.to(parameter.dtype)

    def _check(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> None:
        name = type(self).__name__
        if local.ndim != 3 or local.shape[2] != self.in_width or not local.shape[1] or not local.is_floating_point():
            raise InputError(
                f"expected local features (B, N, {self.in_width}), floating point, for {name}, found "
                f"{tuple(local.shape)} of {local.dtype}; build the head with the backbone's width"
            )
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != local.shape[:2]:
                raise InputError(
                    f"expected a mask {tuple(local.shape[:2])}, bool, for {name}, found {tuple(mask.shape)} of "
                    f"{mask.dtype}; it is True where a sample has an input"
                )
            is_empty = ~mask.any(1)
            if bool(is_empty.any()):
                raise InputError(
                    f"expected an input in each sample, found none in {int(is_empty.sum())} of {len(mask)} (first: number "
                    f"{int(is_empty.nonzero()[0])}); leave such samples out"
                )
        if not self.takes_global:
            return
        expected = None if self.global_width is None else (len(local), self.global_width)
        found = None if global_features is None else tuple(global_features.shape)
        if expected != found:
            raise InputError(
                f"expected global features {expected or 'to be left out'} for {name}, found {found or 'none'}; the "
                "head's global_width says whether it takes them"
            )

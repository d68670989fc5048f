"""Generalised pooling: a learned mean of the sorted values of each dimension (Chen et al. 2021, VSE∞, arXiv 2011.04305).

    pooled = Σₙ θₙ x̂ₙ,  x̂ = each dimension of x sorted downwards,  θ = softmax(w·BiGRU(p₁ … p_n) / 0.1)

p are sine codes of 32 numbers, so that θ depends on the number n of inputs alone. Stated by the authors' code: widths, the
temperature, the mean of the two directions. Letters: B samples, N inputs, E their width, D width, U different lengths.
"""

import torch
from torch import Tensor, nn

from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.pieces import exact, first_places, lengths_of, projection, softmax_over, unit

_CODE_WIDTH = 32
_TEMPERATURE = 0.1


class Gpo(SetHead):
    """Sets of one element, (B, 1, D): inputs are brought to width D by a linear layer, where it differs, and pooled."""

    def __init__(self, in_width: int, width: int = 1024, global_width: int | None = None):
        super().__init__(in_width, width, global_width)
        self.projection = projection(in_width, width)
        self.gru = nn.GRU(_CODE_WIDTH, _CODE_WIDTH, batch_first=True, bidirectional=True)
        self.to_weight = nn.Linear(_CODE_WIDTH, 1, bias=False)

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        values = exact(self.projection(local))
        if mask is not None:
            values = values.masked_fill(~mask[..., None], -torch.inf)
        ordered = values.sort(1, descending=True).values
        lengths = lengths_of(local, mask)
        if mask is not None:  # what is masked stands last
            ordered = ordered.masked_fill(~first_places(lengths, local.shape[1])[..., None], 0.0)
        with torch.autocast(local.device.type, enabled=False):
            pooled = torch.einsum("bn,bnd->bd", self.weights(lengths, local.shape[1]).to(ordered.dtype), ordered)
        return HeadOutput(unit(pooled)[:, None])

    def weights(self, lengths: Tensor, size: int) -> Tensor:
        """Returns θ, (B, size), of samples with `lengths`, (B,), inputs; 0 beyond."""
        different, place = lengths.unique(return_inverse=True)
        codes = _codes(size).to(self.to_weight.weight)
        packed = nn.utils.rnn.pack_padded_sequence(
            codes.expand(len(different), -1, -1), different.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=size)
        forwards, backwards = states.chunk(2, -1)
        logits = self.to_weight((forwards + backwards) / 2)[..., 0] / _TEMPERATURE
        return softmax_over(logits, first_places(different, size), 1)[place]


def _codes(size: int) -> Tensor:
    """Returns sines and cosines of places 0 to size − 1, (size, 32) float64."""
    rates = 10_000.0 ** (-torch.arange(0, _CODE_WIDTH, 2, dtype=torch.float64) / _CODE_WIDTH)
    angles = torch.arange(size)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)

"""PCME: a Gaussian embedding, of which samples are the set (Chun et al. 2021, arXiv 2101.05068).

    μ = PIE-Net with one element, of unit norm;  ln σ = FC(A x) + FC(φ),  A = softmax over inputs of W₂ tanh(W₁ x), its own
    samples z_j = μ + ε_j ⊙ σ,  j = 1 … J, not brought to unit norm

Stated by the authors' code: J = 7 in training and at test, no norm or sigmoid of ln σ. Ours: where ln σ begins, and that at
inference ε is drawn once for all (other ones for pictures and texts), so that the same input gives the same set. Compared by
`match_prob_l2`. Letters: B samples, N inputs, E their width, J samples of an embedding, D its width.
"""

import torch
from torch import Tensor, nn

from setclip.errors import InputError
from setclip.models.heads.base import HeadOutput, SetHead
from setclip.models.heads.pie import Pie
from setclip.models.pieces import exact, softmax_over


class Pcme(SetHead):
    """Sets of `num_samples`, not of unit norm. `auxiliary`, with gradient, for the divergence: "mean" and "log_sigma", (B, D).

    `start`: ln σ as it begins. `noise_seed`: of ε at inference.
    """

    takes_global = needs_global = True
    noise: Tensor

    def __init__(
        self,
        in_width: int,
        width: int = 1024,
        global_width: int | None = None,
        num_samples: int = 7,
        dropout: float = 0.0,
        start: float = -4.0,
        noise_seed: int = 0,
    ):
        super().__init__(in_width, width, global_width)
        if num_samples < 1:
            raise InputError(f"expected num_samples of at least 1, found {num_samples}; PCME has 7")
        assert global_width is not None
        self.mean = Pie(in_width, width, global_width, num_elements=1, dropout=dropout)
        hidden = max(1, in_width // 2)
        self.to_hidden, self.to_map = nn.Linear(in_width, hidden, bias=False), nn.Linear(hidden, 1, bias=False)
        self.of_inputs, self.of_global = nn.Linear(in_width, width), nn.Linear(global_width, width)
        for layer in (self.to_hidden, self.to_map, self.of_inputs, self.of_global):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.of_inputs.bias)
        nn.init.constant_(self.of_global.bias, start)
        generator = torch.Generator().manual_seed(noise_seed)
        self.register_buffer("noise", torch.randn(num_samples, width, generator=generator))

    def encode(self, local: Tensor, mask: Tensor | None, global_features: Tensor | None) -> HeadOutput:
        assert global_features is not None
        of_mean = self.mean.encode(local, mask, global_features)
        mean = of_mean.sets[:, 0]
        maps = self.to_map(torch.tanh(self.to_hidden(local)))
        weights = softmax_over(maps, None if mask is None else mask[..., None], 1)  # (B, N, 1)
        taken = (weights.to(local.dtype) * local).sum(1)
        log_sigma = exact(self.of_inputs(taken)) + exact(self.of_global(global_features))
        if self.training:
            noise = torch.randn(len(mean), *self.noise.shape, device=mean.device, dtype=mean.dtype)
        else:
            noise = self.noise.to(mean)[None]
        samples = mean[:, None] + noise * log_sigma.exp()[:, None]
        return HeadOutput(samples, attention=of_mean.attention, auxiliary={"mean": mean, "log_sigma": log_sigma})

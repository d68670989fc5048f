"""Diversity of sets by their Gram matrix: elements of one set are to be orthogonal (Song and Soleymani 2019, PVSE, Eq. 6).

R = mean over the batch of ‖G − I‖_F / K²,  G the inner products of a set's residuals of unit norm
"""

import torch
from torch import Tensor

from setclip.models.pieces import unit


def gram_loss(elements: Tensor) -> Tensor:
    """Returns the loss of sets (B, K, D), a scalar, float32 at least; 0 of orthogonal elements, with gradient 0."""
    num = elements.shape[1]
    with torch.autocast(elements.device.type, enabled=False):
        directions = unit(elements)
        gram = directions @ directions.transpose(1, 2)
        gram = gram.masked_fill(torch.eye(num, dtype=torch.bool, device=gram.device), 0.0)
        return (torch.linalg.vector_norm(gram, dim=(1, 2)) / num**2).mean()

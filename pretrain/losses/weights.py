"""What an object counts in an IoU: the rarer, the more. Made from a corpus's statistics; used by `tiles`."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from setclip.objects import ObjectTable


@dataclass(frozen=True)
class ObjectWeights:
    """w_o = log(captions / captions that name o), as AlignCLIP's weighted IoU is reconstructed."""

    ids: Tensor
    """(V,) int64 ascending"""
    values: Tensor
    """(V,) float64 ≥ 0"""
    unseen: float
    """Of an object that the statistics do not hold: as if one caption named it"""

    @staticmethod
    def of(table: ObjectTable) -> "ObjectWeights":
        """Returns the weights of a corpus."""
        captions = max(1, table.num_captions)
        order = np.argsort(table.ids)
        values = np.log(captions / np.clip(table.counts[order], 1, captions))
        return ObjectWeights(torch.from_numpy(table.ids[order]), torch.from_numpy(values), float(np.log(captions)))

    def to(self, device: torch.device) -> "ObjectWeights":
        """Returns the weights on a device."""
        return ObjectWeights(self.ids.to(device), self.values.to(device), self.unseen)

    def look_up(self, ids: Tensor) -> Tensor:
        """Returns float64 weights of int64 ids, in their shape."""
        if len(self.ids) == 0:
            return torch.full(ids.shape, self.unseen, dtype=torch.float64, device=ids.device)
        place = torch.searchsorted(self.ids, ids).clamp_max(len(self.ids) - 1)
        return torch.where(self.ids[place] == ids, self.values[place], self.unseen)

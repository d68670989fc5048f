"""Intersection over union of object sets. Letters: B rows, G columns, M objects of a caption (padded with −1)."""

import torch
from torch import Tensor


def iou_matrix(rows: Tensor, columns: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns (B, G): |A ∩ B| / |A ∪ B| of each row's set with each column's; 0 where both are empty.

    `rows` (B, M) and `columns` (G, M') hold int64 ids, distinct within a row, padded with −1. Counts are exact: they
    are whole numbers below 2^24, held in fp32 or wider.
    """
    vocabulary = torch.unique(torch.cat([rows.flatten(), columns.flatten()]))
    vocabulary = vocabulary[vocabulary >= 0]
    shared = _multi_hot(rows, vocabulary, dtype) @ _multi_hot(columns, vocabulary, dtype).T
    sizes = (rows >= 0).sum(1).to(dtype)[:, None] + (columns >= 0).sum(1).to(dtype)[None, :]
    return shared / (sizes - shared).clamp_min(1)


def _multi_hot(sets: Tensor, vocabulary: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (B, V) of 0 and 1. Padding goes to a column of its own, which is cut off."""
    place = torch.where(sets >= 0, torch.searchsorted(vocabulary, sets), len(vocabulary))
    hot = torch.zeros(len(sets), len(vocabulary) + 1, dtype=dtype, device=sets.device)
    return hot.scatter_(1, place, 1)[:, :-1]

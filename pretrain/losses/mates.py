"""Pairs whose texts are equal, as a prompt is that occurs twice in a batch: true pairs of each other, not negatives.

Used by `counts`, `tiles` and `operators`. Letters: N pairs of the batch, P ordered pairs of mates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.losses.ragged import grouped, spans, starts_of
from setclip.errors import InputError

MOST_PAIRS = 1 << 24
"""Pairs of equal texts in a batch: as many as 4,096 that are all equal make. They are listed, so memory is bounded."""


@dataclass(frozen=True)
class Mates:
    """For each pair of the batch, the others with its text."""

    rows: Tensor
    """(P,) int64 ascending"""
    columns: Tensor
    """(P,) int64: the mate, never the row itself"""
    numbers: Tensor
    """(N,) int64 ≥ 1: pairs with this text, the own one included"""
    groups: Tensor
    """(N,) int64: 0 where no other has the text, else a number of the text"""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def starts(self) -> Tensor:
        """(N + 1,) where each row's mates start."""
        return starts_of(self.numbers - 1)


def find_mates(text_ids: Tensor | None, size: int, device: torch.device) -> Mates:
    """Returns the mates of N = `size` pairs by (N,) int64 ids of their texts; None: no texts are equal.

    Raises InputError where there are more than MOST_PAIRS.
    """
    alone = torch.zeros(size, dtype=torch.int64, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    if text_ids is None:
        return Mates(none, none, alone + 1, alone)
    order, group, counts = grouped(text_ids)
    if len(counts) == size:
        return Mates(none, none, alone + 1, alone)
    pairs = int((counts * (counts - 1)).sum())
    if pairs > MOST_PAIRS:
        raise InputError(
            f"expected few equal texts in a batch, found {size:,} pairs in which a text occurs {int(counts.max()):,} times "
            f"({pairs:,} pairs of equal texts, at most {MOST_PAIRS:,} are taken); look for captions that say nothing, or use "
            "--loss.equal-texts negatives"
        )
    numbers, groups = alone.clone(), alone.clone()
    numbers[order] = counts[group]
    groups[order] = torch.where(counts[group] > 1, group + 1, 0)
    owner, place = spans(starts_of(counts)[group], counts[group])
    rows, columns = order[owner], order[place]
    differ = rows != columns
    rows, columns = rows[differ], columns[differ]
    by_row = rows.argsort(stable=True)
    return Mates(rows[by_row], columns[by_row], numbers, groups)

"""Subsets of objects that several captions share, level by level, and the pairs that are taken one by one.

A subset of t + 1 objects is looked for only in rows where its first t objects are shared too, and kept if at least two
rows have it, one of them an image's and one a text's. Every subset's key is (number of its prefix, number of its last
id), a whole number that is different for different subsets: nothing rests on a hash. Used by `counts` and `expansion`.

Pairs are taken one by one where that is exact and cheaper: those that share more than ORDER objects (their remainder),
and all pairs of a row with so many objects that its subsets outnumber its pairs. Letters: U classes, E entries.
"""

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from pretrain.losses.ragged import grouped, is_among, spans, starts_of
from pretrain.losses.sets import SetClasses
from pretrain.losses.similarity import ORDER

_FEW = 256
"""Subsets of a row that are always enumerated."""


@dataclass(frozen=True)
class Level:
    """The kept subsets of t objects."""

    rows: Tensor
    """(E,) int64 ascending: the class that has it"""
    subsets: Tensor
    """(E,) int64: number of the subset, of `count`"""
    count: int


@dataclass(frozen=True)
class Pairs:
    """Ordered pairs of different classes, both directions of each."""

    rows: Tensor
    columns: Tensor
    shared: Tensor
    """(P,) int64: |A ∩ B|"""
    is_whole: Tensor
    """(P,) bool: no subset tells of this pair. Otherwise subsets of up to ORDER objects do."""


@dataclass(frozen=True)
class Overlaps:
    """Everything that sets share, from which any similarity of (|A ∩ B|, |A| + |B|) follows."""

    classes: SetClasses
    levels: tuple[Level, ...]
    """For t = 1, …, ORDER."""
    pairs: Pairs
    is_large: Tensor
    """(U,) bool: all pairs of this class are in `pairs`"""
    keys: Tensor
    """(E,) int64 ascending: class · V + id of every entry of `ids`, where membership is looked up"""
    ids: Level
    """The single ids that are shared, large rows included."""

    def shared_by(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns |A ∩ B| for (P,) classes of an image's and a text's set."""
        return torch.where(
            first == second,
            self.classes.sizes[first],
            _count_shared(self.ids, self.keys, len(self.classes), first, second),
        )


def find_overlaps(classes: SetClasses, most_pairs: float = float("inf")) -> Overlaps | None:
    """Returns what the sets of a batch share; None where more than `most_pairs` pairs would have to be listed."""
    num, device = len(classes), classes.sizes.device
    of_image, of_text = (torch.zeros(num, dtype=torch.bool, device=device) for _ in range(2))
    of_image[classes.of_images], of_text[classes.of_texts] = True, True

    def keep(rows: Tensor, keys: Tensor) -> tuple[Tensor, Level]:
        """Returns which entries hold a subset that is shared between the sides, and these as a level."""
        order, group, counts = grouped(keys)
        owners = rows[order]
        with_image, with_text = (
            torch.zeros_like(counts).index_add_(0, group, side[owners].to(counts.dtype)) for side in (of_image, of_text)
        )
        is_kept = (counts > 1) & (with_image > 0) & (with_text > 0)
        number = is_kept.cumsum(0) - 1
        place = torch.empty_like(keys)
        place[order] = torch.where(is_kept, number, -1)[group]
        kept = place >= 0
        return kept, Level(rows[kept], place[kept], int(is_kept.sum()))

    _, ids = keep(classes.rows, classes.ids)
    keys = ids.rows * max(1, ids.count) + ids.subsets  # ascending, because ids ascend within a class
    is_large, pairs_of_rows = _large_rows(ids, num)
    if 2 * float(pairs_of_rows[is_large].sum()) > most_pairs:
        return None

    small = ~is_large[ids.rows]
    _, level = keep(ids.rows[small], ids.subsets[small])
    levels, items = [level], level
    starts = starts_of(torch.bincount(items.rows, minlength=num))
    last = torch.arange(len(items.rows), device=device)  # place in `items` of a subset's last id
    for _ in range(ORDER):
        rows, prefix = levels[-1].rows, levels[-1].subsets
        owner, place = spans(last + 1, starts[rows + 1] - last - 1)
        kept, level = keep(rows[owner], prefix[owner] * max(1, items.count) + items.subsets[place])
        levels.append(level)
        last = place[kept]
    shared_by = torch.bincount(levels[-1].subsets).double()
    if float((shared_by * (shared_by - 1)).sum()) > most_pairs:
        return None
    pairs = _joined(
        _pairs_of_large_rows(ids, is_large, num), _pairs_of_one_bucket(levels.pop(), ids, keys, num), device
    )
    return Overlaps(classes, tuple(levels), pairs, is_large, keys, ids)


def _large_rows(ids: Level, num: int) -> tuple[Tensor, Tensor]:
    """Returns which rows have more subsets to look at than pairs, and the pairs of each, those of several ids as often."""
    lengths = torch.bincount(ids.rows, minlength=num)
    by_length = [max(0, sum(comb(k, t) for t in range(1, ORDER + 2)) - _FEW) for k in range(int(lengths.max()) + 1)]
    subsets = torch.tensor(by_length, device=lengths.device)[lengths]
    holders = torch.bincount(ids.subsets, minlength=ids.count)
    pairs = torch.zeros_like(subsets).index_add_(0, ids.rows, holders[ids.subsets])
    return subsets > pairs, pairs


def _pairs_of_large_rows(ids: Level, is_large: Tensor, num: int) -> Pairs | None:
    """Returns each large row with every row that shares an id, both directions."""
    entries = torch.nonzero(is_large[ids.rows])[:, 0]
    if len(entries) == 0:
        return None
    members = ids.rows[ids.subsets.argsort(stable=True)]
    holders = torch.bincount(ids.subsets, minlength=ids.count)
    item = ids.subsets[entries]
    owner, place = spans(starts_of(holders)[item], holders[item])
    rows, columns = ids.rows[entries][owner], members[place]
    keys, shared = torch.unique((rows * num + columns)[rows != columns], return_counts=True)
    rows, columns = keys // num, keys % num
    to_small = ~is_large[columns]  # two large rows find each other
    return Pairs(
        torch.cat([rows, columns[to_small]]),
        torch.cat([columns, rows[to_small]]),
        torch.cat([shared, shared[to_small]]),
        torch.ones(len(rows) + int(to_small.sum()), dtype=torch.bool, device=rows.device),
    )


def _pairs_of_one_bucket(level: Level, ids: Level, keys: Tensor, num: int) -> Pairs | None:
    """Returns all pairs of rows that have a subset of ORDER + 1 objects in common, both directions."""
    if level.count == 0:
        return None
    order = level.subsets.argsort(stable=True)
    members = level.rows[order]
    ends = starts_of(torch.bincount(level.subsets, minlength=level.count))[level.subsets[order] + 1]
    here = torch.arange(len(members), device=members.device)
    owner, place = spans(here + 1, ends - here - 1)
    found = torch.unique(members[owner] * num + members[place])  # rows ascend within a bucket
    first, second = found // num, found % num
    shared = _count_shared(ids, keys, num, first, second)
    return Pairs(
        torch.cat([first, second]),
        torch.cat([second, first]),
        torch.cat([shared, shared]),
        torch.zeros(2 * len(first), dtype=torch.bool, device=first.device),
    )


def _count_shared(ids: Level, keys: Tensor, num: int, first: Tensor, second: Tensor) -> Tensor:
    """Returns how many ids the classes `first` and `second` have in common, (P,) int64."""
    lengths = torch.bincount(ids.rows, minlength=num)
    owner, place = spans(starts_of(lengths)[first], lengths[first])
    is_shared = is_among(keys, second[owner] * max(1, ids.count) + ids.subsets[place])
    return torch.zeros_like(first).index_add_(0, owner, is_shared.to(first.dtype))


def _joined(first: Pairs | None, second: Pairs | None, device: torch.device) -> Pairs:
    parts = [part for part in (first, second) if part is not None]
    if not parts:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Pairs(none, none, none, none.bool())
    return Pairs(*(torch.cat([getattr(p, name) for p in parts]) for name in ("rows", "columns", "shared", "is_whole")))

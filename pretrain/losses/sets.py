"""Object sets of a batch: ids without repetitions, and equal sets collapsed into classes.

Used by the subset expansion, whose work then depends on distinct sets only. Letters: N pairs, M ids of a padded row,
U classes (distinct sets of either side, the empty set included).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PAD = -1


@dataclass(frozen=True)
class BatchSets:
    """What a batch's targets are made of. No gradient."""

    image_objects: Tensor
    """(B, M) int64 ids of the objects on the image's side, padded with −1"""
    text_objects: Tensor
    """(B, M') int64, the same on the text's side"""
    text_ids: Tensor | None = None
    """(B,) int64: equal where texts are equal, which are then no negatives of each other; None: all texts count as
    different"""

    def __len__(self) -> int:
        return len(self.image_objects)


@dataclass(frozen=True)
class SetClasses:
    """The distinct object sets of a batch, and who has which."""

    sizes: Tensor
    """(U,) int64: objects of each"""
    rows: Tensor
    """(E,) int64 ascending: the class of each entry"""
    ids: Tensor
    """(E,) int64: its id, ascending within a class"""
    of_images: Tensor
    """(N,) int64: class of each image's set"""
    of_texts: Tensor
    """(N,) int64; the same tensor where the two sides are equal"""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def sides_are_equal(self) -> bool:
        """Whether each image has its text's set."""
        return self.of_images is self.of_texts


def collapse(image_objects: Tensor, text_objects: Tensor) -> SetClasses:
    """Returns the classes of (N, M) and (N, M') int64 ids; negative ids are padding, repeated ids count once."""
    images = _distinct(image_objects)
    if image_objects.shape == text_objects.shape and torch.equal(image_objects, text_objects):
        chosen, of_images = _unique_rows(images)
        of_texts, sets = of_images, images[chosen]
    else:
        texts = _distinct(text_objects)
        width = max(images.shape[1], texts.shape[1])
        both = torch.cat(
            [torch.nn.functional.pad(side, (0, width - side.shape[1]), value=PAD) for side in (images, texts)]
        )
        chosen, of_both = _unique_rows(both)
        of_images, of_texts = of_both[: len(images)], of_both[len(images) :]
        sets = both[chosen]
        if torch.equal(of_images, of_texts):
            of_texts = of_images
    used = sets >= 0
    sizes = used.sum(1)
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return SetClasses(sizes, rows, sets[used], of_images, of_texts)


def _distinct(objects: Tensor) -> Tensor:
    """Returns the rows sorted, padding and repetitions last: equal sets give equal rows."""
    left, right = objects[:, :-1], objects[:, 1:]
    if bool(((right < 0) | ((left >= 0) & (left < right))).all()):  # as the loader gives them
        used = int((objects >= 0).sum(1).max()) if objects.numel() else 0
        return objects[:, :used].clamp_min(PAD)
    last = torch.iinfo(torch.int64).max
    ordered = torch.where(objects < 0, last, objects).sort(1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    ordered = ordered.masked_fill(repeated, last).sort(1).values
    used = int((ordered != last).sum(1).max()) if ordered.numel() else 0
    return ordered.masked_fill(ordered == last, PAD)[:, :used]


def _unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (a row of each class, class of each row). Rows are sorted by a hash and compared in full."""
    hashes, order = _hash(rows).sort(stable=True)
    ordered = rows[order]
    differs = (ordered[1:] != ordered[:-1]).any(1)
    if bool((differs & (hashes[1:] == hashes[:-1])).any()):  # different sets of one hash may lie between equal ones
        _, classes = torch.unique(rows, dim=0, return_inverse=True)
        order = classes.argsort(stable=True)
        differs = classes[order][1:] != classes[order][:-1]
    first = torch.nn.functional.pad(differs, (1, 0), value=True)
    classes = torch.empty_like(order)
    classes[order] = first.cumsum(0) - 1
    return order[first], classes


def _hash(rows: Tensor) -> Tensor:
    """Returns a 64-bit number of each row (splitmix64's finalizer over the ids, summed)."""
    used = rows >= 0
    mixed = rows[used]
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), used.sum(1))
    return mixed.new_zeros(len(rows)).index_add_(0, owner, mixed)

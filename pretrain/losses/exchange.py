"""What ranks exchange for the loss. Ranks may hold different numbers of pairs. Without a process group there is one rank.

Used by `blockwise` and the package's interface. Letters: B pairs on this rank, N over all ranks, R ranks, D width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.losses.sets import BatchSets
from setclip.distributed import world_size


@dataclass(frozen=True)
class Layout:
    """Which of the N pairs lies where, in rank order."""

    rank: int
    counts: tuple[int, ...]
    """Pairs of each rank"""

    @property
    def total(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def mine(self) -> slice:
        """This rank's pairs."""
        first = sum(self.counts[: self.rank])
        return slice(first, first + self.counts[self.rank])

    def columns(self, width: int) -> slice:
        """Returns this rank's share of `width` columns."""
        return _share(width, self.rank, len(self.counts))


def agree(sets: BatchSets) -> tuple[Layout, BatchSets]:
    """Returns the layout, and all ranks' sets, padded with −1 to the widest rank's. Ranks must all have text ids, or none."""
    if world_size() == 1:
        return Layout(0, (len(sets),)), sets
    images, texts = sets.image_objects, sets.text_objects
    mine = torch.tensor([len(sets), images.shape[1], texts.shape[1]], device=images.device)
    shapes = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(shapes, mine)
    counts, image_widths, text_widths = zip(*(shape.tolist() for shape in shapes), strict=True)
    layout = Layout(dist.get_rank(), counts)
    # One message: ids of both sides, and of the texts, beside each other.
    pad = torch.nn.functional.pad
    images = pad(images, (0, max(image_widths) - images.shape[1]), value=-1)
    texts = pad(texts, (0, max(text_widths) - texts.shape[1]), value=-1)
    text_ids = [] if sets.text_ids is None else [sets.text_ids[:, None]]
    both = gather_rows(torch.cat([images, texts, *text_ids], dim=1), layout)
    images, texts, text_ids = both.split([max(image_widths), max(text_widths), len(text_ids)], dim=1)
    return layout, BatchSets(images, texts, None if sets.text_ids is None else text_ids[:, 0])


def gather_rows(local: Tensor, layout: Layout) -> Tensor:
    """Returns (N, …) from each rank's (B, …), in rank order, without gradient."""
    if len(layout.counts) == 1:
        return local.detach()
    most = max(layout.counts)
    padded = local.detach().new_zeros(most, *local.shape[1:])
    padded[: len(local)] = local.detach()
    parts = [torch.empty_like(padded) for _ in layout.counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, layout.counts, strict=True)])


def add_over_ranks(value: Tensor, layout: Layout) -> Tensor:
    """Adds a tensor over the layout's ranks in place and returns it."""
    if len(layout.counts) > 1:
        dist.all_reduce(value)
    return value


def add_to_owners(rows: Tensor, layout: Layout) -> Tensor:
    """Returns (B, D): this rank's rows of the sum over ranks of (N, D)."""
    if len(layout.counts) == 1:
        return rows
    width = rows.shape[1]
    parts = _exchanged(rows, layout, [width] * len(layout.counts))
    return torch.stack(parts).sum(0)


def columns_to_owners(columns: Tensor, layout: Layout, width: int) -> Tensor:
    """Returns (B, `width`) rows of a matrix whose columns are spread over ranks: each holds (N, its share)."""
    if len(layout.counts) == 1:
        return columns
    shares = [_share(width, rank, len(layout.counts)) for rank in range(len(layout.counts))]
    return torch.cat(_exchanged(columns, layout, [share.stop - share.start for share in shares]), dim=1)


def _share(width: int, rank: int, ranks: int) -> slice:
    return slice(width * rank // ranks, width * (rank + 1) // ranks)


def _exchanged(rows: Tensor, layout: Layout, widths: list[int]) -> list[Tensor]:
    """Sends each rank its rows of (N, d); returns what each rank sent, (B, its width)."""
    count = layout.counts[layout.rank]
    received = rows.new_empty(count * sum(widths))
    dist.all_to_all_single(
        received,
        rows.contiguous().view(-1),
        [count * width for width in widths],
        [pairs * rows.shape[1] for pairs in layout.counts],
    )
    return [
        part.view(count, width)
        for part, width in zip(received.split([count * width for width in widths]), widths, strict=True)
    ]

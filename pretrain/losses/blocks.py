"""The logits block by block, and the three products that the gradients are made of. Used by every blockwise loss.

Letters: B images of this rank, N texts of all ranks, D width; R × C a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SHAPES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
"""Rows and columns of a block by kind of device: 2 MB in fp32, which stays in a processor's second-level cache; on GPUs
as large as keeps matrix units busy."""


def shape_on(device: torch.device) -> tuple[int, int]:
    """Returns rows and columns of a block on a device."""
    return SHAPES[device.type]


def blocks_of(num_rows: int, num_columns: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yields (rows, columns) of each block, row after row."""
    height, width = shape_on(device)
    for first_row in range(0, num_rows, height):
        for first_column in range(0, num_columns, width):
            yield (
                slice(first_row, min(first_row + height, num_rows)),
                slice(first_column, min(first_column + width, num_columns)),
            )


def scratch(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns memory for one block."""
    height, width = shape_on(device)
    return torch.empty(min(height, num_rows), min(width, num_columns), dtype=dtype, device=device)


def logit_blocks(images: Tensor, all_texts: Tensor, scale: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (rows, columns, (R, C) logits s x·y). The logits may be overwritten, and are by the next block.

    `images`: (B, D). `all_texts`: (N, D). `scale`: s, one number in the dtype to compute in.
    """
    memory = scratch(len(images), len(all_texts), scale.dtype, images.device)
    for rows, columns in blocks_of(len(images), len(all_texts), images.device):
        block = memory[: rows.stop - rows.start, : columns.stop - columns.start]
        multiply(images[rows], all_texts[columns].T, block)
        yield rows, columns, block.mul_(scale)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes left · right. Factors in bf16 are multiplied as they are, and summed in fp32."""
    if left.is_cuda and left.dtype != out.dtype:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left · right to a matrix in place, summed in its dtype."""
    if left.is_cuda and left.dtype != to.dtype:
        torch.addmm(to, left, right, out_dtype=to.dtype, out=to)
    else:
        to.addmm_(left.to(to.dtype), right.to(to.dtype))


def true_in(block: Tensor, rows: slice, columns: slice, first_pair: int) -> tuple[Tensor, slice]:
    """Returns the true pairs' places in a block, as a view, and which of this rank's pairs they are."""
    first = max(rows.start, columns.start - first_pair)
    last = max(first, min(rows.stop, columns.stop - first_pair))
    inside = block[first - rows.start : last - rows.start, first + first_pair - columns.start :]
    return inside.diagonal()[: last - first], slice(first, last)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Returns Σ left · right, float64, without a third matrix in float64."""
    return torch.linalg.vecdot(left, right).double().sum()


class Products:
    """M Y, Mᵀ X and Σ M_ij z_ij, from blocks of M, where M is the derivative of N · loss by the logits.

    In bf16, rounding M would be as large as the gradient where M is a small difference. So what rounding took from a
    row (column) is given back at its own text (image), which is the right place in so far as texts that share a row's
    mass are alike; and the sum over z is taken before rounding.
    """

    def __init__(self, images: Tensor, all_texts: Tensor, scale: Tensor, first_pair: int, partners: Tensor | None):
        """`partners`: (N, D) all images, where M is to be rounded to their dtype; else None."""
        dtype, device = scale.dtype, images.device
        self.images, self.all_texts, self.scale = images, all_texts, scale
        self.first_pair, self.partners = first_pair, partners
        self.of_images = torch.zeros(images.shape, dtype=dtype, device=device)
        self.of_texts = torch.zeros(all_texts.shape, dtype=dtype, device=device)
        self.with_logits = torch.zeros((), dtype=torch.float64, device=device)
        self.lost_rows = torch.zeros(len(images), dtype=dtype, device=device)
        self.lost_columns = torch.zeros(len(all_texts), dtype=dtype, device=device)

    @property
    def keeps_logits(self) -> bool:
        """Whether `add` needs the logits beside M."""
        return self.partners is not None

    def add(self, rows: slice, columns: slice, block: Tensor, logits: Tensor | None) -> None:
        """Adds a block of M, which is overwritten. `logits`: its z where `keeps_logits`."""
        if self.partners is not None and logits is not None:
            self.with_logits += (block * logits).sum().double()
            exact, block = block, block.to(self.partners.dtype)
            exact.sub_(block)
            self.lost_rows[rows] += exact.sum(1)
            self.lost_columns[columns] += exact.sum(0)
        add_product(self.of_images[rows], block, self.all_texts[columns])
        add_product(self.of_texts[columns], block.T, self.images[rows])

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns M Y, (B, D); Mᵀ X, (N, D); and Σ M_ij x_i·y_j, float64."""
        if self.partners is None:
            return self.of_images, self.of_texts, dot(self.images, self.of_images)
        mine = slice(self.first_pair, self.first_pair + len(self.images))
        self.of_images.addcmul_(self.lost_rows[:, None], self.all_texts[mine].to(self.of_images.dtype))
        self.of_texts.addcmul_(self.lost_columns[:, None], self.partners.to(self.of_texts.dtype))
        return self.of_images, self.of_texts, self.with_logits / self.scale.double()

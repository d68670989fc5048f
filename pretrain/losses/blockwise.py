"""The contrastive loss in blocks: both directions from one pass over the logits, which are never held as a whole.

    loss = 1/2N Σ_i [lse_j z_ij + lse_j z_ji] − 1/N Σ_ij W_ij z_ij,  z_ij = s x_i·y_j

Forward, each block is one product and one exponential, whose sums over rows and columns give both log-sum-exps.
Backward, it is made again: with P the mean of both softmaxes, dX = s (P − W) Y / N and dY = s (P − W)ᵀ X / N.

One shift c serves all blocks: c is so far below the largest possible logit that no sum overflows. A row whose logits all
lie far below c (cosines all below −0.3 at a scale of 100) would lose digits; that is found, and the batch is done again
with a running maximum for each row and column.

True pairs are kept out of the sums, because 1 − p_ii of a model that is nearly sure is lost in p_ii: it is computed from
the others. In bf16, rounding P would be as large as the gradient where P ≈ W. So the diagonal of P − W is made before a
block is rounded, and what rounding took from a row (column) is given back at its own text (image), which is the right
place in so far as texts that share a row's mass are alike.

Each rank makes the blocks of its images with all texts. Letters: B images and texts of this rank, N over all ranks, D
width.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.losses.exchange import Layout, add_over_ranks, add_to_owners, columns_to_owners, gather_rows
from pretrain.losses.operators import Targets

ROWS, COLUMNS = 512, 1024
"""Of a block: 2 MB in fp32, which stays in a processor's second-level cache."""

_BELOW_OVERFLOW = {torch.float32: 70.0, torch.float64: 600.0}
"""exp of this, summed over a block, is finite, and 1 / (N · exp of this) is a normal number."""
_ABOVE_UNDERFLOW = {torch.float32: -58.0, torch.float64: -640.0}
"""Sums above exp of this have lost less than N exp(−29) of themselves to underflow."""


@dataclass(frozen=True)
class LogSums:
    """Log-sum-exps without the true pairs, and with them. All float64."""

    row_others: Tensor
    """(B,) of each of this rank's images over the other pairs' texts"""
    column_others: Tensor
    """(N,) of each text over the other pairs' images"""
    true: Tensor
    """(N,) logits of the true pairs"""
    shift: Tensor | None
    """c; None where a running maximum was needed"""

    @property
    def columns(self) -> Tensor:
        """(N,) of each text over all images."""
        return torch.logaddexp(self.column_others, self.true)

    def excess(self, mine: slice) -> Tensor:
        """Returns (2, B): others less true, of this rank's rows and columns. log p_ii = −log(1 + its exp)."""
        return torch.stack([self.row_others, self.column_others[mine]]) - self.true[mine]


def blockwise_loss(images: Tensor, texts: Tensor, scale: Tensor, targets: Targets, layout: Layout) -> Tensor:
    """Returns this rank's share of the loss; the mean over ranks is the loss over all N pairs.

    `images`, `texts`: (B, D) in float32, float64 or bfloat16. `scale`: s, one number. Gradients are right once they are
    averaged over ranks, as engines do; backward must be called on every rank, with the same factor.
    """
    return cast(Tensor, _Loss.apply(images, texts, scale, targets, layout))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, targets: Targets, layout: Layout) -> Tensor:
        dtype = torch.promote_types(images.dtype, torch.float32)
        factor = scale.detach().reshape(()).to(dtype)
        all_images, all_texts = gather_rows(images, layout), gather_rows(texts, layout)
        sums = log_sums(images.detach(), all_images, all_texts, factor, layout)

        # W's part off the diagonal acts on each column of features by itself: each rank takes a share of the columns.
        soft_images = soft_texts = None
        width = images.shape[1]
        columns = layout.columns(width)
        if targets.gives_to_others:
            targets = targets.to(dtype)
            product = targets.times_texts(all_texts[:, columns].to(dtype))
            soft_images = columns_to_owners(product, layout, width)
            if any(ctx.needs_input_grad):
                product = targets.times_images(all_images[:, columns].to(dtype))
                soft_texts = columns_to_owners(product, layout, width)

        mine = layout.mine
        share = len(layout.counts) / layout.total
        excess, diagonal = sums.excess(mine), targets.diagonal[mine]
        # Σ_i lse_i − W_ii z_ii = Σ_i (lse_i − z_ii) + (1 − W_ii) z_ii: nothing is lost where the loss is small.
        loss = torch.logaddexp(excess, torch.zeros_like(excess)).sum() / 2 + ((1 - diagonal) * sums.true[mine]).sum()
        if soft_images is not None:
            loss = loss - factor.double() * _dot(images.detach().to(dtype), soft_images)
        # Of P − W: 1 − W_ii less the mean of what both directions give to others.
        diagonal = (1 - diagonal - torch.sigmoid(excess).mean(0)).to(dtype)
        row_sums = torch.logaddexp(sums.row_others, sums.true[mine])
        partners = all_images if images.dtype == torch.bfloat16 else None
        ctx.save_for_backward(
            images, all_texts, factor, row_sums, sums.columns, sums.shift, diagonal, partners, soft_images, soft_texts
        )
        ctx.layout, ctx.scale_dtype, ctx.scale_shape = layout, scale.dtype, scale.shape
        return (share * loss).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, all_texts, factor, rows, columns, shift, diagonal, partners, soft_images, soft_texts = ctx.saved_tensors
        layout: Layout = ctx.layout
        made = _products(images, all_texts, factor, rows, columns, shift, diagonal, layout.mine.start, partners)
        d_images, d_all_texts, d_scale = made
        d_texts = add_to_owners(d_all_texts, layout)
        if soft_images is not None:
            d_scale = d_scale - _dot(images.to(factor.dtype), soft_images)
            d_images -= soft_images
            d_texts -= soft_texts
        share = gradients[0].to(factor.dtype) * len(layout.counts) / layout.total
        d_images *= share * factor
        d_texts *= share * factor
        return (
            d_images.to(images.dtype),
            d_texts.to(images.dtype),
            (share.double() * d_scale).to(ctx.scale_dtype).reshape(ctx.scale_shape),
            None,
            None,
        )


def log_sums(images: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor, layout: Layout) -> LogSums:
    """Returns the log-sum-exps of s · images · all_textsᵀ over rows and columns. `scale` has the dtype to compute in."""
    dtype = scale.dtype
    bound = scale.double() * _longest(all_images) * _longest(all_texts)
    # A bound that is small enough needs no shift downwards; rounding may exceed it by a hair.
    shift = (bound * (1 + 1e-5) - _BELOW_OVERFLOW[dtype]).clamp_min(0.0)
    rows, columns, true = _shifted_sums(images, all_texts, scale, shift.to(dtype), layout.mine.start)
    all_true = torch.zeros_like(columns)
    all_true[layout.mine] = true
    shift = shift.to(dtype).double()
    # One message: sums over all ranks' images, true pairs, and whether a row has lost digits.
    too_small = torch.tensor(_ABOVE_UNDERFLOW[dtype], dtype=torch.float64, device=rows.device).exp()
    is_lost = (rows + (true - shift).exp() < too_small).any()
    merged = add_over_ranks(torch.cat([columns, all_true, is_lost.double()[None]]))
    columns, all_true = merged[: layout.total], merged[layout.total : -1]
    if bool((merged[-1] > 0) | (columns + (all_true - shift).exp() < too_small).any()):  # alike on all ranks
        rows, columns = _running_sums(images, all_texts, scale, layout.mine.start)
        each_rank = Layout(layout.rank, (1,) * len(layout.counts))
        return LogSums(rows, torch.logsumexp(gather_rows(columns[None], each_rank), dim=0), all_true, None)
    return LogSums(rows.log() + shift, columns.log() + shift, all_true, shift)


def _shifted_sums(
    images: Tensor, all_texts: Tensor, scale: Tensor, shift: Tensor, first_pair: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Σ exp(z − c) over the others of rows and columns, float64, and the true pairs' z."""
    row_sums, column_sums = _empty_sums(images, all_texts, 0.0)
    true = torch.empty_like(row_sums)
    for rows, columns, block in _blocks(images, all_texts, scale):
        on_diagonal, places = _true_in(block, rows, columns, first_pair)
        true[places] = on_diagonal.double()
        block.sub_(shift).exp_()
        on_diagonal.zero_()
        row_sums[rows] += block.sum(1)
        column_sums[columns] += block.sum(0)
    return row_sums, column_sums, true


def _running_sums(images: Tensor, all_texts: Tensor, scale: Tensor, first_pair: int) -> tuple[Tensor, Tensor]:
    """Returns log Σ exp(z) over the others of rows and columns, float64."""
    row_sums, column_sums = _empty_sums(images, all_texts, -torch.inf)
    for rows, columns, block in _blocks(images, all_texts, scale):
        _true_in(block, rows, columns, first_pair)[0].fill_(-torch.inf)
        row_sums[rows] = torch.logaddexp(row_sums[rows], block.logsumexp(1).double())
        column_sums[columns] = torch.logaddexp(column_sums[columns], block.logsumexp(0).double())
    return row_sums, column_sums


def _products(
    images: Tensor,
    all_texts: Tensor,
    scale: Tensor,
    rows_lse: Tensor,
    columns_lse: Tensor,
    shift: Tensor | None,
    diagonal: Tensor,
    first_pair: int,
    partners: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns M Y, Mᵀ X and Σ M_ij x_i·y_j, where M is P, the mean of both softmaxes, with `diagonal` in its diagonal.

    `partners`: (N, D) all images, where M is to be rounded to their dtype; else None.
    """
    dtype = scale.dtype
    d_images = torch.zeros(images.shape, dtype=dtype, device=images.device)
    d_texts = torch.zeros(all_texts.shape, dtype=dtype, device=images.device)
    d_scale = torch.zeros((), dtype=torch.float64, device=images.device)
    if shift is not None:  # exp(z − lse) = exp(z − c) · exp(c − lse)
        of_rows, of_columns = ((shift - lse).exp().to(dtype) / 2 for lse in (rows_lse, columns_lse))
        shift = shift.to(dtype)
    else:
        of_rows, of_columns = rows_lse.to(dtype), columns_lse.to(dtype)
    scratch = torch.empty(min(ROWS, len(images)), min(COLUMNS, len(all_texts)), dtype=dtype, device=images.device)
    lost_rows, lost_columns = of_rows.new_zeros(len(images)), of_rows.new_zeros(len(all_texts))
    for rows, columns, block in _blocks(images, all_texts, scale):
        other = scratch[: block.shape[0], : block.shape[1]]
        logits = block.clone() if partners is not None else None
        if shift is not None:
            torch.add(of_rows[rows, None], of_columns[columns], out=other)
            block.sub_(shift).exp_().mul_(other)
        else:
            torch.sub(block, of_columns[columns], out=other).exp_()
            block.sub_(of_rows[rows, None]).exp_().add_(other).mul_(0.5)
        on_diagonal, places = _true_in(block, rows, columns, first_pair)
        on_diagonal.copy_(diagonal[places])
        if partners is not None and logits is not None:
            d_scale += (block * logits).sum().double()
            exact, block = block, block.to(partners.dtype)
            exact.sub_(block)
            lost_rows[rows] += exact.sum(1)
            lost_columns[columns] += exact.sum(0)
        _add_product(d_images[rows], block, all_texts[columns])
        _add_product(d_texts[columns], block.T, images[rows])
    if partners is None:
        return d_images, d_texts, _dot(images, d_images)
    d_images.addcmul_(lost_rows[:, None], all_texts[first_pair : first_pair + len(images)].to(dtype))
    d_texts.addcmul_(lost_columns[:, None], partners.to(dtype))
    return d_images, d_texts, d_scale / scale.double()


def _blocks(images: Tensor, all_texts: Tensor, scale: Tensor) -> Any:
    """Yields (rows, columns, logits) block by block; the logits may be overwritten, and are by the next block."""
    memory = torch.empty(min(ROWS, len(images)), min(COLUMNS, len(all_texts)), dtype=scale.dtype, device=images.device)
    for first_row in range(0, len(images), ROWS):
        rows = slice(first_row, min(first_row + ROWS, len(images)))
        for first_column in range(0, len(all_texts), COLUMNS):
            columns = slice(first_column, min(first_column + COLUMNS, len(all_texts)))
            block = memory[: rows.stop - rows.start, : columns.stop - columns.start]
            _product(images[rows], all_texts[columns].T, block)
            yield rows, columns, block.mul_(scale)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes left · right. Factors in bf16 are multiplied as they are, and summed in fp32."""
    torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left · right to a matrix in place, summed in its dtype."""
    to.addmm_(left.to(to.dtype), right.to(to.dtype))


def _true_in(block: Tensor, rows: slice, columns: slice, first_pair: int) -> tuple[Tensor, slice]:
    """Returns the true pairs' places in a block, as a view, and which of this rank's pairs they are."""
    first = max(rows.start, columns.start - first_pair)
    last = max(first, min(rows.stop, columns.stop - first_pair))
    inside = block[first - rows.start : last - rows.start, first + first_pair - columns.start :]
    return inside.diagonal()[: last - first], slice(first, last)


def _empty_sums(images: Tensor, all_texts: Tensor, value: float) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.full((len(x),), value, dtype=torch.float64, device=x.device) for x in (images, all_texts))
    return rows, columns


def _longest(features: Tensor) -> Tensor:
    """Returns the largest norm of (N, D) rows, float64."""
    return (
        torch.linalg.vector_norm(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1).max().double()
    )


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Returns Σ left · right, float64, without a third matrix in float64."""
    return torch.linalg.vecdot(left, right).double().sum()

"""The contrastive loss in blocks: both directions from one pass over the logits, which are never held as a whole.

    loss = 1/2N Σ_i [lse_j z_ij + lse_j z_ji] − 1/N Σ_ij W_ij z_ij,  z_ij = s x_i·y_j

Forward, each block is one product and one exponential, whose sums over rows and columns give both log-sum-exps.
Backward, it is made again: with P the mean of both softmaxes, dX = s (P − W) Y / N and dY = s (P − W)ᵀ X / N.

One shift c serves all blocks: c is so far below the largest possible logit that no sum overflows. A row whose logits all
lie far below c (cosines all below −0.3 at a scale of 100) would lose digits; that is found, and the batch is done again
with a running maximum for each row and column.

True pairs are kept out of the sums, because 1 − p_ii of a model that is nearly sure is lost in p_ii: it is computed from
the others. In bf16, rounding P would be as large as the gradient where P ≈ W. So the diagonal of P − W is made before a
block is rounded, and what rounding took is given back (`blocks.Products`).

On GPUs Triton makes these passes (`kernels`). Each rank makes the blocks of its images with all texts. Letters: B images
and texts of this rank, N over all ranks, D width.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.losses.blocks import Products, dot, logit_blocks, scratch, true_in
from pretrain.losses.exchange import Layout, add_over_ranks, add_to_owners, columns_to_owners, gather_rows
from pretrain.losses.operators import Targets
from pretrain.losses.tiles import InTiles

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
    in_tiles: Tensor
    """Σ W_ij z_ij of what tiles hold of this rank's images"""

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


@dataclass(frozen=True)
class SoftPart:
    """What W, less its diagonal and its tiles, makes of this rank's features."""

    of_images: Tensor | None
    """(B, D) rows of W Y; None where there are none"""
    of_texts: Tensor | None
    """(B, D) rows of Wᵀ X"""

    def dot(self, images: Tensor) -> Tensor | float:
        """Returns Σ W_ij x_i·y_j over this rank's images, float64."""
        return 0.0 if self.of_images is None else dot(images.detach().to(self.of_images.dtype), self.of_images)


def apply_targets(
    targets: Targets, all_images: Tensor, all_texts: Tensor, layout: Layout, dtype: torch.dtype, with_gradient: bool
) -> SoftPart:
    """Returns the products with W. It acts on each column of features by itself: each rank takes a share of the columns."""
    if not targets.gives_to_others:
        return SoftPart(None, None)
    width = all_texts.shape[1]
    columns = layout.columns(width)
    of_images = columns_to_owners(targets.times_texts(all_texts[:, columns].to(dtype)), layout, width)
    if not with_gradient:
        return SoftPart(of_images, None)
    return SoftPart(of_images, columns_to_owners(targets.times_images(all_images[:, columns].to(dtype)), layout, width))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, targets: Targets, layout: Layout) -> Tensor:
        dtype = torch.promote_types(images.dtype, torch.float32)
        factor = scale.detach().reshape(()).to(dtype)
        targets = targets.to(dtype)
        all_images, all_texts = gather_rows(images, layout), gather_rows(texts, layout)
        sums = log_sums(images.detach(), all_images, all_texts, factor, layout, targets.tiles)
        soft = apply_targets(targets, all_images, all_texts, layout, dtype, any(ctx.needs_input_grad))

        mine = layout.mine
        excess, diagonal = sums.excess(mine), targets.diagonal[mine]
        # Σ_i lse_i − W_ii z_ii = Σ_i (lse_i − z_ii) + (1 − W_ii) z_ii: nothing is lost where the loss is small.
        loss = torch.logaddexp(excess, torch.zeros_like(excess)).sum() / 2 + ((1 - diagonal) * sums.true[mine]).sum()
        loss = loss - factor.double() * soft.dot(images) - sums.in_tiles
        # Of P − W: 1 − W_ii less the mean of what both directions give to others.
        diagonal = (1 - diagonal - torch.sigmoid(excess).mean(0)).to(dtype)
        row_sums = torch.logaddexp(sums.row_others, sums.true[mine])
        partners = all_images if images.dtype == torch.bfloat16 else None
        ctx.save_for_backward(
            images,
            all_texts,
            factor,
            row_sums,
            sums.columns,
            sums.shift,
            diagonal,
            partners,
            soft.of_images,
            soft.of_texts,
        )
        ctx.layout, ctx.tiles, ctx.scale_dtype, ctx.scale_shape = layout, targets.tiles, scale.dtype, scale.shape
        return (len(layout.counts) / layout.total * loss).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, all_texts, factor, rows, columns, shift, diagonal, partners, *soft = ctx.saved_tensors
        layout: Layout = ctx.layout
        products = _products(
            images, all_texts, factor, rows, columns, shift, diagonal, layout.mine.start, partners, ctx.tiles
        )
        d_images, d_texts, d_scale = to_gradients(*products, images, factor, gradients[0], SoftPart(*soft), layout)
        return d_images, d_texts, d_scale.to(ctx.scale_dtype).reshape(ctx.scale_shape), None, None


def to_gradients(
    of_images: Tensor,
    of_all_texts: Tensor,
    with_scores: Tensor,
    images: Tensor,
    scale: Tensor,
    gradient: Tensor,
    soft: SoftPart,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by this rank's images, its texts, and s (float64), from `blocks.Products` of M and the soft part.

    `gradient`: by this rank's share of the loss. Overwrites the products.
    """
    of_texts = add_to_owners(of_all_texts, layout)
    if soft.of_images is not None and soft.of_texts is not None:
        with_scores = with_scores - soft.dot(images)
        of_images -= soft.of_images
        of_texts -= soft.of_texts
    share = gradient.to(scale.dtype) * len(layout.counts) / layout.total
    of_images *= share * scale
    of_texts *= share * scale
    return of_images.to(images.dtype), of_texts.to(images.dtype), share.double() * with_scores


def log_sums(
    images: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    scale: Tensor,
    layout: Layout,
    tiles: InTiles | None = None,
) -> LogSums:
    """Returns the log-sum-exps of s · images · all_textsᵀ over rows and columns. `scale` has the dtype to compute in."""
    dtype = scale.dtype
    bound = scale.double() * _longest(all_images) * _longest(all_texts)
    # A bound that is small enough needs no shift downwards; rounding may exceed it by a hair.
    shift = (bound * (1 + 1e-5) - _BELOW_OVERFLOW[dtype]).clamp_min(0.0)
    rows, columns, true, in_tiles = _shifted_sums(images, all_texts, scale, shift.to(dtype), layout.mine.start, tiles)
    all_true = torch.zeros_like(columns)
    all_true[layout.mine] = true
    shift = shift.to(dtype).double()
    # One message: sums over all ranks' images, true pairs, and whether a row has lost digits.
    too_small = torch.tensor(_ABOVE_UNDERFLOW[dtype], dtype=torch.float64, device=rows.device).exp()
    is_lost = (rows + (true - shift).exp() < too_small).any()
    merged = add_over_ranks(torch.cat([columns, all_true, is_lost.double()[None]]), layout)
    columns, all_true = merged[: layout.total], merged[layout.total : -1]
    if bool((merged[-1] > 0) | (columns + (all_true - shift).exp() < too_small).any()):  # alike on all ranks
        rows, columns = _running_sums(images, all_texts, scale, layout.mine.start)
        each_rank = Layout(layout.rank, (1,) * len(layout.counts))
        columns = torch.logsumexp(gather_rows(columns[None], each_rank), dim=0)
        return LogSums(rows, columns, all_true, None, in_tiles)
    return LogSums(rows.log() + shift, columns.log() + shift, all_true, shift, in_tiles)


def _shifted_sums(
    images: Tensor, all_texts: Tensor, scale: Tensor, shift: Tensor, first_pair: int, tiles: InTiles | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns Σ exp(z − c) over the others of rows and columns, the true pairs' z, and Σ W z of tiles: float64."""
    if (kernels := _kernels(images)) is not None:
        sums = kernels.shifted_sums(images, all_texts, scale, shift, first_pair)
        return *sums, _with_tiles(images, all_texts, scale, tiles)
    row_sums, column_sums = _empty_sums(images, all_texts, 0.0)
    true, in_tiles = torch.empty_like(row_sums), row_sums.new_zeros(())
    for rows, columns, block in logit_blocks(images, all_texts, scale):
        on_diagonal, places = true_in(block, rows, columns, first_pair)
        true[places] = on_diagonal.double()
        if tiles is not None:
            in_tiles += dot(tiles.block(rows, columns), block)
        block.sub_(shift).exp_()
        on_diagonal.zero_()
        row_sums[rows] += block.sum(1)
        column_sums[columns] += block.sum(0)
    return row_sums, column_sums, true, in_tiles


def _running_sums(images: Tensor, all_texts: Tensor, scale: Tensor, first_pair: int) -> tuple[Tensor, Tensor]:
    """Returns log Σ exp(z) over the others of rows and columns, float64."""
    if (kernels := _kernels(images)) is not None:
        return kernels.running_sums(images, all_texts, scale, first_pair)
    row_sums, column_sums = _empty_sums(images, all_texts, -torch.inf)
    for rows, columns, block in logit_blocks(images, all_texts, scale):
        true_in(block, rows, columns, first_pair)[0].fill_(-torch.inf)
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
    tiles: InTiles | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns M Y, Mᵀ X and Σ M_ij x_i·y_j, where M is P, the mean of both softmaxes, less tiles, with `diagonal` in it.

    `partners`: (N, D) all images, where M is to be rounded to their dtype; else None.
    """
    if (kernels := _kernels(images)) is not None:
        soft = None if tiles is None else tiles.block
        return kernels.products(
            images, all_texts, scale, rows_lse, columns_lse, shift, diagonal, first_pair, partners, soft
        )
    dtype = scale.dtype
    if shift is not None:  # exp(z − lse) = exp(z − c) · exp(c − lse)
        of_rows, of_columns = ((shift - lse).exp().to(dtype) / 2 for lse in (rows_lse, columns_lse))
        shift = shift.to(dtype)
    else:
        of_rows, of_columns = rows_lse.to(dtype), columns_lse.to(dtype)
    memory = scratch(len(images), len(all_texts), dtype, images.device)
    products = Products(images, all_texts, scale, first_pair, partners)
    for rows, columns, block in logit_blocks(images, all_texts, scale):
        other = memory[: block.shape[0], : block.shape[1]]
        logits = block.clone() if products.keeps_logits else None
        if shift is not None:
            torch.add(of_rows[rows, None], of_columns[columns], out=other)
            block.sub_(shift).exp_().mul_(other)
        else:
            torch.sub(block, of_columns[columns], out=other).exp_()
            block.sub_(of_rows[rows, None]).exp_().add_(other).mul_(0.5)
        if tiles is not None:
            block.sub_(tiles.block(rows, columns))
        on_diagonal, places = true_in(block, rows, columns, first_pair)
        on_diagonal.copy_(diagonal[places])
        products.add(rows, columns, block, logits)
    return products.finish()


def _kernels(features: Tensor) -> Any:
    """Returns the module of GPU kernels where it is for such features, else None: then blocks of PyTorch do the work."""
    if not features.is_cuda:
        return None
    kernels = import_module("pretrain.losses.kernels")  # needs Triton, which CPU builds of torch do not bring
    return kernels if kernels.fit(features) else None


def _with_tiles(images: Tensor, all_texts: Tensor, scale: Tensor, tiles: InTiles | None) -> Tensor:
    """Returns Σ W z of tiles, float64: one product more, which only targets in tiles cost."""
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    if tiles is not None:
        for rows, columns, block in logit_blocks(images, all_texts, scale):
            total += dot(tiles.block(rows, columns), block)
    return total


def _empty_sums(images: Tensor, all_texts: Tensor, value: float) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.full((len(x),), value, dtype=torch.float64, device=x.device) for x in (images, all_texts))
    return rows, columns


def _longest(features: Tensor) -> Tensor:
    """Returns the largest norm of (N, D) rows, float64."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return torch.linalg.vector_norm(features, dim=1, dtype=dtype).max().double()

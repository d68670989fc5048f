"""SoftCLIP in blocks: a symmetric divergence from soft targets, over all pairs and over the negatives alone.

    loss = 1/2N Σ over directions and rows of D(q, p) + λ D(q⁻, p⁻),  D(q, p) = ½ [KL(q ‖ p) + KL(p ‖ q)]

p is the softmax of the logits, q = (1 − β) of one-hot and β of softmax(IoU / τ); q⁻ and p⁻ are q and p without the own
pair, made to sum to 1 again. SoftCLIP (Gao et al. 2023, arXiv 2303.17561) states soft targets, negatives that are compared
apart, and the symmetric divergence; this is the variant that compares object tags, and its formula is our reconstruction.

Of p the own pair has p_d and the negatives v = 1 − p_d; of q it has q_d, and they u = 1 − q_d. By the chain rule

    2 [D(q, p) + λ D(q⁻, p⁻)] = (u − v) x + (v + λ) K + (u + λ) J,  x = logit p_d − logit q_d,
    K = KL(p⁻ ‖ q⁻) = Σ p⁻ r,  J = KL(q⁻ ‖ p⁻) = −Σ q⁻ r,  r = log p⁻ − log q⁻

So a row needs three numbers: the log-sum-exp over its negatives, K and J. Twice the derivative by a negative's logit is
p⁻ [a + (v + λ) r] − (u + λ) q⁻ with a = v (1 − p_d x − v K) + λ (1 − K); by the own pair's, u − v − v p_d (K − x).

Two passes over the blocks give that, a third the gradients; IoUs are made with each block (`tiles`). All is relative to
a row's own negatives, so nothing overflows at any scale, and a model that is nearly sure keeps its digits. Pairs with an
equal text ("mates") are negatives here, whose q is q_d. Letters as in `blockwise`. Images are rows, texts columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.losses.blocks import Products, blocks_of, logit_blocks, true_in
from pretrain.losses.blockwise import SoftPart, to_gradients
from pretrain.losses.exchange import Layout, add_over_ranks, gather_rows
from pretrain.losses.mates import find_mates
from pretrain.losses.operators import count_equal
from pretrain.losses.sets import BatchSets, collapse
from pretrain.losses.similarity import WEIGHTED_SLACK
from pretrain.losses.targets import LossConfig
from pretrain.losses.tiles import SetTiles, make_tiles
from pretrain.losses.weights import ObjectWeights

Pairs = tuple[Tensor, Tensor]
"""Rows and columns of some pairs in a block"""


@dataclass(frozen=True)
class Side:
    """q of one direction: (N,) logarithms, float64."""

    negatives: Tensor
    """log u"""
    true: Tensor
    """log q_d"""
    constant: Tensor
    """log q⁻ is (IoU − 1) / τ more than this"""
    of_mates: Tensor
    """... and of mates this more than that, their IoU being 1"""

    @staticmethod
    def of(log_others: Tensor, numbers: Tensor, beta: float) -> "Side":
        """Returns q from log Σ exp((IoU − 1) / τ) over all but the own pair, and how many pairs have the row's text."""
        soft = math.log(beta) - torch.nn.functional.softplus(log_others)
        hard = math.log(1 - beta) - numbers.log()  # of one-hot, each true pair
        negatives = torch.logaddexp(hard + (numbers - 1).log(), soft + log_others)
        true = torch.logaddexp(hard, soft)
        return Side(negatives, true, soft - negatives, true - soft)

    def at(self, pairs: slice) -> "Side":
        """Returns q of some rows."""
        return Side(self.negatives[pairs], self.true[pairs], self.constant[pairs], self.of_mates[pairs])


@dataclass(frozen=True)
class SoftClipTargets:
    """The targets of a batch over all ranks, and what is to be said of them."""

    images: Side
    texts: Side
    tiles: SetTiles
    temperature: float
    """τ"""
    negatives_weight: float
    """λ"""
    true_pair_mass: float
    """Mean target on true pairs, over rows"""
    similar_pairs: float
    """Share of other pairs of an image and a text with IoU ≥ 1/2: false negatives of a hard loss"""
    equal_pairs: float
    """Share of those with equal objects"""
    entropy: float = 0.0
    """The floor of the loss: a divergence may be 0"""


def make_softclip_targets(
    sets: BatchSets, config: LossConfig, layout: Layout, weights: ObjectWeights | None, dtype: torch.dtype
) -> SoftClipTargets:
    """Returns the targets of all ranks' sets. No gradient, no features needed. Collective.

    `dtype`: that of the logits. Raises ValueError where weights are wanted and not given.
    """
    if config.weights == "frequency" and weights is None:
        raise ValueError("weights 'frequency' needs the weights of objects")
    size, device = len(sets), sets.image_objects.device
    classes = collapse(sets.image_objects, sets.text_objects)
    mates = find_mates(sets.text_ids if config.equal_texts == "positives" else None, size, device)
    tiles = make_tiles(classes, mates, weights if config.weights == "frequency" else None, layout, dtype)

    sums, similar = _LogSums(layout, device), torch.zeros((), dtype=torch.int64, device=device)
    for rows, columns in blocks_of(layout.counts[layout.rank], size, device):
        iou = tiles.iou(rows, columns)
        similar += (iou >= 0.5 * (1 - WEIGHTED_SLACK)).sum()
        sums.add(rows, columns, _exponents(iou, _mates_in(tiles, rows, columns), config.temperature))
    of_images, of_texts = sums.finish()
    numbers = mates.numbers.double()
    images, texts = (Side.of(x, numbers, config.beta) for x in (gather_rows(of_images, layout), of_texts))
    others = max(1, size * size - int(mates.numbers.sum()))
    return SoftClipTargets(
        images,
        texts,
        tiles,
        config.temperature,
        config.negatives_weight,
        float((numbers * (images.true.exp() + texts.true.exp())).mean() / 2),
        float(add_over_ranks(similar, layout)) / others,
        float(count_equal(classes, mates)) / others,
    )


def softclip_loss(images: Tensor, texts: Tensor, scale: Tensor, targets: SoftClipTargets, layout: Layout) -> Tensor:
    """Returns this rank's share of the loss; the mean over ranks is the loss over all N pairs.

    `images`, `texts`: (B, D) in float32, float64 or bfloat16. `scale`: s, one number. As `blockwise_loss` in all else.
    """
    if layout.total == 1:  # no negatives: p and q are 1
        return (0 * (images.sum() + texts.sum() + scale.sum())).to(torch.promote_types(images.dtype, torch.float32))
    return cast(Tensor, _Loss.apply(images, texts, scale, targets, layout))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, targets: SoftClipTargets, layout: Layout
    ) -> Tensor:
        dtype = torch.promote_types(images.dtype, torch.float32)
        if targets.tiles.image_hot.dtype != dtype:
            raise ValueError(f"targets were prepared for {targets.tiles.image_hot.dtype}, the logits are {dtype}")
        factor = scale.detach().reshape(()).to(dtype)
        all_texts, mine = gather_rows(texts, layout), layout.mine
        true = factor.double() * torch.linalg.vecdot(images.detach().to(dtype), texts.detach().to(dtype)).double()
        sums = _LogSums(layout, images.device)
        for rows, columns, block in logit_blocks(images.detach(), all_texts, factor):
            sums.add(rows, columns, block)
        row_negatives, column_negatives = sums.finish()
        of_rows, of_columns = _divergences(images.detach(), all_texts, factor, targets, row_negatives, column_negatives)
        image_rows = _Rows.of(targets.images.at(mine), true, row_negatives, of_rows, targets.negatives_weight)
        text_rows = _Rows.of(
            targets.texts,
            gather_rows(true, layout),
            column_negatives,
            add_over_ranks(of_columns, layout),
            targets.negatives_weight,
        )
        ctx.save_for_backward(
            images,
            all_texts,
            factor,
            image_rows.factors.to(dtype),
            text_rows.factors.to(dtype),
            (image_rows.own + text_rows.own[mine]).to(dtype),
            gather_rows(images, layout) if images.dtype == torch.bfloat16 else None,
        )
        ctx.targets, ctx.layout, ctx.scale_dtype, ctx.scale_shape = targets, layout, scale.dtype, scale.shape
        loss = (image_rows.loss + text_rows.loss[mine]).sum()
        return (len(layout.counts) / layout.total * loss).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, all_texts, factor, image_factors, text_factors, own, partners = ctx.saved_tensors
        layout: Layout = ctx.layout
        products = Products(images, all_texts, factor, layout.mine.start, partners)
        for rows, columns, logits, exponents, mates in _blocks(images, all_texts, factor, ctx.targets):
            block = torch.zeros_like(logits)
            for factors in (image_factors[:, rows, None], text_factors[:, None, columns]):
                level, constant, of_mates, of_p, of_p_r, of_q = factors
                p, q, r = _compare(logits, exponents, mates, level, constant, of_mates)
                block.add_(r.mul_(of_p_r).add_(of_p).mul_(p)).sub_(q.mul_(of_q))
            on_diagonal, places = true_in(block, rows, columns, layout.mine.start)
            on_diagonal.copy_(own[places])
            products.add(rows, columns, block, logits)
        d_images, d_texts, d_scale = to_gradients(
            *products.finish(), images, factor, gradients[0], SoftPart(None, None), layout
        )
        return d_images, d_texts, d_scale.to(ctx.scale_dtype).reshape(ctx.scale_shape), None, None


@dataclass(frozen=True)
class _Rows:
    """What is known of one direction's rows before gradients are made. (K,) float64."""

    loss: Tensor
    """What each adds to N · loss"""
    own: Tensor
    """The derivative of N · loss by its own pair's logit"""
    factors: Tensor
    """(6, K): the log-sum-exp of the negatives' logits, the side's `constant` and `of_mates`; and what p⁻, p⁻ r and q⁻
    are multiplied by in the derivatives by negatives' logits"""

    @staticmethod
    def of(side: Side, true: Tensor, level: Tensor, divergences: Tensor, weight: float) -> "_Rows":
        """Returns them from the own pairs' logits, the negatives' log-sum-exps, (2, K) K and J, and λ."""
        (k, j), u = divergences, side.negatives.exp()
        v, p_own = torch.sigmoid(level - true), torch.sigmoid(true - level)
        x = true - level - side.true + side.negatives
        loss = (u - v) * x + (v + weight) * k + (u + weight) * j
        own = u - v - v * p_own * (k - x)
        of_p = v * (1 - p_own * x - v * k) + weight * (1 - k)
        factors = torch.stack([level, side.constant, side.of_mates, of_p / 4, (v + weight) / 4, (u + weight) / 4])
        return _Rows(loss / 4, own / 4, factors)


class _LogSums:
    """Log-sum-exps of blocks over rows and columns, without the own pairs."""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        self.rows, self.columns = (
            torch.full((size,), -torch.inf, dtype=torch.float64, device=device)
            for size in (layout.counts[layout.rank], layout.total)
        )

    def add(self, rows: slice, columns: slice, block: Tensor) -> None:
        """Adds a block, whose own pairs are overwritten."""
        true_in(block, rows, columns, self.layout.mine.start)[0].fill_(-torch.inf)
        self.rows[rows] = torch.logaddexp(self.rows[rows], block.logsumexp(1).double())
        self.columns[columns] = torch.logaddexp(self.columns[columns], block.logsumexp(0).double())

    def finish(self) -> tuple[Tensor, Tensor]:
        """Returns (B,) of this rank's rows, and (N,) of columns over all ranks' rows. Collective."""
        each_rank = Layout(self.layout.rank, (1,) * len(self.layout.counts))
        return self.rows, gather_rows(self.columns[None], each_rank).logsumexp(0)


def _divergences(
    images: Tensor,
    all_texts: Tensor,
    scale: Tensor,
    targets: SoftClipTargets,
    row_levels: Tensor,
    column_levels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns (2, B) K and J of this rank's rows, and (2, N) what these rows add to those of columns. float64."""
    of_rows, of_columns = (torch.zeros(2, len(x), dtype=torch.float64, device=x.device) for x in (images, all_texts))
    mine = slice(targets.tiles.first_pair, targets.tiles.first_pair + len(images))
    row_factors, column_factors = (
        torch.stack([level, side.constant, side.of_mates]).to(scale.dtype)
        for level, side in ((row_levels, targets.images.at(mine)), (column_levels, targets.texts))
    )
    for rows, columns, logits, exponents, mates in _blocks(images, all_texts, scale, targets):
        for factors, found, along in (
            (row_factors[:, rows, None], of_rows[:, rows], 1),
            (column_factors[:, None, columns], of_columns[:, columns], 0),
        ):
            p, q, r = _compare(logits, exponents, mates, *factors)
            for block in (p, q):
                true_in(block, rows, columns, mine.start)[0].zero_()
            # Σ p⁻ = Σ q⁻ = 1. With their difference in each term, rounding of a row's constants is felt in second order.
            difference = q - p
            found[0] += p.mul_(r).add_(difference).sum(along)
            found[1] -= q.mul_(r).add_(difference).sum(along)
    return of_rows, of_columns


def _blocks(
    images: Tensor, all_texts: Tensor, scale: Tensor, targets: SoftClipTargets
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Pairs]]:
    """Yields (rows, columns, (R, C) logits, (R, C) exponents of q, places of mates) of each block."""
    for rows, columns, logits in logit_blocks(images, all_texts, scale):
        mates = _mates_in(targets.tiles, rows, columns)
        yield rows, columns, logits, _exponents(targets.tiles.iou(rows, columns), mates, targets.temperature), mates


def _compare(
    logits: Tensor, exponents: Tensor, mates: Pairs, level: Tensor, constant: Tensor, of_mates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns p⁻, q⁻ and r of a block in one direction, newly made; what they hold at own pairs means nothing.

    `level`, `constant`, `of_mates`: (R, 1) or (1, C), the first of `_Rows.factors`.
    """
    log_p, log_q = logits - level, exponents + constant
    log_q[mates] += of_mates.expand_as(log_q)[mates]
    r = log_p - log_q
    return log_p.exp_(), log_q.exp_(), r


def _exponents(iou: Tensor, mates: Pairs, temperature: float) -> Tensor:
    """Returns (IoU − 1) / τ in place, 0 for mates."""
    iou.sub_(1).div_(temperature)
    iou[mates] = 0
    return iou


def _mates_in(tiles: SetTiles, rows: slice, columns: slice) -> Pairs:
    places, width = tiles.true.within(rows, columns, len(tiles.text_hot)), columns.stop - columns.start
    return places // width, places % width

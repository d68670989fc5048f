"""psd: the model's own predictions as soft targets, for more and more of the pairs (CLIP-PSD).

A share of the pairs, drawn anew in each step, keeps one-hot targets. The others get what the model predicts in the other
direction, without gradient, at a temperature τ_t:

    Q^I_i = softmax_j(x_j·y_i / τ_t),  Q^T_j = softmax_i(x_j·y_i / τ_t)

Andonian et al. 2022 (arXiv 2204.04588) state progressive self-distillation with directions swapped; the numbers are our
reconstruction. Both are exp(x_j·y_i / τ_t) times a factor of a row or a column, so a block of W is one more product, of
this rank's texts and all images, made with each block of logits: Q is no more stored than the logits are.
Letters: B pairs on this rank, N over all ranks, D width; R × C a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain.losses.blocks import logit_blocks, multiply, true_in
from pretrain.losses.exchange import Layout, add_over_ranks, gather_rows
from pretrain.losses.operators import Targets
from pretrain.losses.ragged import SparseMatrix
from pretrain.losses.targets import LossConfig
from pretrain.losses.tiles import Places


@dataclass(frozen=True)
class TeacherTiles:
    """What pairs without one-hot targets give to others, of both directions, block by block: as `tiles.SoftTiles`."""

    texts: Tensor
    """(B, D) this rank's: what they predict is what its images are to learn"""
    all_images: Tensor
    """(N, D)"""
    temperature: float
    image_shares: Tensor
    """(B,) half of what each image gives per exp(x_j·y_i / τ_t); 0 where its targets are one-hot"""
    text_shares: Tensor
    """(N,)"""
    first_pair: int
    """The text of this rank's first image"""

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks."""
        return self.image_shares.dtype

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Returns (R, C) of W, newly made: 0 for own pairs."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        block = torch.empty(shape, dtype=self.dtype, device=self.texts.device)
        multiply(self.texts[rows], self.all_images[columns].T, block)
        block.mul_(1 / self.temperature).exp_()
        true_in(block, rows, columns, self.first_pair)[0].zero_()
        return block.mul_(torch.add(self.image_shares[rows, None], self.text_shares[columns]))


def hard_share_at(progress: float, hard_share: tuple[float, float]) -> float:
    """Returns the share of pairs with one-hot targets after a share `progress` of the run: a cosine from first to last."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1], found {progress}")
    first, last = hard_share
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def draw_hard(counts: Sequence[int], share: float, seed: int) -> Tensor:
    """Returns (N,) bool on the CPU, in rank order: true for round(share · N) pairs of ranks that hold `counts` of them.

    Ranks take the pairs of a batch in turn. Numbered as they come in the data, the same pairs are drawn for any number of
    ranks.
    """
    size = sum(counts)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: round(share * size)]
    is_hard = torch.zeros(size, dtype=torch.bool).index_fill_(0, drawn, True)
    turns = torch.cat([torch.arange(count) * len(counts) + rank for rank, count in enumerate(counts)])
    return is_hard[turns.argsort().argsort()]


def distil(
    targets: Targets,
    images: Tensor,
    texts: Tensor,
    config: LossConfig,
    layout: Layout,
    is_hard: Tensor,
) -> Targets:
    """Returns the targets of a step from the one-hot ones that `make_targets` returned. No gradient. Collective.

    `images`, `texts`: (B, D) of unit norm, those of the loss. `is_hard`: (N,) bool on the CPU, the same on all ranks: which
    pairs keep one-hot targets (`draw_hard`).
    """
    if bool(is_hard.all()):
        return targets
    hard = is_hard.to(images.device, torch.float64)
    dtype = torch.promote_types(images.dtype, torch.float32)
    all_images, texts = gather_rows(images, layout), texts.detach()
    found = _predict(texts, all_images, config.teacher_temperature, targets.mates, layout, dtype)

    def mixed(one_hot: Tensor | float, predicted: Tensor) -> Tensor:
        return hard * one_hot + (1 - hard) * predicted.mean(0)

    shares = (1 - hard) / 2 / found.sums
    mates = None
    if targets.mates is not None:
        mates = _scaled(targets.mates[0], hard), _scaled(targets.mates[1], hard)
    return replace(
        targets,
        diagonal=mixed(targets.diagonal, found.own),
        tiles=TeacherTiles(
            texts,
            all_images,
            config.teacher_temperature,
            shares[0, layout.mine].to(dtype),
            shares[1].to(dtype),
            layout.mine.start,
        ),
        mates=mates,
        entropy=float(mixed(-targets.diagonal.log(), found.entropy).mean()),
        true_pair_mass=float(mixed(1.0, found.own + found.of_mates).mean()),
    )


@dataclass(frozen=True)
class _Predictions:
    """What is known of both directions' predictions, (2, N) float64 each: of images' targets, then of texts'."""

    sums: Tensor
    """Σ exp(x_j·y_i / τ_t)"""
    own: Tensor
    """Probability of the own pair"""
    of_mates: Tensor
    """Of other pairs with an equal text"""
    entropy: Tensor
    """In nats"""


def _predict(
    texts: Tensor,
    all_images: Tensor,
    temperature: float,
    mates: tuple[SparseMatrix, SparseMatrix] | None,
    layout: Layout,
    dtype: torch.dtype,
) -> _Predictions:
    """One pass over the blocks. |x·y| / τ_t ≤ 50, whose exp neither overflows nor underflows in fp32: no shift is needed."""
    mine, device = layout.mine, texts.device
    # Sums of exp, of exp · x·y / τ_t, and of exp over mates: of this rank's rows, and what they add to all columns'. Own
    # pairs are added in float64: in fp32, 1 less the probability of an own pair that is nearly sure would be lost.
    found = torch.zeros(2, 3, layout.total, dtype=torch.float64, device=device)
    of_rows, of_columns = found[0, :, mine], found[1]
    true = torch.zeros(layout.total, dtype=torch.float64, device=device)
    places = _places(mates[0], layout) if mates is not None else None
    for rows, columns, block in logit_blocks(
        texts, all_images, torch.tensor(1 / temperature, dtype=dtype, device=device)
    ):
        on_diagonal, pairs = true_in(block, rows, columns, mine.start)
        true[mine][pairs] = on_diagonal.double()
        powers = block.exp()
        true_in(powers, rows, columns, mine.start)[0].zero_()
        block.mul_(powers)
        for number, part in enumerate((powers, block)):
            of_rows[number, rows] += part.sum(1)
            of_columns[number, columns] += part.sum(0)
        if places is not None:
            inside, width = places.within(rows, columns, layout.total), powers.shape[1]
            values = powers.view(-1)[inside].double()
            of_rows[2, rows].index_add_(0, inside // width, values)
            of_columns[2, columns].index_add_(0, inside % width, values)
    merged = add_over_ranks(torch.cat([found.view(6, -1), true[None]]), layout)
    (sums, weighted, at_mates), true = merged[:6].view(2, 3, -1).transpose(0, 1), merged[6]
    sums, weighted = sums + true.exp(), weighted + true.exp() * true
    return _Predictions(sums, true.exp() / sums, at_mates / sums, sums.log() - weighted / sums)


def _places(mates: SparseMatrix, layout: Layout) -> Places:
    """Returns which of this rank's pairs of an image and a text are mates, by block."""
    rows = _rows_of(mates)
    is_mine = (rows >= layout.mine.start) & (rows < layout.mine.stop)
    count = layout.counts[layout.rank]
    return Places.of(rows[is_mine] - layout.mine.start, mates.columns[is_mine], count, layout.total)


def _scaled(mates: SparseMatrix, hard: Tensor) -> SparseMatrix:
    """Returns what pairs with equal texts get of rows and columns with one-hot targets alone."""
    assert mates.values is not None
    return replace(mates, values=mates.values * (hard[_rows_of(mates)] + hard[mates.columns]) / 2)


def _rows_of(matrix: SparseMatrix) -> Tensor:
    rows = torch.arange(len(matrix.offsets) - 1, device=matrix.offsets.device)
    return torch.repeat_interleave(rows, matrix.offsets.diff())

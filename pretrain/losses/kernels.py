"""The blockwise loss on GPUs: what `blockwise` does in blocks of PyTorch, by Triton kernels, with the same results.

`shifted_sums` and `running_sums` make both directions' log-sum-exps in one pass, without logits in memory. `products`
makes what the gradients are made of, in one of three ways (`BACKWARD`):

- "chunked": the library's product makes a block of logits in fp32, a kernel makes M of it, two more products follow;
- "made": one kernel multiplies and makes M, which is all that is written of a block; two products of the library;
- "fused": a kernel for each gradient makes M and keeps it on the chip: M is never in memory.

In units of 2 N² D operations: sums 1, backward 3, 3 and 4.

All is deterministic: a program writes its sums to places of its own, and these are added up in float64. Memory beside
the results is bounded, by `PARTIAL_SUMS` and a block of `blocks.SHAPES`. Nothing waits for the device. bf16 is multiplied
by matrix units and summed in fp32; fp32 is multiplied in fp32 proper, "chunked" as torch is told to.

Imported by `blockwise` when features lie on a GPU: importing it needs Triton. Letters: B images of this rank, N texts of
all ranks, D width (a multiple of 16, up to 1,024); R × C a block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.losses.blocks import add_product, blocks_of, multiply, scratch
from setclip.errors import InputError

try:
    import triton

    from pretrain.losses.triton_kernels import block_kernel, fused_kernel, sums_kernel
except ImportError as error:
    raise InputError(
        "expected Triton, which makes the loss on a GPU and comes with CUDA builds of torch on Linux, but found none "
        f"({error}); install it: pip install triton"
    ) from error

Way = Literal["chunked", "made", "fused"]

BACKWARD: Way = "made"
"""Which way `products` takes. By count "fused" does 4 units in place of 3, and "chunked" moves 14 bytes a logit through
memory where "made" moves 6. `benchmarks.loss_gpu` times them."""

PARTIAL_SUMS = 2**24
"""Sums of blocks that are held at a time: 64 MiB."""


@dataclass(frozen=True)
class Shape:
    """What one program makes, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    """Columns of features that are multiplied at a time"""
    warps: int
    stages: int
    """Loads under way at a time"""


# "hopper" is bf16 from compute capability 9.0 on; "bf16" earlier, within 99 KiB of shared memory. What is compiled has no
# or few registers in memory; on an H200 none of these is measured yet (benchmarks.loss_gpu --tune).
PRODUCT = {"hopper": Shape(128, 256, 64, 8, 3), "bf16": Shape(128, 128, 64, 8, 3), "fp32": Shape(64, 64, 32, 4, 2)}
"""Of a block of logits that is summed"""
MADE = {"hopper": Shape(128, 128, 64, 8, 3), "bf16": Shape(128, 128, 64, 8, 3), "fp32": Shape(64, 64, 32, 4, 2)}
"""Of a block of M"""
ELEMENTWISE = {kind: Shape(64, 128, 16, 8, 1) for kind in PRODUCT}
"""Of a block of M that is made of products"""
FUSED = {"hopper": Shape(64, 64, 64, 8, 2), "bf16": Shape(64, 32, 64, 8, 2), "fp32": Shape(32, 32, 32, 4, 1)}
SHARE = {"hopper": 512, "bf16": 256, "fp32": 64}
"""Columns of a gradient that one program of "fused" makes: what its registers hold"""


def fit(features: Tensor) -> bool:
    """Whether these kernels are for such (B, D) features: on a GPU, in bf16 or fp32, and of a width that they take."""
    return features.is_cuda and features.dtype in (torch.bfloat16, torch.float32) and _takes(features.shape[1])


def shifted_sums(
    images: Tensor, all_texts: Tensor, scale: Tensor, shift: Tensor, first_pair: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Σ exp(z − c) over the other pairs of each row, (B,), and of each column, (N,), and true pairs' z, (B,).

    All float64. z = s x_i·y_j. `images`: (B, D), `all_texts`: (N, D), both bf16 or fp32. `scale`, `shift`: s and c, one
    fp32 number each on the same device; no z may exceed c + 70. `first_pair`: the column of row 0's true pair.
    """
    return _sums(images, all_texts, scale, shift, first_pair)


def running_sums(images: Tensor, all_texts: Tensor, scale: Tensor, first_pair: int) -> tuple[Tensor, Tensor]:
    """Returns log Σ exp(z) over the other pairs of each row, (B,), and of each column, (N,). float64.

    For the rare batch that one shift does not suit: each block has a maximum of its own in each row and column. Takes
    what `shifted_sums` takes.
    """
    rows, columns, _ = _sums(images, all_texts, scale, None, first_pair)
    return rows, columns


def products(
    images: Tensor,
    all_texts: Tensor,
    scale: Tensor,
    rows_lse: Tensor,
    columns_lse: Tensor,
    shift: Tensor | None,
    diagonal: Tensor,
    first_pair: int,
    partners: Tensor | None,
    soft: Callable[[slice, slice], Tensor] | None = None,
    way: Way | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns M Y, (B, D) fp32; Mᵀ X, (N, D) fp32; and Σ M_ij x_i·y_j, float64.

    M is P, the mean of both softmaxes, less `soft`, with `diagonal` at true pairs. `rows_lse`, `columns_lse`: (B,) and
    (N,) float64 log-sum-exps with the true pairs. `shift`: what they were made with; None: a running maximum.
    `diagonal`: (B,) fp32. `partners`: (N, D) all images where features are bf16, else None: M is then rounded for its
    products, and what that took from a row (column) is given back at its own text (image). `soft`: from rows and
    columns of a block, one of `blocks_of`, to (R, C) fp32. `way`: in place of `BACKWARD`; "fused" has no blocks, so
    with `soft` it is "made".
    """
    _check(images, all_texts)
    way = way or BACKWARD
    dtype = scale.dtype
    if shift is not None:  # exp(z − lse) = exp(z − c) · exp(c − lse)
        of_rows, of_columns = (((shift - lse).exp() / 2).to(dtype) for lse in (rows_lse, columns_lse))
        shift = shift.to(dtype)
    else:
        of_rows, of_columns = rows_lse.to(dtype), columns_lse.to(dtype)
    images, all_texts = images.contiguous(), all_texts.contiguous()
    problem = _Problem(
        images, all_texts, scale, shift, first_pair, of_rows, of_columns, diagonal.to(dtype), partners is not None
    )
    made = _make_fused(problem) if way == "fused" and soft is None else _make_by_blocks(problem, soft, way == "chunked")
    if partners is not None:
        made.d_images.addcmul_(made.lost_rows[:, None], all_texts[first_pair : first_pair + len(images)])
        made.d_texts.addcmul_(made.lost_columns[:, None], partners)
    return made.d_images, made.d_texts, made.with_products


@dataclass(frozen=True)
class _Problem:
    """What every way of `products` takes."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    shift: Tensor | None
    first_pair: int
    of_rows: Tensor
    """exp(c − lse) / 2 of each row, or lse where there is no shift"""
    of_columns: Tensor
    diagonal: Tensor
    is_rounded: bool

    @property
    def scalars(self) -> dict[str, Tensor]:
        """s and c as kernels take them. Where there is no c, what is given is read, but not used."""
        return {"scale": self.scale, "shift": self.scale if self.shift is None else self.shift}


@dataclass(frozen=True)
class _Made:
    """What every way makes."""

    d_images: Tensor
    d_texts: Tensor
    with_products: Tensor
    lost_rows: Tensor
    """What rounding took from each row"""
    lost_columns: Tensor


def _sums(
    images: Tensor, all_texts: Tensor, scale: Tensor, shift: Tensor | None, first_pair: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes as many rows at a time as `PARTIAL_SUMS` has room for. `shift` None: logarithms of sums."""
    _check(images, all_texts)
    images, all_texts = images.contiguous(), all_texts.contiguous()
    num_rows, num_columns, device = len(images), len(all_texts), images.device
    shape = PRODUCT[_kind(images)]
    column_blocks = triton.cdiv(num_columns, shape.columns)
    row_blocks = max(1, PARTIAL_SUMS // (num_columns + column_blocks * shape.rows))
    rows_at_once = min(row_blocks * shape.rows, num_rows)

    row_sums = torch.empty(num_rows, dtype=torch.float64, device=device)
    column_sums = torch.full((num_columns,), -torch.inf if shift is None else 0.0, dtype=torch.float64, device=device)
    true = torch.empty(num_rows, dtype=torch.float32, device=device)
    memory_of_rows = true.new_empty(column_blocks * rows_at_once)
    memory_of_columns = true.new_empty(triton.cdiv(rows_at_once, shape.rows) * num_columns)
    for first in range(0, num_rows, max(rows_at_once, 1)):
        rows = slice(first, min(first + rows_at_once, num_rows))
        count = rows.stop - first
        row_blocks = triton.cdiv(count, shape.rows)
        of_rows = memory_of_rows[: column_blocks * count].view(column_blocks, count)
        of_columns = memory_of_columns[: row_blocks * num_columns].view(row_blocks, num_columns)
        _launch(
            sums_kernel,
            (row_blocks, column_blocks),
            shape,
            images=images[rows],
            texts=all_texts,
            scale=scale,
            shift=scale if shift is None else shift,
            row_sums=of_rows,
            column_sums=of_columns,
            true=true[rows],
            num_rows=count,
            num_columns=num_columns,
            first_true=first_pair + first,
            RUNNING=shift is None,
            WIDTH=images.shape[1],
        )
        if shift is None:
            row_sums[rows] = of_rows.double().logsumexp(0)
            column_sums = torch.logaddexp(column_sums, of_columns.double().logsumexp(0))
        else:
            row_sums[rows] = of_rows.sum(0, dtype=torch.float64)
            column_sums += of_columns.sum(0, dtype=torch.float64)
    return row_sums, column_sums, true.double()


def _make_by_blocks(problem: _Problem, soft: Callable[[slice, slice], Tensor] | None, is_chunked: bool) -> _Made:
    """M block by block: "chunked", or else "made"."""
    images, texts, dtype, device = problem.images, problem.texts, problem.scale.dtype, problem.images.device
    num_rows, num_columns, is_rounded = len(images), len(texts), problem.is_rounded
    shape = (ELEMENTWISE if is_chunked else MADE)[_kind(images)]
    memory = scratch(num_rows, num_columns, images.dtype if is_rounded else dtype, device)
    memory_of_products = scratch(num_rows, num_columns, dtype, device) if is_chunked and is_rounded else memory

    d_images, d_texts = (torch.zeros(x.shape, dtype=dtype, device=device) for x in (images, texts))
    # Block after block, the program of a place adds to what is its own: nothing need be added up in between.
    row_blocks, column_blocks = triton.cdiv(memory.shape[0], shape.rows), triton.cdiv(memory.shape[1], shape.columns)
    with_products = torch.zeros(row_blocks * column_blocks, dtype=torch.float64, device=device)
    lost_rows = d_images.new_zeros(column_blocks if is_rounded else 0, num_rows)
    lost_columns = d_images.new_zeros(row_blocks if is_rounded else 0, num_columns)
    for rows, columns in blocks_of(num_rows, num_columns, device):
        place = slice(0, rows.stop - rows.start), slice(0, columns.stop - columns.start)
        block, inner_products = memory[place], memory_of_products[place]
        if is_chunked:
            multiply(images[rows], texts[columns].T, inner_products)
        subtracted = inner_products if soft is None else soft(rows, columns).contiguous()
        _launch(
            block_kernel,
            (triton.cdiv(block.shape[0], shape.rows), triton.cdiv(block.shape[1], shape.columns)),
            shape,
            images=images[rows],
            texts=texts[columns],
            products=inner_products,
            soft=subtracted,
            out=block,
            of_rows=problem.of_rows[rows],
            of_columns=problem.of_columns[columns],
            diagonal=problem.diagonal[rows],
            **problem.scalars,
            lost_rows=lost_rows[:, rows],
            lost_columns=lost_columns[:, columns],
            with_products=with_products,
            num_rows=block.shape[0],
            num_columns=block.shape[1],
            first_true=problem.first_pair + rows.start - columns.start,
            products_stride=inner_products.stride(0),
            soft_stride=subtracted.stride(0),
            out_stride=block.stride(0),
            lost_rows_stride=num_rows,
            lost_columns_stride=num_columns,
            GIVEN=is_chunked,
            SOFT=soft is not None,
            SHIFTED=problem.shift is not None,
            ROUNDED=is_rounded,
            WIDTH=images.shape[1],
        )
        add_product(d_images[rows], block, texts[columns])
        add_product(d_texts[columns], block.T, images[rows])
    return _Made(d_images, d_texts, with_products.sum(), lost_rows.sum(0), lost_columns.sum(0))


def _make_fused(problem: _Problem) -> _Made:
    """M Y; and Mᵀ X, which is the same with rows and columns exchanged."""
    images, texts, first_pair = problem.images, problem.texts, problem.first_pair
    of_texts = problem.diagonal.new_zeros(len(texts))
    of_texts[first_pair : first_pair + len(images)] = problem.diagonal
    d_images, lost_rows, with_products = _make_side(
        problem, images, texts, problem.of_rows, problem.of_columns, problem.diagonal, first_pair
    )
    d_texts, lost_columns, _ = _make_side(
        problem, texts, images, problem.of_columns, problem.of_rows, of_texts, -first_pair
    )
    return _Made(d_images, d_texts, with_products, lost_rows, lost_columns)


def _make_side(
    problem: _Problem, own: Tensor, others: Tensor, of_own: Tensor, of_others: Tensor, diagonal: Tensor, first_true: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns M · others, what rounding took from each row of M, and Σ M_ij x_i·y_j."""
    kind, width = _kind(own), own.shape[1]
    shape, share = FUSED[kind], min(SHARE[kind], triton.next_power_of_2(width))
    d_own = torch.empty(own.shape, dtype=problem.scale.dtype, device=own.device)
    lost = d_own.new_empty(len(own))
    blocks = triton.cdiv(len(own), shape.rows)
    with_products = torch.zeros(blocks, dtype=torch.float64, device=own.device)
    _launch(
        fused_kernel,
        (blocks, triton.cdiv(width, share)),
        shape,
        own=own,
        others=others,
        d_own=d_own,
        of_own=of_own,
        of_others=of_others,
        diagonal=diagonal,
        **problem.scalars,
        lost=lost,
        with_products=with_products,
        num_own=len(own),
        num_others=len(others),
        first_true=first_true,
        SHIFTED=problem.shift is not None,
        WIDTH=width,
        SHARE=share,
    )
    return d_own, lost, with_products.sum()


def _takes(width: int) -> bool:
    return width % 16 == 0 and 0 < width <= 1024


def _check(images: Tensor, all_texts: Tensor) -> None:
    """What only a bug of ours can break: `fit` decides beforehand."""
    assert images.dtype == all_texts.dtype, f"{images.dtype}, {all_texts.dtype}"
    assert images.dtype in (torch.bfloat16, torch.float32), images.dtype
    assert images.shape[1] == all_texts.shape[1], f"{images.shape}, {all_texts.shape}"
    assert _takes(images.shape[1]), images.shape


def _kind(features: Tensor) -> str:
    """Returns which entry of the shapes serves these features."""
    if features.dtype == torch.float32:
        return "fp32"
    is_early = features.is_cuda and torch.cuda.get_device_capability(features.device) < (9, 0)
    return "bf16" if is_early else "hopper"


def _launch(kernel: Any, grid: tuple[int, int], shape: Shape, **arguments: Any) -> None:
    """Starts a program for each place of the grid."""
    if grid[0] * grid[1] == 0:
        return
    # No deeper than the features are wide.
    shape = replace(shape, depth=min(shape.depth, triton.next_power_of_2(arguments["WIDTH"])))
    kernel[grid](
        **arguments,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        DEPTH=shape.depth,
        num_warps=shape.warps,
        num_stages=shape.stages,
        enable_fp_fusion=True,  # said, because Triton 3.9 warns that its default will change
    )

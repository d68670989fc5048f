"""The device code of `kernels`, in Triton. Letters: B images, N texts, D width.

Row i's true pair is column i + `first_true`. Places beyond the last row or column are read as the last, and left out of
what is written. Only sizes that are the same in every step are compiled in.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _dot(left, right, total):
    """Adds left · right. Triton's interpreter (3.9) multiplies the bits of bf16 as whole numbers: there in fp32."""
    if _INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _round_to(value, dtype: tl.constexpr):
    """Rounds fp32 to nearest even. Triton's interpreter (3.9) cuts bf16 off: there the bits are rounded first."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _product(
    left, right, rows, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """x_i · y_j, (ROWS, COLUMNS) fp32, of rows of `left` and `right` that exist."""
    depth = tl.arange(0, DEPTH)
    left += rows.to(tl.int64)[:, None] * WIDTH + depth[None, :]
    right += columns.to(tl.int64)[None, :] * WIDTH + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, WIDTH, DEPTH):
        if WIDTH % DEPTH == 0:
            x = tl.load(left + first)
            y = tl.load(right + first)
        else:
            x = tl.load(left + first, mask=(depth < WIDTH - first)[None, :], other=0.0)
            y = tl.load(right + first, mask=(depth < WIDTH - first)[:, None], other=0.0)
        total = _dot(x, y, total)
    return total


@triton.jit
def _mean_probabilities(product, scale, shift, of_rows, of_columns, SHIFTED: tl.constexpr):
    """P, the mean of the softmaxes over rows and columns: from exp(c − lse) / 2 where SHIFTED, else from lse."""
    logits = product * scale
    if SHIFTED:
        return tl.exp(logits - shift) * (of_rows[:, None] + of_columns[None, :])
    return (tl.exp(logits - of_rows[:, None]) + tl.exp(logits - of_columns[None, :])) * 0.5


@triton.jit
def _needs_mask(row_block, column_block, num_rows, num_columns, first_true, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a block holds a true pair, and whether it is cut off; most are neither, and need no mask."""
    lowest = row_block * ROWS + first_true
    has_true = (lowest < (column_block + 1) * COLUMNS) & (lowest + ROWS > column_block * COLUMNS)
    is_cut = ((row_block + 1) * ROWS > num_rows) | ((column_block + 1) * COLUMNS > num_columns)
    return has_true, is_cut


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first_true"])
def sums_kernel(
    images,
    texts,
    scale,
    shift,
    row_sums,
    column_sums,
    true,
    num_rows,
    num_columns,
    first_true,
    RUNNING: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One block's sums over rows, to (column blocks, num_rows), and over columns, to (row blocks, num_columns).

    Of exp(z − c); where RUNNING their logarithms, of exp(z). True pairs are left out, and their z written.
    """
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < num_columns
    real_rows, real_columns = tl.minimum(rows, num_rows - 1), tl.minimum(columns, num_columns - 1)
    logits = _product(images, texts, real_rows, real_columns, WIDTH, ROWS, COLUMNS, DEPTH) * tl.load(scale)

    has_true, is_cut = _needs_mask(row_block, column_block, num_rows, num_columns, first_true, ROWS, COLUMNS)
    of_rows = rows + first_true
    is_other = columns[None, :] != of_rows[:, None]
    if has_true:
        is_here = is_row & (of_rows >= column_block * COLUMNS) & (of_rows < (column_block + 1) * COLUMNS)
        tl.store(true + rows, tl.sum(tl.where(is_other, 0.0, logits), 1), mask=is_here)
    if has_true | is_cut:
        logits = tl.where(is_row[:, None] & is_column[None, :] & is_other, logits, float("-inf"))

    if RUNNING:
        highest = tl.max(logits, 1)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        sums_of_rows = highest + tl.log(tl.sum(tl.exp(logits - highest[:, None]), 1))
        highest = tl.max(logits, 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        sums_of_columns = highest + tl.log(tl.sum(tl.exp(logits - highest[None, :]), 0))
    else:
        terms = tl.exp(logits - tl.load(shift))
        sums_of_rows = tl.sum(terms, 1)
        sums_of_columns = tl.sum(terms, 0)
    tl.store(row_sums + column_block.to(tl.int64) * num_rows + rows, sums_of_rows, mask=is_row)
    tl.store(column_sums + row_block.to(tl.int64) * num_columns + columns, sums_of_columns, mask=is_column)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first_true", "lost_rows_stride", "lost_columns_stride"])
def block_kernel(
    images,
    texts,
    products,
    soft,
    out,
    of_rows,
    of_columns,
    diagonal,
    scale,
    shift,
    lost_rows,
    lost_columns,
    with_products,
    num_rows,
    num_columns,
    first_true,
    products_stride,
    soft_stride,
    out_stride,
    lost_rows_stride,
    lost_columns_stride,
    GIVEN: tl.constexpr,
    SOFT: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes a part of M. Adds what rounding took from rows and columns, and Σ M_ij x_i·y_j, to places of its own.

    Where GIVEN, `products` holds x_i · y_j, and may be `out`; else they are made. Where SOFT, `soft` is subtracted.
    """
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < num_columns
    exists = is_row[:, None] & is_column[None, :]
    far = rows.to(tl.int64)[:, None]
    if GIVEN:
        product = tl.load(products + far * products_stride + columns[None, :], mask=exists, other=0.0)
    else:
        real_rows, real_columns = tl.minimum(rows, num_rows - 1), tl.minimum(columns, num_columns - 1)
        product = _product(images, texts, real_rows, real_columns, WIDTH, ROWS, COLUMNS, DEPTH)
    row_factor = tl.load(of_rows + rows, mask=is_row, other=0.0)
    column_factor = tl.load(of_columns + columns, mask=is_column, other=0.0)
    m = _mean_probabilities(product, tl.load(scale), tl.load(shift), row_factor, column_factor, SHIFTED)
    if SOFT:
        m -= tl.load(soft + far * soft_stride + columns[None, :], mask=exists, other=0.0)
    has_true, is_cut = _needs_mask(row_block, column_block, num_rows, num_columns, first_true, ROWS, COLUMNS)
    if has_true | is_cut:
        at_true = tl.load(diagonal + rows, mask=is_row, other=0.0)
        m = tl.where(columns[None, :] == (rows + first_true)[:, None], at_true[:, None], m)
        m = tl.where(exists, m, 0.0)

    place = with_products + row_block * tl.num_programs(1) + column_block
    tl.store(place, tl.load(place) + tl.sum(tl.sum(m * product, 1), 0).to(tl.float64))
    stored = _round_to(m, out.dtype.element_ty)
    tl.store(out + far * out_stride + columns[None, :], stored, mask=exists)
    if ROUNDED:
        lost = m - stored.to(tl.float32)
        place = lost_rows + column_block.to(tl.int64) * lost_rows_stride + rows
        tl.store(place, tl.load(place, mask=is_row, other=0.0) + tl.sum(lost, 1), mask=is_row)
        place = lost_columns + row_block.to(tl.int64) * lost_columns_stride + columns
        tl.store(place, tl.load(place, mask=is_column, other=0.0) + tl.sum(lost, 0), mask=is_column)


@triton.jit(do_not_specialize=["num_own", "num_others", "first_true"])
def fused_kernel(
    own,
    others,
    d_own,
    of_own,
    of_others,
    diagonal,
    scale,
    shift,
    lost,
    with_products,
    num_own,
    num_others,
    first_true,
    SHIFTED: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes SHARE columns of M times `others`, for ROWS rows of M, which are those of `own`.

    The first share also writes what rounding took from each row, and Σ M_ij x_i·y_j of its rows.
    """
    part = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_own
    real_rows = tl.minimum(rows, num_own - 1)
    share = part * SHARE + tl.arange(0, SHARE)
    is_share = (share < WIDTH)[None, :]
    row_factor = tl.load(of_own + rows, mask=is_row, other=0.0)
    at_true = tl.load(diagonal + rows, mask=is_row, other=0.0)
    scale_value, shift_value = tl.load(scale), tl.load(shift)
    total = tl.zeros((ROWS, SHARE), tl.float32)
    lost_of_rows = tl.zeros((ROWS,), tl.float32)
    products_of_rows = tl.zeros((ROWS,), tl.float32)
    if SHARE >= WIDTH:  # then one reading of the others serves both products
        x = tl.load(own + real_rows.to(tl.int64)[:, None] * WIDTH + share[None, :], mask=is_share, other=0.0)
    for first in range(0, num_others, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        is_column = columns < num_others
        real_columns = tl.minimum(columns, num_others - 1)
        y = tl.load(others + real_columns.to(tl.int64)[:, None] * WIDTH + share[None, :], mask=is_share, other=0.0)
        if SHARE >= WIDTH:
            product = _dot(x, tl.trans(y), tl.zeros((ROWS, COLUMNS), tl.float32))
        else:
            product = _product(own, others, real_rows, real_columns, WIDTH, ROWS, COLUMNS, DEPTH)
        column_factor = tl.load(of_others + columns, mask=is_column, other=0.0)
        m = _mean_probabilities(product, scale_value, shift_value, row_factor, column_factor, SHIFTED)
        m = tl.where(columns[None, :] == (rows + first_true)[:, None], at_true[:, None], m)
        m = tl.where(is_column[None, :], m, 0.0)
        rounded = _round_to(m, own.dtype.element_ty)
        total = _dot(rounded, y, total)
        lost_of_rows += tl.sum(m - rounded.to(tl.float32), 1)
        products_of_rows += tl.sum(m * product, 1)
    tl.store(d_own + rows.to(tl.int64)[:, None] * WIDTH + share[None, :], total, mask=is_row[:, None] & is_share)
    if part == 0:
        tl.store(lost + rows, lost_of_rows, mask=is_row)
        of_program = tl.sum(tl.where(is_row, products_of_rows, 0.0), 0).to(tl.float64)
        tl.store(with_products + tl.program_id(0), of_program)

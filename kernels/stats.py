"""First pass of the forward: the moments of each channel.

    mean = sum(x) / n,  M2 = sum((x - mean)^2)          x [rows, columns]; mean, M2 [C]

Reads x once, writes 3 values a channel (or block of columns) and program. With a residual x is the sum of both,
rounded as it is stored: both are read once and the sum is written. Parallel over blocks of columns (grid axis 0) and
row programs (axis 1).

A thread holds GROUP rows of a column at a time: their mean and the squares of their deviations are exact two-pass
sums, and are merged into what the thread has by (count, sum, M2) (Chan, Golub and LeVeque 1983); what the threads of a
program have is merged once at the end in a fixed tree, so a launch gives the same bits every time. Arithmetic in
float32; of a float32 tensor the sums over the groups are compensated (PyTorch's own are double on a CPU). Whole tiles
come first and need no masks; the others follow in a second loop.
"""

import triton
import triton.language as tl
from torch import Tensor

from .dtypes import partial_dtype
from .launch import STATISTICS, Tile, choose_tile, is_aligned
from .layout import RowMap
from .moments import add_compensated, load_pivot, merge, of_slot, store_sums
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    arithmetic,
    groups,
    load_tile,
    partial_tile,
    row_vectors,
    tile_columns,
    tile_offsets,
    whole_tile,
)


@triton.jit
def _load_sum(
    p_x, p_residual, p_sum, o_outer, o_inner, o_column, m, x_stride, residual_stride, sum_stride, spread,
    ACC: tl.constexpr,
):  # fmt: skip
    """x, or x + residual as it is stored (and it is stored); m is None where nothing is masked."""
    o_x = tile_offsets(o_outer, o_inner, o_column, x_stride, spread)
    b_x = load_tile(p_x, o_x, m, ACC)
    if p_residual is not None:
        o_residual = tile_offsets(o_outer, o_inner, o_column, residual_stride, spread)
        o_sum = tile_offsets(o_outer, o_inner, o_column, sum_stride, spread)
        b_x += load_tile(p_residual, o_residual, m, ACC)
        b_stored = b_x.to(p_sum.dtype.element_ty)
        if m is None:
            tl.store(p_sum + o_sum, b_stored)
        else:
            tl.store(p_sum + o_sum, b_stored, mask=m)
        b_x = b_stored.to(ACC)
    return b_x


@triton.jit
def _add_group(
    b_total, b_total_low, b_m2, b_m2_low, b_sum, b_mean, b_square, inverse, weight,
    COMPENSATED: tl.constexpr,
):  # fmt: skip
    """Merge groups (sum, mean, squares) into (total, M2): inverse = 1 / count before, weight = count * k / (count +
    k).
    """
    b_r = b_mean - b_total * inverse
    b_square += b_r * (b_r * weight)
    if COMPENSATED:
        b_m2, b_m2_low = add_compensated(b_m2, b_m2_low, b_square)
        b_total, b_total_low = add_compensated(b_total, b_total_low, b_sum)
    else:
        b_m2 += b_square
        b_total += b_sum
    return b_total, b_total_low, b_m2, b_m2_low


@triton.jit
def group_moments(
    p_x,
    p_residual,
    p_sum,
    b_pivot,
    x_stride,
    residual_stride,
    sum_stride,
    o_column,
    m_column,
    outer,
    inner,
    spread,
    whole,
    i_program,
    programs,
    ACC: tl.constexpr,
    ONE_OUTER: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(count, mean, M2) [groups of rows, columns] of a program's tiles, for `merge`; means relative to the pivot."""
    BLOCK_CHANNELS: tl.constexpr = o_column.shape[0]
    ROWS: tl.constexpr = BLOCK_OUTER * BLOCK_INNER
    COMPENSATED: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth >= 32
    AXIS: tl.constexpr = 0 if RUN == 1 else 1  # the groups'
    b_total = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_m2 = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_total_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_m2_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    # All groups have the same count until the partial tiles.
    count = tl.full([], 0.0, ACC)
    for i_tile in tl.range(i_program, whole, programs, num_stages=STAGES):
        o_outer, o_inner = whole_tile(i_tile, inner, ONE_OUTER, BLOCK_OUTER, BLOCK_INNER, OFFSET)
        m = None if EVEN else m_column[None, :] & (o_inner >= 0)[:, None]
        b_x = _load_sum(
            p_x, p_residual, p_sum, o_outer, o_inner, o_column, m, x_stride, residual_stride, sum_stride,
            spread, ACC,
        )  # fmt: skip
        # 16-bit values keep their digits in the sum of a group, whatever their mean.
        if COMPENSATED:
            b_x = b_x - b_pivot[None, :]
        b_group = groups(b_x, GROUP, RUN)
        b_sum = tl.sum(b_group, axis=AXIS)
        b_mean = b_sum * (1.0 / GROUP)
        b_d = b_group - tl.expand_dims(b_mean, AXIS)
        b_square = tl.sum(b_d * b_d, axis=AXIS)
        if not COMPENSATED:
            b_sum = b_sum - b_pivot[None, :] * GROUP
            b_mean = b_mean - b_pivot[None, :]
        b_total, b_total_low, b_m2, b_m2_low = _add_group(
            b_total, b_total_low, b_m2, b_m2_low, b_sum, b_mean, b_square,
            1.0 / tl.maximum(count, 1.0), count / (count + GROUP) * GROUP, COMPENSATED,
        )  # fmt: skip
        count += GROUP

    b_count = tl.zeros([ROWS // GROUP], ACC) + count
    tiles = tl.cdiv(outer, BLOCK_OUTER) * tl.cdiv(inner, BLOCK_INNER)
    for i in tl.range(i_program, tiles - whole, programs, num_stages=1):
        o_outer, o_inner, m_row = partial_tile(i, outer, inner, BLOCK_OUTER, BLOCK_INNER, OFFSET)
        m = m_row[:, None] & m_column[None, :]
        b_x = _load_sum(
            p_x, p_residual, p_sum, o_outer, o_inner, o_column, m, x_stride, residual_stride, sum_stride,
            spread, ACC,
        )  # fmt: skip
        b_x = tl.where(m, b_x - b_pivot[None, :], 0.0)
        b_k = tl.sum(groups(m_row.to(ACC), GROUP, RUN), axis=AXIS)
        b_group = groups(b_x, GROUP, RUN)
        b_sum = tl.sum(b_group, axis=AXIS)
        b_mean = b_sum / tl.maximum(b_k, 1.0)[:, None]
        b_d = b_group - tl.expand_dims(b_mean, AXIS)
        b_d = tl.where(groups(m, GROUP, RUN), b_d, 0.0)
        b_square = tl.sum(b_d * b_d, axis=AXIS)
        b_more = b_count + b_k
        b_weight = b_count / tl.maximum(b_more, 1.0) * b_k
        b_total, b_total_low, b_m2, b_m2_low = _add_group(
            b_total, b_total_low, b_m2, b_m2_low, b_sum, b_mean, b_square,
            (1.0 / tl.maximum(b_count, 1.0))[:, None], b_weight[:, None], COMPENSATED,
        )  # fmt: skip
        b_count = b_more

    b_counts = b_count[:, None] + tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    if COMPENSATED:
        b_total = b_total.to(tl.float64) + b_total_low.to(tl.float64)
        b_m2 = b_m2.to(tl.float64) + b_m2_low.to(tl.float64)
        b_counts = b_counts.to(tl.float64)
    b_inverse = 1.0 / tl.maximum(b_count, 1.0).to(b_total.dtype)
    return b_counts, b_total * b_inverse[:, None], b_m2


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_stats_kernel(
    p_x,
    p_residual,
    p_sum,
    p_partial,
    x_stride,
    residual_stride,
    sum_stride,
    outer,
    inner,
    channels,
    spread,
    whole,
    programs,
    width,
    slots,
    FLAT: tl.constexpr,
    ONE_OUTER: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [programs, 3, width]: count, mean relative to the pivot, M2; sum <- x + residual, where there is one.

    whole: tiles without a partial row; EVEN: no partial block of columns either.
    """
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    inner = row_vectors(inner, ROW_VECTORS)
    i_program = tl.program_id(1)
    columns = channels * spread
    o_column, m_column = tile_columns(columns, None, BLOCK_CHANNELS, OFFSET)
    b_pivot = load_pivot(
        p_x, p_residual, p_sum, o_column - o_column % spread, m_column, outer, inner, spread, x_stride,
        residual_stride, ACC, OFFSET,
    )  # fmt: skip
    b_count, b_mean, b_m2 = group_moments(
        p_x, p_residual, p_sum, b_pivot, x_stride, residual_stride, sum_stride, o_column, m_column,
        outer, inner, spread, whole, i_program, programs,
        ACC, ONE_OUTER, EVEN, GROUP, RUN, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    p_row = p_partial + i_program * 3 * width
    if FLAT:  # the columns of a channel together
        for i_slot in range(slots):
            m = of_slot(i_slot, o_column, m_column, spread, BLOCK_CHANNELS)[:, None]
            b_some, b_their_mean, b_their_m2 = merge(
                tl.where(m, b_n[:, None], 0.0),
                tl.where(m, b_mean[:, None], 0.0),
                tl.where(m, b_m2[:, None], 0.0),
            )
            o_slot = tl.program_id(0) * slots + i_slot + tl.arange(0, 1)
            tl.store(p_row + o_slot, b_some.to(p_partial.dtype.element_ty))
            tl.store(p_row + width + o_slot, b_their_mean.to(p_partial.dtype.element_ty))
            tl.store(p_row + 2 * width + o_slot, b_their_m2.to(p_partial.dtype.element_ty))
    else:
        store_sums(p_row, b_n, o_column, m_column, spread, slots, FLAT)
        store_sums(p_row + width, b_mean, o_column, m_column, spread, slots, FLAT)
        store_sums(p_row + 2 * width, b_m2, o_column, m_column, spread, slots, FLAT)


def launch_bn_stats(
    p: Planner, x: Tensor, residual: Tensor | None, total: Tensor | None, rows: RowMap
) -> tuple[Tensor, Tile]:
    """partial [tile.programs, 3, tile.width] <- moments of x, or of total <- x + residual; and the tile.

    rows.strides: total (or whatever the map was made for), x, residual.
    """
    tile = choose_tile(rows, x.element_size(), STATISTICS, p.chip)
    partial = p.empty((tile.programs, 3, tile.width), partial_dtype(x.dtype))
    p.start(
        bn_stats_kernel,
        tile.grid,
        (x, residual, total, partial),
        (
            rows.strides[1],
            rows.strides[2] if residual is not None else None,
            rows.strides[0] if residual is not None else None,
            rows.outer,
            rows.inner,
            rows.channels,
            rows.spread,
            tile.whole,
            tile.programs,
            tile.width,
            tile.slots,
        ),
        (),
        {
            "FLAT": rows.spread > 1,
            "ONE_OUTER": rows.outer == 1,
            "EVEN": tile.even,
            "ROW_VECTORS": rows.row_vectors,
            **tile.groups(rows.channels_fastest or all(map(is_aligned, (x, residual)))),
            "OFFSET": arithmetic(x.dtype, rows)["OFFSET"],
        },
        tile.options,
    )
    return partial, tile

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

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .dtypes import partial_dtype
from .launch import STATISTICS, Tile, choose_tile, is_aligned
from .layout import RowMap
from .moments import Summed, add_compensated, load_pivot, merge, of_slot, store_sums
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    Sizes,
    View,
    groups,
    load_tile,
    partial_tile,
    tile_offsets,
    walk_of,
    whole_tile,
)


class _Groups(NamedTuple):
    """Of groups of rows: their sums, and what rounding took off; their M2 likewise."""

    total: Any
    total_low: Any
    m2: Any
    m2_low: Any


@triton.jit
def _load_sum(of, o_outer, o_inner, o_column, m, spread, ACC: tl.constexpr):
    """x, or x + residual as it is stored (and it is stored); m is None where nothing is masked."""
    o_x = tile_offsets(o_outer, o_inner, o_column, of.x.stride, spread)
    b_x = load_tile(of.x.p, o_x, m, ACC)
    if of.residual is not None:
        o_residual = tile_offsets(o_outer, o_inner, o_column, of.residual.stride, spread)
        o_sum = tile_offsets(o_outer, o_inner, o_column, of.total.stride, spread)
        b_x += load_tile(of.residual.p, o_residual, m, ACC)
        b_stored = b_x.to(of.total.p.dtype.element_ty)
        if m is None:
            tl.store(of.total.p + o_sum, b_stored)
        else:
            tl.store(of.total.p + o_sum, b_stored, mask=m)
        b_x = b_stored.to(ACC)
    return b_x


@triton.jit
def _add_group(have, b_sum, b_mean, b_square, inverse, weight, COMPENSATED: tl.constexpr):
    """Merge groups (sum, mean, squares) into `_Groups`: inverse = 1 / count before, weight = count * k / (count +
    k)."""
    b_total, b_total_low, b_m2, b_m2_low = have
    b_r = b_mean - b_total * inverse
    b_square += b_r * (b_r * weight)
    if COMPENSATED:
        b_m2, b_m2_low = add_compensated(b_m2, b_m2_low, b_square)
        b_total, b_total_low = add_compensated(b_total, b_total_low, b_sum)
    else:
        b_m2 += b_square
        b_total += b_sum
    return _Groups(b_total, b_total_low, b_m2, b_m2_low)


@triton.jit
def group_moments(of, b_pivot, walk, whole, TILE: tl.constexpr, ACC: tl.constexpr):
    """(count, mean, M2) [groups of rows, columns] of a program's tiles, for `merge`; means relative to the pivot.

    of: `Summed`; whole: tiles that have all their rows.
    """
    BLOCK_CHANNELS: tl.constexpr = walk.o_column.shape[0]
    GROUP: tl.constexpr = TILE.group
    RUN: tl.constexpr = TILE.run
    ROWS: tl.constexpr = TILE.outer * TILE.inner
    COMPENSATED: tl.constexpr = of.x.p.dtype.element_ty.primitive_bitwidth >= 32
    AXIS: tl.constexpr = 0 if RUN == 1 else 1  # the groups'
    b_total = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_m2 = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_total_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_m2_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    # All groups have the same count until the partial tiles.
    count = tl.full([], 0.0, ACC)
    for i_tile in tl.range(walk.first, whole, walk.programs, num_stages=TILE.stages):
        o_outer, o_inner = whole_tile(i_tile, walk, TILE)
        m = None if TILE.even else walk.m_column[None, :] & (o_inner >= 0)[:, None]
        b_x = _load_sum(of, o_outer, o_inner, walk.o_column, m, walk.spread, ACC)
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
            _Groups(b_total, b_total_low, b_m2, b_m2_low), b_sum, b_mean, b_square,
            1.0 / tl.maximum(count, 1.0), count / (count + GROUP) * GROUP, COMPENSATED,
        )  # fmt: skip
        count += GROUP

    b_count = tl.zeros([ROWS // GROUP], ACC) + count
    tiles = tl.cdiv(walk.outer, TILE.outer) * tl.cdiv(walk.inner, TILE.inner)
    for i in tl.range(walk.first, tiles - whole, walk.programs, num_stages=1):
        o_outer, o_inner, m_row = partial_tile(i, walk, TILE)
        m = m_row[:, None] & walk.m_column[None, :]
        b_x = _load_sum(of, o_outer, o_inner, walk.o_column, m, walk.spread, ACC)
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
            _Groups(b_total, b_total_low, b_m2, b_m2_low), b_sum, b_mean, b_square,
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
    of,
    p_partial,
    outer,
    inner,
    channels,
    spread,
    whole,
    programs,
    width,
    slots,
    TILE: tl.constexpr,
):
    """partial [programs, 3, width]: count, mean relative to the pivot, M2 of `Summed`, of which total is written.

    whole: tiles without a partial row; TILE.even: no partial block of columns either.
    """
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    walk = walk_of(Sizes(outer, inner, spread, programs=programs), channels, 1, TILE)
    o_column, m_column, spread = walk.o_column, walk.m_column, walk.spread
    b_pivot = load_pivot(of, o_column - o_column % spread, m_column, walk, ACC, OFFSET)
    b_count, b_mean, b_m2 = group_moments(of, b_pivot, walk, whole, TILE, ACC)
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    p_row = p_partial + walk.first * 3 * width
    if TILE.flat:  # the columns of a channel together
        for i_slot in range(slots):
            m = of_slot(i_slot, o_column, m_column, spread, TILE.channels)[:, None]
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
        store_sums(p_row, b_n, walk, None, False)
        store_sums(p_row + width, b_mean, walk, None, False)
        store_sums(p_row + 2 * width, b_m2, walk, None, False)


def launch_bn_stats(
    p: Planner, x: Tensor, residual: Tensor | None, total: Tensor | None, rows: RowMap
) -> tuple[Tensor, Tile]:
    """partial [tile.programs, 3, tile.width] <- moments of x, or of total <- x + residual; and the tile.

    rows.strides: total (or whatever the map was made for), x, residual.
    """
    tile = choose_tile(rows, x.element_size(), STATISTICS, p.chip)
    partial = p.empty((tile.programs, 3, tile.width), partial_dtype(x.dtype))
    is_sum = residual is not None
    p.start(
        bn_stats_kernel,
        tile.grid,
        (
            Summed(
                View(x, rows.strides[1]),
                View(residual, rows.strides[2]) if is_sum else None,
                View(total, rows.strides[0]) if is_sum else None,
            ),
            partial,
            rows.outer,
            rows.inner,
            rows.channels,
            rows.spread,
            tile.whole,
            tile.programs,
            tile.width,
            tile.slots,
        ),
        {
            "TILE": tile.block(rows)._replace(
                even=tile.even,
                **tile.groups(rows.channels_fastest or all(map(is_aligned, (x, residual)))),
            )
        },
        tile.options,
    )  # fmt: skip
    return partial, tile

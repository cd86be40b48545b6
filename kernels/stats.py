"""First pass of the forward: the moments of each channel.

    mean = sum(x) / n,  M2 = sum((x - mean)^2)          x [rows, C]; mean, M2 [C]

Reads x once, writes 3 values a channel and program. With a residual x is the sum of both, rounded as it is stored: both
are read once and the sum is written. Parallel over channel blocks (grid axis 0) and row programs (axis 1). Each
position of the tile keeps its own running (count, sum, M2) (Youngs and Cramer 1971), merged once at the end in a fixed
tree, so a launch gives the same bits every time. Arithmetic in float32; the sums over the tiles of a float32 tensor are
compensated (PyTorch's own are double on a CPU).
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile
from .layout import RowMap
from .moments import add_compensated, finite_or_zero, load_pivot, merge
from .start import start
from .tile import tile_channels, tile_offsets, tile_rows


@triton.jit
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
    tiles_inner,
    tiles,
    programs,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [programs, 3, C]: count, mean relative to the pivot, M2; sum <- x + residual, where there is one."""
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = BLOCK_OUTER * BLOCK_INNER
    COMPENSATED: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth >= 32
    i_program = tl.program_id(1)
    o_channel, m_channel = tile_channels(channels, BLOCK_CHANNELS, OFFSET)
    if p_residual is None:
        b_pivot = load_pivot(p_x, o_channel, m_channel, x_stride[2], ACC)
    else:
        b_first = tl.load(p_x + o_channel * x_stride[2], mask=m_channel, other=0.0).to(ACC)
        p_first = p_residual + o_channel * residual_stride[2]
        b_first += tl.load(p_first, mask=m_channel, other=0.0).to(ACC)
        b_pivot = finite_or_zero(b_first.to(p_sum.dtype.element_ty).to(ACC))

    b_count = tl.zeros([ROWS], ACC)
    b_total = tl.zeros([ROWS, BLOCK_CHANNELS], ACC)
    b_m2 = tl.zeros([ROWS, BLOCK_CHANNELS], ACC)
    b_total_low = tl.zeros([ROWS, BLOCK_CHANNELS], ACC)
    b_m2_low = tl.zeros([ROWS, BLOCK_CHANNELS], ACC)
    for i_tile in tl.range(i_program, tiles, programs, num_stages=STAGES):
        o_outer, o_inner, m_row = tile_rows(
            i_tile, outer, inner, tiles_inner, BLOCK_OUTER, BLOCK_INNER, OFFSET
        )
        m = m_row[:, None] & m_channel[None, :]
        o_x = tile_offsets(o_outer, o_inner, o_channel, x_stride)
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(ACC)
        if p_residual is not None:
            o_residual = tile_offsets(o_outer, o_inner, o_channel, residual_stride)
            b_x += tl.load(p_residual + o_residual, mask=m, other=0.0).to(ACC)
            b_stored = b_x.to(p_sum.dtype.element_ty)
            o_sum = tile_offsets(o_outer, o_inner, o_channel, sum_stride)
            tl.store(p_sum + o_sum, b_stored, mask=m)
            b_x = b_stored.to(ACC)
        b_d = tl.where(m, b_x - b_pivot[None, :], 0.0)
        b_more = b_count + m_row.to(ACC)
        # The deviation from the mean of what came before; weight 0 for the first value and for rows that are not there.
        b_mean = b_total * (1.0 / tl.maximum(b_count, 1.0))[:, None]
        b_r = tl.where(m, b_d - b_mean, 0.0)
        b_weight = b_count / tl.maximum(b_more, 1.0)
        b_square = b_r * (b_r * b_weight[:, None])
        if COMPENSATED:
            b_m2, b_m2_low = add_compensated(b_m2, b_m2_low, b_square)
            b_total, b_total_low = add_compensated(b_total, b_total_low, b_d)
        else:
            b_m2 += b_square
            b_total += b_d
        b_count = b_more

    b_counts = b_count[:, None] + tl.zeros([ROWS, BLOCK_CHANNELS], ACC)
    if COMPENSATED:
        b_total = b_total.to(tl.float64) + b_total_low.to(tl.float64)
        b_m2 = b_m2.to(tl.float64) + b_m2_low.to(tl.float64)
        b_counts = b_counts.to(tl.float64)
    b_n, b_mean, b_m2 = merge(b_counts, b_total, b_m2)
    PARTIAL: tl.constexpr = p_partial.dtype.element_ty
    p_row = p_partial + i_program * 3 * channels + o_channel
    tl.store(p_row, b_n.to(PARTIAL), mask=m_channel)
    tl.store(p_row + channels, b_mean.to(PARTIAL), mask=m_channel)
    tl.store(p_row + 2 * channels, b_m2.to(PARTIAL), mask=m_channel)


def launch_bn_stats(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    partial: Tensor,
    rows: RowMap,
    tile: Tile,
    offset: tl.dtype,
) -> None:
    """partial [tile.programs, 3, C] <- moments of x, or of total <- x + residual; rows.strides: total, x, residual."""
    start(
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
            tile.tiles_inner,
            tile.tiles,
            tile.programs,
        ),
        (),
        {"OFFSET": offset},
        tile.options,
    )

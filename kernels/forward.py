"""The forward in one launch, where maps are small: moments, final step and application of a block of channels.

    y = act((x - mean) * invstd * weight + bias + residual)        mean, invstd: of x, over its rows

x, residual, y [rows, columns]; saved [4, C] and the running statistics as `finalize` leaves them; a residual may have a
BatchNorm of its own. Reads x twice (the second time from the cache), the residual once, or twice if it is normalised;
writes y and, for a tail that will be differentiated, one bit an element. Parallel over blocks of channels alone
(`launch.choose_whole`): a program walks all rows of its own, so that nothing is exchanged between programs and a launch
gives the same bits every time. The loops are those of `stats` and `apply`; the arithmetic is theirs too.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .apply import apply_tiles
from .finalize import Running, finish_moments
from .launch import BITS, Tile, is_aligned
from .layout import RowMap, mask_of
from .moments import load_pivot, merge
from .norm import NO_NORM, Norm
from .plan import Planner
from .stats import group_moments
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    arithmetic,
    channel_step,
    load_vector,
    of_channels,
    own_channels,
    row_vectors,
    tile_columns,
    to_columns,
)


@triton.jit
def _norm_of(
    p_x,
    p_weight,
    p_bias,
    p_running_mean,
    p_running_var,
    p_batches,
    p_saved,
    x_stride,
    o_column,
    m_column,
    outer,
    inner,
    channels,
    spread,
    whole,
    momentum,
    eps,
    keep,
    ONE_OUTER: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(mean, mean_low, scale, bias) of these columns, as `load_norm` gives them, from x; they are left in saved."""
    ACC: tl.constexpr = p_saved.dtype.element_ty
    b_pivot = load_pivot(
        p_x, None, None, o_column - o_column % spread, m_column, outer, inner, spread, x_stride, None, ACC, OFFSET,
    )  # fmt: skip
    b_count, b_mean, b_m2 = group_moments(
        p_x, None, None, b_pivot, x_stride, None, None, o_column, m_column, outer, inner, spread, whole, 0, 1,
        ACC, ONE_OUTER, EVEN, GROUP, RUN, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip
    o_channel, m_channel = own_channels(o_column, m_column, channels, CHANNELS)
    # Several threads hold a channel, and one of them stores it: all have read before.
    b_old_mean = load_vector(p_running_mean, o_channel, m_channel, 0.0, tl.float64)
    b_old_var = load_vector(p_running_var, o_channel, m_channel, 0.0, tl.float64)
    tl.debug_barrier()
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    b_first = b_pivot.to(tl.float64)
    if CHANNELS > 0:
        b_n, b_mean, b_m2 = merge(
            of_channels(b_n, spread, CHANNELS, SPREAD),
            of_channels(b_mean, spread, CHANNELS, SPREAD),
            of_channels(b_m2, spread, CHANNELS, SPREAD),
        )
        b_first = tl.gather(b_first, tl.arange(0, CHANNELS) * spread, 0)
    b_mean, b_low, b_invstd, b_bias = finish_moments(
        (b_n, b_mean, b_m2), b_first, b_old_mean, b_old_var, p_bias, p_saved, p_running_mean, p_running_var, p_batches,
        o_channel, m_channel, channels, momentum, eps, keep,
    )  # fmt: skip
    b_scale = b_invstd * load_vector(p_weight, o_channel, m_channel, 1.0, ACC)
    if CHANNELS > 0:
        b_mean = to_columns(b_mean, o_column, spread, CHANNELS)
        b_low = to_columns(b_low, o_column, spread, CHANNELS)
        b_scale = to_columns(b_scale, o_column, spread, CHANNELS)
        b_bias = to_columns(b_bias, o_column, spread, CHANNELS)
    return b_mean, b_low, b_scale, b_bias


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_forward_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_running_mean,
    p_running_var,
    p_batches,
    p_saved,
    p_residual_weight,
    p_residual_bias,
    p_residual_running_mean,
    p_residual_running_var,
    p_residual_batches,
    p_residual_saved,
    p_y,
    p_bits,
    x_stride,
    residual_stride,
    y_stride,
    bits_stride,
    outer,
    inner,
    channels,
    spread,
    whole,
    tiles_inner,
    tiles,
    keep,
    momentum: "fp64",
    eps: "fp64",
    residual_momentum: "fp64",
    residual_eps: "fp64",
    ONE_OUTER: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPREAD: tl.constexpr,
    NORMALIZE_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y (and bits), saved [4, C] and the running statistics; likewise residual_saved. CHANNELS: of a program, in a flat
    walk, whose columns are at most SPREAD each; else 0.
    """
    ACC: tl.constexpr = p_saved.dtype.element_ty
    inner = row_vectors(inner, ROW_VECTORS)
    columns = channels * spread
    step = channel_step(spread, CHANNELS, 32 // (p_x.dtype.element_ty.primitive_bitwidth // 8))
    o_column, m_column = tile_columns(columns, step, BLOCK_CHANNELS, OFFSET)
    norm = _norm_of(
        p_x, p_weight, p_bias, p_running_mean, p_running_var, p_batches, p_saved,
        y_stride if x_stride is None else x_stride, o_column, m_column,
        outer, inner, channels, spread, whole, momentum, eps, keep,
        ONE_OUTER, EVEN, GROUP, RUN, CHANNELS, SPREAD, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip
    residual_norm = None
    if NORMALIZE_RESIDUAL:
        residual_norm = _norm_of(
            p_residual, p_residual_weight, p_residual_bias, p_residual_running_mean, p_residual_running_var,
            p_residual_batches, p_residual_saved, y_stride if residual_stride is None else residual_stride,
            o_column, m_column, outer, inner, channels, spread, whole, residual_momentum, residual_eps, keep,
            ONE_OUTER, EVEN, GROUP, RUN, CHANNELS, SPREAD, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
        )  # fmt: skip
    apply_tiles(
        p_x, p_residual, p_y, p_bits, norm, residual_norm, x_stride, residual_stride, y_stride, bits_stride,
        o_column, m_column, outer, inner, columns, step, spread, tiles_inner, tiles, 0, 1,
        ACTIVATION, SLOPE, PACK_CHANNELS, WHOLE_BYTES, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, 1,
    )  # fmt: skip


def launch_bn_forward(
    p: Planner,
    x: Tensor,
    residual: Tensor | None,
    norms: Sequence[tuple[Norm, Running]],
    y: Tensor,
    bits: Tensor | None,
    rows: RowMap,
    tile: Tile,
    activation: tuple[str | None, float],
) -> None:
    """y (and bits) and saved <- x, and what is running moves; rows.strides are those of y, x and, where there is one,
    the residual. norms: that of x, and that of the residual where it has one."""
    (norm, running), (other, moved) = (*norms, (NO_NORM, Running()))[:2]
    mask = mask_of(bits, rows)
    p.start(
        bn_forward_kernel,
        tile.grid,
        (
            x, residual,
            norm.weight, norm.bias, running.mean, running.var, running.batches, norm.saved,
            other.weight, other.bias, moved.mean, moved.var, moved.batches, other.saved,
            y, bits,
        ),
        (
            rows.others[1],
            rows.others[2] if residual is not None else None,
            rows.strides[0],
            mask.stride,
            rows.outer,
            rows.inner,
            rows.channels,
            rows.spread,
            tile.whole,
            tile.tiles_inner if rows.outer > 1 else None,
            tile.tiles,
            int(running.keep),
        ),
        (running.momentum, norm.eps, moved.momentum, other.eps),
        {
            "ONE_OUTER": rows.outer == 1,
            "EVEN": tile.even,
            **tile.groups(rows.channels_fastest or all(map(is_aligned, (x, residual)))),
            **tile.kept(rows.spread),
            "NORMALIZE_RESIDUAL": len(norms) > 1,
            "ACTIVATION": activation[0],
            "SLOPE": activation[1],
            "PACK_CHANNELS": mask.packs_channels,
            "WHOLE_BYTES": (rows.columns if mask.packs_channels else rows.inner) % BITS == 0,
            "ROW_VECTORS": rows.row_vectors,
            "OFFSET": arithmetic(x.dtype, rows)["OFFSET"],
        },
        tile.options,
    )  # fmt: skip

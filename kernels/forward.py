"""The forward in one launch, where maps are small: moments, final step and application of a block of channels.

    y = act((x - mean) * invstd * weight + bias + residual)        mean, invstd: of x, over its rows

x, residual, y [rows, columns]; saved [4, C] and the running statistics as `finalize` leaves them; a residual may have a
BatchNorm of its own. Reads x twice (the second time from the cache), the residual once, or twice if it is normalised;
writes y and, for a tail that will be differentiated, one bit an element. Parallel over blocks of channels alone
(`launch.choose_whole`): a program walks all rows of its own, so that nothing is exchanged between programs and a launch
gives the same bits every time. The loops are those of `stats` and `apply`; the arithmetic is theirs too. Whether there
is a residual, a BatchNorm of it and a mask to write is told by integers: one kernel for all tails of a layout, dtype.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .apply import apply_tiles
from .finalize import Running, finish_moments
from .launch import Whole
from .moments import load_pivot, merge
from .norm import Norm
from .plan import Planner
from .stats import group_moments
from .tile import (
    ANY_MULTIPLE,
    ANY_WHOLE,
    arithmetic,
    by_channel,
    by_part,
    load_vector,
    own_channels,
    own_columns,
    own_stride,
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
    slots,
    width,
    momentum,
    eps,
    keep,
    ONE_OUTER: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
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
    o_channel, m_channel = own_channels(o_column, m_column, slots, PARTS)
    # Several threads hold a channel, and one of them stores it: all have read before.
    b_old_mean = load_vector(p_running_mean, o_channel, m_channel, 0.0, tl.float64)
    b_old_var = load_vector(p_running_var, o_channel, m_channel, 0.0, tl.float64)
    tl.debug_barrier()
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    b_first = b_pivot.to(tl.float64)
    if PARTS > 0:
        b_n, b_mean, b_m2 = merge(
            by_part(b_n, slots, width, PARTS),
            by_part(b_mean, slots, width, PARTS),
            by_part(b_m2, slots, width, PARTS),
        )
        b_n, b_mean, b_m2 = merge(
            by_channel(b_n, slots, PARTS), by_channel(b_mean, slots, PARTS), by_channel(b_m2, slots, PARTS)
        )  # fmt: skip
        o_first = tl.minimum(tl.arange(0, PARTS), slots - 1) * (width // slots)
        b_first = tl.gather(b_first, o_first, 0)
    b_mean, b_low, b_invstd, b_bias = finish_moments(
        (b_n, b_mean, b_m2), b_first, b_old_mean, b_old_var, p_bias, p_saved, p_running_mean, p_running_var, p_batches,
        o_channel, m_channel, channels, momentum, eps, keep, False,
    )  # fmt: skip
    b_scale = b_invstd * load_vector(p_weight, o_channel, m_channel, 1.0, ACC)
    if PARTS > 0:
        b_mean = to_columns(b_mean, slots, width, o_column.shape[0])
        b_low = to_columns(b_low, slots, width, o_column.shape[0])
        b_scale = to_columns(b_scale, slots, width, o_column.shape[0])
        b_bias = to_columns(b_bias, slots, width, o_column.shape[0])
    return b_mean, b_low, b_scale, b_bias


@triton.jit(do_not_specialize=ANY_WHOLE, do_not_specialize_on_alignment=ANY_MULTIPLE)
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
    row_stride,
    bits_outer,
    bits_inner,
    bits_piece,
    outer,
    inner,
    channels,
    spread,
    slots,
    width,
    whole,
    tiles_inner,
    tiles,
    adds,
    normalizes,
    writes_bits,
    keep,
    momentum: "fp64",
    eps: "fp64",
    residual_momentum: "fp64",
    residual_eps: "fp64",
    ONE_OUTER: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y, saved [4, C] and the running statistics, and bits with `writes_bits`. adds: whether y has a residual;
    normalizes: whether that has a BatchNorm, which leaves residual_saved. What is not there has a stand-in.

    PARTS: what the columns of a flat walk are added up in (`by_part`), else 0.
    """
    ACC: tl.constexpr = p_saved.dtype.element_ty
    SECTOR: tl.constexpr = 32 // (p_x.dtype.element_ty.primitive_bitwidth // 8)
    own = own_columns(spread, slots, width, PARTS, SECTOR)
    stride = own_stride(channels, row_stride, own)
    bits_stride = (bits_outer, bits_inner, bits_piece, 1)
    o_column, m_column = tile_columns(channels, own, BLOCK_CHANNELS, OFFSET)
    norm = _norm_of(
        p_x, p_weight, p_bias, p_running_mean, p_running_var, p_batches, p_saved, stride,
        o_column, m_column, outer, inner, channels, spread, whole, slots, width, momentum, eps, keep,
        ONE_OUTER, EVEN, GROUP, RUN, PARTS, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip
    residual_norm = None
    if p_residual_saved is not None:
        b_mean = tl.zeros([BLOCK_CHANNELS], ACC)
        b_low = tl.zeros([BLOCK_CHANNELS], ACC)
        b_scale = tl.zeros([BLOCK_CHANNELS], ACC)
        b_bias = tl.zeros([BLOCK_CHANNELS], ACC)
        if normalizes:
            b_mean, b_low, b_scale, b_bias = _norm_of(
                p_residual, p_residual_weight, p_residual_bias, p_residual_running_mean, p_residual_running_var,
                p_residual_batches, p_residual_saved, stride,
                o_column, m_column, outer, inner, channels, spread, whole, slots, width,
                residual_momentum, residual_eps, keep,
                ONE_OUTER, EVEN, GROUP, RUN, PARTS, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
            )  # fmt: skip
        residual_norm = (b_mean, b_low, b_scale, b_bias)
    apply_tiles(
        p_x, p_residual, p_y, p_bits, norm, residual_norm, None, None, stride, bits_stride,
        o_column, m_column, outer, inner, channels, own, spread, tiles_inner, tiles, 0, 1,
        adds, normalizes, writes_bits,
        ACTIVATION, SLOPE, PACK_CHANNELS, WHOLE_BYTES, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, 1,
    )  # fmt: skip


def launch_bn_forward(
    p: Planner,
    x: Tensor,
    residual: Tensor | None,
    norms: Sequence[tuple[Norm, Running]],
    y: Tensor,
    bits: Tensor | None,
    whole: Whole,
    activation: tuple[str | None, float],
) -> None:
    """y (and bits) and saved <- x, and what is running moves; all tensors are walked alike. norms: that of x, and that
    of the residual where it has one."""
    (norm, running), (other, moved) = norms[0], norms[-1]
    p.start(
        bn_forward_kernel,
        whole.tile.grid,
        (
            x, x if residual is None else residual,
            norm.weight, norm.bias, running.mean, running.var, running.batches, norm.saved,
            other.weight, other.bias, moved.mean, moved.var, moved.batches, other.saved,
            y, p.empty((1,), torch.uint8) if bits is None else bits,
        ),
        (
            *whole.integers(),
            whole.tile.whole,
            whole.tile.tiles_inner if whole.is_flat else None,
            whole.tile.tiles,
            int(residual is not None),
            int(len(norms) > 1),
            int(bits is not None),
            int(running.keep),
        ),
        (running.momentum, norm.eps, moved.momentum, other.eps),
        {
            **whole.constants,
            "OFFSET": arithmetic(x.dtype, whole.walk)["OFFSET"],
            "ONE_OUTER": not whole.is_flat,
            "ACTIVATION": activation[0],
            "SLOPE": activation[1],
            "WHOLE_BYTES": whole.has_whole_bytes,
        },
        whole.tile.options,
    )  # fmt: skip

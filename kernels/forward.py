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

from .activation import Activation
from .apply import Output, Tail, apply_tiles
from .finalize import Moving, Running, finish_moments, load_running
from .launch import Whole
from .moments import Summed, load_pivot, merge
from .norm import Affine, Branch, Norm, Vectors
from .plan import Planner
from .stats import group_moments
from .tile import (
    ANY_MULTIPLE,
    ANY_WHOLE,
    Pair,
    Sizes,
    View,
    by_channel,
    by_part,
    load_vector,
    own_channels,
    to_columns,
    walk_of,
    walk_stride,
)


@triton.jit
def _norm_of(x, norm, walk, whole, moving, TILE: tl.constexpr):
    """The `Affine` of these columns, as `load_norm` gives it, from x; mean, invstd and bias are left in norm.saved."""
    ACC: tl.constexpr = norm.saved.dtype.element_ty
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    PARTS: tl.constexpr = TILE.parts
    slots, width = walk.slots, walk.width
    o_first = walk.o_column - walk.o_column % walk.spread
    b_pivot = load_pivot(Summed(x, None, None), o_first, walk.m_column, walk, ACC, OFFSET)
    b_count, b_mean, b_m2 = group_moments(Summed(x, None, None), b_pivot, walk, whole, TILE, ACC)
    o_channel, m_channel = own_channels(walk, PARTS)
    # Several threads hold a channel, and one of them stores it: all have read before.
    old = load_running(norm, o_channel, m_channel)
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
        (b_n, b_mean, b_m2, b_first), old, norm, o_channel, m_channel, walk.channels, moving, False
    )
    b_scale = b_invstd * load_vector(norm.weight, o_channel, m_channel, 1.0, ACC)
    if PARTS > 0:
        b_mean = to_columns(b_mean, slots, width, walk.o_column.shape[0])
        b_low = to_columns(b_low, slots, width, walk.o_column.shape[0])
        b_scale = to_columns(b_scale, slots, width, walk.o_column.shape[0])
        b_bias = to_columns(b_bias, slots, width, walk.o_column.shape[0])
    return Affine(b_mean, b_low, b_scale, b_bias)


@triton.jit(do_not_specialize=ANY_WHOLE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_forward_kernel(
    of,
    out,
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
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out.y, saved [4, C] and the running statistics, and out.bits with `writes_bits`. adds: whether y has a
    residual; normalizes: whether that has a BatchNorm. What is not there has a stand-in.
    """
    ACC: tl.constexpr = of.x.norm.saved.dtype.element_ty
    SECTOR: tl.constexpr = 32 // (of.x.p.dtype.element_ty.primitive_bitwidth // 8)
    sizes = Sizes(outer, inner, spread, tiles_inner, tiles, None, width, slots)
    walk = walk_of(sizes, channels, SECTOR, TILE)
    stride = walk_stride(walk, row_stride)
    bits_stride = (bits_outer, bits_inner, bits_piece, 1)
    norm = _norm_of(View(of.x.p, stride), of.x.norm, walk, whole, Moving(momentum, eps, keep), TILE)
    residual_norm = None
    if of.residual.norm.saved is not None:
        b_mean = tl.zeros(walk.o_column.shape, ACC)
        b_low = tl.zeros(walk.o_column.shape, ACC)
        b_scale = tl.zeros(walk.o_column.shape, ACC)
        b_bias = tl.zeros(walk.o_column.shape, ACC)
        if normalizes:
            b_mean, b_low, b_scale, b_bias = _norm_of(
                View(of.residual.p, stride), of.residual.norm, walk, whole,
                Moving(residual_momentum, residual_eps, keep), TILE,
            )  # fmt: skip
        residual_norm = Affine(b_mean, b_low, b_scale, b_bias)
    apply_tiles(
        Pair(of.x, of.residual), Pair(norm, residual_norm),
        Output(View(out.y, stride), View(out.bits, bits_stride)), walk, Tail(adds, normalizes, writes_bits), TILE,
        ACTIVATION,
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
            Pair(
                Branch(x, None, _written(norm, running)),
                Branch(x if residual is None else residual, None, _written(other, moved)),
            ),
            Output(y, p.empty((1,), torch.uint8) if bits is None else bits),
            whole.row_stride,
            *whole.integers(),
            whole.tile.whole,
            whole.tile.tiles_inner if whole.is_flat else None,
            whole.tile.tiles,
            int(residual is not None),
            int(len(norms) > 1),
            int(bits is not None),
            int(running.keep),
            running.momentum,
            norm.eps,
            moved.momentum,
            other.eps,
        ),
        {
            "TILE": whole.block._replace(whole_bytes=whole.has_whole_bytes),
            "ACTIVATION": Activation(*activation),
        },
        whole.tile.options,
    )


def _written(norm: Norm, running: Running) -> Vectors:
    return Vectors(norm.weight, norm.bias, running.mean, running.var, running.batches, norm.saved)

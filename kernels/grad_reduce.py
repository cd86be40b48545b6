"""First pass of the backward: the two sums of each channel that everything else needs.

    dbias = sum(dz),  sum(dz * (x - mean)) = dweight / invstd          dz = dy * act'(z)

Reads dy and x once (and a tail's mask, one bit an element, or its residual where act' takes more than two values),
writes 2 values a channel (or block of columns) and program. A residual that has a BatchNorm of its own is read once
too, for its own sums. So is a second gradient of the output, which came over the skip connection: dy is the sum of
both then, and dz is written, for the second pass to read instead. Where dx needs none of the sums (nothing was
normalised: dx = scale * dz) it is written here too, and there is no second pass. Parallel and deterministic as the
statistics pass is. The rows of a column that a thread has in a tile are added up first; the sums over the tiles of
float32 tensors are compensated (PyTorch's own are double on a CPU), 16-bit tensors have fewer digits to lose and less
time a byte. The last sum is in float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .grad import Operand, load_dz
from .launch import Tile, is_aligned
from .layout import RowMap, Strides, mask_of
from .moments import (
    add_compensated,
    fold,
    normalize,
    product,
    store_sums,
    sum_rows,
)
from .norm import load_norm
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    arithmetic,
    load_tile,
    load_vector,
    only_if,
    row_vectors,
    sum_groups,
    tile_columns,
    tile_offsets,
    tile_rows,
)


class Skip(NamedTuple):
    """A second gradient of the output: where its rows stand, and where the sum of both goes (masked; or nowhere).

    place: (H, W, stride of H, of W, its own H, its own W) of one that has every stride-th position only; `stride` is
    its own then, as if its positions stood in one row.
    """

    gradient: Tensor | None
    stride: Strides | None
    place: tuple[int, ...] | None
    dz: Tensor | None


NO_SKIP = Skip(None, None, None, None)


@triton.jit
def _add(
    b_sum,
    b_low,
    b_more,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """sum + more [rows, columns], a thread's rows together; and what that rounds off."""
    b_more = sum_groups(b_more, GROUP, RUN)
    if COMPENSATED:
        b_sum, b_low = add_compensated(b_sum, b_low, b_more)
    else:
        b_sum += b_more
    return b_sum, b_low


@triton.jit
def _times_centered(b_dz, b_x, b_mean, ALIKE: tl.constexpr):
    """dz * (x - mean), 0 where dz is. Unless the strides of all tensors are ALIKE the rows of a group may be given to
    several threads, and the product is not to be contracted with their sum.
    """
    b_centered = b_x - b_mean[None, :]
    if ALIKE:
        b = b_dz * b_centered
    else:
        b = product(b_dz, b_centered)
    return b


@triton.jit
def off_mean(b_dot, b_sum, p_saved, channels, o_channel, m_channel, ACC: tl.constexpr):
    """sum(dz * (x - mean - mean_low)) of sum(dz * (x - mean)) and sum(dz): the mean's second part once a program.

    It is read here: through the loop it would take registers.
    """
    if p_saved is not None:
        b_mean_low = load_vector(p_saved + channels, o_channel, m_channel, 0.0, ACC)
        b_dot -= tl.where(tl.abs(b_sum) < float("inf"), b_sum * b_mean_low, 0.0)
    return b_dot


@triton.jit
def grad_sums(
    p_dy,
    p_skip,
    p_x,
    p_bits,
    p_residual,
    p_residual_saved,
    p_dz,
    p_dx,
    norm,
    residual_norm,
    dy_stride,
    skip_stride,
    skip_place,
    x_stride,
    residual_stride,
    out_stride,
    bits_stride,
    o_column,
    m_column,
    outer,
    inner,
    columns,
    own,
    spread,
    tiles_inner,
    tiles,
    i_program,
    programs,
    adds,
    normalizes,
    FLAT: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    ALIKE: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sum(dz), sum(dz * (x - mean)), sum(dz * (residual - its mean)) of the tiles of a program, each as (value, low)
    [groups of rows, columns], the last 0 where the residual has no BatchNorm. norm: what `load_norm` gives.

    adds, normalizes: whether there are a second gradient and a BatchNorm of the residual, if these are given at all.
    """
    BLOCK_CHANNELS: tl.constexpr = o_column.shape[0]
    ROWS: tl.constexpr = BLOCK_OUTER * BLOCK_INNER
    COMPENSATED: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth >= 32
    b_mean, b_mean_low, b_scale, b_bias = norm
    b_rmean, b_rmean_low, b_rscale, b_rbias = residual_norm
    b_high, b_low = fold(b_mean, b_mean_low, b_scale, b_bias)
    b_rhigh, b_rlow = fold(b_rmean, b_rmean_low, b_rscale, b_rbias)

    b_sum = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_dot = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_sum_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_dot_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    # z is computed again where there is no mask of it, and the residual is part of it; with a BatchNorm of its own it
    # has sums of its own too.
    AGAIN: tl.constexpr = ACTIVATION is not None and p_bits is None
    IN_Z: tl.constexpr = p_residual is not None and AGAIN
    b_rdot = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_rdot_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    for i_tile in tl.range(i_program, tiles, programs, num_stages=STAGES):
        o_outer, o_inner, m_row = tile_rows(
            i_tile, outer, inner, tiles_inner, BLOCK_OUTER, BLOCK_INNER, OFFSET
        )
        m = tl.broadcast_to(m_row[:, None], [ROWS, BLOCK_CHANNELS])
        if not EVEN:
            m &= m_column[None, :]
        o_out = tile_offsets(o_outer, o_inner, o_column, out_stride, spread)
        o_x = tile_offsets(o_outer, o_inner, o_column, x_stride, spread, o_out)
        b_x = load_tile(p_x, o_x, m, ACC)
        if IN_Z or p_residual_saved is not None:
            o_residual = tile_offsets(o_outer, o_inner, o_column, residual_stride, spread, o_out)
            m_residual = m if IN_Z else only_if(m, normalizes)
            b_residual = load_tile(p_residual, o_residual, m_residual, ACC)
        if AGAIN:
            b_z = normalize(b_x, b_scale, b_high, b_low)
            if IN_Z:
                b_z += normalize(b_residual, b_rscale, b_rhigh, b_rlow)
        else:
            b_z = None
        b_dz = load_dz(
            p_dy, p_skip, p_bits, b_z, o_out, o_outer, o_inner, o_column, m, i_tile,
            outer, inner, columns, own, spread, tiles_inner, dy_stride, skip_stride, skip_place, bits_stride,
            adds, None,
            ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, BLOCK_CHANNELS, OFFSET, STAGES, FLAT,
        )  # fmt: skip
        if p_dz is not None:
            if adds:
                tl.store(p_dz + o_out, b_dz.to(p_dz.dtype.element_ty), mask=m)
        if p_dx is not None:
            tl.store(p_dx + o_out, (b_scale[None, :] * b_dz).to(p_dx.dtype.element_ty), mask=m)
        b_sum, b_sum_low = _add(b_sum, b_sum_low, b_dz, GROUP, RUN, COMPENSATED)
        b_more = _times_centered(b_dz, b_x, b_mean, ALIKE)
        b_dot, b_dot_low = _add(b_dot, b_dot_low, b_more, GROUP, RUN, COMPENSATED)
        if p_residual_saved is not None:
            if normalizes:
                b_more = _times_centered(b_dz, b_residual, b_rmean, ALIKE)
                b_rdot, b_rdot_low = _add(b_rdot, b_rdot_low, b_more, GROUP, RUN, COMPENSATED)
    return (b_sum, b_sum_low), (b_dot, b_dot_low), (b_rdot, b_rdot_low)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_grad_reduce_kernel(
    p_dy,
    p_skip,
    p_x,
    p_bits,
    p_weight,
    p_saved,
    p_partial,
    p_residual,
    p_residual_weight,
    p_residual_saved,
    p_residual_partial,
    p_dz,
    p_dx,
    dy_stride,
    skip_stride,
    skip_place,
    x_stride,
    residual_stride,
    out_stride,
    bits_stride,
    outer,
    inner,
    channels,
    spread,
    tiles_inner,
    tiles,
    programs,
    width,
    slots,
    FLAT: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    ALIKE: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [programs, 2, width]: sum(dz), sum(dz * (x - mean)); residual_partial likewise, where it has a
    BatchNorm.
    """
    inner = row_vectors(inner, ROW_VECTORS)
    i_program = tl.program_id(1)
    columns = channels * spread
    o_column, m_column = tile_columns(columns, None, BLOCK_CHANNELS, OFFSET)
    norm = load_norm(
        None, None, p_saved, p_weight, None,
        o_column, m_column, channels, spread, i_program, 0.0, ACC,
    )  # fmt: skip
    residual_norm = load_norm(
        None, None, p_residual_saved, p_residual_weight, None,
        o_column, m_column, channels, spread, i_program, 0.0, ACC,
    )  # fmt: skip
    b_sum, b_dot, b_rdot = grad_sums(
        p_dy, p_skip, p_x, p_bits, p_residual, p_residual_saved, p_dz, p_dx, norm, residual_norm,
        dy_stride, skip_stride, skip_place, x_stride, residual_stride, out_stride, bits_stride,
        o_column, m_column, outer, inner, columns, None, spread, tiles_inner, tiles, i_program, programs,
        True, True,
        FLAT, GROUP, RUN, ALIKE, EVEN, ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip

    o_channel = o_column // spread
    b_sum = sum_rows(b_sum[0], b_sum[1])
    b_dot = sum_rows(b_dot[0], b_dot[1])
    b_dot = off_mean(b_dot, b_sum, p_saved, channels, o_channel, m_column, ACC)
    p_row = p_partial + i_program * 2 * width
    store_sums(p_row, b_sum, o_column, m_column, spread, slots, FLAT)
    store_sums(p_row + width, b_dot, o_column, m_column, spread, slots, FLAT)
    if p_residual_saved is not None:
        b_dot = sum_rows(b_rdot[0], b_rdot[1])
        b_dot = off_mean(b_dot, b_sum, p_residual_saved, channels, o_channel, m_column, ACC)
        p_row = p_residual_partial + i_program * 2 * width
        store_sums(p_row, b_sum, o_column, m_column, spread, slots, FLAT)
        store_sums(p_row + width, b_dot, o_column, m_column, spread, slots, FLAT)


def launch_bn_grad_reduce(
    p: Planner,
    dy: Tensor,
    main: Operand,
    residual: Operand,
    bits: Tensor | None,
    skip: Skip | None,
    dx: Tensor | None,
    rows: RowMap,
    tile: Tile,
    activation: tuple[str | None, float],
) -> None:
    """partial <- dy, x; rows.strides: the output, x, dy, and the residual where given."""
    skip = skip or NO_SKIP
    groups = tile.groups(rows.channels_fastest or all(map(is_aligned, (dy, main.x, residual.x))))
    mask = mask_of(bits, rows)
    p.start(
        bn_grad_reduce_kernel,
        tile.grid,
        (
            dy, skip.gradient, main.x, bits, main.norm.weight, main.norm.saved, main.partial,
            residual.x, residual.norm.weight, residual.norm.saved, residual.partial, skip.dz, dx,
        ),
        (
            rows.others[2],
            None if skip.place is None and skip.stride == rows.strides[0] else skip.stride,
            skip.place,
            rows.others[1],
            rows.others[3] if residual.x is not None else None,
            rows.strides[0],
            mask.stride,
            rows.outer,
            rows.inner,
            rows.channels,
            rows.spread,
            tile.tiles_inner if rows.outer > 1 else None,
            tile.tiles,
            tile.programs,
            tile.width,
            tile.slots,
        ),
        (),
        {
            "FLAT": rows.spread > 1,
            **groups,
            "EVEN": tile.even,
            "ALIKE": skip.gradient is None and len(set(rows.strides)) == 1,
            "ACTIVATION": activation[0],
            "SLOPE": activation[1],
            "PACK_CHANNELS": mask.packs_channels,
            "ROW_VECTORS": rows.row_vectors,
            **arithmetic(main.x.dtype, rows),
        },
        tile.options,
    )  # fmt: skip

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

from .activation import Activation
from .grad import At, Flags, Incoming, Operand, Second, Terms, grad_of_z, load_dy
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
from .norm import Branch, Vectors, load_norm
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    Pair,
    Sizes,
    View,
    load_tile,
    load_vector,
    only_if,
    sum_groups,
    tile_offsets,
    tile_rows,
    walk_of,
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

    def told(self, stride: Strides) -> Second:
        """What a kernel is told of it whose output has such strides."""
        is_alike = self.place is None and self.stride == stride
        return Second(self.gradient, None if is_alike else self.stride, self.place)


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
def off_mean(b_dot, b_sum, p_saved, walk, ACC: tl.constexpr):
    """sum(dz * (x - mean - mean_low)) of sum(dz * (x - mean)) and sum(dz): the mean's second part once a program.

    It is read here: through the loop it would take registers.
    """
    if p_saved is not None:
        o_channel = walk.o_column // walk.spread
        b_mean_low = load_vector(p_saved + walk.channels, o_channel, walk.m_column, 0.0, ACC)
        b_dot -= tl.where(tl.abs(b_sum) < float("inf"), b_sum * b_mean_low, 0.0)
    return b_dot


@triton.jit
def grad_sums(
    incoming, of, terms, stride, walk, flags, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """sum(dz), sum(dz * (x - mean)), sum(dz * (residual - its mean)) of the tiles of a program, each as (value, low)
    [groups of rows, columns], the last 0 where the residual has no BatchNorm. of: the `Branch` of x, and of the
    residual; x.scaled is written where given. terms: `Terms`; stride: of what is written; flags: `Flags`.
    """
    BLOCK_CHANNELS: tl.constexpr = walk.o_column.shape[0]
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    GROUP: tl.constexpr = TILE.group
    RUN: tl.constexpr = TILE.run
    ROWS: tl.constexpr = TILE.outer * TILE.inner
    COMPENSATED: tl.constexpr = of.x.p.dtype.element_ty.primitive_bitwidth >= 32
    o_column, spread = walk.o_column, walk.spread
    norm, residual_norm = terms.x, terms.residual
    b_mean, b_scale = norm.mean, norm.scale
    b_rmean, b_rscale = residual_norm.mean, residual_norm.scale
    b_high, b_low = fold(b_mean, norm.mean_low, b_scale, norm.bias)
    b_rhigh, b_rlow = fold(b_rmean, residual_norm.mean_low, b_rscale, residual_norm.bias)

    b_sum = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_dot = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_sum_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_dot_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    # z is computed again where there is no mask of it, and the residual is part of it; with a BatchNorm of its own it
    # has sums of its own too.
    AGAIN: tl.constexpr = ACTIVATION.name is not None and incoming.bits.p is None
    IN_Z: tl.constexpr = of.residual.p is not None and AGAIN
    b_rdot = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    b_rdot_low = tl.zeros([ROWS // GROUP, BLOCK_CHANNELS], ACC)
    for i_tile in tl.range(walk.first, walk.tiles, walk.programs, num_stages=TILE.stages):
        o_outer, o_inner, m_row = tile_rows(i_tile, walk, TILE)
        m = tl.broadcast_to(m_row[:, None], [ROWS, BLOCK_CHANNELS])
        EVEN: tl.constexpr = TILE.even
        if not EVEN:
            m &= walk.m_column[None, :]
        o_out = tile_offsets(o_outer, o_inner, o_column, stride, spread)
        o_x = tile_offsets(o_outer, o_inner, o_column, of.x.stride, spread, o_out)
        b_x = load_tile(of.x.p, o_x, m, ACC)
        if IN_Z or of.residual.norm.saved is not None:
            o_residual = tile_offsets(o_outer, o_inner, o_column, of.residual.stride, spread, o_out)
            m_residual = m if IN_Z else only_if(m, flags.normalizes)
            b_residual = load_tile(of.residual.p, o_residual, m_residual, ACC)
        if AGAIN:
            b_z = normalize(b_x, b_scale, b_high, b_low)
            if IN_Z:
                b_z += normalize(b_residual, b_rscale, b_rhigh, b_rlow)
        else:
            b_z = None
        at = At(i_tile, o_outer, o_inner, m, o_out)
        b_dy = load_dy(incoming, at, walk, ACC, TILE.stages)
        b_dz = grad_of_z(incoming, b_dy, b_z, at, walk, flags, TILE, ACTIVATION)
        if incoming.dz is not None:
            if flags.adds:
                tl.store(incoming.dz + o_out, b_dz.to(incoming.dz.dtype.element_ty), mask=m)
        if of.x.scaled is not None:
            b_dx = b_scale[None, :] * b_dz
            tl.store(of.x.scaled + o_out, b_dx.to(of.x.scaled.dtype.element_ty), mask=m)
        b_sum, b_sum_low = _add(b_sum, b_sum_low, b_dz, GROUP, RUN, COMPENSATED)
        b_more = _times_centered(b_dz, b_x, b_mean, TILE.alike)
        b_dot, b_dot_low = _add(b_dot, b_dot_low, b_more, GROUP, RUN, COMPENSATED)
        if of.residual.norm.saved is not None:
            if flags.normalizes:
                b_more = _times_centered(b_dz, b_residual, b_rmean, TILE.alike)
                b_rdot, b_rdot_low = _add(b_rdot, b_rdot_low, b_more, GROUP, RUN, COMPENSATED)
    return (b_sum, b_sum_low), (b_dot, b_dot_low), (b_rdot, b_rdot_low)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_grad_reduce_kernel(
    incoming,
    of,
    stride,
    outer,
    inner,
    channels,
    spread,
    tiles_inner,
    tiles,
    programs,
    width,
    slots,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """x.partial [programs, 2, width]: sum(dz), sum(dz * (x - mean)); residual.partial likewise, where it has a
    BatchNorm; see `grad_sums`.
    """
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    sizes = Sizes(outer, inner, spread, tiles_inner, tiles, programs)
    walk = walk_of(sizes, channels, 1, TILE)
    norm = load_norm(of.x.norm, walk, 0.0, ACC)
    residual_norm = load_norm(of.residual.norm, walk, 0.0, ACC)
    b_sum, b_dot, b_rdot = grad_sums(
        incoming, of, Terms(norm, residual_norm), stride, walk, Flags(), TILE, ACTIVATION
    )

    b_sum = sum_rows(b_sum[0], b_sum[1])
    b_dot = sum_rows(b_dot[0], b_dot[1])
    b_dot = off_mean(b_dot, b_sum, of.x.norm.saved, walk, ACC)
    p_row = of.x.partial + walk.first * 2 * width
    store_sums(p_row, b_sum, walk, slots, TILE.flat)
    store_sums(p_row + width, b_dot, walk, slots, TILE.flat)
    if of.residual.norm.saved is not None:
        b_dot = sum_rows(b_rdot[0], b_rdot[1])
        b_dot = off_mean(b_dot, b_sum, of.residual.norm.saved, walk, ACC)
        p_row = of.residual.partial + walk.first * 2 * width
        store_sums(p_row, b_sum, walk, slots, TILE.flat)
        store_sums(p_row + width, b_dot, walk, slots, TILE.flat)


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
            Incoming(
                View(dy, rows.others[2]),
                skip.told(rows.strides[0]),
                View(bits, mask.stride),
                skip.dz,
            ),
            Pair(
                Branch(
                    main.x,
                    rows.others[1],
                    Vectors(main.norm.weight, saved=main.norm.saved),
                    partial=main.partial,
                    scaled=dx,
                ),
                Branch(
                    residual.x,
                    rows.others[3] if residual.x is not None else None,
                    Vectors(residual.norm.weight, saved=residual.norm.saved),
                    partial=residual.partial,
                ),
            ),
            rows.strides[0],
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
        {
            "TILE": tile.block(rows)._replace(
                even=tile.even,
                alike=skip.gradient is None and len(set(rows.strides)) == 1,
                packs_channels=mask.packs_channels,
                **groups,
            ),
            "ACTIVATION": Activation(*activation),
        },
        tile.options,
    )

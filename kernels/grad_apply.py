"""Second pass of the backward: dx, and in the same pass the gradient of the residual.

    dx = (scale * dz + level) + slope * (x - mean),  dresidual = dz        scale = invstd * weight

A residual that has a BatchNorm of its own gets its gradient as x does. slope and level [C] come from
`bn_grad_finalize_kernel` (Ioffe and Szegedy 2015, section 3); in eval they are absent and dx = scale * dz. Reads dy, x
(and a tail's mask, or its residual), writes dx and dresidual, each at most once. Parallel over row programs and blocks
of columns; no reduction. Tiles run in the reverse order of the reducing pass. What x was used for besides gives a
gradient too (the sum of a pre-activation unit): it is read and added to dx.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activation import Activation
from .grad import NO_SECOND, At, Flags, Incoming, Operand, Terms, grad_of_z, load_dy
from .launch import Tile
from .layout import RowMap, mask_of
from .moments import fma, fold, normalize
from .norm import Branch, Vectors, load_norm
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    Pair,
    Sizes,
    View,
    load_vector,
    only_if,
    tile_offsets,
    tile_rows,
    walk_of,
    widen,
)


@triton.jit
def _grad_input(b_dz, b_x, b_scale, b_slope, b_high, b_low):
    """(scale * dz + level) + slope * (x - mean), the second part folded. In this order, which is PyTorch's, two values
    of a channel err no more than there, though their terms cancel.
    """
    b_zero = tl.zeros_like(b_x)
    b_part = fma(b_x, b_slope[None, :] + b_zero, b_high[None, :] + b_zero)
    return fma(b_dz, b_scale[None, :] + b_zero, b_low[None, :] + b_zero) + b_part


@triton.jit
def grad_apply_tiles(
    incoming, of, terms, stride, walk, flags, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """The gradients of x and of the residual (each where given) <- incoming, the tiles of a program. of: the `Branch`
    of each; terms: `Terms`; stride: of the gradients; flags: `Flags`."""
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    o_column, spread = walk.o_column, walk.spread
    norm, residual_norm = terms.x, terms.residual
    b_scale, b_rscale = norm.scale, residual_norm.scale
    if terms.coefficients is not None:
        b_slope = terms.coefficients[0]
        b_slope_high, b_slope_low = fold(
            norm.mean, norm.mean_low, b_slope, terms.coefficients[1]
        )  # fmt: skip
    if terms.residual_coefficients is not None:
        b_rslope = terms.residual_coefficients[0]
        b_rslope_high, b_rslope_low = fold(
            residual_norm.mean, residual_norm.mean_low, b_rslope, terms.residual_coefficients[1]
        )
    # z is computed again where there is no mask of it, and the residual is part of it.
    AGAIN: tl.constexpr = ACTIVATION.name is not None and incoming.bits.p is None
    IN_Z: tl.constexpr = of.residual.p is not None and AGAIN
    b_high, b_low = fold(norm.mean, norm.mean_low, b_scale, norm.bias)
    b_rhigh, b_rlow = fold(residual_norm.mean, residual_norm.mean_low, b_rscale, residual_norm.bias)

    for i in tl.range(walk.first, walk.tiles, walk.programs, num_stages=TILE.second):
        i_tile = walk.tiles - 1 - i
        o_outer, o_inner, m_row = tile_rows(i_tile, walk, TILE)
        m = m_row[:, None] & walk.m_column[None, :]
        o_out = tile_offsets(o_outer, o_inner, o_column, stride, spread)
        if terms.coefficients is not None or AGAIN:
            o_x = tile_offsets(o_outer, o_inner, o_column, of.x.stride, spread, o_out)
            b_x = widen(tl.load(of.x.p + o_x, mask=m, other=0.0), ACC)
        if IN_Z or terms.residual_coefficients is not None:
            o_residual = tile_offsets(o_outer, o_inner, o_column, of.residual.stride, spread, o_out)
            m_residual = m if IN_Z else only_if(m, flags.normalizes)
            b_residual = widen(tl.load(of.residual.p + o_residual, mask=m_residual, other=0.0), ACC)
        if AGAIN:
            b_z = normalize(b_x, b_scale, b_high, b_low)
            if IN_Z:
                b_z += normalize(b_residual, b_rscale, b_rhigh, b_rlow)
        else:
            b_z = None
        at = At(i_tile, o_outer, o_inner, m, o_out)
        b_dy = load_dy(incoming, at, walk, ACC, TILE.second)
        b_dz = grad_of_z(incoming, b_dy, b_z, at, walk, flags, TILE, ACTIVATION)
        if of.x.gradient is not None:
            if terms.coefficients is not None:
                b_dx = _grad_input(b_dz, b_x, b_scale, b_slope, b_slope_high, b_slope_low)
            else:
                b_dx = b_scale[None, :] * b_dz
            if of.x.addend.p is not None:
                o_addend = tile_offsets(
                    o_outer, o_inner, o_column, of.x.addend.stride, spread, o_out
                )
                b_dx += widen(tl.load(of.x.addend.p + o_addend, mask=m, other=0.0), ACC)
            tl.store(of.x.gradient + o_out, b_dx.to(of.x.gradient.dtype.element_ty), mask=m)
        if of.residual.gradient is not None:
            if flags.writes_residual:
                if terms.residual_coefficients is None:
                    b_dx = b_rscale[None, :] * b_dz
                else:
                    b_dx = b_dz
                    if flags.normalizes:
                        b_dx = _grad_input(
                            b_dz, b_residual, b_rscale, b_rslope, b_rslope_high, b_rslope_low
                        )
                p_gradient = of.residual.gradient
                tl.store(p_gradient + o_out, b_dx.to(p_gradient.dtype.element_ty), mask=m)


@triton.jit
def _load_coefficients(p_coefficients, walk, ACC: tl.constexpr):
    """(slope, level), or None where there are none."""
    if p_coefficients is None:
        coefficients = None
    else:
        o_channel, m_channel = walk.o_column // walk.spread, walk.m_column
        b_slope = load_vector(p_coefficients, o_channel, m_channel, 0.0, ACC)
        b_level = load_vector(p_coefficients + walk.channels, o_channel, m_channel, 0.0, ACC)
        coefficients = (b_slope, b_level)
    return coefficients


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_grad_apply_kernel(
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
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The gradients of x and of the residual (each where given) <- incoming; see `grad_apply_tiles`."""
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    sizes = Sizes(outer, inner, spread, tiles_inner, tiles, programs)
    walk = walk_of(sizes, channels, 1, TILE)
    norm = load_norm(of.x.norm, walk, 0.0, ACC)
    residual_norm = load_norm(of.residual.norm, walk, 0.0, ACC)
    coefficients = _load_coefficients(of.x.coefficients, walk, ACC)
    residual_coefficients = _load_coefficients(of.residual.coefficients, walk, ACC)
    grad_apply_tiles(
        incoming, of, Terms(norm, residual_norm, coefficients, residual_coefficients), stride, walk, Flags(), TILE,
        ACTIVATION,
    )  # fmt: skip


def launch_bn_grad_apply(
    p: Planner,
    dy: Tensor,
    main: Operand,
    residual: Operand,
    bits: Tensor | None,
    addend: Tensor | None,
    rows: RowMap,
    tile: Tile,
    activation: tuple[str | None, float],
) -> None:
    """The gradients (where given) <- dy, x; rows.strides: theirs, x, dy, and the residual or the addend where given."""
    mask = mask_of(bits, rows)
    p.start(
        bn_grad_apply_kernel,
        tile.grid,
        (
            Incoming(View(dy, rows.others[2]), NO_SECOND, View(bits, mask.stride)),
            Pair(
                Branch(
                    main.x,
                    rows.others[1],
                    Vectors(main.norm.weight, saved=main.norm.saved),
                    coefficients=main.coefficients,
                    gradient=main.gradient,
                    addend=View(addend, rows.others[3] if addend is not None else None),
                ),
                Branch(
                    residual.x,
                    rows.others[3] if residual.x is not None else None,
                    Vectors(residual.norm.weight, saved=residual.norm.saved),
                    coefficients=residual.coefficients,
                    gradient=residual.gradient,
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
        ),
        {
            "TILE": tile.block(rows)._replace(packs_channels=mask.packs_channels),
            "ACTIVATION": Activation(*activation),
        },
        tile.options,
    )

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

from .grad import Operand, load_dz
from .launch import Tile
from .layout import RowMap, mask_of
from .moments import fma, fold, normalize
from .norm import load_norm
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    arithmetic,
    load_vector,
    only_if,
    row_vectors,
    tile_columns,
    tile_offsets,
    tile_rows,
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
    p_dy,
    p_x,
    p_bits,
    p_dx,
    p_dresidual,
    p_residual,
    p_addend,
    norm,
    residual_norm,
    coefficients,
    residual_coefficients,
    dy_stride,
    x_stride,
    residual_stride,
    addend_stride,
    bits_stride,
    out_stride,
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
    normalizes,
    everything,
    writes_residual,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx and dresidual (each where given) <- dy, x, the tiles of a program. norm: what `load_norm` gives; coefficients:
    (slope, level) of the columns, or None. The same of the residual.

    normalizes, writes_residual: whether the residual has a BatchNorm, and a gradient, if these are given at all;
    everything: as in `load_dz`.
    """
    BLOCK_CHANNELS: tl.constexpr = o_column.shape[0]
    b_mean, b_mean_low, b_scale, b_bias = norm
    b_rmean, b_rmean_low, b_rscale, b_rbias = residual_norm
    if coefficients is not None:
        b_slope = coefficients[0]
        b_slope_high, b_slope_low = fold(b_mean, b_mean_low, b_slope, coefficients[1])
    if residual_coefficients is not None:
        b_rslope = residual_coefficients[0]
        b_rslope_high, b_rslope_low = fold(b_rmean, b_rmean_low, b_rslope, residual_coefficients[1])
    # z is computed again where there is no mask of it, and the residual is part of it.
    AGAIN: tl.constexpr = ACTIVATION is not None and p_bits is None
    IN_Z: tl.constexpr = p_residual is not None and AGAIN
    b_high, b_low = fold(b_mean, b_mean_low, b_scale, b_bias)
    b_rhigh, b_rlow = fold(b_rmean, b_rmean_low, b_rscale, b_rbias)

    for i in tl.range(i_program, tiles, programs, num_stages=STAGES):
        i_tile = tiles - 1 - i
        o_outer, o_inner, m_row = tile_rows(
            i_tile, outer, inner, tiles_inner, BLOCK_OUTER, BLOCK_INNER, OFFSET
        )
        m = m_row[:, None] & m_column[None, :]
        o_out = tile_offsets(o_outer, o_inner, o_column, out_stride, spread)
        if coefficients is not None or AGAIN:
            o_x = tile_offsets(o_outer, o_inner, o_column, x_stride, spread, o_out)
            b_x = widen(tl.load(p_x + o_x, mask=m, other=0.0), ACC)
        if IN_Z or residual_coefficients is not None:
            o_residual = tile_offsets(o_outer, o_inner, o_column, residual_stride, spread, o_out)
            m_residual = m if IN_Z else only_if(m, normalizes)
            b_residual = widen(tl.load(p_residual + o_residual, mask=m_residual, other=0.0), ACC)
        if AGAIN:
            b_z = normalize(b_x, b_scale, b_high, b_low)
            if IN_Z:
                b_z += normalize(b_residual, b_rscale, b_rhigh, b_rlow)
        else:
            b_z = None
        b_dz = load_dz(
            p_dy, None, p_bits, b_z, o_out, o_outer, o_inner, o_column, m, i_tile,
            outer, inner, columns, own, spread, tiles_inner, dy_stride, None, None, bits_stride,
            True, everything,
            ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, BLOCK_CHANNELS, OFFSET, STAGES, False,
        )  # fmt: skip
        if p_dx is not None:
            if coefficients is not None:
                b_dx = _grad_input(b_dz, b_x, b_scale, b_slope, b_slope_high, b_slope_low)
            else:
                b_dx = b_scale[None, :] * b_dz
            if p_addend is not None:
                o_addend = tile_offsets(o_outer, o_inner, o_column, addend_stride, spread, o_out)
                b_dx += widen(tl.load(p_addend + o_addend, mask=m, other=0.0), ACC)
            tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m)
        if p_dresidual is not None:
            if writes_residual:
                if residual_coefficients is None:
                    b_dx = b_rscale[None, :] * b_dz
                else:
                    b_dx = b_dz
                    if normalizes:
                        b_dx = _grad_input(
                            b_dz, b_residual, b_rscale, b_rslope, b_rslope_high, b_rslope_low
                        )
                tl.store(p_dresidual + o_out, b_dx.to(p_dresidual.dtype.element_ty), mask=m)


@triton.jit
def _load_coefficients(p_coefficients, o_channel, m_channel, channels, ACC: tl.constexpr):
    """(slope, level), or None where there are none."""
    if p_coefficients is None:
        coefficients = None
    else:
        b_slope = load_vector(p_coefficients, o_channel, m_channel, 0.0, ACC)
        b_level = load_vector(p_coefficients + channels, o_channel, m_channel, 0.0, ACC)
        coefficients = (b_slope, b_level)
    return coefficients


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_grad_apply_kernel(
    p_dy,
    p_x,
    p_bits,
    p_weight,
    p_saved,
    p_coefficients,
    p_dx,
    p_dresidual,
    p_residual,
    p_residual_weight,
    p_residual_saved,
    p_residual_coefficients,
    p_addend,
    dy_stride,
    x_stride,
    residual_stride,
    addend_stride,
    bits_stride,
    out_stride,
    outer,
    inner,
    channels,
    spread,
    tiles_inner,
    tiles,
    programs,
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
    """dx and dresidual (each where given) <- dy, x."""
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
    coefficients = _load_coefficients(p_coefficients, o_column // spread, m_column, channels, ACC)
    residual_coefficients = _load_coefficients(
        p_residual_coefficients, o_column // spread, m_column, channels, ACC
    )
    grad_apply_tiles(
        p_dy, p_x, p_bits, p_dx, p_dresidual, p_residual, p_addend,
        norm, residual_norm, coefficients, residual_coefficients,
        dy_stride, x_stride, residual_stride, addend_stride, bits_stride, out_stride,
        o_column, m_column, outer, inner, columns, None, spread, tiles_inner, tiles, i_program, programs,
        True, None, True,
        ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
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
            dy, main.x, bits, main.norm.weight, main.norm.saved, main.coefficients, main.gradient, residual.gradient,
            residual.x, residual.norm.weight, residual.norm.saved, residual.coefficients, addend,
        ),
        (
            rows.others[2],
            rows.others[1],
            rows.others[3] if residual.x is not None else None,
            rows.others[3] if addend is not None else None,
            mask.stride,
            rows.strides[0],
            rows.outer,
            rows.inner,
            rows.channels,
            rows.spread,
            tile.tiles_inner if rows.outer > 1 else None,
            tile.tiles,
            tile.programs,
        ),
        (),
        {
            "ACTIVATION": activation[0],
            "SLOPE": activation[1],
            "PACK_CHANNELS": mask.packs_channels,
            "ROW_VECTORS": rows.row_vectors,
            **arithmetic(main.x.dtype, rows),
        },
        tile.options,
    )  # fmt: skip

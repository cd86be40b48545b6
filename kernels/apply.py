"""Second pass of the forward: y = act((x - mean) * invstd * weight + bias + residual).

x, residual, y [rows, columns]; mean, invstd, weight, bias [C]. A residual that has a BatchNorm of its own is
normalised as x is. Reads x (and the residual) once, writes y and, for a tail that will be differentiated, one bit an
element. Parallel over row programs and blocks of columns; no reduction. Arithmetic in float32 (float64 for float64),
rounded once. Tiles run in the reverse order of the statistics pass: what that pass read last is what the cache still
holds.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, passes
from .bits import byte_tile, pack
from .launch import ALONE, APPLYING, BITS, DUAL_SHARE, choose_tile
from .layout import RowMap, mask_of
from .moments import fold, normalize
from .norm import NO_NORM, Norm, load_norm
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    arithmetic,
    only_if,
    row_vectors,
    tile_columns,
    tile_offsets,
    tile_rows,
    widen,
)


@triton.jit
def apply_tiles(
    p_x,
    p_residual,
    p_y,
    p_bits,
    norm,
    residual_norm,
    x_stride,
    residual_stride,
    y_stride,
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
    writes_bits,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y (and bits) <- x, the tiles of a program; norm: what `load_norm` gives; residual_norm likewise, or None.

    Whether the residual is added, has its BatchNorm, and bits are written, if they are given at all: constants, or
    integers of a kernel that is one for all of these.
    """
    BLOCK_CHANNELS: tl.constexpr = o_column.shape[0]
    b_mean, b_mean_low, b_scale, b_bias = norm
    b_high, b_low = fold(b_mean, b_mean_low, b_scale, b_bias)
    if residual_norm is not None:
        b_mean, b_mean_low, b_rscale, b_bias = residual_norm
        b_rhigh, b_rlow = fold(b_mean, b_mean_low, b_rscale, b_bias)
    for i in tl.range(i_program, tiles, programs, num_stages=STAGES):
        i_tile = tiles - 1 - i
        o_outer, o_inner, m_row = tile_rows(
            i_tile, outer, inner, tiles_inner, BLOCK_OUTER, BLOCK_INNER, OFFSET
        )
        m = m_row[:, None] & m_column[None, :]
        o_y = tile_offsets(o_outer, o_inner, o_column, y_stride, spread)
        o_x = tile_offsets(o_outer, o_inner, o_column, x_stride, spread, o_y)
        b_x = widen(tl.load(p_x + o_x, mask=m, other=0.0), ACC)
        b_z = normalize(b_x, b_scale, b_high, b_low)
        if p_residual is not None:
            o_residual = tile_offsets(o_outer, o_inner, o_column, residual_stride, spread, o_y)
            b_residual = widen(
                tl.load(p_residual + o_residual, mask=only_if(m, adds), other=0.0), ACC
            )
            if adds:
                if residual_norm is not None:
                    if normalizes:
                        b_residual = normalize(b_residual, b_rscale, b_rhigh, b_rlow)
                b_z += b_residual
        b_y = activate(b_z, ACTIVATION, SLOPE)
        tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m)
        if p_bits is not None:
            if writes_bits:
                o_byte, m_byte = byte_tile(
                    i_tile, outer, inner, columns, own, tiles_inner, bits_stride,
                    PACK_CHANNELS, BLOCK_OUTER, BLOCK_INNER, BLOCK_CHANNELS, OFFSET,
                )  # fmt: skip
                m_bit = passes(b_z, ACTIVATION)
                if not WHOLE_BYTES:
                    m_bit &= m
                b_byte = pack(m_bit, PACK_CHANNELS)
                tl.store(p_bits + o_byte, b_byte, mask=m_byte)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_apply_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_running_mean,
    p_running_var,
    p_saved,
    p_residual_weight,
    p_residual_bias,
    p_residual_running_mean,
    p_residual_running_var,
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
    tiles_inner,
    tiles,
    programs,
    eps: "fp64",
    residual_eps: "fp64",
    NORMALIZE_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    ACC: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    inner = row_vectors(inner, ROW_VECTORS)
    i_program = tl.program_id(1)
    columns = channels * spread
    o_column, m_column = tile_columns(columns, None, BLOCK_CHANNELS, OFFSET)
    norm = load_norm(
        p_running_mean, p_running_var, p_saved, p_weight, p_bias,
        o_column, m_column, channels, spread, i_program, eps, ACC,
    )  # fmt: skip
    residual_norm = None
    if NORMALIZE_RESIDUAL:
        residual_norm = load_norm(
            p_residual_running_mean, p_residual_running_var, p_residual_saved, p_residual_weight, p_residual_bias,
            o_column, m_column, channels, spread, i_program, residual_eps, ACC,
        )  # fmt: skip
    apply_tiles(
        p_x, p_residual, p_y, p_bits, norm, residual_norm, x_stride, residual_stride, y_stride, bits_stride,
        o_column, m_column, outer, inner, columns, None, spread, tiles_inner, tiles, i_program, programs,
        True, True, True,
        ACTIVATION, SLOPE, PACK_CHANNELS, WHOLE_BYTES, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip


def launch_bn_apply(
    p: Planner,
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    y: Tensor,
    bits: Tensor | None,
    rows: RowMap,
    activation: tuple[str | None, float],
) -> None:
    """y (and bits) <- x; rows.strides are those of y, x and, where there is one, the residual."""
    if residual is None:
        kind, share = ALONE, 1
    else:
        kind, share = APPLYING, 1 if residual_norm is None else DUAL_SHARE
    tile = choose_tile(rows, x.element_size(), kind, p.chip, share)
    other = residual_norm or NO_NORM
    mask = mask_of(bits, rows)
    p.start(
        bn_apply_kernel,
        tile.grid,
        (
            x, residual,
            norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.saved,
            other.weight, other.bias, other.running_mean, other.running_var, other.saved,
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
            tile.tiles_inner if rows.outer > 1 else None,
            tile.tiles,
            tile.programs,
        ),
        (norm.eps, other.eps),
        {
            "NORMALIZE_RESIDUAL": residual_norm is not None,
            "ACTIVATION": activation[0],
            "SLOPE": activation[1],
            "PACK_CHANNELS": mask.packs_channels,
            "WHOLE_BYTES": (rows.columns if mask.packs_channels else rows.inner) % BITS == 0,
            "ROW_VECTORS": rows.row_vectors,
            **arithmetic(x.dtype, rows),
        },
        tile.options,
    )  # fmt: skip

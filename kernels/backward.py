"""The backward in one launch, where maps are small: sums, final step and application of a block of channels.

    dx = (scale * dz + level) + slope * (x - mean),  dresidual = dz        dz = dy * act'(z)

slope and level come from the two sums over the rows that `grad_reduce` states; dweight and dbias are written, too.
Reads dy and x (and a tail's mask, or its residual) twice, the second time from the cache, writes dx and dresidual once.
A second gradient of the output is read once, and dz written, for the second loop to read. Parallel over blocks of
channels alone (`launch.choose_whole`): a program walks all rows of its own, so that nothing is exchanged between
programs and a launch gives the same bits every time. The loops are those of `grad_reduce` and `grad_apply`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chip import Chip
from .finalize import finish_sums
from .grad import Operand
from .grad_apply import grad_apply_tiles
from .grad_reduce import NO_SKIP, Skip, grad_sums, off_mean
from .launch import Tile, is_aligned
from .layout import RowMap, mask_of
from .moments import sum_rows
from .norm import load_norm
from .plan import Planner
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

MOST_REGISTERS = 248  # of a thread; 8 warps of them fill a multiprocessor


@triton.jit
def _coefficients_of(
    b_dz,
    b_dot,
    p_saved,
    p_weight,
    p_dweight,
    p_dbias,
    o_column,
    m_column,
    channels,
    spread,
    inverse_count,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """(slope, level) of these columns, of the sums [columns] in float64; dweight and dbias are written."""
    b_dot = off_mean(b_dot, b_dz, p_saved, channels, o_column // spread, m_column, ACC)
    o_channel, m_channel = own_channels(o_column, m_column, channels, CHANNELS)
    if CHANNELS > 0:
        b_dz = tl.sum(of_channels(b_dz, spread, CHANNELS, SPREAD), axis=0)
        b_dot = tl.sum(of_channels(b_dot, spread, CHANNELS, SPREAD), axis=0)
    b_invstd = load_vector(p_saved + 2 * channels, o_channel, m_channel, 0.0, ACC)
    b_slope, b_level = finish_sums(
        b_dz,
        b_dot,
        b_invstd,
        p_weight,
        p_dweight,
        p_dbias,
        o_channel,
        m_channel,
        inverse_count,
        ACC,
    )
    if CHANNELS > 0:
        b_slope = to_columns(b_slope, o_column, spread, CHANNELS)
        b_level = to_columns(b_level, o_column, spread, CHANNELS)
    return b_slope, b_level


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_backward_kernel(
    p_dy,
    p_skip,
    p_x,
    p_bits,
    p_weight,
    p_saved,
    p_dweight,
    p_dbias,
    p_dx,
    p_dresidual,
    p_residual,
    p_residual_weight,
    p_residual_saved,
    p_residual_dweight,
    p_residual_dbias,
    p_addend,
    p_dz,
    dy_stride,
    skip_stride,
    skip_place,
    x_stride,
    residual_stride,
    addend_stride,
    out_stride,
    bits_stride,
    outer,
    inner,
    channels,
    spread,
    tiles_inner,
    tiles,
    inverse_count: "fp64",
    FLAT: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPREAD: tl.constexpr,
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
    """dx, dresidual, dweight and dbias (each where given), and those of a residual that has a BatchNorm. CHANNELS: of a
    program, in a flat walk, whose columns are at most SPREAD each; else 0.
    """
    inner = row_vectors(inner, ROW_VECTORS)
    columns = channels * spread
    step = channel_step(spread, CHANNELS, 32 // (p_x.dtype.element_ty.primitive_bitwidth // 8))
    o_column, m_column = tile_columns(columns, step, BLOCK_CHANNELS, OFFSET)
    norm = load_norm(
        None, None, p_saved, p_weight, None, o_column, m_column, channels, spread, 0, 0.0, ACC
    )
    residual_norm = load_norm(
        None, None, p_residual_saved, p_residual_weight, None, o_column, m_column, channels, spread, 0, 0.0, ACC,
    )  # fmt: skip
    b_sum, b_dot, b_rdot = grad_sums(
        p_dy, p_skip, p_x, p_bits, p_residual, p_residual_saved, p_dz, None, norm, residual_norm,
        dy_stride, skip_stride, skip_place, x_stride, residual_stride, out_stride, bits_stride,
        o_column, m_column, outer, inner, columns, step, spread, tiles_inner, tiles, 0, 1,
        FLAT, GROUP, RUN, ALIKE, EVEN, ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip
    b_dz = sum_rows(b_sum[0], b_sum[1])
    coefficients = _coefficients_of(
        b_dz, sum_rows(b_dot[0], b_dot[1]), p_saved, p_weight, p_dweight, p_dbias,
        o_column, m_column, channels, spread, inverse_count, ACC, CHANNELS, SPREAD,
    )  # fmt: skip
    residual_coefficients = None
    if p_residual_saved is not None:
        residual_coefficients = _coefficients_of(
            b_dz, sum_rows(b_rdot[0], b_rdot[1]), p_residual_saved, p_residual_weight, p_residual_dweight,
            p_residual_dbias, o_column, m_column, channels, spread, inverse_count, ACC, CHANNELS, SPREAD,
        )  # fmt: skip
    if p_dz is None:
        grad_apply_tiles(
            p_dy, p_x, p_bits, p_dx, p_dresidual, p_residual, p_addend,
            norm, residual_norm, coefficients, residual_coefficients,
            dy_stride, x_stride, residual_stride, addend_stride, bits_stride, out_stride,
            o_column, m_column, outer, inner, columns, step, spread, tiles_inner, tiles, 0, 1,
            ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, 1,
        )  # fmt: skip
    else:
        tl.debug_barrier()  # the other threads of this program have written dz
        grad_apply_tiles(
            p_dz, p_x, None, p_dx, p_dresidual, p_residual, p_addend,
            norm, residual_norm, coefficients, residual_coefficients,
            None, x_stride, residual_stride, addend_stride, None, out_stride,
            o_column, m_column, outer, inner, columns, step, spread, tiles_inner, tiles, 0, 1,
            None, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, 1,
        )  # fmt: skip


def launch_bn_backward(
    p: Planner,
    dy: Tensor,
    main: Operand,
    residual: Operand,
    bits: Tensor | None,
    addend: Tensor | None,
    skip: Skip | None,
    rows: RowMap,
    tile: Tile,
    activation: tuple[str | None, float],
) -> None:
    """The gradients of both (each where given) <- dy, x; rows.strides: theirs, x, dy, and the residual or the addend
    where given. With a second gradient skip.dz is written; it may be the residual's gradient, which is None then."""
    skip = skip or NO_SKIP
    mask = mask_of(bits, rows)
    p.start(
        bn_backward_kernel,
        tile.grid,
        (
            dy, skip.gradient, main.x, bits, main.norm.weight, main.norm.saved, main.dweight, main.dbias,
            main.gradient, residual.gradient,
            residual.x, residual.norm.weight, residual.norm.saved, residual.dweight, residual.dbias,
            addend, skip.dz,
        ),
        (
            rows.others[2],
            None if skip.place is None and skip.stride == rows.strides[0] else skip.stride,
            skip.place,
            rows.others[1],
            rows.others[3] if residual.x is not None else None,
            rows.others[3] if addend is not None else None,
            rows.strides[0],
            mask.stride,
            rows.outer,
            rows.inner,
            rows.channels,
            rows.spread,
            tile.tiles_inner if rows.outer > 1 else None,
            tile.tiles,
        ),
        (1.0 / rows.values,),
        {
            "FLAT": rows.spread > 1,
            **tile.groups(
                rows.channels_fastest or all(map(is_aligned, (dy, main.x, residual.x)))
            ),
            **tile.kept(rows.spread),
            "ALIKE": skip.gradient is None and len(set(rows.strides)) == 1,
            "EVEN": tile.even,
            "ACTIVATION": activation[0],
            "SLOPE": activation[1],
            "PACK_CHANNELS": mask.packs_channels,
            "ROW_VECTORS": rows.row_vectors,
            **arithmetic(main.x.dtype, rows),
        },
        tile.options | _registers(p.chip, skip.gradient is not None and residual.norm.saved is not None),
    )  # fmt: skip


def _registers(chip: Chip, is_crowded: bool) -> dict[str, int]:
    """All that one program may have, where it holds four tensors: ptxas aims at two programs' 128, and spills (sm_90,
    float32). AMD's compiler is not told."""
    return {"maxnreg": MOST_REGISTERS} if is_crowded and chip.backend == "cuda" else {}

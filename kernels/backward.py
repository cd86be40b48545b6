"""The backward in one launch, where maps are small: sums, final step and application of a block of channels.

    dx = (scale * dz + level) + slope * (x - mean),  dresidual = dz        dz = dy * act'(z)

slope and level come from the two sums over the rows that `grad_reduce` states; dweight and dbias are written, too.
Reads dy and x (and a tail's mask, or its residual) twice, the second time from the cache, writes dx and dresidual once.
A second gradient of the output is read once, and dz written, for the second loop to read. Parallel over blocks of
channels alone (`launch.choose_whole`): a program walks all rows of its own, so that nothing is exchanged between
programs and a launch gives the same bits every time. The loops are those of `grad_reduce` and `grad_apply`. What a tail
has is told by integers: one kernel for all of a layout and dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .finalize import finish_sums
from .grad import Operand
from .grad_apply import grad_apply_tiles
from .grad_reduce import NO_SKIP, Skip, grad_sums, off_mean
from .launch import Whole
from .moments import sum_rows
from .norm import load_norm
from .plan import Planner
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
    slots,
    width,
    inverse_count,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(slope, level) of these columns, of the sums [columns] in float64; dweight and dbias are written."""
    b_dot = off_mean(b_dot, b_dz, p_saved, channels, o_column // spread, m_column, ACC)
    o_channel, m_channel = own_channels(o_column, m_column, slots, PARTS)
    if PARTS > 0:
        b_dz = tl.sum(by_part(b_dz, slots, width, PARTS), axis=0)
        b_dot = tl.sum(by_part(b_dot, slots, width, PARTS), axis=0)
        b_dz = tl.sum(by_channel(b_dz, slots, PARTS), axis=0)
        b_dot = tl.sum(by_channel(b_dot, slots, PARTS), axis=0)
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
    if PARTS > 0:
        b_slope = to_columns(b_slope, slots, width, o_column.shape[0])
        b_level = to_columns(b_level, slots, width, o_column.shape[0])
    return b_slope, b_level


@triton.jit
def _backward_of(
    p_dy, p_skip, p_x, p_bits, p_weight, p_saved, p_dweight, p_dbias, p_dx, p_dresidual,
    p_residual, p_residual_weight, p_residual_saved, p_residual_dweight, p_residual_dbias, p_addend, p_dz,
    stride, bits_stride, own, outer, inner, channels, spread, slots, width, tiles_inner, tiles,
    adds, normalizes, writes_residual, inverse_count,
    EVEN: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr, PACK_CHANNELS: tl.constexpr, ACC: tl.constexpr, BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, OFFSET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a program of the kernel does, of tensors that are there or None."""
    o_column, m_column = tile_columns(channels, own, BLOCK_CHANNELS, OFFSET)
    norm = load_norm(
        None, None, p_saved, p_weight, None, o_column, m_column, channels, spread, 0, 0.0, ACC
    )
    residual_norm = load_norm(
        None, None, p_residual_saved, p_residual_weight, None, o_column, m_column, channels, spread, 0, 0.0, ACC,
    )  # fmt: skip
    b_sum, b_dot, b_rdot = grad_sums(
        p_dy, p_skip, p_x, p_bits, p_residual, p_residual_saved, p_dz, None, norm, residual_norm,
        None, None, None, None, None, stride, bits_stride,
        o_column, m_column, outer, inner, channels, own, spread, tiles_inner, tiles, 0, 1, adds, normalizes,
        False, GROUP, RUN, True, EVEN, ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip
    b_dz = sum_rows(b_sum[0], b_sum[1])
    coefficients = _coefficients_of(
        b_dz, sum_rows(b_dot[0], b_dot[1]), p_saved, p_weight, p_dweight, p_dbias,
        o_column, m_column, channels, spread, slots, width, inverse_count, ACC, PARTS,
    )  # fmt: skip
    residual_coefficients = None
    if p_residual_saved is not None:
        b_slope = tl.zeros([BLOCK_CHANNELS], ACC)
        b_level = tl.zeros([BLOCK_CHANNELS], ACC)
        if normalizes:
            b_slope, b_level = _coefficients_of(
                b_dz, sum_rows(b_rdot[0], b_rdot[1]), p_residual_saved, p_residual_weight, p_residual_dweight,
                p_residual_dbias, o_column, m_column, channels, spread, slots, width, inverse_count, ACC, PARTS,
            )  # fmt: skip
        residual_coefficients = (b_slope, b_level)
    # With a second gradient dz is read, which the other threads of this program have written; all of it passes.
    tl.debug_barrier()
    if p_dz is not None:
        p_dy = tl.where(adds != 0, p_dz, p_dy)
    grad_apply_tiles(
        p_dy, p_x, p_bits, p_dx, p_dresidual, p_residual, p_addend,
        norm, residual_norm, coefficients, residual_coefficients,
        None, None, None, None, bits_stride, stride,
        o_column, m_column, outer, inner, channels, own, spread, tiles_inner, tiles, 0, 1,
        normalizes, adds, writes_residual,
        ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, OFFSET, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=ANY_WHOLE, do_not_specialize_on_alignment=ANY_MULTIPLE)
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
    tiles_inner,
    tiles,
    adds,
    normalizes,
    plain,
    writes_residual,
    inverse_count: "fp64",
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, dresidual with `writes_residual`, dweight and dbias (each where given), and with `normalizes` those of a
    residual that has a BatchNorm; dz of a second gradient, with `adds`. What is not there has a stand-in.

    plain: there are dy and x alone, which the loops of a tail would take half again as many instructions for.

    PARTS: what the columns of a flat walk are added up in (`by_part`), else 0.
    """
    SECTOR: tl.constexpr = 32 // (p_x.dtype.element_ty.primitive_bitwidth // 8)
    own = own_columns(spread, slots, width, PARTS, SECTOR)
    stride = own_stride(channels, row_stride, own)
    bits_stride = (bits_outer, bits_inner, bits_piece, 1)
    if plain:
        _backward_of(
            p_dy, None, p_x, None, p_weight, p_saved, p_dweight, p_dbias, p_dx, None,
            None, None, None, None, None, p_addend, None,
            stride, bits_stride, own, outer, inner, channels, spread, slots, width, tiles_inner, tiles,
            False, False, False, inverse_count,
            EVEN, GROUP, RUN, PARTS, ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, BLOCK_CHANNELS,
            OFFSET, STAGES,
        )  # fmt: skip
    else:
        _backward_of(
            p_dy, p_skip, p_x, p_bits, p_weight, p_saved, p_dweight, p_dbias, p_dx, p_dresidual,
            p_residual, p_residual_weight, p_residual_saved, p_residual_dweight, p_residual_dbias, p_addend, p_dz,
            stride, bits_stride, own, outer, inner, channels, spread, slots, width, tiles_inner, tiles,
            adds, normalizes, writes_residual, inverse_count,
            EVEN, GROUP, RUN, PARTS, ACTIVATION, SLOPE, PACK_CHANNELS, ACC, BLOCK_OUTER, BLOCK_INNER, BLOCK_CHANNELS,
            OFFSET, STAGES,
        )  # fmt: skip


def launch_bn_backward(
    p: Planner,
    dy: Tensor,
    main: Operand,
    residual: Operand,
    bits: Tensor | None,
    addend: Tensor | None,
    skip: Skip | None,
    whole: Whole,
    activation: tuple[str | None, float],
    is_smooth: bool,
) -> None:
    """The gradients of both (each where given) <- dy, x; all tensors are walked alike. With a second gradient
    (which has a mask, or no activation) skip.dz is written; it may be the residual's gradient, which is None then."""
    skip, (name, slope) = skip or NO_SKIP, activation
    adds, is_dual = skip.gradient is not None, residual.norm.saved is not None
    is_plain = not adds and bits is None and residual.x is None and residual.gradient is None
    flags = (int(adds), int(is_dual), int(is_plain), int(residual.gradient is not None))
    if not is_smooth:
        # One kernel for all that a tail may have. What stands in is not read, and not written.
        written = main.gradient if main.gradient is not None else residual.gradient
        gradient = written if residual.gradient is None else residual.gradient
        residual = (residual if is_dual else main)._replace(gradient=gradient)
        if not adds:
            skip = skip._replace(gradient=dy, dz=written)
        if bits is None and name is not None:
            bits = p.empty((1,), torch.uint8)
    p.start(
        bn_backward_kernel,
        whole.tile.grid,
        (
            dy, skip.gradient, main.x, bits, main.norm.weight, main.norm.saved, main.dweight, main.dbias,
            main.gradient, residual.gradient,
            residual.x, residual.norm.weight, residual.norm.saved, residual.dweight, residual.dbias,
            addend, skip.dz,
        ),
        (
            *whole.integers(),
            whole.tile.tiles_inner if whole.is_flat else None,
            whole.tile.tiles,
            *flags,
        ),
        (1.0 / whole.values,),
        {
            **whole.constants,
            "ACTIVATION": name,
            "SLOPE": slope,
            **arithmetic(main.x.dtype, whole.walk),
        },
        whole.tile.options,
    )  # fmt: skip

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

from .activation import Activation
from .finalize import Gradients, finish_sums
from .grad import Flags, Incoming, Operand, Second, Terms
from .grad_apply import grad_apply_tiles
from .grad_reduce import NO_SKIP, Skip, grad_sums, off_mean
from .launch import Whole
from .moments import sum_rows
from .norm import Branch, Vectors, load_norm
from .plan import Planner
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
def _coefficients_of(b_dz, b_dot, of, walk, inverse_count, TILE: tl.constexpr, ACC: tl.constexpr):
    """(slope, level) of these columns, of the sums [columns] in float64; of.dweight and of.dbias are written."""
    PARTS: tl.constexpr = TILE.parts
    slots, width = walk.slots, walk.width
    b_dot = off_mean(b_dot, b_dz, of.norm.saved, walk, ACC)
    o_channel, m_channel = own_channels(walk, PARTS)
    if PARTS > 0:
        b_dz = tl.sum(by_part(b_dz, slots, width, PARTS), axis=0)
        b_dot = tl.sum(by_part(b_dot, slots, width, PARTS), axis=0)
        b_dz = tl.sum(by_channel(b_dz, slots, PARTS), axis=0)
        b_dot = tl.sum(by_channel(b_dot, slots, PARTS), axis=0)
    b_invstd = load_vector(of.norm.saved + 2 * walk.channels, o_channel, m_channel, 0.0, ACC)
    b_slope, b_level = finish_sums(
        (b_dz, b_dot), b_invstd, of.norm.weight, Gradients(of.dweight, of.dbias), o_channel, m_channel,
        inverse_count, ACC,
    )  # fmt: skip
    if PARTS > 0:
        b_slope = to_columns(b_slope, slots, width, walk.o_column.shape[0])
        b_level = to_columns(b_level, slots, width, walk.o_column.shape[0])
    return b_slope, b_level


@triton.jit
def _backward_of(
    incoming, of, stride, walk, flags, inverse_count, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """What a program of the kernel does, of tensors that are there or None."""
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    norm = load_norm(of.x.norm, walk, 0.0, ACC)
    residual_norm = load_norm(of.residual.norm, walk, 0.0, ACC)
    b_sum, b_dot, b_rdot = grad_sums(
        incoming, of, Terms(norm, residual_norm), stride, walk, flags, TILE, ACTIVATION
    )
    b_dz = sum_rows(b_sum[0], b_sum[1])
    coefficients = _coefficients_of(
        b_dz, sum_rows(b_dot[0], b_dot[1]), of.x, walk, inverse_count, TILE, ACC
    )
    residual_coefficients = None
    if of.residual.norm.saved is not None:
        b_slope = tl.zeros(walk.o_column.shape, ACC)
        b_level = tl.zeros(walk.o_column.shape, ACC)
        if flags.normalizes:
            b_slope, b_level = _coefficients_of(
                b_dz, sum_rows(b_rdot[0], b_rdot[1]), of.residual, walk, inverse_count, TILE, ACC
            )
        residual_coefficients = (b_slope, b_level)

    # With a second gradient dz is read, which the other threads of this program have written; all of it passes.
    tl.debug_barrier()
    p_dy = incoming.dy.p
    if incoming.dz is not None:
        p_dy = tl.where(flags.adds != 0, incoming.dz, p_dy)
    grad_apply_tiles(
        Incoming(View(p_dy, None), Second(None, None, None), incoming.bits), of,
        Terms(norm, residual_norm, coefficients, residual_coefficients), stride, walk,
        Flags(True, flags.normalizes, flags.adds, flags.writes_residual), TILE, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=ANY_WHOLE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_backward_kernel(
    incoming,
    of,
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
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The gradients of x, of the residual with `writes_residual`, dweight and dbias (each where given), and with
    `normalizes` those of a residual that has a BatchNorm; dz of a second gradient, with `adds`. What is not
    there has a stand-in.

    plain: there are dy and x alone, which the loops of a tail would take half again as many instructions for.
    """
    SECTOR: tl.constexpr = 32 // (of.x.p.dtype.element_ty.primitive_bitwidth // 8)
    sizes = Sizes(outer, inner, spread, tiles_inner, tiles, None, width, slots)
    walk = walk_of(sizes, channels, SECTOR, TILE)
    stride = walk_stride(walk, row_stride)
    bits_stride = (bits_outer, bits_inner, bits_piece, 1)
    if plain:
        _backward_of(
            Incoming(incoming.dy, Second(None, None, None), View(None, None)),
            Pair(of.x, Branch(None, None, Vectors())), stride, walk, Flags(False, False, False, False), inverse_count,
            TILE, ACTIVATION,
        )  # fmt: skip
    else:
        _backward_of(
            Incoming(incoming.dy, incoming.skip, View(incoming.bits.p, bits_stride), incoming.dz), of, stride, walk,
            Flags(adds, normalizes, None, writes_residual), inverse_count, TILE, ACTIVATION,
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
    cases = (int(adds), int(is_dual), int(is_plain), int(residual.gradient is not None))
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
            Incoming(
                View(dy, None),
                Second(skip.gradient, None, None),
                View(bits, None),
                skip.dz,
            ),
            Pair(
                Branch(
                    main.x,
                    None,
                    Vectors(main.norm.weight, saved=main.norm.saved),
                    gradient=main.gradient,
                    addend=View(addend, None),
                    dweight=main.dweight,
                    dbias=main.dbias,
                ),
                Branch(
                    residual.x,
                    None,
                    Vectors(residual.norm.weight, saved=residual.norm.saved),
                    gradient=residual.gradient,
                    dweight=residual.dweight,
                    dbias=residual.dbias,
                ),
            ),
            whole.row_stride,
            *whole.integers(),
            whole.tile.tiles_inner if whole.is_flat else None,
            whole.tile.tiles,
            *cases,
            1.0 / whole.values,
        ),
        {"TILE": whole.block, "ACTIVATION": Activation(name, slope)},
        whole.tile.options,
    )

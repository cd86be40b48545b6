"""Gradient of the weight of a 1x1 convolution of any stride.

    dweight[o, i] = sum over rows r of dy[r, o] * x[row(r), i]

The rows are split between programs, each of which writes a sum of its own (no atomics); the sums are added by the
caller in their order. Reads dy once a block of input channels and the visited rows of x once a block of output
channels, from the cache where neighbouring programs share them; writes `splits` matrices in float32. Parallel over
blocks of input and of output channels (both on grid axis 0, the input channels fastest) and splits (axis 1).
"""

import triton
import triton.language as tl
from torch import Tensor

from .dtypes import accumulate_dtype
from .launch import Product, choose_grad_weight
from .layout import GatherMap
from .plan import Planner
from .projection import Extent, Side, dimensions, divisors, dot, gather_rows, operand
from .tile import View


@triton.jit
def projection_grad_weight_kernel(dy, x, p_partial, inner, extent, TILE: tl.constexpr):
    """partial [programs, Cout, Cin] <- the sums over each program's rows."""
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    ACC: tl.constexpr = tl.float64 if x.p.dtype.element_ty == tl.float64 else tl.float32
    PRECISION: tl.constexpr = TILE.precision
    BLOCK_ROWS: tl.constexpr = TILE.rows
    BLOCK_OUT: tl.constexpr = TILE.channels_out
    BLOCK_IN: tl.constexpr = TILE.channels_in
    rows, channels_in, channels_out = extent.rows, extent.channels_in, extent.channels_out
    i_block = tl.program_id(0)
    blocks_in = tl.cdiv(channels_in, BLOCK_IN)
    o_in = (i_block % blocks_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    o_out = (i_block // blocks_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_program = tl.program_id(1)
    m_in, m_out = o_in < channels_in, o_out < channels_out
    b_acc = tl.zeros([BLOCK_OUT, BLOCK_IN], ACC)
    for i_tile in tl.range(i_program, extent.tiles, extent.programs, num_stages=TILE.stages):
        o_row = i_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        o_dy = gather_rows(o_row, inner, dy.stride, TILE.dims, OFFSET)[:, None]
        o_x = gather_rows(o_row, inner, x.stride, TILE.other_dims, OFFSET)[:, None]
        b_dy = tl.load(
            dy.p + o_dy + (o_out * dy.stride[4])[None, :],
            mask=m_row[:, None] & m_out[None, :],
            other=0.0,
        )
        b_x = tl.load(
            x.p + o_x + (o_in * x.stride[4])[None, :],
            mask=m_row[:, None] & m_in[None, :],
            other=0.0,
        )
        b_dy, b_x = operand(b_dy, PRECISION), operand(b_x, PRECISION)
        b_acc = dot(tl.trans(b_dy), b_x, b_acc, PRECISION, ACC)
    o_partial = i_program.to(tl.int64) * channels_out * channels_in
    o_weight = o_out[:, None] * channels_in + o_in[None, :]
    tl.store(p_partial + o_partial + o_weight, b_acc, mask=m_out[:, None] & m_in[None, :])


def launch_projection_grad_weight(
    p: Planner, dy: Side, x: Side, gather: GatherMap, precision: str
) -> Tensor:
    """partial [P, Cout, Cin] <- dy, x, to be summed; gather.strides: dy, then x."""
    dtype = dy.tensor.dtype
    tile = choose_grad_weight(gather.rows, x.channels, dy.channels, dtype.itemsize, p.chip)
    partial = p.empty((tile.programs, dy.channels, x.channels), accumulate_dtype(dtype))
    dy_stride, x_stride = (
        (*strides, side.stride) for strides, side in zip(gather.strides, (dy, x), strict=True)
    )
    p.start(
        projection_grad_weight_kernel,
        (-(-x.channels // tile.block_in) * tile.blocks_out, tile.programs),
        (
            View(dy.tensor, dy_stride),
            View(x.tensor, x_stride),
            partial,
            divisors(gather.sizes[1:]),
            Extent(gather.rows, x.channels, dy.channels, tile.tiles, tile.programs),
        ),
        {
            "TILE": Product(
                tile.block_rows,
                tile.block_out,
                tile.block_in,
                tile.stages,
                precision,
                gather.needs_int64,
                dimensions(gather.sizes, dy_stride),
                dimensions(gather.sizes, x_stride),
            )
        },
        tile.options,
    )
    return partial

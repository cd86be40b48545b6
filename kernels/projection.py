"""1x1 convolution of any stride as a matrix product whose rows are gathered while they are loaded.

    y[r, o] = sum over i of x[row(r), i] * weight[o, i] (+ bias[o])        x [N, Cin, ...], y [rows, Cout]

`row` is an index map, so the stride costs nothing, and the gradient of the input is the same product with the weight
transposed and the map on the output. Reads the visited rows of x once a block of output channels (neighbouring programs
share them in the cache) and writes y once. Parallel over row programs (grid axis 1) and blocks of output channels (axis
0); the sum over i is one chain in a fixed order.

With `partial`, each program leaves the moments of what it wrote (rounded to y's dtype), as the statistics pass would,
so that the BatchNorm behind it needs no pass of its own.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chip import INTERPRETED
from .launch import GemmTile
from .layout import GatherMap
from .start import start

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def gather_rows(o_row, sizes, strides, OFFSET: tl.constexpr):
    """Offset of each row; sizes of the three inner dimensions, strides of all four (the outermost first)."""
    o_rest = o_row.to(OFFSET)
    o_offset = (o_rest % sizes[2]) * strides[3]
    o_rest = o_rest // sizes[2]
    o_offset += (o_rest % sizes[1]) * strides[2]
    o_rest = o_rest // sizes[1]
    o_offset += (o_rest % sizes[0]) * strides[1]
    return o_offset + (o_rest // sizes[0]) * strides[0]


@triton.jit
def round_to_tf32(b_value):
    """float32 rounded to the 10 bits of tf32, halves away from zero, as `cvt.rna.tf32` does.

    A tensor core cuts the other 13 bits off (seen on an H100): products of positive values would be 6.5e-4 too small.
    """
    b_bits = (b_value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_value == b_value, b_bits.to(tl.float32, bitcast=True), b_value)


@triton.jit
def dot(b_left, b_right, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + left @ right on tensor cores. The interpreter multiplies the bit patterns of bfloat16 as they are."""
    if _INTERPRETED:
        b_left, b_right = b_left.to(ACC), b_right.to(ACC)
    elif PRECISION == "tf32" and b_left.dtype == tl.float32:
        b_left, b_right = round_to_tf32(b_left), round_to_tf32(b_right)
    return tl.dot(b_left, b_right, b_acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _tile_moments(b_y, m_row, BLOCK_OUT: tl.constexpr, WIDE: tl.constexpr):
    """(count, mean, M2) [BLOCK_OUT] of the rows that are there, the mean first and then the deviations from it."""
    b_count = tl.sum(m_row.to(tl.float32), axis=0).to(WIDE)
    b_wide = tl.where(m_row[:, None], b_y.to(WIDE), 0.0)
    b_mean = tl.sum(b_wide, axis=0) / tl.maximum(b_count, tl.full([], 1.0, WIDE))
    b_d = tl.where(m_row[:, None], b_wide - b_mean[None, :], 0.0)
    return b_count, b_mean, tl.sum(b_d * b_d, axis=0)


@triton.jit
def projection_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_partial,
    sizes,
    x_stride,
    weight_stride,
    y_stride,
    rows,
    channels_in,
    channels_out,
    tiles,
    programs,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y (+)= x @ weight + bias; partial [programs, 3, Cout] <- count, mean, M2 of y.

    x_stride, y_stride: four for the rows, one for the channel; weight_stride: (input channel, output channel).
    """
    # The moments of float32 values are merged in float64, as those of the statistics pass are.
    WIDE: tl.constexpr = tl.float64 if p_y.dtype.element_ty.primitive_bitwidth >= 32 else tl.float32
    i_program = tl.program_id(1)
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = o_out < channels_out
    o_in = tl.arange(0, BLOCK_IN)
    o_weight = o_in[:, None] * weight_stride[0] + o_out[None, :] * weight_stride[1]
    o_x_in = (o_in * x_stride[4])[None, :]
    b_count = tl.full([], 0.0, WIDE)
    b_mean = tl.zeros([BLOCK_OUT], WIDE)
    b_m2 = tl.zeros([BLOCK_OUT], WIDE)
    for i_tile in range(i_program, tiles, programs):
        o_row = i_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        p_row = p_x + gather_rows(o_row, sizes, x_stride, OFFSET)[:, None] + o_x_in
        b_acc = tl.zeros([BLOCK_ROWS, BLOCK_OUT], ACC)
        for i_in in tl.range(0, channels_in, BLOCK_IN, num_stages=STAGES):
            m_in = i_in + o_in < channels_in
            b_x = tl.load(
                p_row + i_in * x_stride[4], mask=m_row[:, None] & m_in[None, :], other=0.0
            )
            b_weight = tl.load(
                p_weight + o_weight + i_in * weight_stride[0],
                mask=m_in[:, None] & m_out[None, :],
                other=0.0,
            )
            b_acc = dot(b_x, b_weight, b_acc, PRECISION, ACC)
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_out, mask=m_out, other=0.0).to(ACC)[None, :]
        o_y = gather_rows(o_row, sizes, y_stride, OFFSET)[:, None] + (o_out * y_stride[4])[None, :]
        m = m_row[:, None] & m_out[None, :]
        if ACCUMULATE:
            b_acc += tl.load(p_y + o_y, mask=m, other=0.0).to(ACC)
        b_y = b_acc.to(p_y.dtype.element_ty)
        tl.store(p_y + o_y, b_y, mask=m)
        if p_partial is not None:
            b_n, b_more, b_square = _tile_moments(b_y, m_row, BLOCK_OUT, WIDE)
            b_delta = b_more - b_mean
            b_share = b_n / (b_count + b_n)
            b_mean += b_delta * b_share
            b_m2 += b_square + b_delta * (b_delta * (b_count * b_share))
            b_count += b_n
    if p_partial is not None:
        PARTIAL: tl.constexpr = p_partial.dtype.element_ty
        p_program = p_partial + i_program * 3 * channels_out + o_out
        b_counts = b_count + tl.zeros([BLOCK_OUT], WIDE)
        tl.store(p_program, b_counts.to(PARTIAL), mask=m_out)
        tl.store(p_program + channels_out, b_mean.to(PARTIAL), mask=m_out)
        tl.store(p_program + 2 * channels_out, b_m2.to(PARTIAL), mask=m_out)


def launch_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    partial: Tensor | None,
    gather: GatherMap,
    channel_strides: tuple[int, int],
    weight_stride: tuple[int, int],
    channels: tuple[int, int],
    tile: GemmTile,
    adds: bool,
    precision: str,
    accumulate: tl.dtype,
    offset: tl.dtype,
) -> None:
    """y <- x @ weight, or y += where it `adds`; gather.strides, channel_strides: x, then y; channels: in, out."""
    x_stride, y_stride = (
        (*strides, channel)
        for strides, channel in zip(gather.strides, channel_strides, strict=True)
    )
    start(
        projection_kernel,
        (tile.blocks_out, tile.programs),
        (x, weight, bias, y, partial),
        (
            gather.sizes[1:],
            x_stride,
            weight_stride,
            y_stride,
            gather.rows,
            *channels,
            tile.tiles,
            tile.programs,
        ),
        (),
        {"ACCUMULATE": adds, "PRECISION": precision, "ACC": accumulate, "OFFSET": offset},
        tile.options,
    )

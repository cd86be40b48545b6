"""1x1 convolution of any stride as a matrix product whose rows are gathered while they are loaded.

    y[r, o] = sum over i of x[row(r), i] * weight[o, i] (+ bias[o])        x [N, Cin, ...], y [rows, Cout]

`row` is an index map, so the stride costs nothing, and the gradient of the input is the same product with the weight
transposed and the map on the output. Reads the visited rows of x once a block of output channels (neighbouring programs
share them in the cache) and writes y once. Parallel over row programs (grid axis 1) and blocks of output channels (axis
0); the sum over i is one chain in a fixed order.

With `partial`, each program leaves the moments of what it wrote (rounded to y's dtype), as the statistics pass would,
so that the BatchNorm behind it needs no pass of its own. They are Welford's, each thread's own until all tiles are done
(a sum over the threads in every tile took more instructions than all else), and merged in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from .chip import INTERPRETED
from .dtypes import partial_dtype
from .launch import Product, choose_product
from .layout import GatherMap
from .plan import Planner
from .tile import View

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _divide(o, divisor):
    """(o // size, o % size); 32-bit by a multiplication, as `divisors` prepared it: some 5 instructions, not 25."""
    if o.dtype == tl.int64:
        o_quotient = o // divisor[0]
    else:
        b_magic = tl.full(o.shape, divisor[1], tl.int32).to(tl.uint32, bitcast=True)
        o_quotient = (tl.umulhi(o.to(tl.uint32), b_magic) >> divisor[2]).to(tl.int32)
    return o_quotient, o - o_quotient * divisor[0]


@triton.jit
def gather_rows(o_row, inner, strides, DIMS: tl.constexpr, OFFSET: tl.constexpr):
    """Offset of each row of DIMS dimensions: `divisors` of the three inner ones, strides of four (the outermost first).

    A dimension of rows that follow each other is one stride.
    """
    o_rest = o_row.to(OFFSET)
    if DIMS == 1:
        o_offset = o_rest * strides[3]
    else:
        o_rest, o_last = _divide(o_rest, inner[2])
        o_offset = o_last * strides[3]
        if DIMS > 2:
            o_rest, o_last = _divide(o_rest, inner[1])
            o_offset += o_last * strides[2]
        if DIMS > 3:
            o_rest, o_last = _divide(o_rest, inner[0])
            o_offset += o_last * strides[1]
        o_offset += o_rest * strides[4 - DIMS]
    return o_offset


@triton.jit
def round_to_tf32(b_value):
    """float32 rounded to the 10 bits of tf32, halves away from zero, as `cvt.rna.tf32` does.

    A tensor core cuts the other 13 bits off (seen on an H100): products of positive values would be 6.5e-4 too small.
    """
    b_bits = (b_value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_value == b_value, b_bits.to(tl.float32, bitcast=True), b_value)


@triton.jit
def operand(b_value, PRECISION: tl.constexpr):
    """What a tensor core is given: float32 rounded to tf32 where that is the precision."""
    if PRECISION == "tf32" and b_value.dtype == tl.float32 and not _INTERPRETED:
        b_value = round_to_tf32(b_value)
    return b_value


@triton.jit
def dot(b_left, b_right, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + left @ right, two `operand`s. The interpreter multiplies the bit patterns of bfloat16 as they are."""
    if _INTERPRETED:
        b_left, b_right = b_left.to(ACC), b_right.to(ACC)
    return tl.dot(b_left, b_right, b_acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _round(b_value, DTYPE: tl.constexpr):
    """float32 rounded to what DTYPE holds. For 16 bits two at a time, where there is an instruction for it (PTX ISA,
    cvt): a conversion of one takes four times as long.
    """
    if _INTERPRETED or DTYPE.primitive_bitwidth >= 32 or not cuda_capability_geq(8, 0):
        b_round = b_value.to(DTYPE).to(b_value.dtype)
    elif DTYPE == tl.bfloat16:
        b_round = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $1, $3, $2; shl.b32 $0, $1, 16; and.b32 $1, $1, 0xffff0000;",
            "=r,=r,r,r", [b_value], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        b_round = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.f16x2.f32 $1, $3, $2; mov.b32 {low, high}, $1; "
            "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=r,=r,r,r", [b_value], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return b_round


@triton.jit
def _halves(b, SPLIT: tl.constexpr):
    """[rows, ...] -> rows 0 to 7 and rows 8 to 15 of each 16, [rows / 16, 8, ...] each. Without SPLIT: all, twice.

    A thread holds a row of each in the result of a product (not on sm_100), so nothing is moved.
    """
    if not SPLIT:
        b_first, b_second = b, b
    elif len(b.shape) == 1:
        b_rows = tl.reshape(b, (b.shape[0] // 16, 2, 8))
        b_first, b_second = tl.split(tl.permute(b_rows, (0, 2, 1)))
    else:
        b_rows = tl.reshape(b, (b.shape[0] // 16, 2, 8, b.shape[1]))
        b_first, b_second = tl.split(tl.permute(b_rows, (0, 2, 3, 1)))
    return b_first, b_second


@triton.jit
def _add_rows(b_y, b_there, b_count, b_mean, b_low, b_m2, WIDE: tl.constexpr):
    """(count, mean, low, M2), each of its own row of a tile, after another value of each; there: 1.0, or 0.0 for none.

    Welford's update. mean + low is the mean; low stays 0 where a mean of one rounding is enough.
    """
    b_next = b_count + b_there
    b_share = b_there / tl.maximum(b_next, 1.0)
    b_part = tl.expand_dims(b_share, -1)
    b_delta = b_y.to(b_mean.dtype) - b_mean
    if WIDE:
        b_delta -= b_low
        b_step = b_delta * b_part
        b_more = b_mean + b_step
        b_low += b_step - (b_more - b_mean)
    else:
        b_more = b_mean + b_delta * b_part
    b_m2 += b_delta * (b_delta * tl.expand_dims(b_count * b_share, -1))
    return b_next, b_more, b_low, b_m2


@triton.jit
def _store_moments(p_partial, channels_out, o_out, m_out, moments, WIDE: tl.constexpr):
    """partial [3, Cout] of this program <- count, mean, M2, of those that the rows of its tiles have, (count, mean,
    low, M2)."""
    PARTIAL: tl.constexpr = p_partial.dtype.element_ty
    b_count, b_mean, b_low, b_m2 = moments
    SUM: tl.constexpr = tl.float64 if WIDE else tl.float32
    b_count = tl.reshape(b_count, (b_count.numel,)).to(SUM)
    b_mean = tl.reshape(b_mean, (b_count.numel, b_mean.shape[-1])).to(SUM)
    if WIDE:
        b_mean += tl.reshape(b_low, b_mean.shape).to(SUM)
    b_m2 = tl.reshape(b_m2, b_mean.shape).to(SUM)
    b_all = tl.sum(b_count, axis=0)
    b_center = tl.sum(b_mean * b_count[:, None], axis=0) / b_all
    b_delta = b_mean - b_center[None, :]
    b_square = tl.sum(b_m2 + b_delta * (b_delta * b_count[:, None]), axis=0)
    p_program = p_partial + o_out
    tl.store(p_program, (b_all + tl.zeros_like(b_center)).to(PARTIAL), mask=m_out)
    tl.store(p_program + channels_out, b_center.to(PARTIAL), mask=m_out)
    tl.store(p_program + 2 * channels_out, b_square.to(PARTIAL), mask=m_out)


class Extent(NamedTuple):
    """How many rows and channels a product has, and its tiles of rows, which so many programs share."""

    rows: Any
    channels_in: Any
    channels_out: Any
    tiles: Any
    programs: Any


@triton.jit
def projection_kernel(x, weight, p_bias, y, p_partial, inner, extent, TILE: tl.constexpr):
    """y (+)= x @ weight + bias; partial [programs, 3, Cout] <- count, mean, M2 of y.

    x, y: their strides are four for the rows, one for the channel; that of weight: (input channel, output channel).
    inner: `divisors` of the three inner dimensions; extent: `Extent`; TILE: `Product`.
    """
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    ACC: tl.constexpr = tl.float64 if x.p.dtype.element_ty == tl.float64 else tl.float32
    PRECISION: tl.constexpr = TILE.precision
    BLOCK_ROWS: tl.constexpr = TILE.rows
    BLOCK_OUT: tl.constexpr = TILE.channels_out
    BLOCK_IN: tl.constexpr = TILE.channels_in
    BLOCKS_IN: tl.constexpr = TILE.blocks_in
    SPLIT: tl.constexpr = TILE.split
    rows, channels_in, channels_out = extent.rows, extent.channels_in, extent.channels_out
    tiles, programs = extent.tiles, extent.programs
    # float32 values have digits that a mean of one rounding has not.
    WIDE: tl.constexpr = y.p.dtype.element_ty.primitive_bitwidth >= 32
    i_program = tl.program_id(1)
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = o_out < channels_out
    o_in = tl.arange(0, BLOCK_IN)
    p_block = weight.p + (o_in[:, None] * weight.stride[0] + o_out[None, :] * weight.stride[1])
    o_x_in = (o_in * x.stride[4])[None, :]
    if p_partial is not None:
        b_there = _halves(tl.zeros([BLOCK_ROWS], ACC), SPLIT)[0]
        b_count = b_there
        b_mean = _halves(tl.zeros([BLOCK_ROWS, BLOCK_OUT], ACC), SPLIT)[0]
        b_low, b_m2 = b_mean, b_mean
    if BLOCKS_IN == 1:  # the weight stays
        m_weight = (o_in < channels_in)[:, None] & m_out[None, :]
        b_weight = operand(tl.load(p_block, mask=m_weight, other=0.0), PRECISION)
    b_acc = tl.zeros([BLOCK_ROWS, BLOCK_OUT], ACC)
    # One loop over tiles and input channels, so that the loads of the next tile are under way while one is finished.
    for i in tl.range(0, tl.cdiv(tiles - i_program, programs) * BLOCKS_IN, num_stages=TILE.stages):
        i_tile = i_program + (i // BLOCKS_IN) * programs
        i_in = (i % BLOCKS_IN) * BLOCK_IN
        o_row = i_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        m_in = i_in + o_in < channels_in
        # For a row that is not there the last one is read: cheaper than a mask, and not written.
        o_x_row = gather_rows(tl.minimum(o_row, rows - 1), inner, x.stride, TILE.dims, OFFSET)
        p_row = x.p + o_x_row[:, None] + o_x_in
        b_x = tl.load(p_row + i_in * x.stride[4], mask=m_in[None, :], other=0.0)
        if BLOCKS_IN > 1:
            b_weight = tl.load(
                p_block + i_in * weight.stride[0], mask=m_in[:, None] & m_out[None, :], other=0.0
            )
            b_weight = operand(b_weight, PRECISION)
        b_acc = dot(operand(b_x, PRECISION), b_weight, b_acc, PRECISION, ACC)
        if i % BLOCKS_IN == BLOCKS_IN - 1:
            if p_bias is not None:
                b_acc += tl.load(p_bias + o_out, mask=m_out, other=0.0).to(ACC)[None, :]
            o_y_row = gather_rows(o_row, inner, y.stride, TILE.other_dims, OFFSET)
            p_tile = y.p + o_y_row[:, None] + (o_out * y.stride[4])[None, :]
            m = m_row[:, None] & m_out[None, :]
            if TILE.accumulate:
                b_acc += tl.load(p_tile, mask=m, other=0.0).to(ACC)
            if p_partial is not None:
                b_acc = _round(b_acc, y.p.dtype.element_ty)
            tl.store(p_tile, b_acc.to(y.p.dtype.element_ty), mask=m)
            if p_partial is not None:
                b_first, b_second = _halves(b_acc, SPLIT)
                b_there, b_too = _halves(m_row.to(ACC), SPLIT)
                b_count, b_mean, b_low, b_m2 = _add_rows(
                    b_first, b_there, b_count, b_mean, b_low, b_m2, WIDE
                )
                if SPLIT:
                    b_count, b_mean, b_low, b_m2 = _add_rows(
                        b_second, b_too, b_count, b_mean, b_low, b_m2, WIDE
                    )
            b_acc = tl.zeros([BLOCK_ROWS, BLOCK_OUT], ACC)
    if p_partial is not None:
        p_partial += i_program * 3 * channels_out
        moments = (b_count, b_mean, b_low, b_m2)
        _store_moments(p_partial, channels_out, o_out, m_out, moments, WIDE)


def divisors(sizes: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Of each size: itself, and (magic, shift) so that n // size == n * magic >> (32 + shift) for 0 <= n < 2^31.

    Granlund and Montgomery 1994: magic is 2^(31 + l) / size, rounded up, with 2^l >= size. Its 32 bits travel as int32.
    A size of 1, which nothing is divided by (`dimensions`), gets a magic that is not one.
    """
    found = []
    for size in sizes:
        bits = (size - 1).bit_length()
        magic = -(-(1 << 31 + bits) // size)
        found.append((size, magic - (1 << 32) if magic >= 1 << 31 else magic, max(bits - 1, 0)))
    return tuple(found)


def dimensions(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many dimensions the rows of a tensor have, without those of one row: one where they follow each other."""
    rows, apart = 1, strides[len(sizes) - 1]
    follow = True
    for size, stride in zip(reversed(sizes), reversed(strides[: len(sizes)]), strict=True):
        follow = follow and (size == 1 or stride == rows * apart)
        rows *= size
    return 1 if follow else sum(size > 1 for size in sizes)


class Side(NamedTuple):
    """One side of a product: a tensor [N, channels, ...] whose rows are walked."""

    tensor: Tensor
    channels: int
    stride: int  # of the channels


def launch_projection(
    p: Planner,
    x: Side,
    y: Side,
    weight: Tensor,
    weight_stride: tuple[int, int],
    bias: Tensor | None,
    gather: GatherMap,
    adds: bool,
    moments: bool,
    precision: str,
) -> Tensor | None:
    """y <- x @ weight, or y += where it `adds`; gather.strides: x, then y; weight_stride: in, out.

    With `moments` the partial moments of y [P, 3, Cout] come back.
    """
    dtype = x.tensor.dtype
    tile = choose_product(gather.rows, x.channels, y.channels, dtype.itemsize, p.chip)
    partial = None
    if moments:
        partial = p.empty((tile.programs, 3, y.channels), partial_dtype(dtype))
    x_stride, y_stride = (
        (*strides, side.stride) for strides, side in zip(gather.strides, (x, y), strict=True)
    )
    p.start(
        projection_kernel,
        (tile.blocks_out, tile.programs),
        (
            View(x.tensor, x_stride),
            View(weight, weight_stride),
            bias,
            View(y.tensor, y_stride),
            partial,
            divisors(gather.sizes[1:]),
            Extent(gather.rows, x.channels, y.channels, tile.tiles, tile.programs),
        ),
        {
            "TILE": Product(
                tile.block_rows,
                tile.block_out,
                tile.block_in,
                tile.stages,
                precision,
                gather.needs_int64,
                dimensions(gather.sizes, x_stride),
                dimensions(gather.sizes, y_stride),
                blocks_in=tile.blocks_in,
                split=tile.split,
                accumulate=adds,
            )
        },
        tile.options,
    )
    return partial

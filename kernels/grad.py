"""What both passes of the backward begin with: dz = dy * act'(z).

Of two gradients of the same output (the second came over the skip connection) dy is the sum, rounded as a tensor of its
dtype is: what autograd's own addition would have stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activation import keep_passing, through
from .bits import byte_tile, unpack
from .norm import NO_NORM, Norm
from .tile import load_tile, only_if, tile_offsets, widen


class Operand(NamedTuple):
    """A tensor that gets a gradient, x or the residual, and its BatchNorm, whose vectors [C] do. partial [programs, 2,
    width]: its sums; coefficients [2, C]: what those came to."""

    x: Any = None
    norm: Norm = NO_NORM
    partial: Any = None
    coefficients: Tensor | None = None
    gradient: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


@triton.jit
def visited(o_position, place):
    """(position, mask) in a tensor of every stride-th one; `place`: (H, W, stride of H, of W, its own H, its own W).

    o_position counts the positions of [N, H, W] (or of [C, H, W]) in order.
    """
    i_column = o_position % place[1]
    i_line = o_position // place[1]
    i_image = i_line // place[0]
    i_line = i_line % place[0]
    m = (i_line % place[2] == 0) & (i_column % place[3] == 0)
    o_small = (i_image * place[4] + i_line // place[2]) * place[5] + i_column // place[3]
    return o_small, m


@triton.jit
def load_dz(
    p_dy,
    p_skip,
    p_bits,
    b_z,
    o_first,
    o_outer,
    o_inner,
    o_column,
    m,
    i_tile,
    outer,
    inner,
    columns,
    own,
    spread,
    tiles_inner,
    dy_stride,
    skip_stride,
    skip_place,
    bits_stride,
    adds,
    everything,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
):
    """dz [rows, columns], 0 where masked. A tail's mask is read; without one z was computed again (else it is None).

    Of a kernel that is one for several cases, as integers: whether the second gradient is added, and whether everything
    passes the mask (else None).
    """
    o_dy = tile_offsets(o_outer, o_inner, o_column, dy_stride, spread, o_first)
    b_dy = tl.load(p_dy + o_dy, mask=m, other=0.0)
    b_dz = widen(b_dy, ACC) if STAGES == 1 else b_dy.to(ACC)
    if p_skip is not None:
        m_skip = only_if(m, adds)
        if skip_place is not None:
            if FLAT:  # the positions are columns
                o_column, m_column = visited(o_column, skip_place)
                m_skip &= m_column[None, :]
            else:
                o_inner, m_row = visited(o_inner, skip_place)
                m_skip &= m_row[:, None]
        o_skip = tile_offsets(o_outer, o_inner, o_column, skip_stride, spread, o_first)
        b_skip = load_tile(p_skip, o_skip, m_skip, ACC)
        if adds:
            b_dz = (b_dz + b_skip).to(p_dy.dtype.element_ty).to(ACC)
    if p_bits is not None:
        o_byte, m_byte = byte_tile(
            i_tile, outer, inner, columns, own, tiles_inner, bits_stride,
            PACK_CHANNELS, BLOCK_OUTER, BLOCK_INNER, BLOCK_CHANNELS, OFFSET,
        )  # fmt: skip
        b_byte = tl.load(p_bits + o_byte, mask=m_byte, other=0)
        if everything is not None:
            b_byte |= tl.full(b_byte.shape, tl.where(everything != 0, 255, 0), tl.uint8)
        b_dz = keep_passing(b_dz, unpack(b_byte, PACK_CHANNELS), ACTIVATION, SLOPE)
    elif b_z is not None:
        b_dz = through(b_dz, b_z, m, ACTIVATION, SLOPE)
    return b_dz

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


class Second(NamedTuple):
    """A second gradient of the output, as a kernel is told of it; see `grad_reduce.Skip`."""

    p: Any
    stride: Any
    place: Any


NO_SECOND = Second(None, None, None)


class Incoming(NamedTuple):
    """What the backward begins with: dy (`View`); a `Second` gradient; a tail's mask (`View`); and dz, where it is
    written while the sums are taken."""

    dy: Any
    skip: Any
    bits: Any
    dz: Any = None


class At(NamedTuple):
    """A tile of the loop: its number; its rows, o and i; of its values the mask, and the offsets of what is written."""

    tile: Any
    outer: Any
    inner: Any
    m: Any
    first: Any


class Flags(NamedTuple):
    """Of a kernel that is one for several cases, as integers; else constants: whether the second gradient is added, the
    residual has a BatchNorm, everything passes the mask (None: as the mask says), the residual gets a gradient. Each
    counts where what it is about is given at all."""

    adds: Any = True
    normalizes: Any = True
    everything: Any = None
    writes_residual: Any = True


class Terms(NamedTuple):
    """Of a block of channels: `norm.Affine` of x and of the residual, and the coefficients (slope, level) of their
    gradients, or None."""

    x: Any
    residual: Any
    coefficients: Any = None
    residual_coefficients: Any = None


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
def load_dy(incoming, at, walk, ACC: tl.constexpr, STAGES: tl.constexpr):
    """dy [rows, columns] of the tile `At`, 0 where masked."""
    o_dy = tile_offsets(
        at.outer, at.inner, walk.o_column, incoming.dy.stride, walk.spread, at.first
    )
    b_dy = tl.load(incoming.dy.p + o_dy, mask=at.m, other=0.0)
    return widen(b_dy, ACC) if STAGES == 1 else b_dy.to(ACC)


@triton.jit
def grad_of_z(
    incoming, b_dz, b_z, at, walk, flags, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """dz [rows, columns] of dy, with what the second gradient adds to it. A tail's mask is read; without one z was
    computed again (else it is None)."""
    ACC: tl.constexpr = b_dz.dtype
    o_column, spread = walk.o_column, walk.spread
    if incoming.skip.p is not None:
        o_inner = at.inner
        m_skip = only_if(at.m, flags.adds)
        if incoming.skip.place is not None:
            if TILE.flat:  # the positions are columns
                o_column, m_column = visited(o_column, incoming.skip.place)
                m_skip &= m_column[None, :]
            else:
                o_inner, m_row = visited(o_inner, incoming.skip.place)
                m_skip &= m_row[:, None]
        o_skip = tile_offsets(at.outer, o_inner, o_column, incoming.skip.stride, spread, at.first)
        b_skip = load_tile(incoming.skip.p, o_skip, m_skip, ACC)
        if flags.adds:
            b_dz = (b_dz + b_skip).to(incoming.dy.p.dtype.element_ty).to(ACC)
    if incoming.bits.p is not None:
        o_byte, m_byte = byte_tile(at.tile, walk, incoming.bits.stride, TILE)
        b_byte = tl.load(incoming.bits.p + o_byte, mask=m_byte, other=0)
        if flags.everything is not None:
            b_byte |= tl.full(b_byte.shape, tl.where(flags.everything != 0, 255, 0), tl.uint8)
        m_passes = unpack(b_byte, TILE.packs_channels)
        b_dz = keep_passing(b_dz, m_passes, ACTIVATION)
    elif b_z is not None:
        b_dz = through(b_dz, b_z, at.m, ACTIVATION)
    return b_dz

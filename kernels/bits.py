"""One bit an element: whether a tail's gradient passes its activation, eight of them a byte.

The bytes are a tensor of their own, with the same index map and either an eighth of the columns or an eighth of the
inner rows, whichever dimension a thread holds contiguously.
"""

import triton
import triton.language as tl

from .layout import MASK_PIECE
from .tile import tile_columns, tile_offsets, tile_rows

_PIECE = tl.constexpr(MASK_PIECE)


@triton.jit
def pack(m, PACK_CHANNELS: tl.constexpr):
    """bool [rows, columns] -> uint8 [rows, columns / 8] or [rows / 8, columns]."""
    b = m.to(tl.int32)
    o_bit = tl.arange(0, 8)
    if PACK_CHANNELS:
        b = tl.reshape(b, (m.shape[0], m.shape[1] // 8, 8))
        b_byte = tl.sum(b << o_bit[None, None, :], axis=2)
    else:
        b = tl.reshape(b, (m.shape[0] // 8, 8, m.shape[1]))
        b_byte = tl.sum(b << o_bit[None, :, None], axis=1)
    # Four copies and a shift, or LLVM takes the sums apart into bytes, with a byte permutation for each bit (sm_90).
    return ((b_byte * 0x01010101) >> 24).to(tl.uint8)


@triton.jit
def unpack(b_byte, PACK_CHANNELS: tl.constexpr):
    """uint8 [rows, columns / 8] or [rows / 8, columns] -> bool [rows, columns]."""
    b = b_byte.to(tl.int32)
    o_bit = tl.arange(0, 8)
    if PACK_CHANNELS:
        b = (b[:, :, None] >> o_bit[None, None, :]) & 1
        m = tl.reshape(b, (b_byte.shape[0], b_byte.shape[1] * 8))
    else:
        b = (b[:, None, :] >> o_bit[None, :, None]) & 1
        m = tl.reshape(b, (b_byte.shape[0] * 8, b_byte.shape[1]))
    return m != 0


@triton.jit
def byte_tile(i_tile, walk, stride, TILE: tl.constexpr):
    """(offsets, mask) of the bytes that belong to tile `i_tile`; `stride` in bytes, as `bits_layout` gives it."""
    if TILE.packs_channels:
        o_outer, o_inner, m_row = tile_rows(i_tile, walk, TILE)
        own = walk.own[0] // 8, walk.own[1] // 8
        o_column, m_column = tile_columns((walk.columns + 7) // 8, own, TILE.channels // 8, TILE)
    else:
        o_outer, o_inner, m_row = tile_rows(i_tile, walk, TILE, 8)
        o_column, m_column = tile_columns(walk.columns, walk.own, TILE.channels, TILE)
    if stride is None:
        o_plane = o_outer[:, None] * walk.columns + o_column[None, :]
        o_byte = o_plane * ((walk.inner + 7) // 8) + o_inner[:, None]
    else:
        o_byte = tile_offsets(o_outer, o_inner, o_column, stride, _PIECE)
    return o_byte, m_row[:, None] & m_column[None, :]

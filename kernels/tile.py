"""The index map of `layout.RowMap` on the device: which rows and channels a program's tile holds, and where."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(
    i_tile,
    outer,
    inner,
    tiles_inner,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """(o, i, mask) of the rows of tile `i_tile`, each [BLOCK_OUTER * BLOCK_INNER]; OFFSET is the offsets' dtype."""
    i_outer = (i_tile // tiles_inner).to(OFFSET)
    i_inner = (i_tile % tiles_inner).to(OFFSET)
    o_row = tl.arange(0, BLOCK_OUTER * BLOCK_INNER)
    o_inner = i_inner * BLOCK_INNER + (o_row % BLOCK_INNER).to(OFFSET)
    o_outer = i_outer * BLOCK_OUTER + (o_row // BLOCK_INNER).to(OFFSET)
    m_row = (o_outer < outer) & (o_inner < inner)
    return o_outer, o_inner, m_row


@triton.jit
def tile_channels(channels, BLOCK_CHANNELS: tl.constexpr, OFFSET: tl.constexpr):
    """(c, mask) of the channels of this program, each [BLOCK_CHANNELS]; the channel block is grid axis 0."""
    o_channel = tl.program_id(0).to(OFFSET) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS).to(
        OFFSET
    )
    return o_channel, o_channel < channels


@triton.jit
def tile_offsets(o_outer, o_inner, o_channel, stride):
    """Offsets [rows, channels] of a tensor with `stride` = (outer, inner, channel)."""
    o_row = o_outer * stride[0] + o_inner * stride[1]
    return o_row[:, None] + (o_channel * stride[2])[None, :]


@triton.jit
def load_vector(p_vector, o_channel, m_channel, default, ACC: tl.constexpr):
    """A per-channel vector as ACC; `default` where there is no such tensor."""
    if p_vector is None:
        b_vector = tl.full(o_channel.shape, default, ACC)
    else:
        b_vector = tl.load(p_vector + o_channel, mask=m_channel, other=default).to(ACC)
    return b_vector

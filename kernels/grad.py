"""What both passes of the backward begin with: dz = dy where the activation let its input through."""

import triton
import triton.language as tl

from .activation import passes
from .bits import byte_tile, unpack
from .moments import normalize
from .tile import tile_offsets


@triton.jit
def masked_gradient(
    p_dy,
    p_bits,
    b_centered,
    b_scale,
    b_bias,
    o_outer,
    o_inner,
    o_channel,
    m,
    i_tile,
    outer,
    inner,
    channels,
    tiles_inner,
    dy_stride,
    bits_stride,
    ACTIVATION: tl.constexpr,
    PACK_CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """dz [rows, channels]. A tail's mask is read; without one (no residual) it is recomputed from x."""
    o_dy = tile_offsets(o_outer, o_inner, o_channel, dy_stride)
    b_dz = tl.load(p_dy + o_dy, mask=m, other=0.0).to(ACC)
    if p_bits is not None:
        o_byte, m_byte = byte_tile(
            i_tile, outer, inner, channels, tiles_inner, bits_stride,
            PACK_CHANNELS, BLOCK_OUTER, BLOCK_INNER, BLOCK_CHANNELS, OFFSET,
        )  # fmt: skip
        b_byte = tl.load(p_bits + o_byte, mask=m_byte, other=0)
        b_dz = tl.where(unpack(b_byte, PACK_CHANNELS), b_dz, 0.0)
    elif ACTIVATION is not None:
        b_z = normalize(b_centered, b_scale, b_bias)
        b_dz = tl.where(passes(b_z, ACTIVATION), b_dz, 0.0)
    return b_dz

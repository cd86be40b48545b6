"""What a pass needs of a BatchNorm: mean, scale and bias of a block of channels."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .moments import inverse_std
from .tile import load_vector


class Norm(NamedTuple):
    """A BatchNorm as a pass reads it. The vectors are [C], saved [4, C] = (mean, mean_low, invstd, bias)."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    saved: Tensor | None = None
    eps: float = 0.0


NO_NORM = Norm()


@triton.jit
def load_norm(
    p_running_mean,
    p_running_var,
    p_saved,
    p_weight,
    p_bias,
    o_column,
    m_column,
    channels,
    spread,
    i_program,
    eps,
    ACC: tl.constexpr,
):
    """(mean, mean_low, scale, bias) of the channels of these columns, each [BLOCK_CHANNELS]; scale = invstd * weight.

    With running statistics: from those, and they are left in saved [4, C] (where given) with the bias; else saved is
    read. With neither there is no BatchNorm: the values as they are.
    """
    o_channel = o_column // spread
    b_bias = load_vector(p_bias, o_channel, m_column, 0.0, ACC)
    if p_running_mean is not None:
        b_mean = load_vector(p_running_mean, o_channel, m_column, 0.0, ACC)
        b_low = tl.zeros_like(b_mean)
        b_var = load_vector(p_running_var, o_channel, m_column, 1.0, ACC)
        b_invstd = inverse_std(b_var, eps, ACC)
        if p_saved is not None and i_program == 0:
            m_first = m_column & (o_column % spread == 0)
            tl.store(p_saved + o_channel, b_mean, mask=m_first)
            tl.store(p_saved + channels + o_channel, b_low, mask=m_first)
            tl.store(p_saved + 2 * channels + o_channel, b_invstd, mask=m_first)
            tl.store(p_saved + 3 * channels + o_channel, b_bias, mask=m_first)
    elif p_saved is None:
        b_mean = tl.zeros(o_channel.shape, ACC)
        b_low = tl.zeros(o_channel.shape, ACC)
        b_invstd = tl.full(o_channel.shape, 1.0, ACC)
    else:
        b_mean = load_vector(p_saved, o_channel, m_column, 0.0, ACC)
        b_low = load_vector(p_saved + channels, o_channel, m_column, 0.0, ACC)
        b_invstd = load_vector(p_saved + 2 * channels, o_channel, m_column, 0.0, ACC)
        b_bias = load_vector(p_saved + 3 * channels, o_channel, m_column, 0.0, ACC)
    b_scale = b_invstd * load_vector(p_weight, o_channel, m_column, 1.0, ACC)
    return b_mean, b_low, b_scale, b_bias

"""What a pass needs of a BatchNorm: mean, scale and bias of a block of channels."""

from typing import Any, NamedTuple

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


class Vectors(NamedTuple):
    """What a kernel is told of a BatchNorm: those of its tensors that it reads or writes."""

    weight: Any = None
    bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    batches: Any = None
    saved: Any = None


def vectors_of(norm: Norm) -> Vectors:
    """All that is there before a batch is looked at, and what is left of one."""
    return Vectors(norm.weight, norm.bias, norm.running_mean, norm.running_var, saved=norm.saved)


class Branch(NamedTuple):
    """What a kernel is told of one of the two tensors of a tail, x or the residual, and what belongs to it.

    p, stride: of the tensor; norm: `Vectors`. For the backward, too: partial, its sums; coefficients, what those came
    to; its gradient; addend, another gradient of x (`View`); dweight and dbias, of its BatchNorm; scaled, the gradient
    where it needs none of the sums and is written while they are taken.
    """

    p: Any
    stride: Any
    norm: Any
    partial: Any = None
    coefficients: Any = None
    gradient: Any = None
    addend: Any = None
    dweight: Any = None
    dbias: Any = None
    scaled: Any = None


class Affine(NamedTuple):
    """A BatchNorm of a block of channels, in registers; scale = invstd * weight."""

    mean: Any
    mean_low: Any
    scale: Any
    bias: Any


@triton.jit
def load_norm(norm, walk, eps, ACC: tl.constexpr):
    """The `Affine` of these columns, each [BLOCK_CHANNELS], of a BatchNorm's `Vectors`.

    With running statistics: from those, and they are left in saved [4, C] (where given) with the bias; else saved is
    read. With neither there is no BatchNorm: the values as they are.
    """
    o_channel = walk.o_column // walk.spread
    m_column, channels = walk.m_column, walk.channels
    b_bias = load_vector(norm.bias, o_channel, m_column, 0.0, ACC)
    if norm.running_mean is not None:
        b_mean = load_vector(norm.running_mean, o_channel, m_column, 0.0, ACC)
        b_low = tl.zeros_like(b_mean)
        b_var = load_vector(norm.running_var, o_channel, m_column, 1.0, ACC)
        b_invstd = inverse_std(b_var, eps, ACC)
        if norm.saved is not None and walk.first == 0:
            m_first = m_column & (walk.o_column % walk.spread == 0)
            tl.store(norm.saved + o_channel, b_mean, mask=m_first)
            tl.store(norm.saved + channels + o_channel, b_low, mask=m_first)
            tl.store(norm.saved + 2 * channels + o_channel, b_invstd, mask=m_first)
            tl.store(norm.saved + 3 * channels + o_channel, b_bias, mask=m_first)
    elif norm.saved is None:
        b_mean = tl.zeros(o_channel.shape, ACC)
        b_low = tl.zeros(o_channel.shape, ACC)
        b_invstd = tl.full(o_channel.shape, 1.0, ACC)
    else:
        b_mean = load_vector(norm.saved, o_channel, m_column, 0.0, ACC)
        b_low = load_vector(norm.saved + channels, o_channel, m_column, 0.0, ACC)
        b_invstd = load_vector(norm.saved + 2 * channels, o_channel, m_column, 0.0, ACC)
        b_bias = load_vector(norm.saved + 3 * channels, o_channel, m_column, 0.0, ACC)
    b_scale = b_invstd * load_vector(norm.weight, o_channel, m_column, 1.0, ACC)
    return Affine(b_mean, b_low, b_scale, b_bias)

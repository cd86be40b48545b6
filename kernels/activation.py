"""Activations as device functions: the value, and what the backward pass multiplies a gradient by.

"relu", "relu6" and "leaky_relu" have a derivative of two values, so one bit an element tells which (`passes`); that of
the others is computed from their input z again. Formulas: Hendrycks and Gimpel 2016 (GELU), Elfwing et al. 2018 (SiLU),
Misra 2019 (Mish), Howard et al. 2019 (hard swish); at the corners and at NaN they do what PyTorch does.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .moments import fma


class Activation(NamedTuple):
    """Which one, or None; slope: of "leaky_relu", below 0."""

    name: str | None
    slope: float


@triton.jit
def passes(z, ACTIVATION: tl.constexpr):
    """Whether the gradient passes whole where the activation's input is z."""
    if ACTIVATION.name == "relu":
        m = ~(z <= 0)
    elif ACTIVATION.name == "relu6":
        m = ~((z <= 0) | (z >= 6))
    elif ACTIVATION.name == "leaky_relu":
        m = z > 0
    else:
        m = z == z
    return m


@triton.jit
def keep_passing(b_dy, m, ACTIVATION: tl.constexpr):
    """dy where it passes whole; elsewhere nothing of it, or a share of the slope."""
    if ACTIVATION.name == "leaky_relu":
        b_dz = tl.where(m, b_dy, b_dy * _scalar(ACTIVATION.slope, b_dy))
    else:
        b_dz = tl.where(m, b_dy, 0.0)
    return b_dz


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); a NaN stays a NaN."""
    if ACTIVATION.name == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION.name == "relu6":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        z = tl.minimum(z, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION.name == "leaky_relu":
        z = tl.where(z > 0, z, z * _scalar(ACTIVATION.slope, z))
    elif ACTIVATION.name == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION.name == "gelu":
        z = z * normal_cdf(z)
    elif ACTIVATION.name == "gelu_tanh":
        z = z * sigmoid(_gelu_argument(z))
    elif ACTIVATION.name == "hardswish":
        b_gate = tl.where(z <= -3, 0.0, tl.where(z >= 3, 6.0, z + 3))
        z = z * b_gate / 6
    elif ACTIVATION.name == "mish":
        b_tanh, _ = _mish_tanh(z)
        z = z * b_tanh
    return z


@triton.jit
def through(b_dy, z, m, ACTIVATION: tl.constexpr):
    """dy * act'(z), where m; beyond it there is no gradient, whatever the derivative is there."""
    if ACTIVATION.name == "silu":
        b_slope = sigmoid(z) * (1 + z * sigmoid(-z))
    elif ACTIVATION.name == "gelu":
        b_density = tl.exp(-0.5 * z * z) * _scalar(0.3989422804014327, z)
        b_slope = normal_cdf(z) + z * b_density
    elif ACTIVATION.name == "gelu_tanh":
        b_argument = _gelu_argument(z)
        b_inner = _scalar(1.5957691216057308, z) * (1 + _scalar(0.134145, z) * z * z)
        b_slope = sigmoid(b_argument) * (1 + z * sigmoid(-b_argument) * b_inner)
    elif ACTIVATION.name == "hardswish":
        b_slope = tl.where(z <= -3, 0.0, tl.where(z < 3, z / 3 + 0.5, 1.0))
    elif ACTIVATION.name == "mish":
        b_tanh, b_rest = _mish_tanh(z)
        b_slope = b_tanh + z * b_rest * (1 + b_tanh) * sigmoid(z)
    else:
        b_slope = None
    if b_slope is None:
        b_dz = keep_passing(b_dy, passes(z, ACTIVATION), ACTIVATION)
    else:
        b_dz = tl.where(m, b_dy * b_slope, 0.0)
    return b_dz


@triton.jit
def _scalar(VALUE: tl.constexpr, like):
    """A number of the dtype of `like`, not rounded to float32 on its way."""
    return tl.full([], VALUE, like.dtype)


@triton.jit
def decay(z):
    """exp(-|z|), which cannot overflow."""
    b = tl.abs(z)
    if z.dtype == tl.float64:
        b = tl.where(b > 800, 800.0, b)  # 0 from here on; a NaN stays
        b_decay = tl.exp(-b)
    else:
        # The product with log2(e) in two parts: rounded, it would cost |z| units in the last place.
        b = tl.where(b > 110, 110.0, b)
        b_high = b * -1.44269502162933349609375
        b_low = (
            fma(b, tl.full(b.shape, -1.44269502162933349609375, b.dtype), -b_high)
            - b * 1.9259629911266175e-8
        )
        b_decay = tl.exp2(b_high) * (1 + b_low * 0.6931471805599453)
    return b_decay


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z))."""
    b = decay(z)
    return tl.where(z < 0, b, 1.0) / (1 + b)


@triton.jit
def normal_cdf(z):
    """The share of a standard normal variable below z."""
    return 0.5 * (1 + tl.erf(z * _scalar(0.7071067811865476, z)))


@triton.jit
def _gelu_argument(z):
    """GELU by tanh is z * sigmoid of this: 2 sqrt(2 / pi) (z + 0.044715 z^3)."""
    return _scalar(1.5957691216057308, z) * (z + _scalar(0.044715, z) * z * z * z)


@triton.jit
def _mish_tanh(z):
    """(tanh(softplus(z)), 1 - that), by exp(-|z|) = b: with e = exp(z), (e^2 + 2e) / (e^2 + 2e + 2)."""
    b = decay(z)
    b_square = b * b
    b_top = tl.where(z < 0, b_square + 2 * b, 1 + 2 * b)
    b_rest = tl.where(z < 0, 2.0, 2 * b_square)
    return b_top / (b_top + b_rest), b_rest / (b_top + b_rest)

"""Activations as device functions: the value, and the bit that the backward pass needs."""

import triton
import triton.language as tl


@triton.jit
def passes(z, ACTIVATION: tl.constexpr):
    """Whether the gradient passes where the activation's input is z; a NaN passes, as in PyTorch."""
    if ACTIVATION == "relu":
        m = ~(z <= 0)
    else:
        m = z == z
    return m


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); a NaN stays a NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    return z

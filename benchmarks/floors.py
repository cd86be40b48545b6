"""The passes over memory that each fused operator is built to make, and what they are in bytes.

A pass is one full read or write of a tensor of the activation's size; a tail's mask is one bit an element. The tests
hold the kernels to this table, the benchmarks divide it by time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """`activation(bn(x) + residual)`: what it computes, its passes, and how often it touches the mask (a bit each)."""

    residual: bool
    activation: str | None
    forward: float
    backward: float
    forward_bits: int = 0
    backward_bits: int = 0
    training: bool = True
    residual_norm: bool = False  # the residual has a BatchNorm of its own
    moments: bool = False  # the residual comes with its moments, from the product that wrote it
    skip: int | None = (
        None  # the stride of a second gradient of the output, which is added in the backward
    )

    def passes(self, mode: str, element_size: int = 2) -> float:
        """Passes of `forward`, `backward` or `step` (both); a bit is a sixteenth of a pass of two-byte elements."""
        passes = {"forward": self.forward, "backward": self.backward}
        bits = {"forward": self.forward_bits, "backward": self.backward_bits}
        modes = passes if mode == "step" else (mode,)
        return sum(passes[m] + bits[m] / (8 * element_size) for m in modes)

    def bytes(self, mode: str, shape: Sequence[int], element_size: int) -> int:
        """Bytes that it must read and write; per-channel vectors and partial sums are left out."""
        return round(self.passes(mode, element_size) * element_size * math.prod(shape))


OPERATORS = {
    "bn_relu": Operator(False, "relu", 3, 5),
    "bn_add_relu": Operator(True, "relu", 4, 6, 1, 2),
    "bn": Operator(False, None, 3, 5),
    # The residual's gradient is the output's: nothing to write.
    "bn_add": Operator(True, None, 4, 5),
    "bn_bn_add_relu": Operator(True, "relu", 5, 8, 1, 2, residual_norm=True),
    # With running statistics dx waits for no sum: the backward is one pass.
    "bn_relu_eval": Operator(False, "relu", 2, 3, training=False),
    "bn_add_relu_eval": Operator(True, "relu", 3, 4, 1, 1, training=False),
    # At a fork the first pass reads both gradients and writes dz (the residual's gradient), which the second reads. A
    # gradient that came over a projection of stride 2 is a quarter of a tensor.
    "bn_add_relu_fork": Operator(True, "relu", 4, 7, 1, 1, skip=1),
    "bn_add_relu_fork2": Operator(True, "relu", 4, 6.25, 1, 1, skip=2),
    "bn_bn_add_relu_known": Operator(True, "relu", 4, 8, 1, 2, residual_norm=True, moments=True),
    "bn_bn_add_relu_fork": Operator(True, "relu", 5, 10, 1, 1, residual_norm=True, skip=1),
    # An activation whose derivative takes more than two values has no mask: the residual is read again, twice.
    "bn_silu": Operator(False, "silu", 3, 5),
    "bn_add_silu": Operator(True, "silu", 4, 8),
    "bn_add_silu_fork": Operator(True, "silu", 4, 8, skip=1),
    "bn_bn_add_silu": Operator(True, "silu", 5, 8, residual_norm=True),
    "bn_bn_add_relu_fork2": Operator(True, "relu", 5, 9.25, 1, 1, residual_norm=True, skip=2),
}


def projection_bytes(
    mode: str, rows: int, channels_in: int, channels_out: int, element_size: int
) -> int:
    """Bytes of a 1x1 convolution that writes `rows`: it reads as many of its input, and the weight.

    Backward: the weight's gradient reads both again, the input's reads one and writes the other.
    """
    tensors = rows * (channels_in + channels_out) * element_size
    weight = channels_in * channels_out * element_size
    return (1 if mode == "forward" else 2) * (tensors + weight)

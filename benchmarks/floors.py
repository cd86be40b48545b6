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
    forward: int
    backward: int
    forward_bits: int = 0
    backward_bits: int = 0
    training: bool = True
    residual_norm: bool = False  # the residual has a BatchNorm of its own

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
    "bn_relu_eval": Operator(False, "relu", 2, 5, training=False),
    "bn_add_relu_eval": Operator(True, "relu", 3, 5, 1, 2, training=False),
}

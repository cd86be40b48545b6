"""A BatchNorm with its ReLU, and the convolution that reads it and does not keep it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import wants_triton
from ..ops.recompute import composed, may_recompute, read, remember
from .batch_norm import call_tail
from .norms import usual


def call_tail_again(
    norm: Any,
    input: Tensor,
    residual: None = None,
    activation: str | None = "relu",
    into: str | None = None,
    keep: bool = False,
) -> Tensor:
    """`call_tail`, whose output `call_reader` does not keep for the backward: in training, of a plain BatchNorm."""
    found = usual(norm) if may_recompute() else None
    if found is None or not norm.training or input.numel() == 0:
        return call_tail(norm, input, residual, activation, into, keep)
    if wants_triton(input.is_cuda):
        output = call_tail(norm, input, residual, activation, into, keep)
        remember(output)
        return output
    return composed(
        lambda: call_tail(norm, input, residual, activation, into, keep),
        input,
        found[0].bias,
        norm.eps,
    )


def call_reader(convolution: Any, input: Tensor) -> Tensor:
    """`convolution(input)` for what `call_tail_again` gave."""
    return read(convolution, input)

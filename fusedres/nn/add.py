"""The addition and the activation at the end of a block, with a scale or without."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate
from ..dispatch import DTYPES, goes_to_kernels, is_eager, wants_triton
from ..functional import add_act, scaled_add_act
from ..ops import add, scaled
from .batch_norm import is_like


def call_add(input: Tensor, residual: Tensor, activation: str, in_place: bool = False) -> Tensor:
    """`activation(input + residual)`, fused where the two are alike; `in_place`: the sum is written to the input.

    On plain PyTorch the activation works on the sum, which nobody else has seen.
    """
    output = add.met(input, residual, activation)
    if output is not None:
        return output
    if (
        is_eager()
        and isinstance(input, Tensor)
        and is_like(residual, input)
        and input.dtype in DTYPES
        and input.dim() > 1
        and wants_triton(input.is_cuda)
        and goes_to_kernels(input)
    ):
        return add_act(input, residual, activation=activation)
    if in_place:
        input += residual
    else:
        input = input + residual
    return activate(input, activation, is_eager())


def call_scaled_add(
    input: Tensor, residual: Tensor, scale: Tensor | None, activation: str | None = None
) -> Tensor:
    """`activation(residual + scale * input)`, fused where the two are alike; `scale`: None, one element or [C].

    What PyTorch would broadcast or promote is left to PyTorch.
    """
    output = scaled.met(input, residual, scale, activation)
    if output is not None:
        return output
    if (
        is_like(residual, input)
        and input.dim() > 1
        and input.dtype in DTYPES
        and (scale is None or scale.dtype in (torch.float32, input.dtype))
    ):
        if scale is not None:
            return scaled_add_act(input, residual, scale, activation=activation)
        if activation is not None:
            return call_add(input, residual, activation)
        return residual + input
    if scale is not None and scale.dim() == 1 and scale.numel() > 1:
        scale = scale.view([-1] + [1] * (input.dim() - 2))
    return activate(residual + (input if scale is None else scale * input), activation)

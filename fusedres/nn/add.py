"""The addition and the activation at the end of a block that somebody else owns."""

from __future__ import annotations

from torch import Tensor

from ..activations import activate
from ..dispatch import DTYPES, goes_to_kernels, is_eager, wants_triton
from ..functional import add_act
from .batch_norm import is_like


def call_add(input: Tensor, residual: Tensor, activation: str, in_place: bool = False) -> Tensor:
    """`activation(input + residual)`, fused where the two are alike; `in_place`: the sum is written to the input.

    On plain PyTorch the activation works on the sum, which nobody else has seen.
    """
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

"""The operators as plain PyTorch: the `aten` backend, and what tests and benchmarks compare with.

Nothing here is fused. Autograd, double backward, forward mode and vmap are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .activations import activate

_level = torch._C._functorch.maybe_current_level
_is_compiling, _cudnn = torch.compiler.is_compiling, torch._C._get_cudnn_enabled
BELOW_FLOAT32 = (torch.bfloat16, torch.float16)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """`act(batch_norm(input) + residual)`; shapes and dtypes as in `fusedres.functional.batch_norm_act`, unchecked.

    The add and a ReLU work in place on BatchNorm's own output, which nothing else has seen: what autograd saves is the
    input and the output, as for the same three calls in a ResNet.
    """
    output = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return finish(output, residual, activation)


def finish(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """`act(output + residual)`, in place on an output that nothing else has seen."""
    # Under torch.func an in-place result may be too small for its operand (vmap over the residual alone).
    may_write = not _is_compiling() and _level() is None
    if residual is not None and not (
        may_write and (type(residual) is type(output) or type(residual) is nn.Parameter)
    ):  # of a subclass the sum is one too
        output, residual = (output + residual).to(output.dtype), None
    return in_place(output, residual, activation) if may_write else activate(output, activation)


def in_place(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """`finish`, written to the output, with nothing left to ask."""
    if residual is not None:
        output.add_(residual)
    return torch.relu_(output) if activation == "relu" else activate(output, activation, True)


def eager(
    input: Tensor, residual: Tensor | None, vectors: Sequence[Tensor | None], numbers: Sequence[float],
    training: bool, activation: str | None,
) -> Tensor:  # fmt: skip
    """`batch_norm_act` with nothing left to ask: nothing is compiled or transformed, and all tensors are of one kind.

    vectors: weight, bias, running mean and variance; numbers: momentum, eps.
    """
    weight, bias, mean, var = vectors
    momentum, eps = numbers
    output = torch.batch_norm(input, weight, bias, mean, var, training, momentum, eps, _cudnn())
    return in_place(output, residual, activation)


def scaled_add_act(
    input: Tensor, residual: Tensor, scale: Tensor, activation: str | None = None
) -> Tensor:
    """`act(residual + scale * input)`, as in `fusedres.functional.scaled_add_act`, unchecked."""
    if scale.dim() == 1 and scale.numel() > 1:
        scale = scale.view([-1] + [1] * (input.dim() - 2))
    # The sum is laid out as its first operand.
    return activate((scale * input).to(input.dtype) + residual, activation)


def _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps):
    # To a wider input everything is of its dtype already.
    if input.dtype not in BELOW_FLOAT32 or not _are_mixed(running_mean, running_var, weight, bias):
        # A property of a module, which costs as much as the sum; torch.compile knows nothing of what is behind it.
        cudnn = torch.backends.cudnn.enabled if _is_compiling() else _cudnn()
        return torch.batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn
        )
    # aten takes parameters and buffers of one dtype only (on a CPU); a 16-bit input takes each in float32 or its own.
    mean, var, weight, bias = (
        None if tensor is None else tensor.to(torch.float32)
        for tensor in (running_mean, running_var, weight, bias)
    )
    output = _batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    for buffer, updated in ((running_mean, mean), (running_var, var)):
        if training and updated is not buffer:
            buffer.copy_(updated)
    return output


def _are_mixed(*tensors: Tensor | None) -> bool:
    return len({tensor.dtype for tensor in tensors if tensor is not None}) > 1

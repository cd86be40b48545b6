"""How results are laid out in memory: as those of the same calls in PyTorch, whatever the input's strides.

PyTorch's BatchNorm gives a contiguous or a channels_last tensor (its native kernels on CUDA keep other orders of the
dimensions, cuDNN does not: the rule here is the CPU's, on every device); its sums follow their operands.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def output_format(input: Tensor) -> torch.memory_format:
    """What `F.batch_norm` gives on a CPU: the input's format, or the one that the order of its strides suggests."""
    if input.is_contiguous() or (last := _LAST.get(input.dim())) is None:
        return torch.contiguous_format
    if input.is_contiguous(memory_format=last) or _steps_as_channels_last(input):
        return last
    return torch.contiguous_format


def like_output(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor laid out as BatchNorm's output; the gradient of the input and masks are laid out alike."""
    return torch.empty_like(input, dtype=dtype, memory_format=output_format(input))


def _steps_as_channels_last(tensor: Tensor) -> bool:
    """Whether the strides stand in the order of channels_last: c10's `is_channels_last_strides_2d` and `_3d`."""
    strides, shape, least = tensor.stride(), tensor.shape, 0
    if strides[1] == 0:
        return False
    for d in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * shape[d] if shape[d] > 1 else strides[d]
    return True


def like_sum(input: Tensor, residual: Tensor, is_scaled: bool = False) -> Tensor:
    """An empty tensor laid out as `input + residual` (or `scale * input + residual`)."""
    if input.is_contiguous() and residual.is_contiguous():
        return torch.empty_like(input, memory_format=torch.contiguous_format)
    shape = tuple(input.shape)
    strides = _strides_of_sum(shape, input.stride(), residual.stride(), is_scaled)
    return input.new_empty_strided(shape, strides)


@functools.lru_cache(maxsize=4096)
def _strides_of_sum(
    shape: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...], is_scaled: bool
) -> tuple[int, ...]:
    """As PyTorch's own elementwise kernels choose them, asked of tensors without memory."""
    a, b = (torch.empty_strided(shape, strides, device="meta") for strides in (first, second))
    if is_scaled:
        a = torch.empty([shape[1]] + [1] * (len(shape) - 2), device="meta") * a
    return (a + b).stride()

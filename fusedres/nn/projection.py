"""The projected shortcut as a module, and the same for children that somebody else owns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import why_called
from ..projection import project
from .batch_norm import call_dual_batch_norm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def why_not_projection(convolution: nn.Module | None) -> str | None:
    """Why this child is not a 1x1 convolution that can be run without calling it; None when it is."""
    if type(convolution) not in CONVOLUTIONS:
        return f"it is a {type(convolution).__name__}, not an nn.Conv1d/2d/3d"
    child: Any = convolution
    if (reason := why_called(child)) is not None:
        return reason
    if type(child._parameters.get("weight")) is not nn.Parameter:
        return "its weight is not a plain Parameter"
    if any(size != 1 for size in child.kernel_size):
        return f"its kernel is {'x'.join(map(str, child.kernel_size))}"
    if child.groups != 1:
        return f"it has {child.groups} groups"
    if child.padding != "valid" and any(child.padding):
        return f"it pads by {child.padding}"
    return None


def call_projection(
    convolution: Any, input: Tensor, moments: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`convolution(input)` for a real 1x1 `nn.Conv1d/2d/3d`, and the partial moments of it where there are some.

    One that is not, or an input that it would not take, goes to the module itself.
    """
    if why_not_projection(convolution) is not None or input.dim() != convolution.weight.dim():
        return convolution(input), None
    weight, bias = convolution.weight, convolution.bias
    if (dtype := _autocast_dtype(input)) is not None:
        # What autocast does to a convolution's arguments; the weight is cast where it is used.
        input = input.to(dtype)
    elif weight.dtype != input.dtype:
        return convolution(input), None  # PyTorch's own error
    if input.shape[1] != weight.shape[1] or weight.device != input.device:
        return convolution(input), None
    return project(input, weight, bias, convolution.stride, moments)


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if input.dtype == torch.float64 else torch.get_autocast_dtype(device)


def call_projected_tail(
    norm: Any,
    input: Tensor,
    shortcut_norm: Any,
    convolution: Any,
    shortcut: Tensor,
    activation: str | None = None,
    add_in_place: bool = False,
) -> Tensor:
    """`activation(norm(input) + shortcut_norm(convolution(shortcut)))`; a convolution of None has been run already."""
    moments = None
    if convolution is not None:
        wanted = shortcut_norm.training or shortcut_norm.running_mean is None
        shortcut, moments = call_projection(convolution, shortcut, wanted)
    return call_dual_batch_norm(
        norm, input, shortcut_norm, shortcut, activation, add_in_place, moments
    )

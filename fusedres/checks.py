"""What the public functions accept. Everything is checked before any buffer is touched."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import DTYPES

ACTIVATIONS = (None, "relu")
_VECTORS = ("running_mean", "running_var", "weight", "bias")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_batch_norm_act(
    name,
    input,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    residual,
    activation,
) -> None:
    """Refuse what `act(batch_norm(input) + residual)` is not defined for.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; a single value per channel in training.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input is a {type(input).__name__}, expected a torch.Tensor")
    dtype, device, shape = input.dtype, input.device, input.shape
    if dtype not in DTYPES:
        raise TypeError(
            f"{name}: input has dtype {dtype}, expected one of {', '.join(map(str, DTYPES))}; "
            "convert it first, for example with input.float()"
        )
    if len(shape) < 2:
        raise ValueError(
            f"{name}: input has shape {_shape(input)}, expected at least 2 dimensions [N, C, ...]"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: unknown activation {activation!r}; choose one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    channels = shape[1]
    vectors = (running_mean, running_var, weight, bias)
    for tensor in vectors:
        # One test for what is nearly always right: this runs at every call.
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.dim() == 1
            and tensor.numel() == channels
            and (tensor.dtype is torch.float32 or tensor.dtype is dtype)
            and tensor.device == device
        ):
            argument = next(a for a, t in zip(_VECTORS, vectors, strict=True) if t is tensor)
            _refuse_vector(name, argument, tensor, input)
    if (running_mean is None) != (running_var is None):
        missing, given = ("running_mean", "running_var")[:: 1 if running_mean is None else -1]
        raise ValueError(
            f"{name}: {missing} is None and {given} is not; pass both running statistics or neither"
        )
    if running_mean is None and not training:
        raise ValueError(
            f"{name}: running_mean and running_var are None with training=False; "
            "pass both, or training=True to normalise with the statistics of the batch"
        )
    if residual is not None:
        _check_residual(name, residual, input)
    if not isinstance(momentum, (float, int, Tensor)):
        raise TypeError(
            f"{name}: momentum is {momentum!r}, expected a number or a tensor of one element "
            "(for a cumulative average pass 1 / num_batches_tracked)"
        )
    if training and channels > 0:
        _check_values_per_channel(shape)


def _refuse_vector(name, argument, tensor, input) -> None:
    channels, dtype, device = input.shape[1], input.dtype, input.device
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: {argument} is a {type(tensor).__name__}, expected a torch.Tensor or None"
        )
    if tensor.shape != (channels,):
        raise ValueError(
            f"{name}: {argument} has shape {_shape(tensor)}, expected [{channels}], "
            f"one value for each channel of input {_shape(input)}"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name}: {argument} is on {tensor.device}, input is on {device}; move one of them"
        )
    raise TypeError(
        f"{name}: {argument} has dtype {tensor.dtype}, expected torch.float32 or the input's {dtype}"
    )


def _check_residual(name, residual, input) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"{name}: residual is a {type(residual).__name__}, expected a torch.Tensor or None"
        )
    if residual.shape != input.shape:
        raise ValueError(
            f"{name}: residual has shape {_shape(residual)}, expected {_shape(input)} like input; "
            "project or expand it first"
        )
    if residual.device != input.device:
        raise ValueError(
            f"{name}: residual is on {residual.device}, input is on {input.device}; move one of them"
        )
    if residual.dtype not in DTYPES:
        raise TypeError(
            f"{name}: residual has dtype {residual.dtype}, expected a floating dtype like input's {input.dtype}"
        )


def _check_values_per_channel(shape) -> None:
    values = shape[0]
    for size in shape[2:]:
        values *= size
    if values == 1:
        # PyTorch's own message and type (torch.nn.functional._verify_batch_size).
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )

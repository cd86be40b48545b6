"""What the public functions accept. Everything is checked before any buffer is touched."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import check_activation
from .dispatch import DTYPES

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
    _check_input(name, input, activation)
    dtype, device, shape = input.dtype, input.device, input.shape
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


def _check_input(name, input, activation) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input is a {type(input).__name__}, expected a torch.Tensor")
    if input.dtype not in DTYPES:
        raise TypeError(
            f"{name}: input has dtype {input.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
            "convert it first, for example with input.float()"
        )
    if input.dim() < 2:
        raise ValueError(
            f"{name}: input has shape {_shape(input)}, expected at least 2 dimensions [N, C, ...]"
        )
    check_activation(name, activation)


def check_add_act(name, input, residual, activation) -> None:
    """Refuse what `act(input + residual)` is not defined for.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, an unknown activation.
    """
    _check_input(name, input, activation)
    _check_residual(name, residual, input)
    if residual.dtype != input.dtype:
        raise TypeError(
            f"{name}: residual has dtype {residual.dtype}, expected the input's {input.dtype}; convert one of them"
        )


def check_scaled_add_act(name, input, residual, scale, activation) -> None:
    """Refuse what `act(residual + scale * input)` is not defined for.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, an unknown activation.
    """
    check_add_act(name, input, residual, activation)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        scale = scale.reshape(1).expand(input.shape[1])
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"{name}: scale is a {type(scale).__name__}, expected a torch.Tensor of one element or of one per channel"
        )
    if (
        scale.shape != input.shape[1:2]
        or scale.device != input.device
        or scale.dtype not in (torch.float32, input.dtype)
    ):
        _refuse_vector(name, "scale", scale, input)


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


def check_projection(
    name, input, weight, bias, stride, padding, dilation, groups, argument="input"
):
    """Refuse what is no 1x1 convolution; the stride as a tuple, one step for each spatial dimension.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: {argument} is a {type(input).__name__}, expected a torch.Tensor")
    if input.dtype not in DTYPES:
        raise TypeError(
            f"{name}: {argument} has dtype {input.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
            f"convert it first, for example with {argument}.float()"
        )
    dimensions = input.dim() - 2
    if not 1 <= dimensions <= 3:
        raise ValueError(
            f"{name}: {argument} has shape {_shape(input)}, expected [N, Cin, ...] with 1 to 3 spatial dimensions"
        )
    steps = _per_dimension(name, "stride", stride, dimensions)
    if min(steps) < 1:
        raise ValueError(f"{name}: stride is {stride!r}, expected 1 or more")
    for option, value, only in (("padding", padding, 0), ("dilation", dilation, 1)):
        if set(_per_dimension(name, option, value, dimensions)) != {only}:
            raise ValueError(
                f"{name}: {option} is {value!r}, a projection has {option} {only}; use torch.nn.functional.conv2d "
                "for it, and dual_batch_norm_act for what follows"
            )
    if groups != 1:
        raise ValueError(
            f"{name}: groups is {groups!r}, a projection has 1; use torch.nn.functional.conv2d for it, "
            "and dual_batch_norm_act for what follows"
        )
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name}: weight of the projection is a {type(weight).__name__}, expected a torch.Tensor"
        )
    if weight.dim() != input.dim() or set(weight.shape[2:]) != {1}:
        expected = ["Cout", "Cin", *["1"] * dimensions]
        raise ValueError(
            f"{name}: the projection's weight has shape {_shape(weight)}, expected [{', '.join(expected)}]; "
            "a kernel larger than 1x1 is no projection: use torch.nn.functional.conv2d"
        )
    if weight.shape[1] != input.shape[1]:
        raise ValueError(
            f"{name}: the projection's weight has shape {_shape(weight)}, and {argument} {_shape(input)} has "
            f"{input.shape[1]} channels; expected them to agree (groups are not supported)"
        )
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: {what} of the projection is a {type(tensor).__name__}, expected a torch.Tensor"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"{name}: {what} of the projection is on {tensor.device}, {argument} is on {input.device}; move one"
            )
        if tensor.dtype not in (torch.float32, input.dtype):
            raise TypeError(
                f"{name}: {what} of the projection has dtype {tensor.dtype}, expected torch.float32 or "
                f"the dtype of {argument}, {input.dtype}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias of the projection has shape {_shape(bias)}, expected [{weight.shape[0]}]"
        )
    return steps


def _per_dimension(name, option, value, dimensions):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dimensions
    if len(values) == 1:
        values *= dimensions
    if len(values) != dimensions or not all(type(v) is int for v in values):
        raise ValueError(
            f"{name}: {option} is {value!r}, expected a whole number or {dimensions} of them"
        )
    return values


def check_projected_shape(name, input, shortcut, weight, stride) -> None:
    """Refuse a projection whose output does not have the main path's shape.

    Raises:
        ValueError: it has another; the message names the stride that would fit, where one does.
    """
    spatial = [
        (size - 1) // step + 1 for size, step in zip(shortcut.shape[2:], stride, strict=True)
    ]
    projected = [shortcut.shape[0], weight.shape[0], *spatial]
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input is a {type(input).__name__}, expected a torch.Tensor")
    if list(input.shape) == projected:
        return
    fitting = [
        s
        for s in range(1, 9)
        if [(n - 1) // s + 1 for n in shortcut.shape[2:]] == list(input.shape[2:])
    ]
    hint = f"; stride={fitting[0]} fits" if fitting and fitting[0] not in stride else ""
    raise ValueError(
        f"{name}: the shortcut {_shape(shortcut)} is projected to {projected} with stride {stride}, "
        f"and input is {_shape(input)}; expected them to agree{hint}"
    )

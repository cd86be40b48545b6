"""What the public functions accept. Everything is checked before any buffer is touched.

An error is of the type that PyTorch raises for the same call: TypeError for what is no tensor, number or bool,
NotImplementedError (a RuntimeError) for an input of a dtype or layout that there is no kernel for, RuntimeError for
shapes, dtypes and devices that do not fit, ValueError for a value.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import check_activation
from .dispatch import DTYPES
from .words import a_type

# What PyTorch runs on oneDNN's own layout stays with PyTorch (`dispatch.goes_to_kernels`).
_LAYOUTS = (torch.strided, torch._mkldnn)  # type: ignore[attr-defined]
_VECTORS = ("running_mean", "running_var", "weight", "bias")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def number(name: str, argument: str, value: Any) -> float:
    """A number as PyTorch reads an argument of type float: ints, bools, scalars of numpy, tensors of no dimension.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return float(value)
    # Whoever passes a scalar of numpy has imported it.
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.number, numpy.bool_)):
        return float(value.real)
    _check_tensor_number(name, argument, value)
    found = value.item()
    return float(found.real)


def _check_tensor_number(name: str, argument: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad:
        return
    hint = ""
    if isinstance(value, Tensor):
        hint = "; use its value, for example float(value), or of several the one that is meant"
    elif value is None and argument.endswith("momentum"):
        hint = " (for a cumulative average pass 1 / num_batches_tracked)"
    raise TypeError(
        f"{name}: {argument} is {value!r}, expected a number, or a tensor of no dimension that needs no gradient{hint}"
    )


def momentum_number(name: str, value: Any) -> float | Tensor:
    """`number`, but a tensor stays one: its value need not be waited for."""
    if isinstance(value, Tensor):
        _check_tensor_number(name, "momentum", value)
        return value
    return number(name, "momentum", value)


def check_eps(name: str, argument: str, eps: float, training: bool) -> None:
    """Refuse what `torch.nn.functional.batch_norm` refuses; a NaN is none of it.

    Raises:
        ValueError: it is negative, or 0 in training.
    """
    if eps < 0 or (training and eps == 0):
        wanted = "a positive number in training" if training else "no negative number"
        raise ValueError(f"{name}: {argument} is {eps}, expected {wanted}")
    if eps == 0:
        # In eval mode PyTorch 2.11 refuses it too, and 2.15 does not: whichever runs says so.
        F.batch_norm(torch.zeros(1, 1), torch.zeros(1), torch.ones(1), eps=0.0)


def takes(vector: torch.dtype, input: torch.dtype) -> bool:
    """Whether parameters or statistics of this dtype go with an input of that one.

    The input's own, or float32 with 16-bit values: PyTorch's rule. (Of one dtype must they be only on its CPU.)
    """
    return vector is input or (
        vector is torch.float32 and input is not torch.float64 and input in DTYPES
    )


def check_batch_norm_act(
    name,
    input,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    eps,
    residual,
    activation,
    eps_name="eps",
) -> None:
    """Refuse what `act(batch_norm(input) + residual)` is not defined for.

    Raises:
        TypeError, NotImplementedError, RuntimeError, ValueError: as PyTorch; a single value per channel in training is
            a ValueError.
    """
    _check_input(name, input, activation)
    if training is not True and training is not False:
        raise TypeError(f"{name}: training is {training!r}, expected a bool")
    shape = input.shape
    if training and len(shape) > 0:
        _check_values_per_channel(shape)
    check_eps(name, eps_name, eps, training)
    # Of an empty input PyTorch looks at nothing else, and one of a single dimension is fine.
    if input.numel() > 0:
        _check_vectors(name, input, running_mean, running_var, weight, bias, training)
    if residual is not None:
        _check_residual(name, residual, input)


def check_shared_batch_norm(
    name, input, running_mean, running_var, weight, bias, eps, residual, activation
) -> None:
    """As `check_batch_norm_act` of a call in training whose statistics several processes share.

    How many values a channel has in all is not known here, and an empty input is looked at as any other: its process
    moves the same running statistics.
    """
    _check_input(name, input, activation)
    check_eps(name, "eps", eps, True)
    _check_vectors(name, input, running_mean, running_var, weight, bias, True)
    if residual is not None:
        _check_residual(name, residual, input)


def _check_vectors(name, input, running_mean, running_var, weight, bias, training) -> None:
    dtype, device, shape = input.dtype, input.device, input.shape
    vectors = (running_mean, running_var, weight, bias)
    if len(shape) < 2:
        _refuse_dimensions(name, input, vectors, training)
    channels = shape[1]
    for tensor in vectors:
        # One test for what is nearly always right: this runs at every call.
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.dim() == 1
            and tensor.numel() == channels
            and (tensor.dtype is dtype or takes(tensor.dtype, dtype))
            and tensor.device == device
        ):
            argument = next(a for a, t in zip(_VECTORS, vectors, strict=True) if t is tensor)
            _refuse_vector(name, argument, tensor, input)
    if (running_mean is None) != (running_var is None):
        missing, given = ("running_mean", "running_var")[:: 1 if running_mean is None else -1]
        raise (ValueError if training else RuntimeError)(
            f"{name}: {missing} is None and {given} is not; pass both running statistics or neither"
        )
    if running_mean is None and not training:
        raise RuntimeError(
            f"{name}: running_mean and running_var are None with training=False; "
            "pass both, or training=True to normalise with the statistics of the batch"
        )


def _refuse_dimensions(name, input, vectors, training) -> None:
    # PyTorch counts no channels then, finds vectors of another length, or no second dimension.
    has_some = any(isinstance(t, Tensor) and t.numel() > 0 for t in vectors)
    by_index = training and (input.dim() == 0 or not has_some)
    raise (IndexError if by_index else RuntimeError)(
        f"{name}: input has shape {_shape(input)}, expected at least 2 dimensions [N, C, ...]"
    )


def _check_input(name, input, activation) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input is {a_type(input)}, expected a torch.Tensor")
    _check_kind(name, "input", input)
    check_activation(name, activation)


def _check_kind(name, argument, tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise NotImplementedError(
            f"{name}: {argument} has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
            f"convert it first, for example with {argument}.float()"
        )
    if tensor.layout not in _LAYOUTS:
        raise NotImplementedError(
            f"{name}: {argument} has layout {tensor.layout}, expected torch.strided; convert it first, for example "
            f"with {argument}.to_dense()"
        )


def check_add_act(name, input, residual, activation) -> None:
    """Refuse what `act(input + residual)` is not defined for.

    Raises:
        TypeError, NotImplementedError, RuntimeError: as PyTorch.
        ValueError: an unknown activation.
    """
    _check_input(name, input, activation)
    if input.dim() < 2:
        raise RuntimeError(
            f"{name}: input has shape {_shape(input)}, expected at least 2 dimensions [N, C, ...]"
        )
    _check_residual(name, residual, input)
    if residual.dtype != input.dtype:
        raise RuntimeError(
            f"{name}: residual has dtype {residual.dtype}, expected the input's {input.dtype}; convert one of them"
        )


def check_scaled_add_act(name, input, residual, scale, activation) -> None:
    """Refuse what `act(residual + scale * input)` is not defined for.

    Raises:
        TypeError, NotImplementedError, RuntimeError: as PyTorch.
        ValueError: an unknown activation.
    """
    check_add_act(name, input, residual, activation)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        scale = scale.reshape(1).expand(input.shape[1])
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"{name}: scale is {a_type(scale)}, expected a torch.Tensor of one element or of one per channel"
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
        raise TypeError(f"{name}: {argument} is {a_type(tensor)}, expected a torch.Tensor or None")
    if tensor.shape != (channels,):
        raise RuntimeError(
            f"{name}: {argument} has shape {_shape(tensor)}, expected [{channels}], "
            f"one value for each channel of input {_shape(input)}"
        )
    if tensor.device != device:
        raise RuntimeError(
            f"{name}: {argument} is on {tensor.device}, input is on {device}; move one of them"
        )
    wanted = f"the input's {dtype}"
    if dtype is not torch.float32 and (argument == "scale" or takes(torch.float32, dtype)):
        wanted = f"torch.float32 or {wanted}"
    raise RuntimeError(
        f"{name}: {argument} has dtype {tensor.dtype}, expected {wanted}; convert one of them"
    )


def _check_residual(name, residual, input) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name}: residual is {a_type(residual)}, expected a torch.Tensor or None")
    if residual.shape != input.shape:
        raise RuntimeError(
            f"{name}: residual has shape {_shape(residual)}, expected {_shape(input)} like input; "
            "project or expand it first"
        )
    if residual.device != input.device:
        raise RuntimeError(
            f"{name}: residual is on {residual.device}, input is on {input.device}; move one of them"
        )
    _check_kind(name, "residual", residual)


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
        TypeError, NotImplementedError, RuntimeError: as PyTorch's own convolution.
        ValueError: a convolution that is none of 1x1: its kernel, padding, dilation or groups.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: {argument} is {a_type(input)}, expected a torch.Tensor")
    _check_kind(name, argument, input)
    dimensions = input.dim() - 2
    if not 1 <= dimensions <= 3:
        raise RuntimeError(
            f"{name}: {argument} has shape {_shape(input)}, expected [N, Cin, ...] with 1 to 3 spatial dimensions"
        )
    steps = _per_dimension(name, "stride", stride, dimensions)
    if min(steps) < 1:
        raise RuntimeError(f"{name}: stride is {stride!r}, expected 1 or more")
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
            f"{name}: weight of the projection is {a_type(weight)}, expected a torch.Tensor"
        )
    if weight.dim() != input.dim() or set(weight.shape[2:]) != {1}:
        expected = ["Cout", "Cin", *["1"] * dimensions]
        raise (RuntimeError if weight.dim() != input.dim() else ValueError)(
            f"{name}: the projection's weight has shape {_shape(weight)}, expected [{', '.join(expected)}]; "
            "a kernel larger than 1x1 is no projection: use torch.nn.functional.conv2d"
        )
    if weight.shape[1] != input.shape[1]:
        raise RuntimeError(
            f"{name}: the projection's weight has shape {_shape(weight)}, and {argument} {_shape(input)} has "
            f"{input.shape[1]} channels; expected them to agree (groups are not supported)"
        )
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: {what} of the projection is {a_type(tensor)}, expected a torch.Tensor"
            )
        if tensor.device != input.device:
            raise RuntimeError(
                f"{name}: {what} of the projection is on {tensor.device}, {argument} is on {input.device}; move one"
            )
        if not takes(tensor.dtype, input.dtype):
            either = "torch.float32 or " if takes(torch.float32, input.dtype) else ""
            raise RuntimeError(
                f"{name}: {what} of the projection has dtype {tensor.dtype}, expected {either}"
                f"the dtype of {argument}, {input.dtype}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"{name}: bias of the projection has shape {_shape(bias)}, expected [{weight.shape[0]}]"
        )
    return steps


def _per_dimension(name, option, value, dimensions):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    wanted = f"{name}: {option} is {value!r}, expected a whole number or {dimensions} of them"
    try:
        values = tuple(operator.index(v) for v in values)
    except TypeError:
        raise TypeError(wanted) from None
    if len(values) == 1:
        values *= dimensions
    if len(values) != dimensions:
        raise RuntimeError(wanted)
    return values


def check_projected_shape(name, input, shortcut, weight, stride) -> None:
    """Refuse a projection whose output does not have the main path's shape.

    Raises:
        RuntimeError: it has another; the message names the stride that would fit, where one does.
    """
    spatial = [
        (size - 1) // step + 1 for size, step in zip(shortcut.shape[2:], stride, strict=True)
    ]
    projected = [shortcut.shape[0], weight.shape[0], *spatial]
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input is {a_type(input)}, expected a torch.Tensor")
    if list(input.shape) == projected:
        return
    fitting = [
        s
        for s in range(1, 9)
        if [(n - 1) // s + 1 for n in shortcut.shape[2:]] == list(input.shape[2:])
    ]
    hint = f"; stride={fitting[0]} fits" if fitting and fitting[0] not in stride else ""
    raise RuntimeError(
        f"{name}: the shortcut {_shape(shortcut)} is projected to {projected} with stride {stride}, "
        f"and input is {_shape(input)}; expected them to agree{hint}"
    )

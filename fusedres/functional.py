"""The functions of fusedres: `torch.nn.functional`'s arguments in their order, then what is fused in."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .activations import activate
from .checks import (
    check_add_act,
    check_batch_norm_act,
    check_projected_shape,
    check_projection,
    check_scaled_add_act,
    momentum_number,
    number,
)
from .dispatch import goes_to_kernels, is_eager, wants_triton
from .kernels.dtypes import accumulate_dtype
from .ops import add, dual, preactivation, scaled
from .ops import batch_norm_act as single
from .ops.norm import BatchNorm, How, blend
from .ops.projection import project
from .ops.statistics import Statistics, keep_finite

__all__ = [
    "add_act",
    "add_batch_norm_act",
    "batch_norm_act",
    "dual_batch_norm_act",
    "projection",
    "projection_batch_norm_act",
    "scaled_add_act",
]


def __dir__() -> list[str]:
    return list(__all__)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    keep_finite_statistics: bool = False,
) -> Tensor:
    """`activation(batch_norm(input) + residual)`, in as few passes over memory as it takes.

    With `mean` and `var` of each channel over all other dimensions (of the batch when `training`, else the running
    statistics; `var` is the biased variance, Ioffe and Szegedy 2015, arXiv:1502.03167):

        output = activation((input - mean) / sqrt(var + eps) * weight + bias + residual)

    Args:
        input: [N, C, ...], at least 2-D, any strides; float32, bfloat16, float16 or float64.
        running_mean, running_var: [C] or None; of the input's dtype, or float32 with a 16-bit one. With `training` they
            are updated in place: `running = (1 - momentum) * running + momentum * batch`, the variance unbiased.
        weight, bias: [C] or None (ones and zeros); of the input's dtype, or float32 with a 16-bit one.
        training: normalise with the statistics of the batch.
        momentum: a number, or a tensor of no dimension (no host synchronisation: `1 / num_batches_tracked` makes the
            cumulative average of `nn.BatchNorm2d(momentum=None)`).
        eps: added to the variance; a number, not negative, and in training not 0.
        residual: like `input` in shape, in any layout; added before the activation.
        activation: None, or a name: "relu", "relu6", "leaky_relu" ("leaky_relu(0.2)" for a slope that is not 0.01),
            "silu", "gelu", "gelu_tanh", "hardswish", "mish".
        keep_finite_statistics: a channel whose running mean or variance would not be finite keeps both.

    Returns:
        A tensor with the input's shape, dtype and memory format. Arithmetic is in float32 (float64 for float64) and
        rounded once. First and second derivatives are supported; a NaN passes through the activation, as in PyTorch.

    Raises:
        TypeError: an argument that is no tensor, number or bool where one is wanted.
        NotImplementedError: an input that is not of these dtypes, or not dense.
        RuntimeError: shapes, dtypes or devices that do not fit; the triton backend was asked for and cannot run there.
        ValueError: an eps or an activation that there is not; one value per channel in training.

    The types are those that `F.batch_norm` raises for the same call. After an error the running statistics are what
    they were.
    """
    name = "batch_norm_act"
    if type(eps) is not float:
        eps = number(name, "eps", eps)
    if type(momentum) is not float:
        momentum = momentum_number(name, momentum)
    check_batch_norm_act(
        name, input, running_mean, running_var, weight, bias, training, eps, residual, activation
    )
    if keep_finite_statistics and training and running_mean is not None and running_var is not None:
        arguments = input, running_mean, running_var, weight, bias, training, momentum, eps
        return keep_finite(
            [Statistics(running_mean, running_var)],
            lambda: batch_norm_act(*arguments, residual=residual, activation=activation),
        )
    if isinstance(momentum, Tensor):
        if not training or running_mean is None or running_var is None or input.numel() == 0:
            momentum = 0.0
        else:
            return _with_tensor_momentum(
                input, running_mean, running_var, weight, bias, momentum, eps, residual, activation
            )
    if wants_triton(input.is_cuda) and goes_to_kernels(input):
        norm = BatchNorm(weight, bias, running_mean, running_var, float(momentum), eps)
        return single.batch_norm_act(input, residual, norm, How(training, activation))
    return reference.batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        residual=residual, activation=activation,
    )  # fmt: skip


def dual_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_momentum: float = 0.1,
    residual_eps: float = 1e-5,
    *,
    activation: str | None = "relu",
) -> Tensor:
    """`activation(batch_norm(input) + batch_norm(residual))`: the tail of a block whose shortcut is projected.

    Each of the two is normalised as `batch_norm_act` normalises its input, with statistics, weight and bias of its own.

    Args:
        input, residual: [N, C, ...] of one shape, at least 2-D, any strides; float32, bfloat16, float16 or float64.
        running_mean, running_var, residual_running_mean, residual_running_var: [C] or None; float32 or the dtype of
            what they belong to. With `training` they are updated in place.
        weight, bias, residual_weight, residual_bias: [C] or None (ones and zeros).
        training: normalise both with the statistics of the batch.
        momentum, eps, residual_momentum, residual_eps: as for `batch_norm_act`; a momentum that is a tensor is read.
        activation: as for `batch_norm_act`.

    Returns:
        A tensor with the input's shape, dtype and memory format. First and second derivatives are supported.

    Raises:
        TypeError, NotImplementedError, RuntimeError, ValueError: as `batch_norm_act` does; for the residual the message
            says so.

    After an error the running statistics are what they were.
    """
    norms = (
        BatchNorm(weight, bias, running_mean, running_var, momentum, eps),
        BatchNorm(
            residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_momentum, residual_eps
        ),
    )  # fmt: skip
    return dual.tail_of_two(
        "dual_batch_norm_act", input, residual, norms, How(training, activation)
    )


def projection(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """A 1x1 convolution of any stride: what a shortcut does where a block changes shape. Arguments of `F.conv2d`.

        output[n, o, h, w] = sum over i of input[n, i, h * stride, w * stride] * weight[o, i] (+ bias[o])

    Channels-last inputs of few channels go to a Triton product that reads only the rows which the stride visits, and
    whose input gradient touches no others; where arithmetic is what takes the time, and on the aten backend, it is
    PyTorch's own convolution. float32 is tf32 only where `torch.backends.cudnn` allows it for convolutions.

    Args:
        input: [N, Cin, ...] with 1 to 3 spatial dimensions; float32, bfloat16, float16 or float64.
        weight: [Cout, Cin, 1, ...]; of the input's dtype, or float32 with a 16-bit one.
        bias: [Cout] or None.
        stride: one step, or one for each spatial dimension.
        padding, dilation, groups: 0, 1 and 1; anything else is refused.

    Returns:
        [N, Cout, ...] in the input's dtype. First and second derivatives are supported.

    Raises:
        TypeError: an argument that is no tensor or whole number where one is wanted.
        NotImplementedError: an input that is not of these dtypes, or not dense.
        RuntimeError: shapes, dtypes, devices or a stride that do not fit.
        ValueError: a weight that is not 1x1; padding, dilation or groups.
    """
    steps = check_projection("projection", input, weight, bias, stride, padding, dilation, groups)
    return project(input, weight, bias, steps, False)[0]


def projection_batch_norm_act(
    input: Tensor,
    shortcut: Tensor,
    projection_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_momentum: float = 0.1,
    residual_eps: float = 1e-5,
    *,
    projection_bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    activation: str | None = "relu",
) -> Tensor:
    """`activation(batch_norm(input) + batch_norm(projection(shortcut)))`: a projected shortcut and its block's tail.

    `dual_batch_norm_act` of the input and of `projection(shortcut, projection_weight, projection_bias, stride)`; where
    the Triton product runs, the statistics of what it writes leave it together with the values.

    Args:
        input: [N, C, ...], the main path.
        shortcut: [N, Cin, ...], the block's input.
        projection_weight: [C, Cin, 1, ...].
        running_mean to residual_eps: as for `dual_batch_norm_act`; the residual is the projected shortcut.
        projection_bias, stride, padding, dilation, groups: as for `projection`.
        activation: as for `batch_norm_act`.

    Returns:
        A tensor with the input's shape, dtype and memory format.

    Raises:
        TypeError, NotImplementedError, RuntimeError, ValueError: as `projection` and `dual_batch_norm_act` do;
            RuntimeError too when the projected shortcut has not the input's shape.

    After an error the running statistics are what they were.
    """
    name = "projection_batch_norm_act"
    steps = check_projection(
        name, shortcut, projection_weight, projection_bias, stride, padding, dilation, groups, "shortcut"
    )  # fmt: skip
    check_projected_shape(name, input, shortcut, projection_weight, steps)
    residual, moments = project(shortcut, projection_weight, projection_bias, steps, training)
    norms = (
        BatchNorm(weight, bias, running_mean, running_var, momentum, eps),
        BatchNorm(
            residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_momentum, residual_eps
        ),
    )  # fmt: skip
    return dual.tail_of_two(name, input, residual, norms, How(training, activation), moments)


def add_act(input: Tensor, residual: Tensor, *, activation: str | None = "relu") -> Tensor:
    """`activation(input + residual)`: the end of a block that scales what its last BatchNorm gave.

    Args:
        input, residual: of one shape [N, C, ...], at least 2-D, any strides; float32, bfloat16, float16 or float64.
        activation: as for `batch_norm_act`.

    Returns:
        A tensor with the input's shape, dtype and memory format. First and second derivatives are supported.

    Raises:
        TypeError: an argument that is no tensor.
        NotImplementedError: an input or residual that is not of these dtypes, or not dense.
        RuntimeError: shapes, dtypes or devices that do not fit; the triton backend was asked for and cannot run there.
        ValueError: an unknown activation.
    """
    output = add.met(input, residual, activation)
    if output is not None:
        return output
    check_add_act("add_act", input, residual, activation)
    if (
        activation is not None
        and is_eager()
        and wants_triton(input.is_cuda)
        and goes_to_kernels(input)
    ):
        return add.add_act(input, residual, activation)
    return activate(input + residual, activation, in_place=is_eager())


def scaled_add_act(
    input: Tensor, residual: Tensor, scale: Tensor, *, activation: str | None = None
) -> Tensor:
    """`activation(residual + scale * input)`: a residual block with a learnable scale (Bachlechner et al. 2020,
    arXiv:2003.04887: one that starts at 0 makes the block begin as the identity).

    Args:
        input: what the block gives, [N, C, ...], at least 2-D, any strides; float32, bfloat16, float16 or float64.
        residual: like `input` in shape and dtype, in any layout.
        scale: of one element, or [C]; float32 or the input's dtype.
        activation: as for `batch_norm_act`.

    Returns:
        A tensor with the input's shape, dtype and memory format. First and second derivatives are supported.

    Raises:
        TypeError: an argument that is no tensor.
        NotImplementedError: an input or residual that is not of these dtypes, or not dense.
        RuntimeError: shapes, dtypes or devices that do not fit; the triton backend was asked for and cannot run there.
        ValueError: an unknown activation.
    """
    output = scaled.met(input, residual, scale, activation)
    if output is not None:
        return output
    check_scaled_add_act("scaled_add_act", input, residual, scale, activation)
    if is_eager() and wants_triton(input.is_cuda) and goes_to_kernels(input):
        return scaled.scaled_add_act(input, residual, scale, activation)
    return reference.scaled_add_act(input, residual, scale, activation)


def add_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = "relu",
) -> tuple[Tensor, Tensor]:
    """`sum = input + residual` and `output = activation(batch_norm(sum))`, both kept: a pre-activation unit (He et al.
    2016, arXiv:1603.05027) from the end of one to the beginning of the next.

    Args:
        input: what the last unit's branch gives, [N, C, ...], at least 2-D, any strides; float32, bfloat16, float16 or
            float64.
        residual: like `input` in shape and dtype, in any layout.
        running_mean to eps, activation: as for `batch_norm_act`; the statistics are those of the sum as it is stored.

    Returns:
        (sum, output), both with the input's shape, dtype and memory format. First and second derivatives are supported.

    Raises:
        TypeError, NotImplementedError, RuntimeError, ValueError: as `batch_norm_act` does.

    After an error the running statistics are what they were.
    """
    name = "add_batch_norm_act"
    eps, momentum = number(name, "eps", eps), momentum_number(name, momentum)
    check_add_act(name, input, residual, activation)
    check_batch_norm_act(
        name, input, running_mean, running_var, weight, bias, training, eps, None, activation
    )
    if (
        not isinstance(momentum, Tensor)
        and is_eager()
        and wants_triton(input.is_cuda)
        and goes_to_kernels(input)
    ):
        norm = BatchNorm(weight, bias, running_mean, running_var, float(momentum), eps)
        return preactivation.add_batch_norm_act(input, residual, norm, How(training, activation))
    total = input + residual
    return total, batch_norm_act(
        total, running_mean, running_var, weight, bias, training, momentum, eps, activation=activation
    )  # fmt: skip


def _with_tensor_momentum(
    input, running_mean, running_var, weight, bias, momentum, eps, residual, activation
) -> Tensor:
    """Take the statistics of this batch alone (momentum 1) and blend them in on the device."""
    wide = accumulate_dtype(running_mean.dtype)
    batch_mean, batch_var = (torch.zeros_like(t, dtype=wide) for t in (running_mean, running_var))
    output = batch_norm_act(
        input, batch_mean, batch_var, weight, bias, True, 1.0, eps, residual=residual, activation=activation
    )  # fmt: skip
    blend(running_mean, batch_mean, momentum)
    blend(running_var, batch_var, momentum)
    return output

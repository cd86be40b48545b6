"""The autograd Function above the operators: what is saved, first and second derivatives.

With xhat = (x - mean) * invstd, z = xhat * weight + bias + residual, y = act(z) and dz = dy * act'(z), over the n rows
of a channel (Ioffe and Szegedy 2015, section 3):

    dbias = sum(dz),  dweight = sum(dz * xhat),  dresidual = dz
    dx = weight * invstd * (dz - dbias / n - xhat * dweight / n)        (in eval: weight * invstd * dz)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import batching as batching  # its vmap rules register themselves
from . import fork, operators
from .activations import activate, is_piecewise, keep_passing
from .dispatch import is_eager


class BatchNormAct(torch.autograd.Function):
    """`act(batch_norm(input) + residual)` on the operators `fusedres::batch_norm_act` and `..._backward`.

    Saved for backward: the input, the weight, four values a channel, and for a tail one bit an element (its residual,
    where the activation is smooth); never the running statistics (two forwards before a backward would trip their
    version counter). The bias only for torch.func, whose double backward of a smooth activation goes through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation, save
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return operators.batch_norm_act(
            input, residual, weight, bias, running_mean, running_var,
            training, momentum, eps, activation, save,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _remember(ctx, inputs, output, inputs[3])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy, None, None)


def _remember(ctx: Any, inputs: tuple, output: tuple, bias: Tensor | None) -> None:
    """What the backward needs; `bias`, where it is to be saved as it is."""
    input, residual, weight, _, _, _, training, _, eps, activation, _ = inputs
    _, saved, bits = output
    ctx.mark_non_differentiable(saved, bits)
    ctx.set_materialize_grads(False)
    recomputes = activation is not None and not is_piecewise(activation)
    ctx.save_for_backward(input, weight, saved, bits, residual if recomputes else None, bias)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = None if inputs[3] is None else inputs[3].dtype
    ctx.training, ctx.eps, ctx.activation = training, eps, activation


def _backward(
    ctx: Any, dy: Any, skip: Tensor | None, stride: list[int] | None
) -> tuple[Tensor | None, ...]:
    """`skip`, `stride`: a second gradient of the output, as `fork.take` gives it."""
    rest = (None,) * 7
    if dy is None and skip is None:
        return None, None, None, None, *rest
    input, weight, saved, bits, residual, bias = ctx.saved_tensors
    if dy is None and skip is not None:
        dy, skip = operators.spread_skip(skip, stride, input), None
    needs = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return *differentiable_backward(
            ctx, dy, input, weight, saved, bits, residual, bias, needs
        ), *rest
    # Without an activation dz is dy itself, which no kernel need write again.
    passed_on = needs[1] and ctx.activation is None and skip is None
    dx, dresidual, dweight, dbias = operators.batch_norm_act_backward(
        dy, input, weight, saved, bits, ctx.training, ctx.activation, ctx.residual_dtype,
        needs[0], needs[1] and not passed_on, needs[2], ctx.bias_dtype if needs[3] else None,
        skip, stride, residual,
    )  # fmt: skip
    if passed_on:
        dresidual = dy.to(ctx.residual_dtype)
    return (
        dx if needs[0] else None,
        dresidual if needs[1] else None,
        dweight if needs[2] else None,
        dbias if needs[3] else None,
        *rest,
    )


class _Eager(torch.autograd.Function):
    """The same with a forward that takes the context: a `setup_context`, which torch.func needs, costs an
    `inspect.signature` at each call (25 us, torch 2.15). It takes part in the fork of a residual."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = BatchNormAct.forward(*inputs)
        _remember(ctx, inputs, output, None)
        remember_bias(ctx, inputs[3])
        fork.begin(ctx, inputs[1])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        dx, dresidual, *rest = _backward(ctx, dy, *fork.take(ctx))
        return dx, fork.hand_over(ctx, 1, dresidual), *rest


fork.takes_gradients(_Eager)


class _AsItWas(torch.autograd.Function):
    """A bias in the graph, with the value that it had in the forward."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def remember_bias(ctx: Any, bias: Tensor | None) -> None:
    """Keep what `bias_in_graph` needs of a bias, not as a saved tensor: its value may change until the backward."""
    ctx.bias, ctx.bias_dtype = bias, None if bias is None else bias.dtype


def bias_in_graph(
    bias: Tensor | None, kept: Tensor | None, saved: Tensor, activation: str | None
) -> Tensor | None:
    """A bias for the graph of first derivatives: `bias` where it was saved itself, else the `kept` one as it was."""
    if bias is not None:
        return bias.view_as(bias)
    if kept is None:
        return None
    if activation is not None and not is_piecewise(activation) and kept.requires_grad:
        return _AsItWas.apply(kept, saved[3])
    # The value is in no derivative, or the bias has none.
    return saved[3].detach().requires_grad_(kept.requires_grad)


def differentiable_backward(ctx, dy, input, weight, saved, bits, residual, bias, needs):
    """The same gradients as a graph of PyTorch's own operations, for `create_graph=True`.

    The derivative of a piecewise activation is a constant almost everywhere, so it enters as a mask; all others are
    taken by PyTorch, whose double backward is known to be right.
    """
    activation, dz = ctx.activation, dy
    bias = bias_in_graph(bias, getattr(ctx, "bias", None), saved, activation)
    y, leaves = normalized_graph(input, weight, bias, saved, ctx.training, ctx.eps)
    order = (0, 2, 3)  # of input, weight and bias in `needs`, with the residual at 1
    if activation is not None and not is_piecewise(activation):
        # Aliased, as the others are.
        added = None if residual is None else residual.view_as(residual)
        y = activate(y if added is None else y + added.to(y.dtype), activation)
        leaves, order = [*leaves, added], (*order, 1)
        dresidual = None
    else:
        if activation is not None:
            with torch.no_grad():
                mask = operators.gradient_mask(input, weight, saved, bits, activation)
            dz = keep_passing(dy, mask, activation)
        dresidual = dz.to(ctx.residual_dtype) if needs[1] else None
    found = graph_gradients(y, leaves, [needs[k] for k in order], dz)
    dx, dweight, dbias = found[:3]
    dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
    return [dx, found[3] if len(found) > 3 else dresidual, dweight, dbias]


def normalized_graph(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, list[Any]]:
    """A BatchNorm's output in the dtype of its arithmetic, as a graph, and what to ask for the gradients of input,
    weight and bias (`bias_in_graph`): aliases, so that a weight that was itself computed from the input is not walked
    through twice."""
    aliases: list[Any] = [None if t is None else t.view_as(t) for t in (input, weight)] + [bias]
    wide = saved.dtype
    w, b = (None if t is None else t.to(wide) for t in aliases[1:])
    x = aliases[0].to(wide)
    if training:
        # Without cuDNN (the last argument): vmap has no rule for its derivative of a channels_last tensor.
        return torch.batch_norm(x, w, b, None, None, True, 0.0, eps, False), aliases
    # Not F.batch_norm, which under vmap asks for a derivative by the running statistics.
    mean, low, invstd = (operators._per_channel(row, x) for row in saved.detach()[:3].unbind(0))
    y = (x - mean - low) * invstd
    y = y if w is None else y * operators._per_channel(w, x)
    return y if b is None else y + operators._per_channel(b, x), aliases


def graph_gradients(
    y: Tensor, leaves: list[Any], needs: list[bool], dy: Tensor
) -> list[Tensor | None]:
    """The gradients of the leaves that need one (None for the others), as a graph."""
    wanted = [k for k, need in enumerate(needs) if need]
    gradients: list[Tensor | None] = [None] * len(leaves)
    if wanted:
        found = torch.autograd.grad(
            y, [leaves[k] for k in wanted], dy.to(y.dtype), create_graph=True, allow_unused=True
        )
        for k, gradient in zip(wanted, found, strict=True):
            gradients[k] = gradient
    return gradients


def batch_norm_act(
    input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
) -> Tensor:
    """`fusedres.functional.batch_norm_act` on checked arguments, through the operators."""
    save = torch.is_grad_enabled() and (
        input.requires_grad
        or (residual is not None and residual.requires_grad)
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    eager = is_eager()
    if eager and not save:
        return operators.batch_norm_act(
            input, residual, weight, bias, running_mean, running_var,
            training, float(momentum), eps, activation, False,
        )[0]  # fmt: skip
    function = _Eager if eager else BatchNormAct
    return function.apply(
        input, residual, weight, bias, running_mean, running_var,
        training, float(momentum), eps, activation, True,
    )[0]  # fmt: skip

"""The pair of a pre-activation unit: `sum = input + residual`, `output = act(batch_norm(sum))`, both kept.

    fusedres::add_batch_norm_act  input, residual, ... -> sum, output, saved [4, C] = (mean, mean_low, invstd, bias)

The statistics of the sum are taken while it is written: 5 passes forward (eager: 3 + 5). Backward gets the gradients of
both results, and adds that of the sum in its own second pass: 6 passes (eager: 8 + 3). It is the operator
`batch_norm_act_backward` on the sum, which is what BatchNorm normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators
from .activations import parse
from .autograd import differentiable_backward, remember_bias
from .dispatch import resolve
from .layouts import like_output, like_sum
from .operators import LIBRARY, accumulate_dtype

LIBRARY.define(
    "add_batch_norm_act(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, str? activation, bool save) "
    "-> (Tensor sum, Tensor output, Tensor saved)"
)
_forward_operator = torch.ops.fusedres.add_batch_norm_act.default


def _forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = like_sum(input, residual)
    if not training or resolve(input.device, input.dtype)[0] != "triton":
        # With running statistics nothing is gained by one pass that has to wait for no other.
        torch.add(input, residual, out=total)
        output, saved, _ = operators._batch_norm_act(
            total, None, weight, bias, running_mean, running_var,
            training, momentum, eps, activation, save,
        )  # fmt: skip
        return total, output, saved
    k = operators._kernels()
    rows, (input, residual) = operators._common_rows(total, input, residual)
    wide = accumulate_dtype(total.dtype)
    saved = total.new_empty((4, rows.channels), dtype=wide)
    bias = operators._dense(bias)
    operators._statistics(
        k,
        input,
        rows,
        bias,
        saved,
        (running_mean, running_var),
        momentum,
        eps,
        added=(residual, total),
    )
    output = like_output(total)
    rows, (laid_out,) = operators._common_rows(output, total)
    k.apply(
        laid_out, None, operators._dense(weight), None, None, None, saved, None, output, None,
        rows, None, False, k.tile(rows, total.element_size(), k.ALONE, k.chip()), eps,
        *parse(activation), k.dtype[wide], k.offset[rows.needs_int64],
    )  # fmt: skip
    return total, output, saved


LIBRARY.impl("add_batch_norm_act", _forward, "CPU")
LIBRARY.impl("add_batch_norm_act", operators._on_its_device(_forward), "CUDA")


@torch.library.register_fake("fusedres::add_batch_norm_act", lib=LIBRARY)
def _(
    input, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation, save
):  # fmt: skip
    has_moments = training or save
    saved = input.new_empty(
        (4, input.shape[1]) if has_moments else (0,), dtype=accumulate_dtype(input.dtype)
    )
    total = torch.empty_like(input + residual)
    return total, like_output(total), saved


class AddBatchNormAct(torch.autograd.Function):
    """Saved for backward: the sum, the weight, four values a channel."""

    @staticmethod
    def forward(
        ctx: Any, input, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total, output, saved = _forward_operator(
            input, residual, weight, bias, running_mean, running_var,
            training, momentum, eps, activation, True,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, saved)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        remember_bias(ctx, bias)
        return total, output

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 6
        needs = ctx.needs_input_grad
        if dy is None:
            return *(dtotal if need else None for need in needs[:2]), None, None, *rest
        total, weight, saved = ctx.saved_tensors
        wanted = needs[0] or needs[1], False, needs[2]
        bits = total.new_empty(0, dtype=torch.uint8)
        if torch.is_grad_enabled():
            dx, _, dweight, dbias = differentiable_backward(
                ctx, dy, total, weight, saved, bits, None, None, (*wanted, needs[3])
            )
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
        else:
            dx, _, dweight, dbias = operators.batch_norm_act_backward(
                dy, total, weight, saved, bits, ctx.training, ctx.activation, None, *wanted,
                ctx.bias_dtype if needs[3] else None, None, None, None, dtotal,
            )  # fmt: skip
        return (
            dx if needs[0] else None,
            dx if needs[1] else None,
            dweight if needs[2] else None,
            dbias if needs[3] else None,
            *rest,
        )


def add_batch_norm_act(
    input, residual, running_mean, running_var, weight, bias, training, momentum, eps, activation
) -> tuple[Tensor, Tensor]:
    """`fusedres.functional.add_batch_norm_act` on checked arguments, through the operators."""
    arguments = (
        input, residual, weight, bias, running_mean, running_var,
        training, float(momentum), eps, activation,
    )  # fmt: skip
    tensors = (input, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return AddBatchNormAct.apply(*arguments)
    return _forward_operator(*arguments, False)[:2]

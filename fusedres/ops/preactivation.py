"""The pair of a pre-activation unit: `sum = input + residual`, `output = act(batch_norm(sum))`, both kept.

    fusedres::add_batch_norm_act  input, residual, ... -> sum, output, saved [4, C] = (mean, mean_low, invstd, bias)

The statistics of the sum are taken while it is written: 5 passes forward (eager: 3 + 5). Backward gets the gradients of
both results, and adds that of the sum in its own second pass: 6 passes (eager: 8 + 3). It is the operator
`batch_norm_act_backward` on the sum, which is what BatchNorm normalised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activations import parse
from ..kernels.dtypes import accumulate_dtype
from ..layouts import like_output, like_sum
from . import batch_norm_act as single
from .graph import bias_in_graph, needs_graph
from .masks import empty_bits
from .norm import BatchNorm, How, Kept, Needs, Skip, empty_saved, names
from .operator import Operator

if TYPE_CHECKING:
    from ..kernels.plan import Planner

SCHEMA = (
    "add_batch_norm_act(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, str? activation, bool save) "
    "-> (Tensor sum, Tensor output, Tensor saved)"
)


# --- forward -----------------------------------------------------------------------------------------------------


def _forward(
    p: Planner, input: Tensor, residual: Tensor, norm: BatchNorm, how: How, save: bool
) -> tuple:
    from ..kernels.apply import launch_bn_apply

    total = p.like(like_sum(input, residual))
    wide = accumulate_dtype(total.dtype)
    saved = p.keep((4, total.shape[1]), wide) if how.training or save else None
    if not how.training:
        # With running statistics nothing is gained by one pass that has to wait for no other.
        p.do(lambda out, a, b: torch.add(a, b, out=out), total, input, residual)
    elif saved is not None:
        rows, (input, residual) = p.common_rows(total, input, residual)
        single.statistics(p, input, rows, norm, saved, added=(residual, total))
    output = p.like(like_output(total))
    rows, (laid_out,) = p.common_rows(output, total)
    applied = single.as_applied(norm, how, saved)
    launch_bn_apply(p, laid_out, None, applied, None, output, None, rows, parse(how.activation))
    return total, output, wide if saved is None else saved


# --- the same in plain PyTorch -----------------------------------------------------------------------------------


def _plain_forward(
    input: Tensor, residual: Tensor, norm: BatchNorm, how: How, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = like_sum(input, residual)
    torch.add(input, residual, out=total)
    output, saved, _ = single.plain_forward(total, None, norm, how, save)
    return total, output, saved


# --- shapes ------------------------------------------------------------------------------------------------------


def _fake(
    input: Tensor, residual: Tensor, norm: BatchNorm, how: How, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(input + residual)
    return total, like_output(total), empty_saved(input, how.training or save)


# --- operators ---------------------------------------------------------------------------------------------------

FORWARD = Operator(
    SCHEMA,
    ("input", "residual", single.NORM, names(How, "training", "activation"), "save"),
    recipe=_forward,
    plain=_plain_forward,
    fake=_fake,
)


# --- autograd ----------------------------------------------------------------------------------------------------


class AddBatchNormAct(torch.autograd.Function):
    """Saved for backward: the sum, the weight, four values a channel."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, norm: BatchNorm, how: How
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total, output, saved = FORWARD(input, residual, norm, how, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, saved)
        ctx.how, ctx.eps, ctx.biases, ctx.behind = how, (norm.eps,), (bias,), ()
        ctx.bias_dtypes = (None if bias is None else bias.dtype,)
        return total, output

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if dy is None:
            return *(dtotal if need else None for need in needs[:2]), None, None, None, None
        kept = Kept(*ctx.saved_tensors)
        need_sum = needs[0] or needs[1]
        bits = empty_bits(kept.input, False)
        if needs_graph(dy, dtotal, *kept[:2], ctx.biases[0]):
            bias = bias_in_graph(None, ctx.biases[0], kept.saved, ctx.how.activation)
            wanted = (need_sum, False, *needs[2:4])
            dx, _, dweight, dbias = single.differentiable(dy, kept, bits, None, bias, ctx, wanted)
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
        else:
            asked = Needs(need_sum, False, needs[2], ctx.bias_dtypes[0] if needs[3] else None)
            dx, _, dweight, dbias = single.BACKWARD(
                dy, kept, bits, ctx.how, asked, Skip(), None, dtotal
            )
        found = zip((dx, dx, dweight, dbias), needs[:4], strict=True)
        return *(each if need else None for each, need in found), None, None


def add_batch_norm_act(
    input: Tensor, residual: Tensor, norm: BatchNorm, how: How
) -> tuple[Tensor, Tensor]:
    """`fusedres.functional.add_batch_norm_act` on checked arguments, by the kernels."""
    tensors = (input, residual, norm.weight, norm.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return AddBatchNormAct.apply(*tensors, norm, how)
    return FORWARD(input, residual, norm, how, False)[:2]

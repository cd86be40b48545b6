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
from ..checks import check_add_act, check_batch_norm_act
from ..kernels.dtypes import accumulate_dtype
from ..layouts import like_output, like_sum
from . import batch_norm_act as single
from .graph import bias_in_graph, needs_graph
from .masks import empty_bits
from .node import Node, gradients, is_node
from .norm import BatchNorm, How, Kept, Needs, Skip, empty_saved, names
from .operator import Operator
from .straight import is_quiet
from .tail import Gradients, Tail, straight, through_operators

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


class AddBatchNormAct(Node):
    """Saved for backward: the sum, the weight, four values a channel."""

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dtotal: Tensor | None, dy: Tensor | None
    ) -> Gradients:
        return gradients(ctx, dy, Skip(dtotal), ctx.needs_input_grad)


is_node(AddBatchNormAct)


def _backward_groups(ctx: Any, dy: Tensor, tensors: tuple, needs: tuple, skip: Skip) -> tuple:
    """skip: the gradient of the sum."""
    kept = Kept(*tensors)
    wanted = Needs(needs[0] or needs[1], False, needs[2], ctx.bias_dtypes[0] if needs[3] else None)
    return dy, kept, empty_bits(kept.input, False), ctx.how, wanted, Skip(), None, skip.gradient


def _gradients(ctx: Any, dy: Tensor | None, tensors: tuple, needs: tuple, skip: Skip) -> Gradients:
    dtotal = skip.gradient
    if dy is None:
        return *(dtotal if need else None for need in needs[:2]), None, None
    groups = _backward_groups(ctx, dy, tensors, needs, skip)
    _, kept, bits, _, wanted, *_ = groups
    if needs_graph(dy, dtotal, *kept[:2], ctx.biases[0]):
        bias = bias_in_graph(None, ctx.biases[0], kept.saved, ctx.how.activation)
        asked = (wanted.input, False, *needs[2:])
        dx, _, dweight, dbias = single.differentiable(dy, kept, bits, None, bias, ctx, asked)
        if dx is not None and dtotal is not None:
            dx = dx + dtotal
    else:
        dx, _, dweight, dbias = single.BACKWARD(*groups)
    found = zip((dx, dx, dweight, dbias), needs, strict=True)
    return tuple(each if need else None for each, need in found)


def _check(input: Tensor, residual: Tensor, n: BatchNorm, how: How) -> None:
    check_add_act("add_batch_norm_act", input, residual, how.activation)
    check_batch_norm_act(
        "add_batch_norm_act", input, n.running_mean, n.running_var, n.weight, n.bias, how.training, n.eps, None,
        how.activation,
    )  # fmt: skip


def compose(input: Tensor, residual: Tensor, norm: BatchNorm, how: How) -> tuple[Tensor, Tensor]:
    """The pair in plain PyTorch."""
    total = input + residual
    return total, single.compose(total, None, norm, how)


TAIL = Tail(
    FORWARD,
    single.BACKWARD,
    AddBatchNormAct,
    how=3,
    check=_check,
    compose=compose,
    reads=lambda how: (~0, 2),
    backward_groups=_backward_groups,
    gradients=_gradients,
    of=(0, 0, 2, 3),
    outputs=2,
)


def add_batch_norm_act(
    input: Tensor, residual: Tensor, norm: BatchNorm, how: How
) -> tuple[Tensor, Tensor]:
    """`fusedres.functional.add_batch_norm_act` on checked arguments, by the kernels."""
    groups = (input, residual, norm, how, True)
    if is_quiet():
        key = "preactivation", input.shape, input.dtype, how, torch.is_grad_enabled()
        found = straight(TAIL, key, groups)
        if found is not None:
            return found
    return through_operators(TAIL, groups)

"""`act(residual + scale * input)`, the scale being one number or one a channel.

    fusedres::scaled_add_act           input, residual, scale [C] -> output, bits
    fusedres::scaled_add_act_backward  dy, the output's strides, input, scale, bits -> dinput, dresidual, dscale [C]

The kernels are those of `batch_norm_act` with nothing to normalise, the scale in the place of the weight. With
dz = dy * act'(z): dinput = scale * dz, dresidual = dz, dscale = sum over the rows of dz * input, which none of the
others waits for: one pass does it all. Passes: 3 forward, 3 backward (eager: 5 and 6); with a ReLU 3 1/16 and 4 1/16,
and with a smooth activation, where z is computed again, 3 and 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..activations import activate, gradient, is_piecewise, keep_passing, parse, passes
from ..kernels.dtypes import accumulate_dtype, partial_dtype
from ..kernels.layout import bits_layout
from ..layouts import like_sum
from .graph import needs_graph, passing, per_channel, smooth
from .masks import empty_bits, has_bits, pack, unpack
from .node import Node, is_node
from .norm import How, Skip, names
from .operator import Operator
from .straight import is_quiet
from .tail import Gradients, Tail, again, may_be_met, straight, through_operators

if TYPE_CHECKING:
    from ..kernels.plan import Planner

FORWARD_SCHEMA = (
    "scaled_add_act(Tensor input, Tensor residual, Tensor scale, str? activation, bool save) "
    "-> (Tensor output, Tensor bits)"
)
BACKWARD_SCHEMA = (
    "scaled_add_act_backward(Tensor dy, SymInt[] stride, Tensor input, Tensor? residual, Tensor scale, Tensor bits, "
    "str? activation, bool need_input, bool need_residual, bool need_scale) "
    "-> (Tensor dinput, Tensor dresidual, Tensor dscale)"
)


class Kept(NamedTuple):
    """What the backward reads; the residual is given where z is computed again. stride: of the output."""

    stride: tuple[int, ...]
    input: Tensor
    residual: Tensor | None
    scale: Tensor
    bits: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for."""

    input: bool
    residual: bool
    scale: bool


def _like(kept: Kept) -> Tensor:
    return kept.input.new_empty_strided(kept.input.shape, kept.stride)


# --- forward -----------------------------------------------------------------------------------------------------


def _forward(
    p: Planner, input: Tensor, residual: Tensor, scale: Tensor, how: How, save: bool
) -> tuple:
    from ..kernels.apply import launch_bn_apply
    from ..kernels.norm import Norm

    output = p.like(like_sum(input, residual, is_scaled=True))
    rows, (input, residual) = p.common_rows(output, input, residual)
    bits, activation = None, how.activation
    if has_bits(activation, save):
        bits = p.keep((bits_layout(rows)[1],), torch.uint8)
    launch_bn_apply(p, input, residual, Norm(scale), None, output, bits, rows, parse(activation))
    return output, torch.uint8 if bits is None else bits


# --- backward ----------------------------------------------------------------------------------------------------


def _backward(p: Planner, dy: Tensor, kept: Kept, activation: str | None, needs: Needs) -> tuple:
    """The gradients of input and residual are laid out as the output was."""
    from ..kernels.finalize import launch_bn_grad_finalize
    from ..kernels.grad import Operand
    from ..kernels.grad_apply import launch_bn_grad_apply
    from ..kernels.grad_reduce import Skip, launch_bn_grad_reduce
    from ..kernels.launch import CROWDED, DUAL_SHARE, GRAD_APPLYING, REDUCING, choose_tile
    from ..kernels.norm import NO_NORM, Norm

    layout, norm, size = _like(kept), Norm(kept.scale), kept.input.element_size()
    dinput = p.like(layout) if needs.input else None
    dresidual = p.like(layout) if needs.residual else None
    operands = [kept.input, dy, *([] if kept.residual is None else [kept.residual])]
    rows, (x, dy, *others) = p.common_rows(layout, *operands)
    added = others[0] if others else None
    mask = kept.bits if kept.bits.numel() else None
    share = 1 if added is None else DUAL_SHARE
    dtype, dscale = kept.input.dtype, None
    if not needs.scale:
        tile = choose_tile(rows, size, GRAD_APPLYING, p.chip, share)
        main = Operand(x, norm, gradient=dinput)
        other = Operand(added, gradient=dresidual)
        launch_bn_grad_apply(p, dy, main, other, mask, None, rows, tile, parse(activation))
    else:
        dscale = p.like(kept.scale)
        # float32 spills before sm_90 where dx is written by four warps.
        kind = REDUCING if added is None and size < 4 else CROWDED
        tile = choose_tile(rows, size, kind, p.chip, share)
        partial = p.empty((tile.programs, 2, tile.width), partial_dtype(dtype))
        skip = Skip(None, None, None, dresidual)
        launch_bn_grad_reduce(
            p, dy, Operand(x, norm, partial), Operand(added), mask, skip, dinput, rows, tile,
            parse(activation),
        )  # fmt: skip
        summed = Operand(x, NO_NORM, partial)
        launch_bn_grad_finalize(p, summed, None, dscale, None, rows, tile)
    asked = zip((dinput, dresidual, dscale), (dtype, dtype, kept.scale.dtype), strict=True)
    return tuple(dtype if tensor is None else tensor for tensor, dtype in asked)


# --- the same in plain PyTorch -----------------------------------------------------------------------------------


def _sum(input: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    wide = accumulate_dtype(input.dtype)
    return residual.to(wide) + per_channel(scale.to(wide), input) * input


def _plain_forward(input, residual, scale, how, save) -> tuple[Tensor, Tensor]:
    activation = how.activation
    output = like_sum(input, residual, is_scaled=True)
    z = _sum(input, residual, scale)
    output.copy_(activate(z, activation))
    if has_bits(activation, save):
        mask = torch.empty_like(output, dtype=torch.bool)
        return output, pack(mask.copy_(passes(z, activation)))
    return output, empty_bits(output, False)


def _plain_backward(
    dy: Tensor, kept: Kept, activation: str | None, needs: Needs
) -> tuple[Tensor, ...]:
    layout, input, scale = _like(kept), kept.input, kept.scale
    wide = accumulate_dtype(input.dtype)
    dz = dy.to(wide)
    if kept.bits.numel():
        mask = unpack(kept.bits, torch.empty_like(layout, dtype=torch.bool))
        dz = keep_passing(dz, mask, activation)
    elif kept.residual is not None:
        dz = gradient(dz, _sum(input, kept.residual, scale), activation)
    dims = [0, *range(2, input.dim())]
    dinput, dresidual, dscale = _fake_backward(dy, kept, activation, needs)
    if needs.input:
        dinput.copy_(dz * per_channel(scale.to(wide), input))
    if needs.residual:
        dresidual.copy_(dz)
    if needs.scale:
        dscale.copy_((dz * input).sum(dims))
    return dinput, dresidual, dscale


# --- shapes ------------------------------------------------------------------------------------------------------


def _fake_forward(input, residual, scale, how, save) -> tuple[Tensor, Tensor]:
    output = torch.empty_like((per_channel(scale, input) * input).to(input.dtype) + residual)
    return output, empty_bits(output, has_bits(how.activation, save))


def _fake_backward(
    dy: Tensor, kept: Kept, activation: str | None, needs: Needs
) -> tuple[Tensor, ...]:
    return (
        _like(kept) if needs.input else kept.input.new_empty(0),
        _like(kept) if needs.residual else kept.input.new_empty(0),
        torch.empty_like(kept.scale) if needs.scale else kept.scale.new_empty(0),
    )


# --- operators ---------------------------------------------------------------------------------------------------

_KEPT: Any = names(Kept, "stride", "input", "residual", "scale", "bits")
_NEEDS: Any = names(Needs, "need_input", "need_residual", "need_scale")

FORWARD = Operator(
    FORWARD_SCHEMA,
    ("input", "residual", "scale", names(How, False, "activation"), "save"),
    recipe=_forward,
    plain=_plain_forward,
    fake=_fake_forward,
)
BACKWARD = Operator(
    BACKWARD_SCHEMA,
    ("dy", _KEPT, "activation", _NEEDS),
    recipe=_backward,
    plain=_plain_backward,
    fake=_fake_backward,
)


# --- second derivatives ------------------------------------------------------------------------------------------


def _differentiable(
    dy: Tensor, kept: Kept, activation: str | None, *, behind: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """As a graph (see `graph`): a mask is a constant, all else PyTorch's own."""
    dz = dy
    _, input, residual, scale, bits = kept
    if activation is not None and is_piecewise(activation):
        with torch.no_grad():
            mask = unpack(bits, torch.empty_like(_like(kept), dtype=torch.bool))
        dz = passing(dy, mask, activation, (input, scale, *behind))
    elif activation is not None and residual is not None:
        dz = smooth(dy, _sum(input, residual, scale), activation)
    wide = accumulate_dtype(input.dtype)
    dims = [0, *range(2, input.dim())]
    dinput = dz.to(wide) * per_channel(scale.to(wide), input)
    dscale = (dz.to(wide) * input).sum(dims)
    return dinput.to(input.dtype), dz.to(input.dtype), dscale.to(scale.dtype)


# --- autograd ----------------------------------------------------------------------------------------------------


class ScaledAddAct(Node):
    """Saved for backward: the input and the scale; one bit an element, or the residual where act is smooth."""


is_node(ScaledAddAct)


def _reads(how: How) -> tuple[int | None, ...]:
    is_smooth = how.activation is not None and not is_piecewise(how.activation)
    return 0, 1 if is_smooth else None, 2


def _backward_groups(ctx: Any, dy: Tensor, tensors: tuple, needs: tuple, skip: Skip) -> tuple:
    # Without an activation dz is dy itself, which no kernel need write again.
    passes_on = ctx.how.activation is None
    asked = Needs(needs[0], needs[1] and not passes_on, needs[2])
    return dy, Kept(ctx.stride, *tensors), ctx.how.activation, asked


def _gradients(ctx: Any, dy: Tensor, tensors: tuple, needs: tuple, skip: Skip) -> Gradients:
    groups = _backward_groups(ctx, dy, tensors, needs, skip)
    found: Any
    if needs_graph(dy, *tensors[:3], *ctx.behind):
        found = _differentiable(*groups[:3], behind=ctx.behind)
    else:
        dinput, dresidual, dscale = BACKWARD(*groups)
        found = dinput, dresidual if groups[-1].residual else dy, dscale
    return tuple(each if need else None for each, need in zip(found, needs, strict=True))


def _compose(input: Tensor, residual: Tensor, scale: Tensor, how: How) -> Tensor:
    return reference.scaled_add_act(input, residual, scale, how.activation)


TAIL = Tail(
    FORWARD,
    BACKWARD,
    ScaledAddAct,
    how=3,
    check=lambda *_: None,  # the caller has
    compose=_compose,
    reads=_reads,
    backward_groups=_backward_groups,
    gradients=_gradients,
    of=(0, 1, 2),
)


def _key(input: Tensor, activation: str | None) -> tuple:
    return "scaled", input.shape, input.dtype, activation, torch.is_grad_enabled()


def met(
    input: Tensor, residual: Tensor, scale: Tensor | None, activation: str | None
) -> Tensor | None:
    """A call that looks like one before, of which nothing need be asked again; None of any other."""
    if scale is None or (activation is not None and type(activation) is not str):
        return None
    if not may_be_met(input, residual, scale) or input.dim() < 2:
        return None
    return again(_key(input, activation), input, residual, _of_channels(scale, input))


def _of_channels(scale: Tensor, input: Tensor) -> Tensor:
    """The scale with one element a channel, where it has a single one."""
    if scale.numel() != 1:
        return scale
    # Its gradient is summed again by PyTorch, over the channels, before it is rounded.
    return scale.reshape(1).to(accumulate_dtype(input.dtype)).expand(input.shape[1])


def scaled_add_act(
    input: Tensor, residual: Tensor, scale: Tensor, activation: str | None
) -> Tensor:
    """`activation(residual + scale * input)` by the kernels; the scale has one element, or one a channel."""
    groups = (input, residual, _of_channels(scale, input), How(False, activation), True)
    if is_quiet():
        output = straight(TAIL, _key(input, activation), groups)
        if output is not None:
            return output
    return through_operators(TAIL, groups)

"""`act(residual + scale * input)`, the scale being one number or one a channel.

    fusedres::scaled_add_act           input, residual, scale [C] -> output, bits
    fusedres::scaled_add_act_backward  dy, the output's strides, input, scale, bits -> dinput, dresidual, dscale [C]

The kernels are those of `batch_norm_act` with nothing to normalise, the scale in the place of the weight. With
dz = dy * act'(z): dinput = scale * dz, dresidual = dz, dscale = sum over the rows of dz * input, which none of the
others waits for: one pass does it all. Passes: 3 forward, 3 backward (eager: 5 and 6); with a ReLU 3 1/16 and 4 1/16,
and with a smooth activation, where z is computed again, 3 and 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators
from .activations import activate, gradient, is_piecewise, keep_passing, parse, passes
from .dispatch import resolve
from .kernels.layout import bits_layout, row_map
from .layouts import like_sum
from .operators import LIBRARY, accumulate_dtype

LIBRARY.define(
    "scaled_add_act(Tensor input, Tensor residual, Tensor scale, str? activation, bool save) "
    "-> (Tensor output, Tensor bits)"
)
LIBRARY.define(
    "scaled_add_act_backward(Tensor dy, SymInt[] stride, Tensor input, Tensor? residual, Tensor scale, Tensor bits, "
    "str? activation, bool need_input, bool need_residual, bool need_scale) "
    "-> (Tensor dinput, Tensor dresidual, Tensor dscale)"
)
_forward_operator = torch.ops.fusedres.scaled_add_act.default
_backward_operator = torch.ops.fusedres.scaled_add_act_backward.default


def _needs_bits(activation: str | None, save: bool) -> bool:
    return save and activation is not None and is_piecewise(activation)


def _sum(input: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    wide = accumulate_dtype(input.dtype)
    return residual.to(wide) + operators._per_channel(scale.to(wide), input) * input


def _forward(
    input: Tensor, residual: Tensor, scale: Tensor, activation: str | None, save: bool
) -> tuple[Tensor, Tensor]:
    output = like_sum(input, residual, is_scaled=True)
    has_bits = _needs_bits(activation, save)
    if resolve(input.device, input.dtype)[0] != "triton":
        z = _sum(input, residual, scale)
        output.copy_(activate(z, activation))
        mask = torch.empty_like(output, dtype=torch.bool)
        if has_bits:
            return output, operators._pack(mask.copy_(passes(z, activation)))
        return output, input.new_empty(0, dtype=torch.uint8)
    k = operators._kernels()
    rows, (input, residual) = operators._common_rows(output, input, residual)
    pack_channels, n_bytes, bits_stride = bits_layout(rows)
    bits = input.new_empty((n_bytes if has_bits else 0,), dtype=torch.uint8)
    k.apply(
        input, residual, operators._dense(scale), None, None, None, None, None, output, bits if has_bits else None,
        rows, bits_stride, pack_channels, k.tile(rows, input.element_size(), k.APPLYING, k.chip()),
        0.0, *parse(activation), k.dtype[accumulate_dtype(input.dtype)], k.offset[rows.needs_int64],
    )  # fmt: skip
    return output, bits


def _backward(
    dy: Tensor,
    stride: list[int],
    input: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    bits: Tensor,
    activation: str | None,
    need_input: bool,
    need_residual: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input and residual are laid out as the output was; the residual is given where z is needed."""
    if resolve(dy.device, dy.dtype)[0] != "triton":
        return _backward_aten(
            dy,
            stride,
            input,
            residual,
            scale,
            bits,
            activation,
            need_input,
            need_residual,
            need_scale,
        )
    k = operators._kernels()
    like = input.new_empty_strided(input.shape, stride)
    dinput = like if need_input else input.new_empty(0)
    dresidual = torch.empty_like(like) if need_residual else input.new_empty(0)
    dscale = torch.empty_like(scale) if need_scale else scale.new_empty(0)
    rows, (x, dy, *others) = operators._common_rows(
        like, input, dy, *([] if residual is None else [residual])
    )
    added = others[0] if others else None
    weight = operators._dense(scale)
    wide = accumulate_dtype(input.dtype)
    pack_channels, _, bits_stride = bits_layout(rows)
    mask = bits if bits.numel() else None
    share = 1 if added is None else k.DUAL_SHARE
    size, chip, offset = input.element_size(), k.chip(), k.offset[rows.needs_int64]
    dx, dz = dinput if need_input else None, dresidual if need_residual else None
    if not need_scale:
        k.grad_apply(
            dy, x, mask, weight, None, None, dx, dz, added, None, None, None, None,
            rows, bits_stride, pack_channels, k.tile(rows, size, k.GRAD_APPLYING, chip, share),
            *parse(activation), k.dtype[wide], offset,
        )  # fmt: skip
        return dinput, dresidual, dscale
    # float32 spills before sm_90 where dx is written by four warps.
    kind = k.REDUCING if added is None and size < 4 else k.CROWDED
    tile = k.tile(rows, size, kind, chip, share)
    partial = input.new_empty(
        (tile.programs, 2, tile.width), dtype=operators._partial_dtype(input.dtype)
    )
    k.grad_reduce(
        dy, x, mask, weight, None, partial, added, None, None, None,
        k.skip(None, None, None, dz), dx,
        rows, bits_stride, pack_channels, tile, *parse(activation), k.dtype[wide], offset,
    )  # fmt: skip
    k.grad_finalize(partial, None, None, None, dscale, None, rows, tile, k.dtype[wide])
    return dinput, dresidual, dscale


def _backward_aten(
    dy, stride, input, residual, scale, bits, activation, need_input, need_residual, need_scale
):
    like = input.new_empty_strided(input.shape, stride)
    wide = accumulate_dtype(input.dtype)
    dz = dy.to(wide)
    if bits.numel():
        mask = operators.unpack(bits, torch.empty_like(like, dtype=torch.bool))
        dz = keep_passing(dz, mask, activation)
    elif residual is not None:
        dz = gradient(dz, _sum(input, residual, scale), activation)
    none = input.new_empty(0)
    dims = [0, *range(2, input.dim())]
    per_channel = operators._per_channel(scale.to(wide), input)
    return (
        torch.empty_like(like).copy_(dz * per_channel) if need_input else none,
        torch.empty_like(like).copy_(dz) if need_residual else none,
        (dz * input).sum(dims).to(scale.dtype) if need_scale else scale.new_empty(0),
    )


for _name, _implementation in (
    ("scaled_add_act", _forward),
    ("scaled_add_act_backward", _backward),
):
    LIBRARY.impl(_name, _implementation, "CPU")
    LIBRARY.impl(_name, operators._on_its_device(_implementation), "CUDA")


@torch.library.register_fake("fusedres::scaled_add_act", lib=LIBRARY)
def _(input, residual, scale, activation, save):
    output = torch.empty_like(
        (operators._per_channel(scale, input) * input).to(input.dtype) + residual
    )
    n_bytes: Any = 0
    if _needs_bits(activation, save):
        n_bytes = bits_layout(row_map.__wrapped__(tuple(output.shape), tuple(output.stride())))[1]
    return output, input.new_empty((n_bytes,), dtype=torch.uint8)


@torch.library.register_fake("fusedres::scaled_add_act_backward", lib=LIBRARY)
def _(dy, stride, input, residual, scale, bits, activation, need_input, need_residual, need_scale):
    like = input.new_empty_strided(input.shape, stride)
    return (
        like if need_input else input.new_empty(0),
        torch.empty_like(like) if need_residual else input.new_empty(0),
        torch.empty_like(scale) if need_scale else scale.new_empty(0),
    )


class ScaledAddAct(torch.autograd.Function):
    """Saved for backward: the input and the scale; one bit an element, or the residual where act is smooth."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, residual: Tensor, scale: Tensor, activation: str | None
    ) -> Tensor:
        output, bits = _forward_operator(input, residual, scale, activation, True)
        ctx.set_materialize_grads(False)
        is_smooth = activation is not None and not is_piecewise(activation)
        ctx.save_for_backward(input, residual if is_smooth else None, scale, bits)
        ctx.activation, ctx.stride = activation, output.stride()
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        input, residual, scale, bits = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = _differentiable(dy, ctx.stride, input, residual, scale, bits, ctx.activation)
        else:
            # Without an activation dz is dy itself, which no kernel need write again.
            passed_on = ctx.activation is None
            dinput, dresidual, dscale = _backward_operator(
                dy, ctx.stride, input, residual, scale, bits, ctx.activation,
                needs[0], needs[1] and not passed_on, needs[2],
            )  # fmt: skip
            found = dinput, dy if passed_on else dresidual, dscale
        return *(each if need else None for each, need in zip(found, needs, strict=True)), None


def _differentiable(dy, stride, input, residual, scale, bits, activation) -> tuple[Tensor, ...]:
    """For `create_graph=True`: a mask is a constant, all else PyTorch's own."""
    dz = dy
    if activation is not None and is_piecewise(activation):
        with torch.no_grad():
            mask = torch.empty_strided(input.shape, stride, dtype=torch.bool, device=input.device)
            operators.unpack(bits, mask)
        dz = keep_passing(dy, mask, activation)
    elif activation is not None:
        # Aliases: a scale that was computed from the input is not walked through twice.
        z = _sum(input.view_as(input), residual.view_as(residual), scale.view_as(scale))
        y = activate(z, activation)
        dz = torch.autograd.grad(y, z, dy.to(y.dtype), create_graph=True)[0]
    wide = accumulate_dtype(input.dtype)
    dims = [0, *range(2, input.dim())]
    dinput = dz.to(wide) * operators._per_channel(scale.to(wide), input)
    dscale = (dz.to(wide) * input).sum(dims)
    return dinput.to(input.dtype), dz.to(input.dtype), dscale.to(scale.dtype)


def scaled_add_act(
    input: Tensor, residual: Tensor, scale: Tensor, activation: str | None
) -> Tensor:
    """`activation(residual + scale * input)` through the kernels; the scale has one element, or one a channel."""
    if scale.numel() == 1:
        # Its gradient is summed again by PyTorch, over the channels, before it is rounded.
        scale = scale.reshape(1).to(accumulate_dtype(input.dtype)).expand(input.shape[1])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (input, residual, scale)):
        return ScaledAddAct.apply(input, residual, scale, activation)
    return _forward_operator(input, residual, scale, activation, False)[0]

"""A backward as a graph of PyTorch's own operations: for whoever differentiates it again.

That is `create_graph=True`, torch.func, whose levels nest, and tangents of forward-mode AD. The formulas stand here as
operations that PyTorch knows the derivatives of; nothing asks what the saved tensors themselves came from, so that they
hold as well where a level has ended (`torch.func.vjp`). The derivative of a piecewise activation is a constant almost
everywhere, so it enters as a mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import gradient, is_piecewise, keep_passing, parse
from ..dispatch import has_tangents
from ..fork import Leaf
from ..kernels.dtypes import accumulate_dtype
from .norm import Kept

Gradient = Tensor | None


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether a backward that reads these is to be a graph: it is differentiated itself, or may be."""
    if torch.compiler.is_compiling():
        return False
    if has_tangents():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def leaves_behind(node: Any, *places: int) -> tuple[Tensor, ...]:
    """The leaves that inputs of a node come from, by their places, where its backward is to be a graph itself.

    For inputs that were not saved: what a mask was made of gets zeros (`passing`), and a node knows what its inputs
    came from without keeping them. (A tensor in between, for which a gradient is asked, gets none.)
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return ()
    waiting: list[Any] = [node.next_functions[k][0] for k in places]
    seen, found = set(), []
    while waiting:
        each = waiting.pop()
        if each is None or each in seen:
            continue
        seen.add(each)
        if isinstance(each, Leaf):
            found.append(each.variable)
        else:
            waiting += [before for before, _ in each.next_functions]
    return tuple(t for t in found if type(t) in (Tensor, torch.nn.Parameter))


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector [C] that multiplies [N, C, ...]."""
    return vector.view([1, -1] + [1] * (like.dim() - 2))


class _AsItWas(torch.autograd.Function):
    """A bias in the graph, with the value that it had in the forward."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.to(ctx.dtype), None


class _Passing(torch.autograd.Function):
    """`keep_passing(dz, mask)`. What the mask was made of gets a gradient of zeros, as from PyTorch's own
    `threshold_backward`: an optimizer's weight decay does more with zeros than with None."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dz: Tensor, mask: Tensor, activation: str, *sources: Tensor) -> Tensor:
        return keep_passing(dz, mask, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, mask, ctx.activation, *sources = inputs
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        ctx.kinds = [(t.shape, t.dtype, t.device) for t in sources]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (mask,), needs = ctx.saved_tensors, ctx.needs_input_grad
        zeros = [
            dy.new_zeros((), dtype=dtype, device=device).expand(shape) if need else None
            for (shape, dtype, device), need in zip(ctx.kinds, needs[3:], strict=True)
        ]
        dz = keep_passing(dy, mask, ctx.activation) if needs[0] else None
        return dz, None, None, *zeros

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        (mask,) = ctx.saved_tensors
        return None if tangent is None else keep_passing(tangent, mask, ctx.activation)


def smooth(dz: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz * act'(z) of a smooth activation, for derivatives of any order (those that PyTorch composes it of, where it
    has none for its own operator)."""
    name, dz = parse(activation).name, dz.to(z.dtype)
    if name == "silu":
        s = torch.sigmoid(z)
        return dz * (s * (1 + z * (1 - s)))
    if name == "mish":
        t = torch.tanh(F.softplus(z))
        return dz * (t + z * torch.sigmoid(z) * (1 - t * t))
    return gradient(dz, z, activation)


def passing(
    dz: Tensor, mask: Tensor, activation: str, sources: tuple[Tensor | None, ...]
) -> Tensor:
    """dz where a piecewise activation lets it pass; sources: what its mask was made of."""
    return _Passing.apply(dz, mask, activation, *[t for t in sources if t is not None])


def bias_in_graph(
    saved_bias: Tensor | None, bias: Tensor | None, saved: Tensor, activation: str | None
) -> Tensor | None:
    """A bias for the graph of first derivatives: the one that was saved itself, else `bias` with the value it had."""
    if saved_bias is not None or bias is None:
        return saved_bias
    if activation is not None and not is_piecewise(activation) and bias.requires_grad:
        return _AsItWas.apply(bias, saved[3])
    return bias  # its value is in no derivative


def normalized_graph(kept: Kept, bias: Tensor | None, training: bool, eps: float) -> Tensor:
    """A BatchNorm's output in the dtype of its arithmetic, as a graph."""
    wide = accumulate_dtype(kept.input.dtype)
    w, b = (None if t is None else t.to(wide) for t in (kept.weight, bias))
    x = kept.input.to(wide)
    if training:
        # Without cuDNN (the last argument): vmap has no rule for its derivative of a channels_last tensor.
        return torch.batch_norm(x, w, b, None, None, True, 0.0, eps, False)
    # Not F.batch_norm, which under vmap asks for a derivative by the running statistics.
    y = _normalized(x, kept.saved)
    y = y if w is None else y * per_channel(w, x)
    return y if b is None else y + per_channel(b, x)


def _normalized(x: Tensor, saved: Tensor) -> Tensor:
    mean, low, invstd = (per_channel(row, x) for row in saved.detach()[:3].unbind(0))
    return (x - mean - low) * invstd


def norm_gradients(
    dz: Tensor, kept: Kept, training: bool, eps: float, needs: tuple[bool, bool, bool]
) -> tuple[Gradient, Gradient, Gradient]:
    """The gradients of a BatchNorm's input, weight and bias as a graph: None for those that are not needed, or that
    there are not; that of the bias in the dtype of the arithmetic."""
    input, weight, saved = kept
    wide = accumulate_dtype(input.dtype)
    x, w, dz = input.to(wide), None if weight is None else weight.to(wide), dz.to(wide)
    needs = (needs[0], needs[1] and weight is not None, needs[2])
    dx: Gradient
    dweight: Gradient
    dbias: Gradient
    if training:
        mean, low, invstd, _ = saved.detach().unbind(0)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dz, x, w, None, None, mean + low, invstd, True, eps, list(needs)
        )
    else:
        dims = [0, *range(2, x.dim())]
        scale = saved.detach()[2] if w is None else saved.detach()[2] * w
        dx = dz * per_channel(scale, x) if needs[0] else None
        dweight = (dz * _normalized(x, saved)).sum(dims) if needs[1] else None
        dbias = dz.sum(dims) if needs[2] else None
    dx = dx.to(input.dtype) if needs[0] and dx is not None else None
    dweight = (
        dweight.to(weight.dtype)
        if needs[1] and dweight is not None and weight is not None
        else None
    )
    return dx, dweight, dbias if needs[2] else None

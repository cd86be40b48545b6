"""Second derivatives: the first ones as a graph of PyTorch's own operations, for `create_graph=True`.

The derivative of a piecewise activation is a constant almost everywhere, so it enters as a mask; all others are taken
by PyTorch, whose double backward is known to be right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import is_piecewise
from ..kernels.dtypes import accumulate_dtype


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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


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
    wide = accumulate_dtype(input.dtype)
    w, b = (None if t is None else t.to(wide) for t in aliases[1:])
    x = aliases[0].to(wide)
    if training:
        # Without cuDNN (the last argument): vmap has no rule for its derivative of a channels_last tensor.
        return torch.batch_norm(x, w, b, None, None, True, 0.0, eps, False), aliases
    # Not F.batch_norm, which under vmap asks for a derivative by the running statistics.
    mean, low, invstd = (per_channel(row, x) for row in saved.detach()[:3].unbind(0))
    y = (x - mean - low) * invstd
    y = y if w is None else y * per_channel(w, x)
    return y if b is None else y + per_channel(b, x), aliases


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

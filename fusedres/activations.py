"""The activations that can be fused in: their names, and what each is in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Their derivative takes two values, so one bit an element is enough to remember which.
PIECEWISE = ("relu", "relu6", "leaky_relu")
SMOOTH = ("silu", "gelu", "gelu_tanh", "hardswish", "mish")
NAMES = (*PIECEWISE, *SMOOTH)
SLOPE = 0.01  # nn.LeakyReLU's own default


class Activation(NamedTuple):
    """A name as the kernels know it, and the share of a negative input that passes."""

    name: str | None
    slope: float = 0.0


_PARSED: dict[str | None, Activation] = {
    None: Activation(None),
    **{name: Activation(name, SLOPE if name == "leaky_relu" else 0.0) for name in NAMES},
}


def parse(activation: str | None) -> Activation:
    """The activation of this name; "leaky_relu" may say its slope, as in "leaky_relu(0.1)".

    Raises:
        ValueError: there is none of that name; the text lists those that there are.
    """
    # No cache of functools: torch.compile traces this.
    found = _PARSED.get(activation)
    if found is not None:
        return found
    slope = None
    if isinstance(activation, str) and activation.startswith("leaky_relu("):
        slope = _number(activation.removeprefix("leaky_relu(").removesuffix(")"))
    if slope is None:
        raise ValueError(
            f"unknown activation {activation!r}; choose one of None, {', '.join(map(repr, NAMES))} "
            "(or 'leaky_relu(0.1)' for a slope that is not 0.01)"
        )
    return Activation("leaky_relu", slope)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def check_activation(caller: str, activation: object) -> None:
    """Refuse what is no name of an activation.

    Raises:
        ValueError: as `parse`, with the caller's name in front.
    """
    if activation is None or activation == "relu":
        return
    if not isinstance(activation, str):
        raise ValueError(f"{caller}: unknown activation {activation!r}, expected a name or None")
    try:
        parse(activation)
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from None


def is_piecewise(activation: str | None) -> bool:
    """Whether the derivative takes two values only."""
    return parse(activation).name in PIECEWISE


def activate(input: Tensor, activation: str | None, in_place: bool = False) -> Tensor:
    """act(input), by PyTorch's own function; `in_place` where nobody else holds the input.

    Only ReLU makes use of it: out of place it keeps its output for the backward pass as well, so whoever writes to that
    output afterwards sees no difference. The others keep their input.
    """
    if activation is None:
        return input
    if activation == "relu":
        return torch.relu_(input) if in_place else torch.relu(input)
    name, slope = parse(activation)
    if name == "relu6":
        return F.relu6(input)
    if name == "leaky_relu":
        return F.leaky_relu(input, slope)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(input, approximate="tanh" if name == "gelu_tanh" else "none")
    return {"silu": F.silu, "hardswish": F.hardswish, "mish": F.mish}[str(name)](input)


def gradient(dy: Tensor, z: Tensor, activation: str | None) -> Tensor:
    """dy * act'(z) of a smooth activation, by the operator that PyTorch's own backward runs."""
    name, aten, dy = parse(activation).name, torch.ops.aten, dy.to(z.dtype)
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(dy, z, approximate="tanh" if name == "gelu_tanh" else "none")
    smooth = {"silu": aten.silu_backward, "hardswish": aten.hardswish_backward, "mish": aten.mish_backward}  # fmt: skip
    return smooth[str(name)](dy, z)


def passes(z: Tensor, activation: str | None) -> Tensor:
    """Where the gradient of a piecewise activation passes whole, by its input or its output."""
    name = parse(activation).name
    if name == "leaky_relu":
        return z > 0
    return ~((z <= 0) | (z >= 6)) if name == "relu6" else ~(z <= 0)


def keep_passing(gradient: Tensor, mask: Tensor, activation: str | None) -> Tensor:
    """A gradient where the mask is set, and the share of the slope elsewhere."""
    slope = parse(activation).slope
    return torch.where(mask, gradient, gradient * slope if slope else 0.0)

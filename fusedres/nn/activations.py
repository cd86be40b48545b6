"""Which of the activations that the kernels know a module computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ..activations import SLOPE


def leaky(slope: Any) -> str:
    """The name of a LeakyReLU with this slope; empty where a name cannot say it."""
    if type(slope) not in (int, float) or not math.isfinite(slope):
        return ""  # not a number that a name can say
    return "leaky_relu" if slope == SLOPE else f"leaky_relu({slope!r})"


def gelu(approximate: str) -> str:
    """The name of a GELU."""
    return "gelu_tanh" if approximate == "tanh" else "gelu"


# By class, and by name for classes of a package that need not be installed.
_MODULES: dict[Any, Callable[[Any], str]] = {
    nn.ReLU: lambda child: "relu",
    nn.ReLU6: lambda child: "relu6" if (child.min_val, child.max_val) == (0, 6) else "",
    nn.LeakyReLU: lambda child: leaky(child.negative_slope),
    nn.SiLU: lambda child: "silu",
    nn.GELU: lambda child: gelu(child.approximate),
    nn.Hardswish: lambda child: "hardswish",
    nn.Mish: lambda child: "mish",
    ("timm.layers.activations", "GELU"): lambda child: "gelu",
    ("timm.layers.activations", "GELUTanh"): lambda child: "gelu_tanh",
    ("timm.layers.activations", "Swish"): lambda child: "silu",
    ("timm.layers.activations", "HardSwish"): lambda child: "hardswish",
    ("timm.layers.activations", "Mish"): lambda child: "mish",
}


LAYERS = tuple(kind for kind in _MODULES if isinstance(kind, type))


def activation_of(child: nn.Module) -> str | None:
    """The name of the activation that this child is; None where it is none that the kernels know."""
    kind = type(child)
    name = _MODULES.get(kind) or _MODULES.get((kind.__module__, kind.__qualname__))
    return (name(child) or None) if name is not None else None

"""The shortcut of a residual block: the identity, what it becomes where the shape changes, and variants for study.

With `x` the block's input and `f` what its branch gives, a block adds `skip + f`:

    identity        skip = x
    project         skip = W x, W a 1x1 convolution, where the shape changes; x elsewhere (option B)
    pad             skip = x, subsampled, with channels of zeros, where the shape changes; x elsewhere (option A)
    conv            skip = W x in every block (option C)
    scale           skip = x / 2, f is halved
    exclusive_gate  skip = (1 - g) x, f becomes g f, with g = sigmoid(W x + b)
    shortcut_gate   skip = (1 - g) x
    dropout         skip = dropout(x), half of it

Options A to C are those of He et al. 2015 (arXiv:1512.03385, section 4.1), the others those of He et al. 2016
(arXiv:1603.05027, section 3), whose `x` is padded as in option A where the shape changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projection import CONVOLUTIONS, Projection


class Pad(nn.Module):
    """`x` at every `stride`-th place with `extra` channels of zeros behind: [N, C, ...] -> [N, C + extra, ...]."""

    def __init__(self, extra: int, stride: int, dims: int = 2) -> None:
        super().__init__()
        self.extra, self.stride, self.dims = extra, stride, dims

    def forward(self, x: Tensor) -> Tensor:
        """The padded input; no parameters, no arithmetic."""
        x = x[(slice(None), slice(None), *[slice(None, None, self.stride)] * self.dims)]
        return F.pad(x, [0, 0] * self.dims + [0, self.extra])

    def extra_repr(self) -> str:
        return f"extra={self.extra}, stride={self.stride}"


class Weighed(nn.Module):
    """A shortcut that weighs the branch too: `weighed(x, f)` gives the pair (skip, f) that is added."""


class Scale(Weighed):
    """`scale * x` and `(1 - scale) * f`; `match` gives `x` the shape of `f`."""

    def __init__(self, match: nn.Module, scale: float = 0.5) -> None:
        super().__init__()
        self.match, self.scale = match, scale

    def forward(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C_in, ...] and f [N, C, ...] to two tensors like `f`."""
        return self.match(x) * self.scale, f * (1 - self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class Gate(Weighed):
    """`(1 - g) * x`, and `g * f` where the gate is exclusive (else `f`), with `g = sigmoid(gate(x))`."""

    def __init__(self, match: nn.Module, gate: nn.Module, exclusive: bool) -> None:
        super().__init__()
        self.match, self.gate, self.exclusive = match, gate, exclusive

    def forward(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C_in, ...] and f [N, C, ...] to two tensors like `f`."""
        g = torch.sigmoid(self.gate(x))
        return (1 - g) * self.match(x), g * f if self.exclusive else f

    def extra_repr(self) -> str:
        return f"exclusive={self.exclusive}"


class Change(NamedTuple):
    """What a shortcut is made for: the block's name and shape, and whether a projection ends in a BatchNorm."""

    owner: str
    in_channels: int
    out_channels: int
    stride: int
    dims: int
    normed: bool
    gate_bias: float
    where: dict[str, Any]
    keep: bool = False

    def __bool__(self) -> bool:
        """Whether there is a change at all."""
        return self.stride != 1 or self.in_channels != self.out_channels

    def convolution(self, bias: bool = False) -> nn.Module:
        """A 1x1 convolution that makes the change."""
        made: Callable[..., nn.Module] = CONVOLUTIONS[self.dims - 1]
        return made(self.in_channels, self.out_channels, 1, self.stride, bias=bias, **self.where)

    def projection(self) -> nn.Module:
        """Option B: with a BatchNorm behind it, or bare."""
        if not self.normed:
            return self.convolution()
        return Projection(
            self.in_channels, self.out_channels, self.stride, dims=self.dims,
            keep_finite_statistics=self.keep, **self.where,
        )  # fmt: skip

    def pad(self) -> nn.Module:
        """Option A.

        Raises:
            ValueError: there are fewer channels to come.
        """
        if self.out_channels < self.in_channels:
            raise ValueError(
                f"{self.owner}: this shortcut adds channels of zeros and cannot go from {self.in_channels} channels to "
                f"{self.out_channels}; choose shortcut='project'"
            )
        return Pad(self.out_channels - self.in_channels, self.stride, self.dims)

    def match(self) -> nn.Module:
        """What comes before a weight."""
        return self.pad() if self else nn.Identity()

    def gated(self, exclusive: bool) -> nn.Module:
        """A gate that begins nearly shut: the shortcut passes whole."""
        gate: Any = self.convolution(bias=True)
        nn.init.constant_(gate.bias, self.gate_bias)
        return Gate(self.match(), gate, exclusive)

    def dropped(self) -> nn.Module:
        """Dropout of half of the shortcut's values."""
        return nn.Sequential(self.pad(), nn.Dropout(0.5)) if self else nn.Dropout(0.5)

    def nothing(self) -> None:
        """The identity.

        Raises:
            ValueError: the shape changes.
        """
        if self:
            raise ValueError(
                f"{self.owner}: shortcut='identity' adds the input as it is, and this block goes from "
                f"{self.in_channels} to {self.out_channels} channels with stride {self.stride}; choose "
                "shortcut='project' (a 1x1 convolution) or shortcut='pad' (zeros, no parameters)"
            )


_MAKERS: dict[str, Callable[[Change], nn.Module | None]] = {
    "identity": Change.nothing,
    "project": lambda change: change.projection() if change else None,
    "pad": lambda change: change.pad() if change else None,
    "conv": Change.projection,
    "scale": lambda change: Scale(change.match()),
    "exclusive_gate": lambda change: change.gated(exclusive=True),
    "shortcut_gate": lambda change: change.gated(exclusive=False),
    "dropout": Change.dropped,
}
SHORTCUTS = tuple(_MAKERS)


def make_shortcut(name: str, change: Change) -> nn.Module | None:
    """The module of this shortcut; None for the identity.

    Raises:
        ValueError: an unknown name, or one that cannot make this change.
    """
    check_choice(change.owner, "shortcut", name, SHORTCUTS)
    return _MAKERS[name](change)


def check_choice(caller: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: naming the argument, the value and the choices.
    """
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{caller}: {argument} is {value!r}, expected one of {listed}")


def check_count(caller: str, argument: str, value: object) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        TypeError: no whole number; naming the argument and the value.
        ValueError: one below 1.
    """
    wanted = f"{caller}: {argument} is {value!r}, expected a whole number of at least 1"
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(wanted) from None
    if count < 1:
        raise ValueError(wanted)

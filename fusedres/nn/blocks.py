"""Residual blocks that run fused by themselves: post-activation as in torchvision, and pre-activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..activations import activate, check_activation
from .batch_norm import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    call_add_batch_norm,
    run_tail,
)
from .keeping import KeepsStatistics
from .norms import FUSED_NORMS, why_called
from .projection import CONVOLUTIONS, Projection
from .script import NotScriptable
from .shortcuts import Change, Weighed, check_choice, check_count, make_shortcut

BATCH_NORM_ACTS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)
_STRIDE_ON = ("3x3", "1x1")


class _Convolution(NamedTuple):
    """One convolution of a branch."""

    kernel: int
    in_channels: int
    out_channels: int
    stride: int = 1
    groups: int = 1


class _Block(KeepsStatistics, NotScriptable, nn.Module):
    """What all four have in common: a branch of two or three convolutions with their BatchNorms, and a shortcut."""

    expansion = 1
    activation: str | None

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: str = "project",
        groups: int = 1,
        base_width: int = 64,
        stride_on: str = "3x3",
        activation: str | None = "relu",
        zero_init_last: bool = False,
        dims: int = 2,
        gate_bias: float = -6.0,
        keep_finite_statistics: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_choice(owner, "dims", dims, (1, 2, 3))
        check_choice(owner, "stride_on", stride_on, _STRIDE_ON)
        counts = {
            "in_channels": in_channels, "channels": channels, "stride": stride, "groups": groups,
            "base_width": base_width,
        }  # fmt: skip
        for argument, count in counts.items():
            check_count(owner, argument, count)
        check_activation(owner, activation)
        self.activation = activation
        self.keep_finite_statistics = keep_finite_statistics
        self.out_channels = channels * self.expansion
        where = {"device": device, "dtype": dtype}
        branch = self._branch(in_channels, channels, stride, groups, base_width, stride_on)
        for k, each in enumerate(branch, 1):
            self._add_pair(k, each, dims, where)
        self.depth = len(branch)
        self._add_shortcut(shortcut, in_channels, stride, dims, gate_bias, where)
        if zero_init_last:
            self.zero_last()

    def _branch(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        groups: int,
        base_width: int,
        stride_on: str,
    ) -> list[_Convolution]:
        raise NotImplementedError

    def _add_pair(self, k: int, each: _Convolution, dims: int, where: dict[str, Any]) -> None:
        raise NotImplementedError

    def _add_shortcut(
        self, name: str, in_channels: int, stride: int, dims: int, gate_bias: float, where: Any
    ) -> None:
        raise NotImplementedError

    def zero_last(self) -> None:
        """Let the block begin as its shortcut alone (Goyal et al. 2017, arXiv:1706.02677, section 5.1)."""
        raise NotImplementedError

    def _run(
        self, norm: Any, input: Tensor, residual: Tensor | None, activation: str | None
    ) -> Tensor:
        return run_tail(norm, input, residual, activation, self.keep_finite_statistics)

    def _pairs(self) -> list[tuple[Any, Any]]:
        """(convolution, BatchNorm) in the order of their numbers."""
        children = self._modules
        return [(children[f"conv{k}"], children[f"bn{k}"]) for k in range(1, self.depth + 1)]

    def extra_repr(self) -> str:
        return f"activation={self.activation}{self._kept_repr()}"


def _convolution(each: _Convolution, dims: int, where: dict[str, Any]) -> nn.Module:
    made: Any = CONVOLUTIONS[dims - 1]
    return made(
        each.in_channels, each.out_channels, each.kernel, each.stride, each.kernel // 2,
        groups=each.groups, bias=False, **where,
    )  # fmt: skip


class _Basic(_Block):
    """Two 3x3 convolutions."""

    def _branch(self, in_channels, channels, stride, groups, base_width, stride_on):
        given = {"groups": groups, "base_width": base_width, "stride_on": stride_on}
        usual = {"groups": 1, "base_width": 64, "stride_on": "3x3"}
        for name, value in given.items():
            if value != usual[name]:
                raise ValueError(
                    f"{type(self).__name__}: {name} is {value!r}, expected {usual[name]!r}: it has no 1x1 convolutions "
                    "around the 3x3; choose a block that is called Bottleneck"
                )
        return [_Convolution(3, in_channels, channels, stride), _Convolution(3, channels, channels)]


class _Bottleneck(_Block):
    """A 3x3 convolution between two of 1x1."""

    expansion = 4

    def _branch(self, in_channels, channels, stride, groups, base_width, stride_on):
        width = int(channels * (base_width / 64)) * groups
        first, middle = (stride, 1) if stride_on == "1x1" else (1, stride)
        return [
            _Convolution(1, in_channels, width, first),
            _Convolution(3, width, width, middle, groups),
            _Convolution(1, width, channels * self.expansion),
        ]


class _PostActivation(_Block):
    """conv, BN, act, ..., conv, BN, add, act."""

    def _add_pair(self, k, each, dims, where):
        self.add_module(f"conv{k}", _convolution(each, dims, where))
        self.add_module(f"bn{k}", FUSED_NORMS[dims - 1](each.out_channels, **where))

    def _add_shortcut(self, name, in_channels, stride, dims, gate_bias, where):
        owner = type(self).__name__
        self.downsample = make_shortcut(
            name,
            Change(
                owner,
                in_channels,
                self.out_channels,
                stride,
                dims,
                True,
                gate_bias,
                where,
                self.keep_finite_statistics,
            ),
        )

    def zero_last(self) -> None:
        """Set the weight of the last BatchNorm to zero, so that the block begins as its shortcut alone (Goyal et al.
        2017, arXiv:1706.02677, section 5.1)."""
        nn.init.zeros_(self._pairs()[-1][1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, in_channels, ...] -> [N, channels * expansion, ...], strided."""
        out = x
        *front, (convolution, norm) = self._pairs()
        for before, its_norm in front:
            out = self._run(its_norm, before(out), None, self.activation)
        return self._tail(norm, convolution(out), x)

    def _tail(self, norm: Any, out: Tensor, x: Tensor) -> Tensor:
        shortcut: Any = self.downsample
        if isinstance(shortcut, Weighed):
            skip, f = shortcut(x, self._run(norm, out, None, None))
            return activate(skip + f, self.activation)
        if isinstance(shortcut, Projection) and isinstance(x, Tensor):  # not a proxy of torch.fx
            keep = self.keep_finite_statistics or shortcut.keep_finite_statistics
            return shortcut.joined(norm, out, x, self.activation, keep)
        return self._run(norm, out, x if shortcut is None else shortcut(x), self.activation)

    def fused_norms(self) -> dict[str, str]:
        """The pattern that each BatchNorm below runs in, by its name, for `fusedres.explain`."""
        shortcut: Any = self.downsample
        act = "" if self.activation is None else f"+{self.activation}"
        found = {f"bn{k}": f"BN{act}" for k in range(1, self.depth)}
        last = f"bn{self.depth}"
        if isinstance(shortcut, Weighed):
            return {**found, last: "BN"}
        if isinstance(shortcut, Projection) and why_called(shortcut) is None:
            return {**found, last: f"BN+BN+add{act}", "downsample.1": f"BN+BN+add{act}"}
        return {**found, last: f"BN+add{act}"}


class _PreActivation(_Block):
    """BN, act, conv, ..., BN, act, conv, add."""

    bn1: nn.Module | None

    def __init__(self, *args: Any, input_activated: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        if input_activated:
            self.bn1 = None

    def _add_pair(self, k, each, dims, where):
        self.add_module(f"bn{k}", FUSED_NORMS[dims - 1](each.in_channels, **where))
        self.add_module(f"conv{k}", _convolution(each, dims, where))

    def _add_shortcut(self, name, in_channels, stride, dims, gate_bias, where):
        owner = type(self).__name__
        self.shortcut = make_shortcut(
            name,
            Change(owner, in_channels, self.out_channels, stride, dims, False, gate_bias, where),
        )
        self.projects = name in ("project", "conv")

    def zero_last(self) -> None:
        """Set the weight of the last convolution to zero, so that the block begins as its shortcut alone. (A BatchNorm
        of zeros before a ReLU would stay so: no gradient passes.)"""
        nn.init.zeros_(self._pairs()[-1][0].weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, in_channels, ...] -> [N, channels * expansion, ...], strided."""
        _, activated = _begin(self._modules["bn1"], self, None, x)
        f, skip = self.branch(activated, x)
        return skip + f

    def branch(self, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two that the block adds, (f, skip), with `a = act(bn1(x))` computed already; shapes as in forward."""
        (convolution, _), *rest = self._pairs()
        f = convolution(a)
        for convolution, norm in rest:
            f = convolution(self._run(norm, f, None, self.activation))
        shortcut: Any = self.shortcut
        if shortcut is None:
            return f, x
        if isinstance(shortcut, Weighed):
            skip, f = shortcut(x, f)
            return f, skip
        return f, shortcut(a if self.projects else x)

    def fused_norms(self) -> dict[str, str]:
        """The pattern that each BatchNorm below runs in, by its name, for `fusedres.explain`."""
        act = "" if self.activation is None else f"+{self.activation}"
        names = [f"bn{k}" for k in range(1, self.depth + 1)]
        return {name: f"BN{act}" for name in names if self._modules[name] is not None}


class BasicBlock(_Basic, _PostActivation):
    """`act(bn2(conv2(act(bn1(conv1(x))))) + shortcut(x))` (He et al. 2015, arXiv:1512.03385, figure 5).

    Children and state_dict are those of torchvision's BasicBlock, without a child for the ReLU. Each line ends in a
    fused operator; where a child has hooks or was converted, it is called.

    Args:
        in_channels: of the input.
        channels: the width; the output has `channels * expansion`.
        stride: of the block, one number for all dimensions.
        shortcut: "identity", "project" (a 1x1 convolution and a BatchNorm where the shape changes), "pad" (zeros where
            it does); for study "conv", "scale", "exclusive_gate", "shortcut_gate", "dropout" (`fusedres.nn.shortcuts`
            has the formulas). The child is `downsample`, None for the identity.
        groups, base_width, stride_on: of a Bottleneck; here they must be 1, 64 and "3x3".
        activation: as for `fusedres.functional.batch_norm_act`.
        zero_init_last: begin as the shortcut alone (`zero_last`).
        dims: 1, 2 or 3 spatial dimensions.
        gate_bias: where the bias of a gate begins; far below zero, the gate leaves the shortcut whole.
        keep_finite_statistics: as in `FuseConfig`, for all BatchNorms of the block.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: an argument that is none of these, a shortcut that cannot make the block's change of shape.
    """


class Bottleneck(_Bottleneck, _PostActivation):
    """`act(bn3(conv3(act(bn2(conv2(act(bn1(conv1(x)))))))) + shortcut(x))`, with 1x1, 3x3 and 1x1 convolutions (He et
    al. 2015, arXiv:1512.03385, figure 5).

    Children and state_dict are those of torchvision's Bottleneck, without a child for the ReLU.

    Args:
        in_channels, channels, stride, shortcut, activation, zero_init_last, dims, gate_bias, device, dtype: as for
            `BasicBlock`; the output has 4 times `channels`.
        keep_finite_statistics: as for `BasicBlock`.
        groups: of the 3x3 convolution (Xie et al. 2017, arXiv:1611.05431).
        base_width: the 3x3 convolution has `channels * base_width / 64 * groups` channels.
        stride_on: the convolution that has the stride: "3x3" as in torchvision ("v1.5"), "1x1" as in the paper, the
            first one.

    Raises:
        ValueError: as `BasicBlock`.
    """


class PreActBasicBlock(_Basic, _PreActivation):
    """`shortcut(x) + conv2(act(bn2(conv1(act(bn1(x))))))`: the unit of He et al. 2016, arXiv:1603.05027, figure 4(e).

    In a `PreActSequential` the addition runs with the BatchNorm and the activation of the next block.

    Args:
        in_channels, channels, stride, groups, base_width, stride_on: as for `BasicBlock`.
        activation, dims, gate_bias, keep_finite_statistics, device, dtype: as for `BasicBlock`.
        shortcut: as for `BasicBlock`. The child is `shortcut`; its convolution, if it is one, has no BatchNorm and is
            given `act(bn1(x))`, as in the paper's appendix; all other shortcuts are given `x`.
        zero_init_last: begin as the shortcut alone: the last convolution's weight is zero.
        input_activated: the input is an activation already, as for the first block of a net: there is no `bn1` then.

    Raises:
        ValueError: as `BasicBlock`.
    """


class PreActBottleneck(_Bottleneck, _PreActivation):
    """`shortcut(x) + conv3(act(bn3(conv2(act(bn2(conv1(act(bn1(x)))))))))` (He et al. 2016, arXiv:1603.05027).

    In a `PreActSequential` the addition runs with the BatchNorm and the activation of the next block.

    Args:
        groups, base_width, stride_on: as for `Bottleneck`.
        in_channels, stride, shortcut, activation, dims, gate_bias, keep_finite_statistics, device, dtype: as for
            `PreActBasicBlock`.
        channels, zero_init_last, input_activated: as for `PreActBasicBlock`; the output has 4 times `channels`.

    Raises:
        ValueError: as `BasicBlock`.
    """


class PreActSequential(NotScriptable, nn.Sequential):
    """An nn.Sequential that runs the addition at the end of a pre-activation block with what the next child begins by.

    That is `bn1` and the activation of another such block, or a whole `BatchNormAct1d/2d/3d`, with which a net ends.
    Any other child, and one with hooks, is called. A PreActSequential inside is taken as its children are. The results
    are those of nn.Sequential.

        stage = PreActSequential(PreActBasicBlock(16, 16), PreActBasicBlock(16, 16), BatchNormAct2d(16))
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Sequential."""
        return run_units(self._modules.values(), input)

    def fused_norms(self) -> dict[str, str]:
        """The pattern that each BatchNorm of its own runs in, by its name, for `fusedres.explain`."""
        children = self._modules.items()
        return {name: norm_pattern(c) for name, c in children if isinstance(c, BATCH_NORM_ACTS)}


def norm_pattern(norm: Any) -> str:
    """The pattern of a BatchNormAct, called with one argument."""
    return "BN" if norm.activation is None else f"BN+{norm.activation}"


def run_units(units: Iterable[Any], x: Tensor) -> Tensor:
    """The units one after the other, the addition of each pre-activation block with the BatchNorm that follows it."""
    if not isinstance(x, Tensor) or _has_any_global_hook():
        # Whoever watches modules, torch.fx included, sees them called.
        for unit in units:
            x = unit(x)
        return x
    f = None  # of x + f, where the addition is still to come
    for unit in _flat(units):
        if isinstance(unit, _PreActivation) and _is_own(unit, _PreActivation):
            x, activated = _begin(unit._modules["bn1"], unit, f, x)
            f, x = unit.branch(activated, x)
        elif isinstance(unit, BATCH_NORM_ACTS) and _is_own(unit, BatchNormAct2d):
            x, f = _begin(unit._modules["bn"], unit, f, x)[1], None
        else:
            x, f = unit(x if f is None else x + f), None
    return x if f is None else x + f


def _flat(units: Iterable[Any]) -> Iterator[Any]:
    for unit in units:
        if isinstance(unit, PreActSequential) and _is_own(unit, PreActSequential):
            yield from _flat(unit._modules.values())
        else:
            yield unit


def _is_own(unit: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a unit does what its kind does when it is called, and nothing more."""
    return type(unit).forward is kind.forward and why_called(unit) is None


def _begin(norm: nn.Module | None, unit: Any, f: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x + f, act(norm(x + f))) with the activation of a unit; an `f` of None is not added, a norm of None means that
    the sum is an activation."""
    how = unit.activation, unit.keep_finite_statistics
    if f is None:
        return x, x if norm is None else run_tail(norm, x, None, *how)
    if norm is None:
        x = x + f
        return x, x
    return call_add_batch_norm(norm, f, x, *how)

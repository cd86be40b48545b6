"""Who runs a case: each provider turns the plain PyTorch module of the case into the one that it would train."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fusedres

from .cases import DualTail, Tail

OURS = ("fusedres", "fusedres + compile")
BASELINE = "eager"


class Unfit(Exception):
    """This provider cannot run this case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """`wrap` may change the module it is given. `why_not` says what is missing on this machine, or None."""

    name: str
    wrap: Callable[[nn.Module], nn.Module]
    why_not: Callable[[torch.device], str | None] = lambda device: None
    compiles: bool = False


def _out_of_place(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, nn.ReLU):
            child.inplace = False
    return module


def _in_place(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, nn.ReLU):
            child.inplace = True
    return module


def _compiled(mode: str) -> Callable[[nn.Module], nn.Module]:
    # CUDA graphs are captured around the step, for every provider in the same way.
    def wrap(module: nn.Module) -> Any:
        return torch.compile(module, mode=mode, fullgraph=True, dynamic=False)

    return wrap


def _fused(module: nn.Module) -> nn.Module:
    if isinstance(module, DualTail):
        return FusedDualTail(module)
    if isinstance(module, Tail):
        return FusedTail(module)
    report = fusedres.fuse_(module)
    if report.n_fused == 0:
        raise Unfit("nothing in it was fused")
    return module


class FusedTail(nn.Module):
    """A Tail on `fusedres.nn.BatchNormAct2d`, with the same parameters."""

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.bn = fusedres.nn.BatchNormAct2d(tail.bn.num_features, activation=tail.activation)
        self.bn.bn = tail.bn

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.bn(x, residual)


class FusedDualTail(nn.Module):
    """A DualTail on `fusedres.functional.dual_batch_norm_act`, with the same parameters."""

    def __init__(self, tail: DualTail) -> None:
        super().__init__()
        self.bn: Any = tail.bn
        self.shortcut: Any = tail.shortcut
        self.activation = tail.activation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        for norm in (self.bn, self.shortcut):
            norm.num_batches_tracked.add_(1)
        return fusedres.functional.dual_batch_norm_act(
            x, residual, self.bn.running_mean, self.bn.running_var,
            self.shortcut.running_mean, self.shortcut.running_var,
            self.bn.weight, self.bn.bias, self.shortcut.weight, self.shortcut.bias,
            self.training, activation=self.activation,
        )  # fmt: skip


class _Peer(nn.Module):
    """A Tail on another library's module, which is given the Tail's parameters and buffers."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        if type(tail) is not Tail:
            raise Unfit("it has no form of this block")
        self.bn: Any = self.make(tail).to(tail.bn.weight.device)
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(self.bn, name, getattr(tail.bn, name))

    def make(self, tail: Tail) -> nn.Module:
        raise NotImplementedError


class _Attorch(_Peer):
    def make(self, tail: Tail) -> nn.Module:
        package = importlib.import_module("attorch")
        return package.BatchNorm2d(tail.bn.num_features, act_func=tail.activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.bn(x, residual)


class _Apex(_Peer):
    """apex's group BatchNorm, which takes [N, H, W, C]."""

    def make(self, tail: Tail) -> nn.Module:
        if tail.residual and tail.activation is None:
            raise Unfit("it has no add without ReLU")
        if tail.activation not in (None, "relu"):
            raise Unfit(f"it has no {tail.activation}")
        package = importlib.import_module("apex.contrib.groupbn.batch_norm")
        return package.BatchNorm2d_NHWC(tail.bn.num_features, fuse_relu=tail.activation == "relu")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float16 or not x.is_contiguous(memory_format=torch.channels_last):
            raise Unfit("it takes float16 in channels_last only")
        last = None if residual is None else residual.permute(0, 2, 3, 1)
        return self.bn(x.permute(0, 2, 3, 1), last).permute(0, 3, 1, 2)


class _InPlaceABN(_Peer):
    """It overwrites its input, so it is given a copy of it, which is timed with it; it has no ReLU and no add."""

    def make(self, tail: Tail) -> nn.Module:
        if tail.residual or tail.activation is not None:
            raise Unfit("it has no ReLU and no add")
        package = importlib.import_module("inplace_abn")
        return package.InPlaceABN(tail.bn.num_features, activation="identity")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.bn(x.clone())


def _needs(package: str) -> Callable[[torch.device], str | None]:
    def why_not(device: torch.device) -> str | None:
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            found = None
        if found is None:
            return f"{package.split('.')[0]} is not installed"
        return None if device.type == "cuda" else "it runs on a GPU only"

    return why_not


def _why_not_compiled(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    if platform.system() == "Windows" or not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on the CPU, and there is none"
    return None


def _why_not_tuned(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "max-autotune is for GPUs"


PROVIDERS = (
    Provider(BASELINE, _out_of_place),
    Provider("eager, in place", _in_place),
    Provider("fusedres", _fused),
    Provider("compile", _compiled("default"), _why_not_compiled, compiles=True),
    Provider(
        "fusedres + compile", lambda module: _compiled("default")(_fused(module)), _why_not_compiled, compiles=True
    ),
    Provider(
        "compile, max-autotune", _compiled("max-autotune-no-cudagraphs"), _why_not_tuned, compiles=True
    ),
    Provider("attorch", _Attorch, _needs("attorch")),
    Provider("apex groupbn", _Apex, _needs("apex.contrib.groupbn")),
    Provider("inplace_abn", _InPlaceABN, _needs("inplace_abn")),
)  # fmt: skip

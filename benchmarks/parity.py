"""Right before fast: what a provider computes is held against an oracle, and a wrong one is not timed.

The oracle is the same module in plain PyTorch, one precision wider (float64 for operators and for float32, else
float32 without tf32). A result is right when its relative error, in the 2-norm, is at most twice that of PyTorch eager
plus one unit in the last place of its dtype (of a gradient: of the activations' dtype) and sixteen of float32, in which
everyone adds: sums in another order differ by less, mistakes by more. torch.compile 2.15 was seen to need it on a CPU:
a running mean five units of float32 off, and in bfloat16 a float32 gradient of the weight a third of a bfloat16 unit.

A value near zero before a ReLU changes gradients in steps, here for one provider and there for another: an operator
gets no gradient there, and a network a budget of four times eager's largest error over all tensors of a kind. The
library's own tests are stricter.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Tail
from .workload import Workload

FACTOR, NETWORK_FACTOR = 2.0, 4.0
MARGIN = 1e-3
SUMS = 16 * torch.finfo(torch.float32).eps


class Wrong(Exception):
    """A provider's result is wrong; the message says which and by how much."""


class Parity:
    """The oracle's results and eager's errors for one workload; `check` holds a module against them."""

    def __init__(self, workload: Workload, module: nn.Module) -> None:
        self._workload = workload
        if isinstance(module, Tail) and module.activation == "relu":
            workload.mute(_near_the_kink(workload, module))
        self._eager = workload.results(copy.deepcopy(module))
        with _exact_float32():
            self._oracle = workload.results(copy.deepcopy(module), _wider(workload))
        self._eager_errors = {
            name: _error(actual, self._oracle[name])
            for name, actual in self._eager.items()
            if actual.dtype.is_floating_point
        }

    def check(self, module: nn.Module) -> None:
        """One forward and backward of a module that has not run yet.

        Raises:
            Wrong: a result is off by more than it may be, or of another shape or dtype than eager's.
        """
        self.hold(self._workload.results(module))

    def _allowed(self, name: str, actual: Tensor) -> float:
        kind = name.split()[0]
        dtypes = [actual.dtype] + [self._workload.setting.dtype] * (kind == "gradient")
        rounding = max(torch.finfo(dtype).eps for dtype in dtypes) + SUMS
        if self._workload.case.level == "operator":
            return FACTOR * self._eager_errors[name] + rounding
        errors = [e for other, e in self._eager_errors.items() if other.split()[0] == kind]
        return NETWORK_FACTOR * max(errors) + rounding

    def hold(self, results: Mapping[str, Tensor]) -> None:
        """Hold some of the results against the oracle."""
        for name, actual in results.items():
            if name not in self._oracle:
                raise Wrong(f"it has a {name}, which eager has not")
            eager, exact = self._eager[name], self._oracle[name]
            if actual.shape != eager.shape or actual.dtype != eager.dtype:
                raise Wrong(
                    f"{name} is {list(actual.shape)} {actual.dtype}, eager's {list(eager.shape)} {eager.dtype}"
                )
            if not actual.dtype.is_floating_point:
                if not torch.equal(actual, eager):
                    raise Wrong(f"{name} is not eager's")
                continue
            allowed, error = self._allowed(name, actual), _error(actual, exact)
            if not error <= allowed:
                raise Wrong(f"{name}: relative error {error:.1e}, at most {allowed:.1e} is allowed")


def _near_the_kink(workload: Workload, module: Tail) -> Tensor:
    """Where the ReLU's input is so small that rounding decides whether the gradient passes."""
    wide = copy.deepcopy(module).double()
    wide.act = torch.nn.Identity()
    with torch.no_grad():
        return wide(*(t.detach().double() for t in workload.inputs())).abs() < MARGIN


def _error(actual: Tensor, exact: Tensor) -> float:
    norm = torch.linalg.vector_norm(exact, dtype=torch.float64)
    off = torch.linalg.vector_norm(actual.to(exact.dtype) - exact, dtype=torch.float64)
    return float(off / norm.clamp_min(torch.finfo(torch.float32).tiny))


def _wider(workload: Workload) -> torch.dtype:
    return torch.float32 if workload.autocast else torch.float64


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """Convolutions and matrix products without tf32, whatever the user's setting."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed

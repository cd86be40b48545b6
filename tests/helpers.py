"""The oracle and the error budget, once for all tests.

The oracle is BatchNorm's textbook forward and backward in numpy's long double: another code, with more digits than any
dtype under test. A result is right when its largest error is no larger than that of PyTorch eager on the same inputs,
times 1.1, plus one unit in the last place of the result's dtype at the magnitude of the result. A gradient by compiled
code may err by one more unit, at the magnitude of the terms that it is added up from, which may cancel: eager's error
is that of one draw, and the compiler contracts a product and a sum, and divides to two units. In float64, where both
sides only differ in the order in which they add, eager's error of a sum is the largest over eight orders of the batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import fusedres.functional
from fusedres import reference
from fusedres.activations import parse
from fusedres.dispatch import INTERPRET, wants_triton

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16,
    "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        order = [0, *range(2, tensor.dim()), 1]
        inverse = [order.index(d) for d in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(inverse)
    if layout == "sliced":  # every second element of something larger, in every dimension
        large = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
        view = large[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "transposed":  # the last two dimensions swapped in memory
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(layout)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same values with the same strides on another device; `.to(device)` makes gaps and expanded strides dense."""
    places = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.detach().as_strided((places,), (1,), 0).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass
class Case:
    """One call of `batch_norm_act` and the gradient that comes back."""

    shape: tuple[int, ...] = (4, 8, 5, 7)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    residual_layout: str | None = None
    grad_layout: str | None = None
    training: bool = True
    affine: bool = True
    tracked: bool = True
    residual: bool = True
    activation: str | None = "relu"
    momentum: float = 0.1
    eps: float = 1e-5
    mean_over_std: float = 2.0
    parameter_dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    tensors: dict[str, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors:
            self.draw()

    def draw(self) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        parameter = self.parameter_dtype or (
            torch.float64 if self.dtype == torch.float64 else torch.float32
        )
        channels = self.shape[1]
        per_channel = [1, channels] + [1] * (len(self.shape) - 2)
        mean = self.mean_over_std * (1 + normal(per_channel).abs())
        layouts = self.layout, self.residual_layout or self.layout, self.grad_layout or self.layout
        input, residual, grad = (
            lay_out(t.to(self.dtype).to(self.device), layout)
            for t, layout in zip(
                (normal(self.shape) + mean, normal(self.shape), normal(self.shape)), layouts, strict=True
            )
        )  # fmt: skip
        vector = [normal(channels) for _ in range(4)]
        self.tensors = {
            "input": input,
            "residual": residual if self.residual else None,
            "weight": vector[0] if self.affine else None,
            "bias": vector[1] if self.affine else None,
            "running_mean": vector[2] + mean.flatten() if self.tracked else None,
            "running_var": vector[3].square() + 0.5 if self.tracked else None,
            "grad": grad,
        }
        for name in ("weight", "bias", "running_mean", "running_var"):
            if self.tensors[name] is not None:
                self.tensors[name] = self.tensors[name].to(parameter).to(self.device)

    def with_tensors(self, **tensors: Tensor) -> Case:
        return replace(self, tensors={**self.tensors, **tensors})


DIFFERENTIABLE = ("input", "residual", "weight", "bias")


def run(case: Case, function=None) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one forward and backward."""
    function = function or fusedres.functional.batch_norm_act
    leaves = {
        name: None if case.tensors[name] is None else case.tensors[name].detach().requires_grad_()
        for name in DIFFERENTIABLE
    }
    buffers = {
        name: None if case.tensors[name] is None else case.tensors[name].clone()
        for name in ("running_mean", "running_var")
    }
    output = function(
        leaves["input"], buffers["running_mean"], buffers["running_var"], leaves["weight"], leaves["bias"],
        case.training, case.momentum, case.eps, residual=leaves["residual"], activation=case.activation,
    )  # fmt: skip
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(output, list(present.values()), case.tensors["grad"])
    results = {"output": output.detach()}
    results.update({f"grad_{name}": g for name, g in zip(present, gradients, strict=True)})
    results.update({name: buffer for name, buffer in buffers.items() if buffer is not None})
    return results


def run_eager(case: Case) -> dict[str, Tensor]:
    """The plain composition, as a ResNet spells it."""
    return run(case, reference.batch_norm_act)


def run_oracle(case: Case) -> dict[str, np.ndarray]:
    """Ioffe and Szegedy 2015, forward and backward, in long double."""
    return _oracle(case)[0]


def _oracle(case: Case) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The results, and the size of the terms that a gradient is added up from (of many, the root of their squares)."""

    def wide(name):
        tensor = case.tensors[name]
        return (
            None if tensor is None else tensor.detach().cpu().double().numpy().astype(np.longdouble)
        )

    x, residual, weight, bias, dy = map(wide, ("input", "residual", "weight", "bias", "grad"))
    running_mean, running_var = wide("running_mean"), wide("running_var")
    channels = x.shape[1]
    axes = (0, *range(2, x.ndim))
    n = x.size // channels

    def spread(vector):
        return vector.reshape([1, channels] + [1] * (x.ndim - 2))

    w = np.ones(channels, np.longdouble) if weight is None else weight
    b = np.zeros(channels, np.longdouble) if bias is None else bias
    if case.training:
        mean = x.mean(axes)
        var = ((x - spread(mean)) ** 2).mean(axes)
    else:
        mean, var = running_mean, running_var
    invstd = 1 / np.sqrt(var + np.longdouble(case.eps))
    xhat = (x - spread(mean)) * spread(invstd)
    z = xhat * spread(w) + spread(b)
    z = z if residual is None else z + residual
    value, slope = oracle_activation(z, case.activation)
    dz = dy * slope
    dbias, dweight = dz.sum(axes), (dz * xhat).sum(axes)
    dx = dz - spread(dbias / n) - xhat * spread(dweight / n) if case.training else dz
    results = {"output": value, "grad_input": dx * spread(w * invstd)}
    if residual is not None:
        results["grad_residual"] = dz
    if weight is not None:
        results.update(grad_weight=dweight, grad_bias=dbias)
    if running_mean is not None:
        results.update(running_mean=running_mean, running_var=running_var)
        if case.training:
            m = np.longdouble(case.momentum)
            results["running_mean"] = (1 - m) * running_mean + m * mean
            results["running_var"] = (1 - m) * running_var + m * var * n / (n - 1)
    many = {"grad_weight": dz * xhat, "grad_bias": dz}
    terms = {name: np.sqrt((each**2).sum(axes)) for name, each in many.items()}
    if case.training:
        terms["grad_input"] = np.abs(dz * spread(w * invstd))
    return results, {name: float(each.max(initial=0)) for name, each in terms.items()}


def oracle_activation(z: np.ndarray, activation: str | None) -> tuple[np.ndarray, np.ndarray]:
    """act(z) and act'(z) by the formulas of their papers; where the derivative jumps, PyTorch's choice."""
    name, share = parse(activation)
    one = np.ones_like(z)
    if name is None:
        return z, one
    if name in ("relu", "relu6", "leaky_relu"):
        top = 6 if name == "relu6" else np.inf
        inside = (z > 0) & (z < top)
        return np.where(inside, z, np.where(z > 0, top, share * z)), np.where(inside, one, share)
    if name == "hardswish":
        gate = np.clip(z + 3, 0, 6) / 6
        return z * gate, np.where(z <= -3, 0 * z, np.where(z < 3, z / 3 + one / 2, one))
    sigmoid = 1 / (1 + np.exp(-z))
    if name == "silu":
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    if name == "mish":
        tanh = np.tanh(np.log1p(np.exp(z)))
        return z * tanh, tanh + z * (1 - tanh**2) * sigmoid
    pi = 4 * np.arctan(np.longdouble(1))
    if name == "gelu":
        # In double: numpy has no erf of its own.
        cdf = np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(z.astype(np.float64))
        return z * cdf, cdf + z * np.exp(-(z**2) / 2) / np.sqrt(2 * pi)
    k = np.longdouble("0.044715")
    tanh = np.tanh(np.sqrt(2 / pi) * (z + k * z**3))
    slope = (1 + tanh) / 2 + z / 2 * (1 - tanh**2) * np.sqrt(2 / pi) * (1 + 3 * k * z**2)
    return z * (1 + tanh) / 2, slope


@contextmanager
def exact_hardswish(device: torch.device) -> Iterator[None]:
    """PyTorch's hardswish by its formula on a GPU, where its own multiplies a float64 by float32(1/6), off by 3e-8
    (ActivationHardswishKernel.cu, torch 2.11); on a CPU its own."""

    def formula(input: Tensor) -> Tensor:
        return input * (input + 3).clamp(0, 6) / 6

    if device.type == "cpu":
        yield
        return
    with (
        mock.patch.object(torch._C._nn, "hardswish", formula),
        mock.patch.object(torch._C._nn, "hardswish_", lambda input: input.copy_(formula(input))),
    ):
        yield


def error(actual: Tensor, oracle: np.ndarray) -> float:
    """The largest absolute difference."""
    wide = actual.detach().cpu().double().numpy().astype(np.longdouble)
    return float(np.abs(wide - oracle).max(initial=0))


def _orders(case: Case) -> list[Case]:
    """The case itself first; in float64 also with its batch and its last axis rotated, which changes nothing but the
    order of sums."""
    cases, axes = [case], (0, -1) if len(case.shape) > 2 else (0,)
    for shift in range(1, 8 if case.dtype == torch.float64 else 1):
        rotated = {
            name: case.tensors[name].roll((shift,) * len(axes), axes)
            for name in ("input", "residual", "grad")
            if case.tensors[name] is not None
        }
        cases.append(case.with_tensors(**rotated))
    return cases


def over_budget(
    case: Case, actual: dict[str, Tensor] | None = None
) -> dict[str, tuple[float, float]]:
    """{result: (error, allowed)} of every result whose error is larger than is allowed; empty when all is right."""
    actual = run(case) if actual is None else actual
    oracle, terms = _oracle(case)
    is_compiled = not INTERPRET and wants_triton(str(case.device).startswith("cuda"))
    eager = [run_eager(reordered) for reordered in _orders(case)]
    assert actual.keys() == eager[0].keys() == oracle.keys()
    found = {}
    for name, exact in oracle.items():
        size = float(np.abs(exact).max(initial=0)) + (terms.get(name, 0.0) if is_compiled else 0.0)
        sums = eager if exact.ndim == 1 else eager[:1]
        allowed = 1.1 * max(error(result[name], exact) for result in sums)
        allowed += torch.finfo(actual[name].dtype).eps * size
        if not error(actual[name], exact) <= allowed:
            found[name] = (error(actual[name], exact), allowed)
    return found


def without_plans(monkeypatch):
    """No call is planned yet, until the test is over: for what a plan would not notice."""
    from fusedres.ops import operator, tail

    monkeypatch.setattr(operator, "_plans", {})
    monkeypatch.setattr(tail, "_planned", {})
    monkeypatch.setattr(tail, "_kinds", {})


def force_int64(monkeypatch):
    """From now on, kernels get the offsets that a tensor of 2^31 elements and more takes."""
    from fusedres.kernels import layout, plan
    from fusedres.ops import dual, skips

    without_plans(monkeypatch)

    def wide(*tensors):
        rows = layout.row_map_of(*tensors)
        return rows and replace(rows, needs_int64=True)

    for module in (plan, dual, skips):
        monkeypatch.setattr(module, "row_map_of", wide)

"""What docs/cuda_graphs.md says: nothing waits for the device, memory is PyTorch's, and a graph's steps are eager's."""

from __future__ import annotations

import ast
import contextlib
import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import fork

from .helpers import without_plans
from .test_torch_compile import Small

ROOT = Path(__file__).resolve().parent.parent


# --- nothing waits ---------------------------------------------------------------------------------------------------


def variants() -> dict[str, nn.Module]:
    """A network with BatchNorms of every kind of statistics."""
    cumulative, frozen = Small(), Small()
    for norm in cumulative.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    for norm in frozen.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    return {"plain": Small(), "momentum=None": cumulative, "frozen": frozen}


class Waits(TorchDispatchMode):
    """The operations of a step that the host would wait for the device at."""

    ASKED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.ASKED:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


HOST = (
    "item",
    "cpu",
    "tolist",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
)


@pytest.mark.cpu
@pytest.mark.interpreter
@pytest.mark.parametrize("way", ["straight", "operators"])
@pytest.mark.parametrize("name", ["plain", "momentum=None", "frozen"])
@pytest.mark.composes("a step without a wait for the device", "works")
def test_no_value_of_a_tensor_is_read_on_the_host(name, way, monkeypatch):
    """Forward, backward and optimizer, past the operators and by them (somebody watches); inside a launch Triton's
    interpreter reads."""
    without_plans(monkeypatch)
    model, x, labels = variants()[name], torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    fusedres.fuse_(model)
    from triton.runtime.interpreter import GridExecutor

    run, asked = GridExecutor.__call__, []
    reads = {each: getattr(Tensor, each) for each in HOST}
    is_inside = [False]

    def launch(self, *args, **options):
        is_inside[0] = True
        try:
            return run(self, *args, **options)
        finally:
            is_inside[0] = False

    def noted(read):
        def method(self, *args, **options):
            if not is_inside[0]:
                asked.append(read)
            return reads[read](self, *args, **options)

        return method

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)
    waits = Waits()
    with (
        waits if way == "operators" else contextlib.nullcontext(),
        mock.patch.multiple(Tensor, **{each: noted(each) for each in HOST}),
    ):
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert (asked, waits.found) == ([], [])


@pytest.mark.once
def test_memory_comes_from_pytorch_alone():
    """Nothing that ships talks to the driver's allocator: no ctypes, no bindings of CUDA."""
    found = {
        (path.name, name)
        for folder in ("fusedres", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if "benchmarks" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None) or node.names[0].name]
        if name.partition(".")[0] in ("ctypes", "cffi", "cuda", "cupy", "pycuda")
    }
    assert found == set()


@pytest.mark.kernels
@pytest.mark.composes("a residual's fork in torch.cuda.make_graphed_callables", "steps aside")
def test_what_make_graphed_callables_asks_for_leaves_no_gradient_at_a_fork(monkeypatch, device):
    """It captures `torch.autograd.grad` of outputs and parameters: there autograd adds, to the same results."""
    left, leave = [], fork.leave
    monkeypatch.setattr(fork, "leave", lambda *given: (left.append(1), leave(*given)))
    model = Small().to(device)
    fusedres.fuse_(model)
    x = torch.randn(2, 3, 8, 8, device=device)
    output = model(x)
    asked = torch.autograd.grad(
        output, tuple(model.parameters()), torch.ones_like(output), only_inputs=True, allow_unused=False
    )  # fmt: skip
    assert left == []
    model(x).backward(torch.ones_like(output))
    assert len(left) > 0
    torch.testing.assert_close(
        asked, tuple(p.grad for p in model.parameters()), rtol=1e-4, atol=1e-5
    )


# --- on a GPU --------------------------------------------------------------------------------------------------------


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 3, 32, 32).cuda(), torch.randint(0, 5, (8,)).cuda()) for _ in range(4)]


def eager(model: nn.Module, data) -> dict[str, Tensor]:
    """The parameters and statistics after a step for each batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.state_dict()


def fused_twice() -> tuple[nn.Module, nn.Module]:
    model = Small().cuda()
    fusedres.fuse_(model)
    return model, copy.deepcopy(model)


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.composes("torch.cuda.graph of a whole step", "works")
def test_a_captured_step_is_an_eager_one():
    model, other = fused_twice()
    data, state = batches(), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, labels = (each.clone() for each in data[0])

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), labels).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    model.load_state_dict(state)
    for batch, target in data:
        x.copy_(batch), labels.copy_(target)
        graph.replay()
        optimizer.step()
    agree(model.state_dict(), eager(other, data))


@pytest.mark.gpu
@pytest.mark.composes("torch.cuda.make_graphed_callables", "works")
def test_a_graphed_callable_trains_as_the_eager_module():
    model, other = fused_twice()
    data, state = batches(), copy.deepcopy(model.state_dict())
    graphed = torch.cuda.make_graphed_callables(model, (data[0][0].clone(),))
    model.load_state_dict(state)
    agree(eager(graphed, data), eager(other, data))


@pytest.mark.gpu
@pytest.mark.composes("torch.compile(mode='reduce-overhead') on a GPU", "works")
def test_reduce_overhead_trains_as_the_eager_module():
    model, other = fused_twice()
    data = batches()
    compiled = torch.compile(model, mode="reduce-overhead")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x, labels in data:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), labels).backward()
        optimizer.step()
    agree(model.state_dict(), eager(other, data))

"""The straight way of a tail, from the module to the launches: the same launches, and nobody who looks is passed by."""

from __future__ import annotations

import copy
import gc
import re
import threading
import weakref
from contextvars import copy_context

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

import fusedres
from fusedres.benchmarks.compile_only import compile_only
from fusedres.benchmarks.stub_driver import stub_driver, why_no_stub
from fusedres.kernels import bind, memory, plan
from fusedres.nn.add import call_add, call_scaled_add
from fusedres.nn.batch_norm import call_add_batch_norm, call_dual_batch_norm, call_tail
from fusedres.nn.projection import call_projected_tail
from fusedres.ops import (
    add,
    batch_norm_act,
    dual,
    node,
    operator,
    preactivation,
    projection,
    scaled,
    straight,
    tail,
)
from fusedres.ops.norm import BatchNorm, How
from fusedres.ops.projection import in_triton, project

from .helpers import without_plans

SHAPE = (2, 8, 4, 4)


def images(n=1, shape=SHAPE, **options):
    made = [torch.randn(shape, **options).requires_grad_() for _ in range(n)]
    return made[0] if n == 1 else made


# --- the same launches -----------------------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    if (why := why_no_stub()) is not None:
        pytest.skip(why)
    without_plans(monkeypatch)
    with stub_driver() as driver, fusedres.backend("triton"):
        yield driver


@pytest.fixture
def launched(stub, monkeypatch):
    """Every launch of a bound kernel: (kernel, grid, arguments), each address by when it was first seen; and what
    PyTorch does between them."""
    found, seen, arena = [], {}, torch.empty(1 << 22, dtype=torch.uint8)
    text, used, do = bind.Bound.text, [0], plan.Step.__call__

    def address(value):
        return "address", seen.setdefault(value, len(seen))

    def did(self, *tensors):
        looks = [(*address(t.data_ptr()), t.shape, t.stride(), t.dtype) for t in tensors]
        found.append((self.function.__qualname__, None, looks))
        do(self, *tensors)

    def noted(self, name, pointer, given):
        said, scope = text(self, name, pointer, given)
        launch, specs = scope[name], self._values

        def noting(*arguments):
            values = arguments[-1] if self._is_packed else arguments[len(arguments) - len(specs) :]
            told = [
                address(value) if type(spec) is bind.Pointer else value
                for spec, value in zip(
                    bind.parts_of(specs), bind.parts_of(tuple(values)), strict=True
                )
            ]
            found.append((self.kept.name, arguments[:3], told))
            launch(*arguments)

        return said, scope | {name: noting}

    def empty(shape, stride, dtype):  # no address is used twice
        size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        start, used[0] = used[0], used[0] + -(-size * dtype.itemsize // 64) * 64
        made = torch.empty(0, dtype=dtype)
        return made.set_(arena.untyped_storage(), start // dtype.itemsize, shape, stride)

    monkeypatch.setattr(bind.Bound, "text", noted)
    monkeypatch.setattr(plan.Step, "__call__", did)
    monkeypatch.setitem(memory.EMPTY, "cpu", empty)

    def launches_of(step):
        found.clear(), seen.clear()
        step()
        return list(found)

    return launches_of


@pytest.fixture
def by_the_operators(monkeypatch):
    """From when it is called, somebody looks."""

    def begin():
        for module in (
            add,
            batch_norm_act,
            dual,
            node,
            operator,
            preactivation,
            projection,
            scaled,
            straight,
            tail,
        ):
            monkeypatch.setattr(module, "is_quiet", lambda: False)
        monkeypatch.setattr("fusedres.nn.batch_norm.is_quiet", lambda: False)

    return begin


class SixNorms(nn.Module):
    """BN + ReLU, tails with forks, a tail with a BatchNorm on either side: of the fork itself, or of a strided
    projection of it, which leaves its gradient with the tail in front."""

    def __init__(self, is_projected: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        made = nn.Conv2d(8, 8, 1, stride=2, dtype=torch.bfloat16) if is_projected else None
        self.projection = made

    def forward(self, x):
        a, b, c, d, e, f = self.norms
        first = call_tail(a, x, None, "relu")
        second = call_tail(b, call_tail(c, first, None, "relu"), first, "relu")
        if self.projection is None:
            return call_dual_batch_norm(e, call_tail(d, second, second, None), f, second, "relu")
        main = call_tail(d, second, None, "relu")[..., ::2, ::2].contiguous(**LAST)
        return call_projected_tail(e, main, f, self.projection, second, "relu")


class Others(nn.Module):
    """Whatever else there is: sums, with a scale of one element and of one a channel, and pre-activation pairs."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(8), activation
        self.one, self.all = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(8))

    def forward(self, x):
        # Others' tensors are no one's gradients: what PyTorch adds stands where something else stood before.
        a, b, c = (torch.ones_like(x) for _ in range(3))
        self.held = a, b, c
        total, y = call_add_batch_norm(self.norm, x, a, self.activation)
        y = call_add(y, total, self.activation) if self.activation else y
        y = call_scaled_add(y, b, self.one, self.activation)
        return call_scaled_add(y, c, self.all, self.activation)


class Crossed(nn.Module):
    """A residual and a gradient that no kernel can walk beside an input: they are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        self.held = torch.ones(4, 6, 6, 8).permute(0, 3, 2, 1)
        return call_tail(self.norm, x, self.held, "silu").transpose(2, 3).contiguous()


LAST = {"memory_format": torch.channels_last}
# (layout of the input, its dtype, network, launches of a step, what PyTorch does between them)
NETWORKS = {
    "contiguous": ({}, torch.float32, lambda: SixNorms(False), (33, 0)),
    "channels_last": (LAST, torch.float32, lambda: SixNorms(False), (33, 0)),
    "projected": (LAST, torch.bfloat16, lambda: SixNorms(True), (35, 4)),
    "others, ReLU": ({}, torch.float32, lambda: Others("relu"), (14, 2)),
    "others, SiLU": (LAST, torch.float32, lambda: Others("silu"), (14, 2)),
    "others, none": ({}, torch.bfloat16, lambda: Others(None), (12, 2)),
    "others, eval": ({}, torch.float32, lambda: Others("relu").eval(), (12, 3)),
    "copies": ({}, torch.float32, Crossed, (6, 3)),
}  # fmt: skip


@pytest.mark.compiler
@pytest.mark.parametrize("network", NETWORKS)
def test_both_ways_launch_the_same(launched, by_the_operators, network, monkeypatch):
    """Kernels, grids, numbers and how their tensors hang together; but for the counters, which are counted on the host
    by the operators' way."""
    layout, dtype, make, expected = NETWORKS[network]
    network, x = make(), torch.randn(4, 8, 6, 6, dtype=dtype).contiguous(**layout).requires_grad_()
    monkeypatch.setattr(tail, "_is_counter", lambda *_: False)
    with in_triton():
        gradient = torch.randn_like(network(x))

        def step():
            network(x).backward(gradient)

        def thrice():
            without_plans(monkeypatch)
            for _ in range(3):
                step()

        thrice()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator.Operator, "_run", None)
            patch.setattr(plan.Plan, "start", None)
            found = launched(step)
        by_the_operators()
        thrice()
        assert found == launched(step)
    kernels = sum(name.endswith("_kernel") for name, *_ in found)
    assert (kernels, len(found) - kernels) == expected


@pytest.mark.compiler
def test_a_call_that_was_met_before_looks_at_no_kernel(launched):
    """Six launches, past Triton and past `torch.ops`."""
    module, x = fusedres.nn.BatchNormAct2d(8), images()
    gradient = torch.randn(SHAPE)

    def step():
        module(x).backward(gradient)

    for _ in range(3):
        step()
    with pytest.MonkeyPatch.context() as patch:
        for each in (batch_norm_act.FORWARD, batch_norm_act.BACKWARD):
            patch.setattr(each, "op", None)
            patch.setattr(each, "_run", None)
        assert [name for name, *_ in launched(step)] == [
            "bn_stats_kernel", "bn_finalize_kernel", "bn_apply_kernel",
            "bn_grad_reduce_kernel", "bn_grad_finalize_kernel", "bn_grad_apply_kernel",
        ]  # fmt: skip


@pytest.mark.compiler
@pytest.mark.parametrize("kind", ["gradient", "input"])
def test_another_layout_is_another_launch(launched, monkeypatch, kind):
    """Of the input, or of the gradient alone; met after others, it is launched as if it were the first."""
    module, x = fusedres.nn.BatchNormAct2d(8), images()
    last = {"memory_format": torch.channels_last}
    layouts = {"gradient": ({}, last), "input": (last, last)}[kind]

    def step(layout, of_gradient):
        input = x.detach().contiguous(**layout).requires_grad_()
        module(input).backward(torch.ones(SHAPE).contiguous(**of_gradient))

    def thrice(*layouts):
        for _ in range(3):
            step(*layouts)

    thrice({}, {}), thrice(*layouts)
    found = launched(lambda: step(*layouts))
    without_plans(monkeypatch)
    thrice(*layouts)
    assert found == launched(lambda: step(*layouts))
    assert found != launched(lambda: (step({}, {}), step({}, {})))[-6:]


COMPILED = []  # what is compiled goes by the driver that it was compiled for, which is gone by then


@pytest.fixture
def written(stub):
    """A module all of whose launches are written out, its inputs, and the kernels of its forward."""
    module, (x, residual) = fusedres.nn.BatchNormAct2d(8), images(2)
    for _ in range(3):
        module(x, residual).backward(torch.ones(SHAPE))
    (planned,) = tail._kinds.values()
    assert planned.forward._written is not None
    return module, x, residual, planned


@pytest.mark.compiler
@pytest.mark.parametrize("spoiled", ["input", "gradient"])
def test_a_written_plan_looks_at_addresses(written, spoiled, monkeypatch):
    module, x, residual, _ = written
    gradient = torch.ones(SHAPE)
    if spoiled == "input":
        x = moved_on(x).requires_grad_()
    else:
        gradient = moved_on(gradient)
    launched, taken = plan.Plan.launch, []
    monkeypatch.setattr(plan.Plan, "launch", lambda *a: taken.append(made := launched(*a)) or made)
    module(x, residual).backward(gradient)
    assert [made is None for made in taken] == [spoiled == "input", True][spoiled == "input" :]


@pytest.mark.compiler
def test_a_written_plan_looks_at_the_driver(stub, written):
    module, x, residual, _ = written
    before = stub.launches
    with compile_only(90) as launches:
        plainly(module, x, residual)
        assert (len(launches), stub.launches - before) == (6, 0)


@pytest.mark.compiler
def test_a_written_plan_looks_for_hooks_at_the_launch(written, monkeypatch):
    module, x, residual, _ = written
    seen = []
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda told: seen.append(told))
    plainly(module, x, residual)
    assert len(seen) == 6


@pytest.mark.compiler
def test_a_written_plan_looks_for_hooks_of_a_kernel(written, monkeypatch):
    module, x, residual, planned = written
    kernel, seen = planned.forward.launches[0].kernel, []
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *a, **k: seen.append(1)])
    plainly(module, x, residual)
    assert seen == [1]


@pytest.mark.compiler
def test_a_written_plan_looks_whether_a_kernel_is_debugged(written, monkeypatch):
    module, x, residual, planned = written
    kernel, seen = planned.forward.launches[0].kernel, []
    run = type(kernel).run
    monkeypatch.setattr(kernel, "debug", True)
    monkeypatch.setattr(type(kernel), "run", lambda *a, **k: seen.append(a[0]) or run(*a, **k))
    module(x, residual)
    assert seen == [kernel]


@pytest.mark.compiler
def test_a_written_plan_looks_whether_its_code_is_there(written, monkeypatch):
    module, x, residual, planned = written
    kernel = planned.forward.launches[0].kernel
    caches = kernel.device_caches
    monkeypatch.setattr(kernel, "device_caches", type(caches)(caches.default_factory))
    module(x, residual)
    assert kernel.device_caches[0][0]
    COMPILED.append(kernel.device_caches)


@pytest.mark.compiler
@pytest.mark.parametrize(("current", "goes"), [(0, False), (1, True)])
def test_a_written_plan_looks_which_gpu_is_the_current_one(written, monkeypatch, current, goes):
    *_, planned = written
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setitem(memory.EMPTY, "cuda", memory.EMPTY["cpu"])
    launch = plan.write(planned.forward, torch.device("cuda", 1))
    tensors = [torch.empty(1024)] * planned.forward.given
    assert (launch(tensors, (0.1, 1e-5)) is not None) == goes
    assert straight.is_current(1) == goes


@pytest.mark.compiler
def test_what_a_call_allocates(stub, monkeypatch):
    """The result, what is kept, what is gone afterwards; four gradients and what is gone afterwards."""
    made, empty = [], memory.EMPTY["cpu"]
    monkeypatch.setitem(memory.EMPTY, "cpu", lambda *look: made.append(look) or empty(*look))
    module, (x, residual) = fusedres.nn.BatchNormAct2d(8), images(2)
    for _ in range(3):
        output = module(x, residual)
        output.backward(torch.ones(SHAPE))
    made.clear()
    output = module(x, residual)
    forward = len(made)
    output.backward(torch.ones(SHAPE))
    assert (forward, len(made)) == (3, 3 + 5)


# --- who looks -------------------------------------------------------------------------------------------------------

# By the operators, or straight? Of each situation: (what is done with a module and its two inputs, ways of the forward,
# ways of the backward).
LONG, STRAIGHT = "operators", "straight"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),  # PyTorch's own, of AD
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning"),  # PyTorch 2.11's
    pytest.mark.filterwarnings(
        "ignore:.*should not be instantiated:DeprecationWarning"
    ),  # while it compiles
    pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning"),
]


class Subclass(torch.Tensor):
    pass


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Asking(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def plainly(module, x, residual):
    module(x, residual).sum().backward()


def under(context, with_backward=True):
    def run(module, x, residual):
        with context():
            output = module(x, residual)
            if with_backward:
                output.sum().backward()

    return run


def fake(module, x, residual):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module(mode.from_tensor(x.detach()), mode.from_tensor(residual.detach()))


def create_graph(module, x, residual):
    (gradient,) = torch.autograd.grad(module(x, residual).sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()


def batched_gradients(module, x, residual):
    output = module(x, residual)
    torch.autograd.grad(output, x, torch.randn(3, *SHAPE), is_grads_batched=True)


def watched_backward(module, x, residual):
    output = module(x, residual)
    with Looking():
        output.sum().backward()


def profiled_backward(module, x, residual):
    output = module(x, residual)
    with profiler():
        output.sum().backward()


def profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def hooked(module, x, residual):
    handle = module.bn.register_forward_hook(lambda *_: None)
    try:
        module(x, residual)
    finally:
        handle.remove()


def moved_on(t):
    """The same a few bytes further on, where no vector of values may be read."""
    room = torch.empty(t.numel() + 1, device=t.device)[1:].as_strided(t.shape, t.stride())
    return room.copy_(t.detach())


def misaligned(module, x, residual):
    module(moved_on(x).requires_grad_(), residual)


def misaligned_gradient(module, x, residual):
    torch.autograd.grad(module(x, residual), x, moved_on(x))


def cloned_saved_tensors(module, x, residual):
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: t.clone(), lambda t: t):
        module(x, residual).sum().backward()


def other_saved_tensors(module, x, residual):
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: t, lambda t: t.as_subclass(Subclass)):
        module(x, residual).sum().backward()


def with_a_tangent(module, x, residual):
    with forward_ad.dual_level():
        output = module.eval()(forward_ad.make_dual(x, residual.detach()), residual)
        assert forward_ad.unpack_dual(output).tangent is not None


SITUATIONS = {
    "plainly": (plainly, STRAIGHT, STRAIGHT),
    "an expanded gradient": (lambda m, x, r: m(x, r).backward(torch.ones(1).expand(SHAPE)), STRAIGHT, STRAIGHT),
    "no_grad": (under(torch.no_grad, False), STRAIGHT, None),
    "inference_mode": (
        lambda m, x, r: under(torch.inference_mode, False)(m, x.detach().clone(), r.detach().clone()), STRAIGHT, None,
    ),
    "saved tensors cloned": (cloned_saved_tensors, STRAIGHT, STRAIGHT),
    "saved tensors of another class": (other_saved_tensors, STRAIGHT, LONG),
    "checkpoint": (lambda m, x, r: checkpoint(m, x, r, use_reentrant=False).sum().backward(), STRAIGHT, STRAIGHT),
    "re-entrant checkpoint": (
        lambda m, x, r: checkpoint(m, x, r, use_reentrant=True).sum().backward(), STRAIGHT, STRAIGHT,
    ),
    "residual in another layout": (
        lambda m, x, r: m(x, r.detach().contiguous(memory_format=torch.channels_last)), STRAIGHT, None,
    ),
    "bfloat16 input": (lambda m, x, r: m(x.bfloat16(), r.bfloat16()), STRAIGHT, None),
    "create_graph": (create_graph, STRAIGHT, LONG),
    "is_grads_batched": (batched_gradients, STRAIGHT, LONG),
    "a dispatch mode": (under(Looking), LONG, LONG),
    "a dispatch mode around the backward": (watched_backward, STRAIGHT, LONG),
    "FlopCounterMode": (under(lambda: FlopCounterMode(display=False)), LONG, LONG),
    "a function mode": (under(Asking), LONG, LONG),
    "a device for new tensors": (under(lambda: torch.device("cpu")), STRAIGHT, STRAIGHT),
    "FakeTensorMode": (fake, LONG, None),
    "make_fx": (lambda m, x, r: make_fx(lambda a, b: m(a, b))(x.detach(), r.detach()), LONG, None),
    "torch.func.grad": (
        lambda m, x, r: torch.func.grad(lambda a: m.eval()(a, r).sum())(x.detach()), LONG, None,
    ),
    "plain tensors within torch.func": (
        lambda m, x, r: torch.func.grad(lambda a: (a * m.eval()(x, r)).sum())(torch.ones(())), LONG, None,
    ),
    "vmap": (lambda m, x, r: torch.vmap(m.eval())(torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)), LONG, None),
    "forward-mode AD": (with_a_tangent, LONG, None),
    "a profiler": (under(profiler), LONG, LONG),
    "a profiler around the backward": (profiled_backward, STRAIGHT, LONG),
    "jit.trace": (
        lambda m, x, r: torch.jit.trace(m.eval(), (x.detach(), r.detach()), check_trace=False), LONG, None,
    ),
    "torch.compile": (
        lambda m, x, r: torch.compile(m, backend="eager", fullgraph=True)(x, r), LONG, None,
    ),
    "a subclass": (lambda m, x, r: m(x.detach().as_subclass(Subclass), r.detach()), LONG, None),
    "a hook on the norm": (hooked, LONG, None),
    "an input that is not aligned": (misaligned, LONG, None),
    "a gradient that is not aligned": (misaligned_gradient, STRAIGHT, LONG),
    "a cumulative average": (
        lambda m, x, r: (setattr(m.bn, "momentum", None), m(x, r)), STRAIGHT, None,
    ),
    "a counter that is gone": (
        lambda m, x, r: (setattr(m.bn, "num_batches_tracked", None), plainly(m, x, r)), STRAIGHT, STRAIGHT,
    ),
    "no affine": (
        lambda m, x, r: (setattr(m.bn, "weight", None), setattr(m.bn, "bias", None), plainly(m, x, r)),
        STRAIGHT, STRAIGHT,
    ),
    "eval": (lambda m, x, r: plainly(m.eval(), x, r), STRAIGHT, STRAIGHT),
    "an empty input": (lambda m, x, r: m.eval()(x[:0], r[:0]), LONG, None),
    "another backend": (
        lambda m, x, r: under(lambda: fusedres.backend("aten"), False)(m, x, r), LONG, None,
    ),
}  # fmt: skip


@pytest.fixture
def ways(monkeypatch):
    """Which way forwards and backwards took: by `Tail.forward` and `.backward`, or by a plan of their own."""
    taken = {"forward": set(), "backward": set()}

    def count(kind, way, function):
        def counted(*arguments, **options):
            result = function(*arguments, **options)
            if way is LONG or result is not None:
                taken[kind].add(way)
            return result

        return counted

    without_plans(monkeypatch)
    monkeypatch.setattr(tail, "run", count("forward", STRAIGHT, tail.run))
    monkeypatch.setattr("fusedres.nn.batch_norm.run", tail.run)
    monkeypatch.setattr(node, "_straight_back", count("backward", STRAIGHT, node._straight_back))
    monkeypatch.setattr(node, "_long_back", count("backward", LONG, node._long_back))
    return taken


@pytest.mark.composes(
    "dispatch and function modes, fake tensors, profilers, `make_fx`, FLOP counters", "works"
)
@pytest.mark.kernels
@pytest.mark.cpu
@pytest.mark.parametrize("situation", SITUATIONS)
def test_who_looks_is_not_passed_by(situation, ways, device):
    """The kernels run either way."""
    do, forward, backward = SITUATIONS[situation]
    module = fusedres.nn.BatchNormAct2d(8, device=device)
    do(module, *images(2, device=device))
    assert ways["forward"] == ({STRAIGHT} if forward is STRAIGHT else set())
    if backward is not None:
        assert ways["backward"] == {backward}


class Called(nn.Module):
    """One of the functions that a module calls, with a BatchNorm `bn` to give it."""

    def __init__(self, call, device) -> None:
        super().__init__()
        self.bn, self.other = (nn.BatchNorm2d(8, device=device) for _ in range(2))
        self.one = nn.Parameter(torch.ones(1, device=device))
        self.projection = nn.Conv2d(8, 8, 1, device=device)
        self.call = call

    def forward(self, x, residual):
        return self.call(self, x, residual)


# What goes straight, and its operator.
CALLS = {
    "tail": (lambda m, x, r: call_tail(m.bn, x, r, "relu"), "batch_norm_act"),
    "two norms": (lambda m, x, r: call_dual_batch_norm(m.bn, x, m.other, r, "relu"), "dual_batch_norm_act"),
    "add": (lambda m, x, r: call_add(x, r, "silu"), "add_act"),
    "scaled add": (lambda m, x, r: call_scaled_add(x, r, m.one, "silu"), "scaled_add_act"),
    "pre-activation": (lambda m, x, r: sum(call_add_batch_norm(m.bn, x, r)), "add_batch_norm_act"),
    "projection": (lambda m, x, r: project(x, m.projection.weight, m.projection.bias, (1, 1), False)[0], "projection"),
}  # fmt: skip
BACKWARD = {"add_batch_norm_act": "batch_norm_act"}
# Of the situations one for each thing that is asked.
ASKED = (
    "plainly", "no_grad", "create_graph", "is_grads_batched", "a dispatch mode", "a dispatch mode around the backward",
    "a function mode", "FakeTensorMode", "torch.func.grad", "plain tensors within torch.func", "forward-mode AD",
    "a profiler", "a profiler around the backward", "torch.compile", "a subclass", "an input that is not aligned",
    "a gradient that is not aligned", "another backend",
)  # fmt: skip


@pytest.mark.kernels
@pytest.mark.cpu
@pytest.mark.parametrize("situation", ASKED)
@pytest.mark.parametrize("call", CALLS)
def test_who_looks_is_not_passed_by_whatever_was_called_before(call, situation, ways, device):
    do, forward, backward = SITUATIONS[situation]
    module = Called(CALLS[call][0], device)
    x, residual = (t.detach().contiguous(**LAST).requires_grad_() for t in images(2, device=device))
    for training in (False, True):
        plainly(module.train(training), x, residual)
    for taken in ways.values():
        assert taken == {STRAIGHT}
        taken.clear()
    do(module, x, residual)
    assert ways["forward"] == ({STRAIGHT} if forward is STRAIGHT else set())
    if backward is not None:
        assert ways["backward"] == {backward}


@pytest.mark.composes("`torch.profiler` shows the operators by name", "works")
@pytest.mark.compiler
@pytest.mark.parametrize("call", CALLS)
def test_a_profiler_sees_the_operators_by_their_names(call):
    function, name = CALLS[call]
    x, residual = (t.detach().bfloat16().contiguous(**LAST).requires_grad_() for t in images(2))
    module = Called(function, "cpu")
    module.projection.bfloat16()
    with fusedres.backend("triton"), compile_only(90), profiler() as profile, in_triton():
        plainly(module, x, residual)
    names = {event.name for event in profile.events()}
    assert {f"fusedres::{name}", f"fusedres::{BACKWARD.get(name, name)}_backward"} <= names


# What a forward and a backward launch, however: by Triton's C function, by its launcher, or as Triton starts them.
LAUNCHES = {
    "tail": 6, "two norms": 9, "add": 2, "scaled add": 3, "pre-activation": 6, "projection": 3,
}  # fmt: skip


@pytest.mark.compiler
@pytest.mark.parametrize("level", ["launcher", "run", "triton"])
@pytest.mark.parametrize("call", CALLS)
def test_at_every_level_each_kernel_is_launched_once(stub, monkeypatch, call, level):
    monkeypatch.setattr(bind, "LEVEL", level)
    module = Called(CALLS[call][0], "cpu")
    module.projection.bfloat16()
    x, residual = (t.detach().bfloat16().contiguous(**LAST).requires_grad_() for t in images(2))
    counts = []
    with in_triton():
        for _ in range(3):
            before = stub.launches
            plainly(module, x, residual)
            counts.append(stub.launches - before)
    assert counts == [LAUNCHES[call]] * 3


@pytest.mark.compiler
def test_a_switch_that_was_turned_since_the_forward_is_looked_at(ways, monkeypatch):
    """Whether float32 products may round their operands."""
    weight = torch.randn(8, 8, 1, 1).requires_grad_()
    x = torch.randn(SHAPE).contiguous(**LAST).requires_grad_()
    with fusedres.backend("triton"), compile_only(90), in_triton():
        for rounds, way in ((True, STRAIGHT), (False, LONG)):
            monkeypatch.setattr(projection, "_allows_tf32", lambda: True)
            output, _ = project(x, weight, None, (1, 1), False)
            monkeypatch.setattr(projection, "_allows_tf32", lambda rounds=rounds: rounds)
            output.sum().backward()
            assert ways["backward"] == {way}
            ways["backward"].clear()


# --- what changes between two calls ----------------------------------------------------------------------------------


def results(module, x, residual):
    x, residual = (t.detach().clone().requires_grad_() for t in (x, residual))
    output = module(x, residual)
    output.sum().backward()
    kept = [output.detach(), x.grad, residual.grad]
    return [*kept, *(b.clone() for b in module.buffers())]


CHANGES = {
    "eps": lambda m: setattr(m, "eps", 0.5),
    "momentum": lambda m: setattr(m, "momentum", 0.9),
    "no momentum": lambda m: setattr(m, "momentum", None),
    "eval": lambda m: m.eval(),
    "no statistics": lambda m: setattr(m, "track_running_stats", False),
    "a new weight": lambda m: setattr(m, "weight", nn.Parameter(torch.arange(8.0).to(m.running_mean.device))),
    "no bias": lambda m: setattr(m, "bias", None),
    "a frozen weight": lambda m: m.weight.requires_grad_(False),
    "weights that are not dense": lambda m: setattr(m.weight, "data", torch.arange(16.0).to(m.weight)[::2]),
    "a counter of another kind": lambda m: setattr(m, "num_batches_tracked", torch.tensor(5, dtype=torch.int32)),
    "no counter": lambda m: setattr(m, "num_batches_tracked", None),
    "another forward": lambda m: setattr(m, "forward", lambda t: t * 2),
    "a hook": lambda m: m.register_forward_hook(lambda *a: a[-1] * 2),
    "a hook in front": lambda m: m.register_forward_pre_hook(lambda _, a: (a[0] * 2 + 1,)),
    "a hook on the gradient": lambda m: m.register_full_backward_hook(lambda _, dx, dy: (dx[0] * 2,)),
    "a hook in front of the gradient": lambda m: m.register_full_backward_pre_hook(lambda _, dy: (dy[0] * 2,)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_was_changed_is_looked_at_again(change, device):
    """After two calls of one kind, the third is as that of a module that was never called."""
    module = fusedres.nn.BatchNormAct2d(8, device=device)
    x, residual = images(2, device=device)
    for _ in range(2):
        module(x, residual).sum().backward()
    fresh = copy.deepcopy(module)
    for each in (module, fresh):
        CHANGES[change](each.bn)
    found, expected = (results(each, x, residual) for each in (module, fresh))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("vector", ["running_mean", "running_var"])
def test_statistics_that_are_not_dense_are_moved_where_they_are(vector, device):
    module, x = fusedres.nn.BatchNormAct2d(8, device=device), images(device=device)
    module(x)
    expected = copy.deepcopy(module.bn)
    spread = torch.stack([getattr(module.bn, vector)] * 2, 1)[:, 0]
    module.bn._buffers[vector] = spread
    module(x), expected(x)
    torch.testing.assert_close(spread, getattr(expected, vector), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_pair", [False, True])
def test_in_eval_without_statistics_it_is_the_batchs(is_pair, device):
    module = Joined(device) if is_pair else fusedres.nn.BatchNormAct2d(8, device=device)
    x, residual = images(2, device=device)
    module.eval()(x, residual), module(x, residual)
    module.bn.running_mean = module.bn.running_var = None
    fresh = copy.deepcopy(module)
    assert torch.equal(module(x, residual), fresh(x, residual))


def test_what_was_met_without_a_graph_has_one_later(device):
    module, (x, residual) = fusedres.nn.BatchNormAct2d(8, device=device), images(2, device=device)
    for _ in range(2):
        with torch.no_grad():
            module(x, residual)
        assert module(x, residual).requires_grad


def test_what_a_batchnorm_was_asked_for_says_nothing_of_the_next(device):
    norm, (x, residual) = nn.BatchNorm2d(8, device=device), images(2, device=device)
    for _ in range(2):
        assert isinstance(call_tail(norm, x, residual, "relu"), torch.Tensor)
        assert len(call_add_batch_norm(norm, x, residual, "relu")) == 2


def test_where_the_sum_goes_is_asked_again(device):
    """PyTorch's sum has the layout of its first operand."""
    norm, (x, residual) = nn.BatchNorm2d(8, device=device).eval(), images(2, device=device)
    residual = residual.detach().contiguous(**LAST)
    for _ in range(2):
        assert call_tail(norm, x, residual, "relu").is_contiguous()
        first = call_tail(norm, x, residual, "relu", "residual first")
        assert first.is_contiguous(**LAST)


def test_statistics_are_kept_from_when_it_is_asked_for(device):
    module, x = fusedres.nn.BatchNormAct2d(8, device=device), images(device=device)
    for _ in range(2):
        module(x)
    module.keep_finite_statistics = True
    before = module.bn.running_var.clone()
    for _ in range(2):
        module(x.detach() * float("inf"))
    assert torch.equal(module.bn.running_var, before)


@pytest.mark.parametrize("keep", [True, False])
def test_a_counter_of_another_kind_is_counted_alike(keep, device):
    modules = [
        fusedres.nn.BatchNormAct2d(8, device=device, keep_finite_statistics=keep) for _ in range(2)
    ]
    modules[1].bn.num_batches_tracked = torch.tensor(0, dtype=torch.int32, device=device)
    x = images(device=device).detach()
    for input in (x, x, moved_on(x), x * float("inf"), x):
        for module in modules:
            module(input)
    counts = [module.bn.num_batches_tracked.item() for module in modules]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_that_is_not_the_vectors(dtype, device):
    """However often: 16 bits go with float32 vectors, others do not."""
    module, x = fusedres.nn.BatchNormAct2d(8, device=device), images(device=device).to(dtype)
    for _ in range(3):
        if dtype is torch.float64:
            with pytest.raises(RuntimeError):
                module(x)
        else:
            assert module(x).dtype is dtype


def test_a_residual_that_is_a_number_is_refused(device):
    module, x = fusedres.nn.BatchNormAct2d(8, device=device), images(device=device)
    for _ in range(2):
        with pytest.raises(TypeError, match="residual is a float"):
            module(x, 0.5)


def test_a_transform_of_a_module_that_was_met(device):
    """The output of one call, mapped over residuals, is too small for its sums to be written to."""
    module = fusedres.nn.BatchNormAct2d(8, device=device).eval()
    x, residual = (t.detach() for t in images(2, device=device))
    module(x, residual), module(x, residual)
    stacked = torch.stack([residual, -residual])
    found = torch.vmap(module, (None, 0))(x, stacked)
    expected = torch.stack([module(x, each) for each in stacked])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def dual_of(norm, other, x):
    return call_dual_batch_norm(norm.to(x.device), x, other.to(x.device), x)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: dual_of(nn.BatchNorm2d(8), nn.BatchNorm1d(8), x), ValueError),
        (lambda x: fusedres.functional.add_act(x, x, activation=[]), ValueError),
        (lambda x: [fusedres.functional.add_act(x, each) for each in (x, x, 2.0)], TypeError),
        (lambda x: fusedres.functional.scaled_add_act(x, x, x[0, :, 0, 0], activation=[]), ValueError),
        (lambda x: fusedres.functional.scaled_add_act(x.flatten(), x.flatten(), x[0, 0, 0, :1]), RuntimeError),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_by_the_checks(call, error, device):
    with pytest.raises(error, match="expected"):
        call(images(device=device))


@pytest.mark.kernels
@pytest.mark.cpu
def test_what_may_be_counted_by_a_kernel():
    input = torch.empty(SHAPE)
    assert tail._is_counter(None, input)
    assert tail._is_counter(torch.tensor(0), input)
    assert not tail._is_counter(torch.tensor(0, dtype=torch.int32), input)
    assert not tail._is_counter(torch.tensor([0]), input)
    assert not tail._is_counter(torch.tensor(0, device="meta"), input)


def test_gradients_of_some_inputs_say_nothing_of_those_of_all(device):
    module, (x, residual) = fusedres.nn.BatchNormAct2d(8, device=device), images(2, device=device)
    expected = gradients(module, (x, residual))
    for of in (x, residual):
        torch.autograd.grad(module(x, residual).sum(), of)
        torch.autograd.grad(module(x, residual), of, torch.ones(SHAPE, device=device))
    found = gradients(module, (x, residual))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_residual_of_another_dtype_gets_its_own_gradient(device):
    x, residual = images(2, device=device)
    vectors = [torch.ones(8, device=device) for _ in range(4)]
    for _ in range(2):
        output = fusedres.functional.batch_norm_act(
            x.bfloat16(), *vectors, residual=residual, activation=None
        )
        output.sum().backward()
    assert residual.grad.dtype is torch.float32


class Joined(nn.Module):
    """A tail with a BatchNorm on either side."""

    def __init__(self, device) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8, device=device)
        self.shortcut = fusedres.nn.Projection(8, 8, device=device)

    def forward(self, x, residual):
        return self.shortcut.join(self.bn, x, residual)


@pytest.mark.parametrize("side", ["main path", "shortcut"])
@pytest.mark.parametrize("change", ["eps", "momentum", "no momentum", "eval", "no statistics", "a hook"])  # fmt: skip
def test_a_pair_of_which_one_was_changed_is_looked_at_again(change, side, device):
    module = Joined(device)
    x, residual = images(2, device=device)
    for _ in range(2):
        module(x, residual).sum().backward()
    fresh = copy.deepcopy(module)
    for each in (module, fresh):
        CHANGES[change](each.bn if side == "main path" else each.shortcut[1])
    found, expected = (results(each, x, residual) for each in (module, fresh))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("vector", ["weight", "bias", "running_mean"])
def test_a_vector_that_no_longer_fits_is_refused(vector, device):
    module, x = fusedres.nn.BatchNormAct2d(8, device=device), images(device=device)
    module(x), module(x)
    getattr(module, vector).data = torch.ones(9, device=device)
    before = [b.clone() for b in module.buffers()]
    with pytest.raises(RuntimeError, match=vector):
        module(x)
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


@pytest.mark.kernels
def test_a_rank_that_the_module_does_not_take_is_refused_however_often(device):
    module = fusedres.nn.BatchNormAct2d(8, device=device)
    three = images(shape=(2, 8, 5), device=device)
    fusedres.nn.BatchNormAct1d(8, device=device)(three)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected 4D input"):
            module(three)


def test_a_trace_calls_the_batchnorm_however_often_the_module_has_run(device):
    def traced(module):
        given = tuple(images(2, device=device))
        graph = torch.jit.trace(module, given, check_trace=False).graph
        return re.sub(r"___torch_mangle_\d+\.", "", str(graph))

    fresh, met = (fusedres.nn.BatchNormAct2d(8, device=device).eval() for _ in range(2))
    for _ in range(2):
        met(*images(2, device=device))
    assert traced(met) == traced(fresh)


def test_batches_are_counted_once_a_call(device):
    module, x = fusedres.nn.BatchNormAct2d(8, device=device), images(device=device)
    for _ in range(3):
        module(x)
    module.eval()(x)
    assert module.num_batches_tracked.item() == 3


# --- two that are one ------------------------------------------------------------------------------------------------


def gradients(function, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output = function(*leaves)
    gradient = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    return torch.autograd.grad(output, leaves, gradient)


def own_residual(module, x, _):
    module(x, x).sum().backward()


def own_gradient(module, x, residual):
    output = module(x, residual)
    output.backward(x.detach())


@pytest.mark.parametrize("first", [own_residual, own_gradient])
@pytest.mark.parametrize("activation", ["silu", "relu", None])
def test_a_call_with_one_tensor_twice_says_nothing_of_the_next(
    first, activation, device, monkeypatch
):
    without_plans(monkeypatch)
    module = fusedres.nn.BatchNormAct2d(8, activation=activation, device=device)
    x, residual = images(2, device=device)
    expected = gradients(module, (x, residual))
    without_plans(monkeypatch)
    first(module, *images(2, device=device))
    found = gradients(module, (x, residual))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("first", [own_residual, own_gradient])
def test_whatever_is_called_with_one_tensor_twice_says_nothing_of_the_next(
    first, call, device, monkeypatch
):
    module = Called(CALLS[call][0], device)
    x, residual, *others = (t.detach().contiguous(**LAST) for t in images(4, device=device))

    def gradients_of():
        a, b = (t.clone().requires_grad_() for t in (x, residual))
        leaves = [a, b, *module.parameters()]
        return torch.autograd.grad(module(a, b).square().sum(), leaves, allow_unused=True)

    without_plans(monkeypatch)
    expected = gradients_of()
    without_plans(monkeypatch)
    first(module, *(t.requires_grad_() for t in others))
    for found in (gradients_of(), gradients_of()):
        assert all(
            a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True)
        )


def test_two_batchnorms_of_one_tensor_say_nothing_of_the_next(device, monkeypatch):
    without_plans(monkeypatch)
    norms = [nn.BatchNorm2d(8, device=device) for _ in range(2)]
    x, residual, other = images(3, device=device)

    def tail_of(a, b):
        return call_dual_batch_norm(norms[0], a, norms[1], b, "relu")

    expected = gradients(tail_of, (x, residual))
    without_plans(monkeypatch)
    tail_of(other, other).sum().backward()
    found = gradients(tail_of, (x, residual))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("as_operator", [False, True])
def test_one_batchnorm_on_both_sides_moves_its_statistics_in_order(as_operator, device):
    norm = nn.BatchNorm2d(8, device=device)
    expected, (x, residual) = copy.deepcopy(norm), images(2, device=device)
    if as_operator:
        own = BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var)
        groups = (x.detach(), residual.detach(), own, own, How(True, "relu"), True, None)
        dual.FORWARD.op(*dual.FORWARD.flat(groups))
    else:
        call_dual_batch_norm(norm, x, norm, residual, "relu")
    expected(x), expected(residual)
    torch.testing.assert_close(norm.running_mean, expected.running_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.cpu
def test_what_is_met_first_with_an_odd_address_is_planned_for_even_ones(device, monkeypatch):
    without_plans(monkeypatch)
    module = fusedres.nn.BatchNormAct2d(8, device=device)
    misaligned(module, *images(2, device=device))
    assert [planned.forward for planned in tail._kinds.values()] == []


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda m, x: m(inferred(x), x), RuntimeError, "Inference tensors"),
        (lambda m, x: (m.bn.running_mean.requires_grad_(), m(x)), RuntimeError, "running_mean"),
        (lambda m, x: (delattr(m.bn, "running_mean"), m(x)), AttributeError, "running_mean"),
        (lambda m, x: (delattr(m.bn, "num_batches_tracked"), m(x)), AttributeError, "num_batches"),
        (lambda m, x: (setattr(m, "activation", []), m(x)), ValueError, "unknown activation"),
        (lambda m, x: (setattr(m.bn, "num_batches_tracked", torch.tensor(True)), m(x)), RuntimeError, "Bool|bool"),
    ],
)  # fmt: skip
def test_what_pytorch_refuses_leaves_the_statistics_alone(spoil, error, said, device):
    module, x = fusedres.nn.BatchNormAct2d(8, device=device), images(device=device)
    module(x)
    before = module.bn.running_var.clone()
    with pytest.raises(error, match=said):
        spoil(module, x)
    assert torch.equal(module.bn.running_var, before)


def inferred(x):
    with torch.inference_mode():
        return torch.randn_like(x)


def test_a_counter_of_one_value_is_counted(device):
    module = fusedres.nn.BatchNormAct2d(8, device=device)
    module.bn.num_batches_tracked = torch.zeros(1, dtype=torch.long, device=device)
    for _ in range(2):
        module(images(device=device))
    assert module.bn.num_batches_tracked.tolist() == [2]


def test_a_residual_of_a_subclass_gives_one(device):
    module, (x, residual) = fusedres.nn.BatchNormAct2d(8, device=device), images(2, device=device)
    assert type(module(x, residual.detach().as_subclass(Subclass))) is Subclass


@pytest.mark.composes("hooks of saved tensors (`save_on_cpu`)", "works")
def test_saved_tensors_may_come_back_from_anywhere(device):
    """To hooks, what is kept is bytes."""

    def at_an_odd_place(t):
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        return room.copy_(t.flatten()).view(t.shape)

    module = fusedres.nn.BatchNormAct2d(8, device=device)
    inputs = [t.detach() for t in images(2, device=device)]
    expected = gradients(module, inputs)
    with torch.autograd.graph.saved_tensors_hooks(at_an_odd_place, lambda t: t):
        found = gradients(module, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.cpu
def test_what_is_printed_of_a_call(monkeypatch):
    without_plans(monkeypatch)
    fusedres.nn.BatchNormAct2d(8)(images())
    (planned,) = tail._kinds.values()
    assert repr(planned.forward) == "<plan: bn_stats_kernel, bn_finalize_kernel, bn_apply_kernel>"
    assert repr(planned.tail.forward) == "<fusedres::batch_norm_act>"


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("call", CALLS)
def test_a_plan_holds_no_tensor(call, device):
    module = Called(CALLS[call][0], device)
    x, residual = images(2, device=device)
    plainly(module, x, residual)
    held = [weakref.ref(t) for t in (x, residual, *module.parameters(), *module.buffers())]
    del module, x, residual
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


@pytest.mark.kernels
def test_modules_that_are_new_at_each_call_share_plans(device, monkeypatch):
    """DataParallel's replicas are."""
    without_plans(monkeypatch)
    module, (x, residual) = fusedres.nn.BatchNormAct2d(8, device=device), images(2, device=device)
    plainly(module, x, residual)
    monkeypatch.setattr(operator.Operator, "plan", None)
    for _ in range(3):
        plainly(copy.deepcopy(module), x, residual)


@pytest.mark.kernels
def test_plans_do_not_fill_the_memory(device, monkeypatch):
    without_plans(monkeypatch)
    monkeypatch.setattr(operator, "MOST", 8)
    module = fusedres.nn.BatchNormAct2d(8, device=device)
    for n in range(1, 30):
        module(images(shape=(n, 8, 2, 2), device=device))
    kinds = [planned for found in tail._planned.values() for planned in found]
    assert len(tail._planned) <= 8
    assert len(kinds) <= 8 * tail.ALIKE


@pytest.mark.compiler
def test_a_driver_that_is_replaced_gets_launches_of_its_own(monkeypatch):
    without_plans(monkeypatch)
    module, x = fusedres.nn.BatchNormAct2d(8), images()
    found = {}
    with fusedres.backend("triton"):
        for architecture in (90, 80, 90, 80):
            with compile_only(architecture) as launches:
                module(x)
                found.setdefault(architecture, []).append([each.architecture for each in launches])
    assert found == {90: [[90] * 3] * 2, 80: [[80] * 3] * 2}


@pytest.mark.compiler
def test_threads_share_plans(stub, monkeypatch):
    """Each of them launches as often as it calls."""
    modules = [fusedres.nn.BatchNormAct2d(8) for _ in range(3)]
    for n in range(1, 6):  # what two threads compile at once, one of them throws away
        modules[0](images(shape=(n, 8, 4, 4))).sum().backward()
    without_plans(monkeypatch)
    before, faults = stub.launches, []

    def work():
        try:
            for n in range(20):
                for module in modules:
                    module(images(shape=(1 + n % 5, 8, 4, 4))).sum().backward()
        except Exception as error:
            faults.append(error)

    # Each with the backend that is chosen here.
    threads = [threading.Thread(target=copy_context().run, args=(work,)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert faults == []
    assert stub.launches - before == 4 * 20 * 3 * 6

"""A bound launch tells the driver what Triton's own start tells it, at every level that it can be bound at.

Triton's C launcher runs here, over a libcuda that does nothing but copy the parameters (benchmarks/stub.c).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

import fusedres
from fusedres.benchmarks.compile_only import compile_only
from fusedres.benchmarks.stub_driver import stub_driver, why_no_stub
from fusedres.functional import (
    add_batch_norm_act,
    batch_norm_act,
    dual_batch_norm_act,
    projection,
)
from fusedres.kernels import bind, launch
from fusedres.kernels.apply import bn_apply_kernel
from fusedres.kernels.launch import passes
from fusedres.ops import sync
from fusedres.ops.dual import Wanted
from fusedres.ops.norm import BatchNorm, Kept
from fusedres.ops.projection import in_triton

from .helpers import without_plans

pytestmark = pytest.mark.compiler

SIZES = {"i1": 1, "i8": 1, "u1": 1, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}
LEVELS = ("launcher", "run")


@pytest.fixture
def stub(backend):
    why = why_no_stub()
    if why is not None:
        pytest.skip(why)
    with stub_driver() as driver, fusedres.backend("triton"):
        yield driver


@dataclass(frozen=True)
class Started:
    """What `kernel[grid](...)` was given, and what it returned."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple
    options: dict[str, Any]
    compiled: Any

    @property
    def constants(self) -> tuple:
        return tuple(self.options[name] for name in self.kernel.arg_names[len(self.arguments) :])

    @property
    def tensors(self) -> list[Tensor]:
        return [part for part in bind.parts_of(self.arguments) if isinstance(part, Tensor)]

    @property
    def floats(self) -> tuple[float, ...]:
        return tuple(part for part in self.arguments if isinstance(part, float))

    def told(self, floats: tuple | None = None) -> tuple:
        """The arguments as if the call had one pointer more than this kernel takes, in another order."""
        places = iter(range(len(self.tensors), 0, -1))
        given = iter(self.floats if floats is None else floats)

        def by(part: Any) -> Any:
            if isinstance(part, Tensor):
                return bind.Pointer(next(places))
            return next(given) if isinstance(part, float) else part

        return bind.replaced(self.arguments, by)

    @property
    def pointers(self) -> tuple[int, ...]:
        return (0xDEAD, *(t.data_ptr() for t in reversed(self.tensors)))

    def bind(self, floats: tuple | None = None) -> bind.Bound | None:
        return bind.bind(self.compiled, self.grid, self.told(floats), self.constants)

    def start(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)

    def run(self) -> None:
        """As Triton starts it, by the addresses of the tensors."""
        compiled = self.compiled
        arguments = bind.replaced(
            self.arguments, lambda part: part.data_ptr() if isinstance(part, Tensor) else part
        )
        compiled.run(
            *self.grid, 0, compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *self.constants,
        )  # fmt: skip


def started(call) -> list[Started]:
    """What `call` starts that was not started before."""
    found = []
    run = type(bn_apply_kernel).run

    def noted(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=warmup, **options)
        found.append(Started(kernel, (*grid, 1, 1)[:3], arguments, options, compiled))
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        without_plans(patch)
        patch.setattr(type(bn_apply_kernel), "run", noted)
        call()
    assert found
    return found


def arrived(stub, compiled, launch) -> tuple:
    """What one launch brings to the driver."""

    def flat(kind):
        return [kind] if isinstance(kind, str) else [part for each in kind for part in flat(each)]

    kinds = [k for k in flat(tuple(compiled.src.signature.values())) if k != "constexpr"]
    before = stub.launches
    told = stub.arriving(launch, [8 if kind.startswith("*") else SIZES[kind] for kind in kinds])
    assert stub.launches == before + 1
    return told


SHAPE = (3, 24, 9, 9)


def vectors(dtype=torch.float32, channels=SHAPE[1]):
    return [torch.rand(channels, dtype=dtype) for _ in range(4)]


def images(dtype, layout, n=2, shape=SHAPE):
    made = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(n)]
    return [tensor.requires_grad_() for tensor in made]


def one(dtype, layout, residual):
    x, other = images(dtype, layout)
    mean, var, *affine = vectors()
    affine = [vector.requires_grad_() for vector in affine]
    other = other if residual else None
    y = batch_norm_act(x, mean, var, *affine, True, residual=other)
    y.backward(torch.ones_like(y))


def evaluated():
    x, residual = images(torch.float32, torch.contiguous_format)
    with torch.no_grad():
        batch_norm_act(x, *vectors(), residual=residual, activation="silu")


def in_float64():
    (x,) = images(torch.float64, torch.contiguous_format, 1)
    batch_norm_act(x, *vectors(torch.float64), True, momentum=0.25, eps=1e-3).sum().backward()


def dual():
    x, residual = images(torch.float32, torch.channels_last)
    (mean, var, weight, bias), (mean2, var2, weight2, bias2) = vectors(), vectors()
    dual_batch_norm_act(
        x, residual, mean, var, mean2, var2, weight, bias, weight2, bias2, True
    ).sum().backward()


def preactivation():
    x, residual = images(torch.bfloat16, torch.channels_last)
    total, output = add_batch_norm_act(x, residual, *vectors(), True)
    (total + output).sum().backward()


def projected():
    (x,) = images(torch.bfloat16, torch.channels_last, 1, (2, 16, 9, 9))
    weight = torch.randn(32, 16, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    with in_triton():
        projection(x, weight, stride=2).sum().backward()


def in_one_launch():
    with passes("one"):
        one(torch.bfloat16, torch.channels_last, True)


def with_the_final_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "LAST_MERGES", True)
        one(torch.bfloat16, torch.channels_last, True)


def shared():
    """What a process of several does between their collectives."""
    (x,) = images(torch.bfloat16, torch.channels_last, 1)
    mean, var, weight, bias = vectors()
    moments, _ = sync.MOMENTS(x, None, None, False)
    norm = BatchNorm(weight, bias, mean, var)
    y, saved, _, bits = sync.FORWARD(x, None, norm, sync.NO_NORM, moments, None, "relu", True)
    wanted = Wanted((True,) * 4, torch.float32, None)
    sync.SUMS(y, Kept(x, weight, saved), Kept(None, None, None), bits, "relu", wanted)


CALLS = {
    "float32": functools.partial(one, torch.float32, torch.contiguous_format, False),
    "float32-residual": functools.partial(one, torch.float32, torch.contiguous_format, True),
    "bfloat16-nhwc": functools.partial(one, torch.bfloat16, torch.channels_last, True),
    "eval": evaluated,
    "float64": in_float64,
    "dual": dual,
    "preactivation": preactivation,
    "projection": projected,
    "one launch": in_one_launch,
    "the final step too": with_the_final_step,
    "shared": shared,
}


@functools.cache
def starts(call: str) -> list[Started]:
    return started(CALLS[call])


def test_these_calls_start_every_kernel(stub):
    folder = Path(fusedres.kernels.__path__[0])
    there = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert {each.kernel.__name__ for call in CALLS for each in starts(call)} == there


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("call", CALLS)
def test_what_arrives_is_what_tritons_own_start_brings(stub, monkeypatch, call, level):
    monkeypatch.setattr(bind, "LEVEL", level)
    for each in starts(call):
        expected = arrived(stub, each.compiled, each.start)
        assert arrived(stub, each.compiled, each.run) == expected
        given = tuple(map(bind.Given, range(len(each.floats))))
        for floats in {
            each.floats,
            given,
            each.floats[:1] + given[1:],
            given[:1] + each.floats[1:],
        }:
            go = each.bind(floats)
            launch = functools.partial(go, 0, each.pointers, each.floats)
            assert arrived(stub, each.compiled, launch) == expected
            *_, stream, parameters = arrived(
                stub, each.compiled, functools.partial(go, 77, each.pointers, each.floats)
            )
            assert (stream, parameters) == (77, expected[-1])


@pytest.fixture
def by_the_launcher(monkeypatch):
    """How often Triton's launcher itself was called."""
    called = []
    call = bind.nvidia.CudaLauncher.__call__

    def counted(self, *arguments):
        called.append(self)
        return call(self, *arguments)

    monkeypatch.setattr(bind.nvidia.CudaLauncher, "__call__", counted)
    return called


def _launch(each: Started) -> None:
    each.bind()(0, each.pointers, ())


def test_a_bound_launch_goes_past_tritons_launcher(stub, by_the_launcher):
    (each, *_) = starts("float32")
    go = each.bind()
    by_the_launcher.clear()
    before = stub.launches
    go(0, each.pointers, ())
    assert (stub.launches, by_the_launcher) == (before + 1, [])


def test_a_level_that_is_forced_is_gone_to_and_no_further(stub, monkeypatch, by_the_launcher):
    (each, *_) = starts("float32")
    monkeypatch.setattr(bind, "LEVEL", "run")
    _launch(each)
    assert by_the_launcher == [each.compiled.run]
    monkeypatch.setattr(bind, "LEVEL", "triton")
    assert each.bind() is None


def _twice(call):
    def __call__(self, *arguments):
        call(self, *arguments)
        call(self, *arguments)

    return __call__


UNKNOWN = {
    "more in it": lambda run, patch: patch.setattr(run, "table", None, raising=False),
    "scratch memory": lambda run, patch: patch.setattr(run, "global_scratch_size", 16),
    "descriptors": lambda run, patch: patch.setattr(run, "launch", lambda *told: None),
    "two launches": lambda run, patch: patch.setattr(
        type(run), "__call__", _twice(type(run).__call__)
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_known_is_left_to_tritons_launcher(stub, monkeypatch, by_the_launcher, what):
    (each, *_) = starts("float32")
    with monkeypatch.context() as patch:
        UNKNOWN[what](each.compiled.run, patch)
        go = each.bind()
    by_the_launcher.clear()
    go(0, each.pointers, ())
    assert by_the_launcher == [each.compiled.run]


def test_another_launcher_is_not_bound(stub):
    found = []
    run = type(bn_apply_kernel).run
    with pytest.MonkeyPatch.context() as patch, compile_only(90):
        without_plans(patch)
        patch.setattr(type(bn_apply_kernel), "run", lambda *a, **o: found.append(run(*a, **o)))
        evaluated()
        assert bind.bind(found[0], (1, 1, 1), (), ()) is None


def test_tensors_that_it_was_not_compiled_for_are_refused(stub):
    (each, *_) = starts("float32")
    told = bind.replaced(each.told(), lambda part: bind.Pointer(0) if part is None else part)
    assert told != each.told()
    with pytest.raises(
        ValueError, match=r"^bn_stats_kernel was compiled for other tensors than \("
    ):
        bind.bind(each.compiled, each.grid, told, each.constants)


def test_a_launch_that_the_driver_refuses_is_an_error(stub):
    (each, *_) = starts("float32")
    with pytest.raises((TypeError, OverflowError)):
        each.bind()(0, ("no address",) * len(each.pointers), ())


# --- who watches -----------------------------------------------------------------------------------------------------


def test_a_hook_at_the_launch_is_seen_however_it_was_set(monkeypatch):
    def hook(metadata):
        return None

    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        chain.add(hook)
        assert bind.is_watched()
        chain.remove(hook)
        assert not bind.is_watched()
        with knobs.runtime.scope():
            setattr(knobs.runtime, name, hook)
            assert bind.is_watched()
            setattr(knobs.runtime, name, None)
            assert not bind.is_watched()
    assert not bind.is_watched()


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("runtime", "debug", True),
        ("compilation", "instrumentation_mode", "fpsan"),
        ("runtime", "add_stages_inspection_hook", lambda *a: ("key", "hash")),
    ],
)
def test_a_knob_that_changes_what_is_launched_is_seen(group, name, value):
    group = getattr(knobs, group)
    assert not bind.is_watched()
    with group.scope():
        setattr(group, name, value)
        assert bind.is_watched()
    assert not bind.is_watched()


def test_environment_variables_are_seen_when_triton_sees_them(monkeypatch):
    """On import, and when it is told to look again."""
    monkeypatch.setenv("TRITON_DEBUG", "1")
    assert bool(knobs.runtime.debug) == bind.is_watched()
    with knobs.runtime.scope(), knobs.compilation.scope():
        knobs.refresh_knobs()
        assert knobs.runtime.debug
        assert bind.is_watched()
    assert not bind.is_watched()


def test_what_is_asked_of_one_kernel(monkeypatch):
    assert not bind.kernel_is_watched(bn_apply_kernel)
    for name, value in (("debug", True), ("pre_run_hooks", [lambda *a, **o: None])):
        with monkeypatch.context() as patch:
            patch.setattr(bn_apply_kernel, name, value)
            assert bind.kernel_is_watched(bn_apply_kernel)

"""A kernel that is started again goes past Triton's own start, and is never the wrong one."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import triton
from triton import knobs

import fusedres
from fusedres.benchmarks.compile_only import compile_only
from fusedres.functional import batch_norm_act
from fusedres.kernels import start
from fusedres.kernels.apply import bn_apply_kernel
from fusedres.kernels.stats import bn_stats_kernel
from fusedres.ops import operator, tail

from .helpers import without_plans

pytestmark = pytest.mark.compiler

SHAPE = (8, 16, 8, 8)


def forget():
    """Nothing is planned yet."""
    operator.forget()


def launches_of(x, eps=1e-5, activation="relu", architecture=90, residual=None):
    vectors = [torch.empty(x.shape[1]) for _ in range(4)]
    with fusedres.backend("triton"), compile_only(architecture) as recorded, torch.no_grad():
        batch_norm_act(
            x, *vectors, training=True, eps=eps, activation=activation, residual=residual
        )
        return list(recorded)


@pytest.fixture
def slow_starts(monkeypatch):
    """How often Triton's own start was taken."""
    taken = []
    run = type(bn_apply_kernel).run

    def counted(self, *arguments, **options):
        taken.append(self)
        return run(self, *arguments, **options)

    monkeypatch.setattr(type(bn_apply_kernel), "run", counted)
    without_plans(monkeypatch)
    return taken


def test_the_second_start_is_short_and_the_same(slow_starts):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    first = launches_of(x)
    assert len(slow_starts) == 3
    assert launches_of(torch.empty_like(x)) == first
    assert len(slow_starts) == 3


def test_a_float_is_passed_on_and_asks_nothing(slow_starts):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    launches_of(x)
    found = launches_of(x, eps=0.25)
    assert len(slow_starts) == 3
    assert [each.arguments.get("eps") for each in found] == [None, 0.25, 0.25]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"x": torch.empty(SHAPE, dtype=torch.float16)}, id="dtype"),
        pytest.param({"x": torch.empty(SHAPE, dtype=torch.bfloat16, memory_format=torch.channels_last)}, id="layout"),
        pytest.param({"x": torch.empty(8 * 16 * 64 + 1, dtype=torch.bfloat16)[1:].view(SHAPE)}, id="alignment"),
        pytest.param({"activation": None}, id="constant"),
        pytest.param({"residual": torch.empty(SHAPE, dtype=torch.bfloat16)}, id="residual"),
        pytest.param({"architecture": 80}, id="chip"),
    ],
)  # fmt: skip
def test_what_the_compiler_was_told_otherwise_is_another_kernel(slow_starts, other):
    """The machine code is what Triton's own start would have launched."""
    plain = {"x": torch.empty(SHAPE, dtype=torch.bfloat16)}
    launches_of(**plain)
    found = launches_of(**plain | other)
    forget()
    assert found == launches_of(**plain | other)
    assert found[-1].cubin != launches_of(**plain)[-1].cubin


def test_shapes_that_keep_changing_do_not_fill_the_memory(slow_starts, monkeypatch):
    monkeypatch.setattr(operator, "MOST", 8)
    for n in range(1, 12):
        launches_of(torch.empty((n, *SHAPE[1:]), dtype=torch.bfloat16))
    assert len(tail._planned) <= 8


WATCHES = {
    "hook": lambda kernel, patch: patch.setattr(kernel, "pre_run_hooks", [lambda *a, **o: None]),
    "hook at the launch": lambda kernel, patch: patch.setattr(
        knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None]
    ),
    "debug": lambda kernel, patch: patch.setattr(knobs.runtime, "debug", True),
    "kernel debug": lambda kernel, patch: patch.setattr(kernel, "debug", True),
    "instrumentation": lambda kernel, patch: patch.setattr(
        knobs.compilation, "instrumentation_mode", "fpsan"
    ),
    "pipeline": lambda kernel, patch: patch.setattr(
        knobs.runtime, "add_stages_inspection_hook", lambda *a: ("key", "hash")
    ),
}


@pytest.mark.parametrize("watch", WATCHES)
def test_while_triton_is_watched_launches_are_its_own(slow_starts, monkeypatch, watch):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    first = launches_of(x)
    with monkeypatch.context() as patch:
        WATCHES[watch](bn_apply_kernel, patch)
        patch.setattr(type(bn_apply_kernel), "run", lambda self, *a, **o: slow_starts.append(self))
        slow_starts.clear()
        launches_of(x)
        launches_of(x)
        assert slow_starts.count(bn_apply_kernel) == 2
    slow_starts.clear()
    assert launches_of(x) == first
    assert slow_starts == []


def test_a_hook_before_the_run_is_called_at_each_launch(slow_starts):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    launches_of(x)
    called = []
    bn_apply_kernel.add_pre_run_hook(lambda *arguments, **options: called.append(arguments))
    try:
        launches_of(x)
        launches_of(x)
    finally:
        bn_apply_kernel.pre_run_hooks.clear()
    launches_of(x)
    assert len(called) == 2


def test_debugging_is_other_code_as_long_as_it_is_on(slow_starts, monkeypatch):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    plain = launches_of(x)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        debugged = launches_of(x)
    assert [each.cubin for each in launches_of(x)] == [each.cubin for each in plain]
    assert debugged[-1].cubin != plain[-1].cubin


@contextmanager
def forgotten(kernel):
    """Triton's memory of what it compiled of a kernel is empty."""
    before = kernel.device_caches
    kernel.device_caches = defaultdict(kernel.create_binder)
    try:
        yield
    finally:
        with compile_only(90):  # a compiled kernel that goes asks the active driver to unload it
            kernel.device_caches = before
            forget()


def test_a_cache_that_was_emptied_is_filled_again(slow_starts):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    launches_of(x)
    slow_starts.clear()
    with forgotten(bn_apply_kernel):
        launches_of(x)
        assert slow_starts == [bn_apply_kernel]


def test_a_kernel_that_another_thread_compiles_is_started_by_triton(slow_starts):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    first = launches_of(x)
    with forgotten(bn_apply_kernel), ThreadPoolExecutor(1) as pool:
        with triton.AsyncCompileMode(pool):
            assert launches_of(x) == first
        assert launches_of(x) == first


# What Triton's own start reads, and how it is known that nothing changed.
READ = {
    "asked of each launch": {"self.device_caches"},
    "watched": {
        "self.debug", "self.pre_run_hooks", "knobs.runtime.debug", "knobs.runtime.add_stages_inspection_hook",
        "knobs.compilation.instrumentation_mode", "knobs.runtime.launch_enter_hook", "knobs.runtime.launch_exit_hook",
    },
    "of no effect without instrumentation": {"knobs.compilation.fpsan_homomorphic_casts"},
    "constants": {"self.used_global_vals"},
    "to compile": {"self._pack_args", "self._do_compile"},
}  # fmt: skip


def test_triton_reads_nothing_else():
    """A Triton whose start reads more has to be read again."""
    source = inspect.getsource(type(bn_apply_kernel).run)
    found = set(re.findall(r"\b(?:knobs\.\w+|self)\.\w+", source))
    assert found <= set.union(*READ.values())


@pytest.fixture
def capture(monkeypatch):
    """As if the current stream were recorded into a CUDA graph, from when it is called."""

    def begin():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


@pytest.mark.composes("a CUDA graph capture before a warm-up", "refused")
def test_what_a_capture_would_have_to_compile_is_refused(slow_starts, capture):
    capture()
    hook = knobs.runtime.jit_cache_hook
    with forgotten(bn_stats_kernel), compile_only(90) as recorded:
        with pytest.raises(
            RuntimeError,
            match=r"^bn_stats_kernel is not compiled for these shapes yet .*: warm up first, with the same shapes",
        ):
            launches_of(torch.empty(SHAPE, dtype=torch.bfloat16))
        assert bn_stats_kernel.device_caches[90][0] == {}
    assert (recorded, knobs.runtime.jit_cache_hook) == ([], hook)


@pytest.mark.composes("a CUDA graph capture after a warm-up", "works")
def test_after_a_warm_up_it_may_be_captured(slow_starts, capture):
    x = torch.empty(SHAPE, dtype=torch.bfloat16)
    first = launches_of(x)
    capture()
    assert launches_of(x) == first


def test_a_batch_size_first_met_in_a_capture_may_use_what_is_compiled(slow_starts, capture):
    small, large = (torch.empty((n, 16, 32, 32), dtype=torch.bfloat16) for n in (256, 512))
    first = launches_of(small)
    capture()
    found = launches_of(large)
    assert [each.cubin for each in found] == [each.cubin for each in first]


def test_a_capture_refuses_nothing_to_other_threads(monkeypatch):
    told = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **of: told.append(of))
    with start._nothing_compiles(), ThreadPoolExecutor(1) as other:
        other.submit(lambda: knobs.runtime.jit_cache_hook(fn=bn_apply_kernel)).result()
    assert told == [{"fn": bn_apply_kernel}]

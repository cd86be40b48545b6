"""A kernel that is started again goes past Triton's own start, and is never the wrong one."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.benchmarks.compile_only import compile_only
from fusedres.functional import batch_norm_act
from fusedres.kernels import start
from fusedres.kernels.apply import bn_apply_kernel

pytestmark = pytest.mark.compiler

SHAPE = (8, 16, 8, 8)


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
    monkeypatch.setattr(start, "_started", {})
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
    passed = []
    for key, (_, constants, kept) in list(start._started.items()):
        start._started[key] = (lambda *a: passed.append(a)), constants, kept
    launches_of(x, eps=0.25)
    assert len(slow_starts) == 3
    assert sum(0.25 in a for a in ([v for v in p if isinstance(v, float)] for p in passed)) == 2


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
    start._started.clear()
    assert found == launches_of(**plain | other)
    assert found[-1].cubin != launches_of(**plain)[-1].cubin


def test_shapes_that_keep_changing_do_not_fill_the_memory(slow_starts, monkeypatch):
    monkeypatch.setattr(start, "MOST", 8)
    for n in range(1, 12):
        launches_of(torch.empty((n, *SHAPE[1:]), dtype=torch.bfloat16))
    assert len(start._started) <= 8

"""Host cost of a call: microseconds of Python and dispatch on tensors of 256 values, fused against the composition."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.benchmarks.host import ATEN, SUBJECTS, forms, step_of
from fusedres.benchmarks.providers import BASELINE
from fusedres.benchmarks.timing import one_thread

CALL = SUBJECTS[0]


@pytest.mark.parametrize("provider", [BASELINE, ATEN])
@pytest.mark.parametrize("mode", CALL.modes)
def test_call(benchmark, mode, provider):
    with one_thread(), fusedres.backend("aten"):
        benchmark(step_of(CALL, forms(CALL)[provider], mode, torch.device("cpu")))

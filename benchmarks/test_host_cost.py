"""Host cost of a call: microseconds of Python and dispatch on tensors of 256 values, fused against the composition."""

from __future__ import annotations

import pytest
import torch

from fusedres.benchmarks.host import call_of, tails
from fusedres.benchmarks.timing import one_thread


@pytest.mark.parametrize("provider", tails())
@pytest.mark.parametrize("mode", ["forward", "eval", "step"])
def test_call(benchmark, mode, provider):
    with one_thread():
        step = call_of(tails()[provider], mode, torch.device("cpu"))
        benchmark(step.run, None)

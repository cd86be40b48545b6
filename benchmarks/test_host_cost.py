"""Host cost of a call: microseconds of Python and dispatch on tensors of 256 values, fused against the composition."""

from __future__ import annotations

import pytest
import torch

from fusedres.benchmarks.host import call_of, tails


@pytest.mark.parametrize("provider", tails())
@pytest.mark.parametrize("mode", ["forward", "eval", "step"])
def test_call(benchmark, mode, provider):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = call_of(tails()[provider], mode, torch.device("cpu"))
        benchmark(step.run, None)
    finally:
        torch.set_num_threads(before)

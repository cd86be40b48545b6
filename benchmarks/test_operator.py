"""The operators, fused and composed, at the shapes that the device can hold; each is checked before it is timed."""

from __future__ import annotations

import pytest
import torch

from fusedres.benchmarks.cases import Case, operators
from fusedres.benchmarks.parity import Parity
from fusedres.benchmarks.providers import PROVIDERS
from fusedres.benchmarks.workload import Setting, Workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
CASES = [case for case in operators((256,) if ON_GPU else (2,), grid=False) if case.kernel != "bn"]
TIMED = [provider for provider in PROVIDERS if provider.name in ("eager, in place", "fusedres")]


@pytest.mark.parametrize("provider", TIMED, ids=lambda provider: provider.name)
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(benchmark, case: Case, mode: str, provider):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    workload = Workload(case, Setting(DEVICE, dtype, torch.channels_last))
    module = provider.wrap(workload.build())
    Parity(workload, workload.build()).check(module)
    step = workload.step(module, mode)

    def run(i: int) -> None:
        step.run(step.prepare(i))
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = case.bytes(mode, dtype)
    benchmark.pedantic(run, args=(0,), rounds=20, iterations=1, warmup_rounds=3)

"""The statistics' final step in the last program of the statistics: bit for bit what two launches give, and off."""

from __future__ import annotations

import pytest
import torch

from fusedres.benchmarks import code
from fusedres.benchmarks.code import Target

from .helpers import DTYPES, Case, run, without_plans


@pytest.fixture
def merging(monkeypatch):
    """Switches it on; the kernels that are started then."""
    from fusedres.kernels import launch
    from fusedres.kernels.start import Launch

    found, start = [], Launch.start

    def recorded(self, *arguments):
        if "stats" in self.kernel.__name__:
            found.append((self.kernel.__name__, self.grid))
        start(self, *arguments)

    monkeypatch.setattr(Launch, "start", recorded)

    def switch():
        without_plans(monkeypatch)
        monkeypatch.setattr(launch, "LAST_MERGES", True)
        found.clear()
        return found

    return switch


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 12, 20, 20), (2, 1, 3, 3)], ids=str)
def test_the_bits_of_two_launches(shape, dtype, layout, merging, device):
    case = Case(shape=shape, dtype=DTYPES[dtype], layout=layout, device=device)
    expected, launches = run(case), merging()
    for _ in range(2):  # the counters are 0 again
        actual = run(case)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert {name for name, _ in launches} == {"bn_stats_finalize_kernel"}


@pytest.mark.interpreter
def test_the_stress_runs_and_sees_a_stale_value(capsys, monkeypatch):
    from fusedres.benchmarks import ordering

    assert ordering.main(["--device", "cpu", "--repetitions", "2"]) == 0
    assert capsys.readouterr().out.count("0 of 2 wrong") == 2
    run_it = ordering.Statistics.__call__

    def stale(self, in_one):
        found = run_it(self, in_one)
        found[0][0, 1] = float("nan")
        return found

    monkeypatch.setattr(ordering.Statistics, "__call__", stale)
    assert ordering.main(["--device", "cpu", "--repetitions", "2"]) == 1
    assert "launch 1 of 2 gave other bits" in capsys.readouterr().out


@pytest.mark.interpreter
def test_it_is_off(merging, device):
    from fusedres.kernels import launch

    assert not launch.LAST_MERGES
    launches = merging()
    launch.LAST_MERGES = False
    run(Case(device=device))
    assert {name for name, _ in launches} == {"bn_stats_kernel"}


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_spills(dtype, layout, architecture, merging):
    merging()
    target = Target(architecture, "bn_relu", "here", (256, 512, 28, 28), dtype, layout)
    (found,) = (launch for launch in code.compile_target(target) if "stats" in launch.kernel)
    assert found.kernel == "bn_stats_finalize_kernel"
    assert found.programs > 132
    assert found.code.spills == 0
    assert found.resident >= (4 if architecture < 100 else 3)  # as the statistics alone

"""The statistics' final step in the last program of the statistics: bit for bit what two launches give, and off."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import fusedres
from fusedres.benchmarks import code
from fusedres.benchmarks.code import Target
from fusedres.benchmarks.ptx import emulated

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


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 12, 20, 20), (2, 1, 3, 3)], ids=str)
def test_the_bits_of_two_launches(shape, dtype, layout, merging, device):
    case = Case(shape=shape, dtype=DTYPES[dtype], layout=layout, device=device)
    expected, launches = run(case), merging()
    for _ in range(2):  # the counters are 0 again
        actual = run(case)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert {name for name, _ in launches} == {"bn_stats_finalize_kernel"}


# --- compiled code, whoever is last -----------------------------------------------------------------------------------

SLOW_ON_80 = [pytest.param(80, marks=pytest.mark.slow), 90]


def compiled(
    dtype: str, layout: str, architecture: int, order: int, ptx: Callable[[str], str] | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The results, and what the kernel did that it must not; `ptx`: what stands instead of its own."""
    case = Case(shape=(4, 70, 20, 20), dtype=DTYPES[dtype], layout=layout)

    def rewrite(kernel: str, text: str) -> str:
        return ptx(text) if ptx is not None and kernel == "bn_stats_finalize_kernel" else text

    with (
        fusedres.backend("triton"),
        emulated(architecture, order=order, rewrite=rewrite) as launches,
    ):
        results = run(case)
    return results, [error for launch in launches for error in launch.errors]


@pytest.mark.once
@pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "backward", "drawn"])
@pytest.mark.parametrize("architecture", SLOW_ON_80)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float32", *(pytest.param(n, marks=pytest.mark.slow) for n in ("float16", "float64"))]
)  # fmt: skip
def test_the_bits_of_two_launches_whoever_is_last(dtype, layout, architecture, order, merging):
    expected, _ = compiled(dtype, layout, architecture, 0)
    launches = merging()
    actual, errors = compiled(dtype, layout, architecture, order)
    assert errors == []
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    (grid,) = {grid for name, grid in launches if name == "bn_stats_finalize_kernel"}
    assert min(grid) > 1


def _without_barriers(ptx: str) -> str:
    """None from the last partial to the ticket: Triton 3.9 adds one to the kernel's own."""
    before, after = ptx.split("atom.global", 1)
    at = before.rindex("st.global")
    assert "bar.sync" in before[at:]
    return before[:at] + re.sub(r"bar\.sync\s+0;", "", before[at:]) + "atom.global" + after


def _read_first(ptx: str) -> str:
    """The first partial is read by all programs, and then they take their tickets."""
    partial = re.findall(r"\.ptr \.global \.align 1 (\w+)", ptx)[1]
    load = (
        "{ .reg .b64 %planted_address; .reg .b32 %planted;\n"
        f"ld.param.b64 %planted_address, [{partial}];\n"
        "ld.global.cg.b32 %planted, [%planted_address]; }\n"
    )
    at = ptx.rindex("\n", 0, ptx.index("atom.global")) + 1
    return ptx[:at] + load + ptx[at:]


FAULTS = {
    "a relaxed ticket": lambda ptx: ptx.replace(".acq_rel.", ".relaxed."),
    "a ticket that does not release": lambda ptx: ptx.replace(".acq_rel.", ".acquire."),
    "a ticket that does not acquire": lambda ptx: ptx.replace(".acq_rel.", ".release."),
    "a ticket for the own program": lambda ptx: ptx.replace(".gpu.acq_rel.", ".cta.acq_rel."),
    "no barrier before the ticket": _without_barriers,
    "read before the ticket": _read_first,
}


@pytest.mark.once
@pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "backward", "drawn"])
@pytest.mark.parametrize("architecture", SLOW_ON_80)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_whoever_is_last(fault, layout, architecture, order, merging):
    merging()
    _, errors = compiled("bfloat16", layout, architecture, order, FAULTS[fault])
    assert any("race in global memory" in error for error in errors)


@pytest.mark.cpu
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

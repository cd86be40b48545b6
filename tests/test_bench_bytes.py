"""The byte level puts three counts side by side, and says which of them it could not make."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fusedres.benchmarks import bytes_level
from fusedres.benchmarks.floors import OPERATORS
from fusedres.benchmarks.traffic import Site, Traffic, TrafficError, measure_traffic

pytestmark = pytest.mark.once

SCHEDULE = SimpleNamespace(
    forward_bytes=7, backward_bytes=11, forward_kernels=4, backward_kernels=5
)  # fmt: skip


def floors(sites, processes):
    """As if every kernel moved what the table says, and a constant."""
    return [
        Traffic(
            *(100 + OPERATORS[s.kernel].bytes(m, s.shape, 2) for m in ("forward", "backward")), 3, 3
        )
        for s in sites
    ]


@pytest.fixture
def rows(monkeypatch, request):
    """The rows of the quick level, with planted answers; a parameter is the peer that fails."""
    failing = getattr(request, "param", None)

    def schedule(*arguments):
        if failing == "compile":
            raise RuntimeError("planted")
        return SCHEDULE

    def measure(sites, processes):
        if failing == "fusedres":
            raise TrafficError("planted")
        return floors(sites, processes)

    monkeypatch.setattr(bytes_level, "_tail_schedule", schedule)
    monkeypatch.setattr(bytes_level, "measure_traffic", measure)
    return [row for rows in bytes_level.measure(quick=True) for row in rows]


def test_passes_of_all_three_stand_side_by_side(rows):
    found = {
        (row.provider, row.mode): row.median
        for row in rows
        if row.kernel == "bn_add_relu" and row.metric == "passes"
    }
    assert found["eager", "forward"] == found["eager", "backward"] == 8
    assert found["fusedres", "forward"] == pytest.approx(4 + 1 / 16, rel=1e-4)
    assert found["fusedres", "backward"] == pytest.approx(6 + 2 / 16, rel=1e-4)
    assert found["compile", "forward"] > 0


def test_kernels_are_counted_for_those_that_write_their_own(rows):
    of_bn = [row for row in rows if row.kernel == "bn" and row.metric == "kernels"]
    assert [(row.provider, row.mode, row.median) for row in of_bn] == [
        ("compile", "forward", 4), ("compile", "backward", 5), ("fusedres", "forward", 3), ("fusedres", "backward", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("rows", ["compile", "fusedres"], indirect=True)
def test_a_peer_that_cannot_be_counted_leaves_the_others_their_numbers(rows, request):
    failing = request.node.callspec.params["rows"]
    without = {row.provider for row in rows if row.median is None}
    assert without == {failing}
    assert all("planted" in row.note for row in rows if row.provider == failing)


def test_bytes_are_held_against_the_table(rows):
    assert bytes_level.faults(rows) == []


def test_the_interpreter_measures_in_a_process_of_its_own():
    """The only way to run it here, where the kernels are not interpreted; largest first, answers in order."""
    sites = [Site("bn", (2, 8, 16, 16)), Site("bn_add_relu", (2, 8, 32, 32))]
    found = measure_traffic(sites, processes=2)
    passes = [found[0].forward / (2 * 2 * 8 * 16 * 16), found[1].forward / (2 * 2 * 8 * 32 * 32)]
    assert passes == pytest.approx([3, 4 + 1 / 16], rel=0.1)
    assert {t.forward_launches for t in found} == {3}


def test_an_interpreter_that_fails_is_an_error_with_its_last_line():
    with pytest.raises(TrafficError, match=r"the interpreter failed: .*no_such_dtype"):
        measure_traffic([Site("bn", (2, 8, 4, 4), "no_such_dtype")])

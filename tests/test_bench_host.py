"""Host cost: what is timed is fused and launched as the rows say, and what takes too long is a fault."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import fusedres
from fusedres.benchmarks import host
from fusedres.benchmarks.record import Row
from fusedres.benchmarks.timing import Step, processor_time

CPU = torch.device("cpu")
CALL, CHAIN, *NETWORKS = host.SUBJECTS


class Busy(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x, residual=None):
        end = time.thread_time() + 0.005
        while time.thread_time() < end:
            pass
        return self.module(x, residual)


@pytest.mark.compiler
def test_a_call_that_is_busy_is_a_fault():
    modules = host.forms(CALL)
    modules[host.ATEN] = Busy(modules[host.ATEN])
    rows = host.compare(CALL, modules, "step", CPU, seconds=0.0)
    assert [row.provider for row in rows] == ["eager", host.ATEN, host.TRITON]
    assert any(f"call, step, {host.ATEN}: takes " in fault for fault in host.faults(rows))


def host_row(provider: str, minimum: float, p10: float, subject=CALL) -> Row:
    row = Row("host", subject.name, provider, "time_us", "step", median=2 * p10)
    return replace(row, minimum=minimum, p10=p10)


@pytest.mark.parametrize(
    ("row", "faulty"),
    [
        (host_row(host.TRITON, 10.2, 11.1), False),
        (host_row(host.TRITON, 12.0, 11.0), False),  # by one figure only
        (host_row(host.TRITON, 12.0, 13.0), True),
        (host_row(host.ATEN, 12.0, 13.0), True),
        (host_row(host.COMPILE, 12.0, 13.0), False),
    ],
)
def test_a_fault_is_what_takes_too_long_by_both_figures(row, faulty):
    rows = [host_row("eager", 10.0, 11.0), row]
    assert bool(host.faults(rows)) == faulty
    assert not host.faults([row])


@pytest.mark.once
def test_a_network_may_take_a_tenth_longer():
    for subject in NETWORKS:
        eager = host_row("eager", 10.0, 11.0, subject)
        assert not host.faults([eager, host_row(host.TRITON, 11.1, 12.2, subject)])
        assert host.faults([eager, host_row(host.TRITON, 12.0, 13.0, subject)])
        assert host.faults([eager, host_row(host.ATEN, 11.1, 12.2, subject)])


@pytest.mark.parametrize("subject", host.SUBJECTS, ids=lambda subject: subject.name)
def test_host_subjects_are_fused_whole_and_as_wide_as_they_say(subject):
    plain = subject.build()
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert min(norm.num_features for norm in norms) == host.CHANNELS
    if subject is not CALL:
        assert fusedres.fuse_(plain).n_fused == len(norms)
        assert len(norms) == {"chain of 20 tails": 20}.get(subject.name, len(norms))


@pytest.mark.compiler
@pytest.mark.parametrize("stub", [True, False])
def test_the_row_says_what_took_the_launches(stub, monkeypatch):
    if not stub:
        monkeypatch.setattr(host, "why_no_stub", lambda: "there is no C compiler")
    elif host.why_no_stub() is not None:
        pytest.skip(host.why_no_stub())
    rows = host.compare(CHAIN, host.forms(CHAIN), "step", CPU, seconds=0.0)
    told = {row.provider: row.note for row in rows}
    assert told == {
        "eager": "",
        host.ATEN: "",
        host.TRITON: "Triton's own launcher, into a libcuda that does nothing"
        if stub
        else "a stand-in for Triton's driver notes the launches: there is no C compiler",
    }
    assert all(row.minimum <= row.p10 <= row.median for row in rows)


@pytest.mark.once
def test_processor_time_is_not_that_of_who_waits():
    steps = {"waits": Step(lambda i: time.sleep(0.01)), "works": Step(lambda i: sum(range(10**5)))}
    found = processor_time(steps, CPU, seconds=0.0)
    assert found["waits"].minimum < 0.005
    assert 0 < found["works"].minimum <= found["works"].p10 <= found["works"].median


@pytest.mark.once
def test_in_each_turn_everyone_comes_once():
    order: list[str] = []
    steps = {name: Step(lambda i, name=name: order.append(name)) for name in "abc"}
    processor_time(steps, CPU, seconds=0.0, calls=2)
    turns = ["".join(order[i : i + 6]) for i in range(0, len(order), 6)]
    assert {"".join(sorted(turn)) for turn in turns} == {"aabbcc"}
    assert len(set(turns)) > 1

"""What the interpreter of compiled kernels knows of two programs: what an atomic puts in order, and what is a race."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fusedres.benchmarks.ptx.decode import Unknown
from fusedres.benchmarks.ptx.driver import Emulator, Options

pytestmark = pytest.mark.once

# A program of 64 threads. %rd4: a thread's word of the data, %rd5: the word of the thread that is its mirror image;
# %rd2 and %rd3 are two tickets; %p1: the first thread.
HEAD = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u64 k_param_2) .reqntid 64
{
.reg .pred %p<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
ld.param.b64 %rd1, [k_param_0]; ld.param.b64 %rd2, [k_param_1]; ld.param.b64 %rd3, [k_param_2];
mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x; setp.eq.s32 %p1, %r2, 0; mov.b32 %r9, 7;
mul.wide.u32 %rd4, %r2, 4; add.s64 %rd4, %rd1, %rd4;
sub.s32 %r3, 63, %r2; mul.wide.u32 %rd5, %r3, 4; add.s64 %rd5, %rd1, %rd5;
"""
WRITE, READ, READ_OTHERS = (
    "st.global.b32 [%rd4], %r2;", "ld.global.b32 %r9, [%rd4];", "ld.global.cg.b32 %r9, [%rd5];"
)  # fmt: skip
BARRIER = "bar.sync 0;"


def take(how: str = "gpu.acq_rel", at: str = "%rd2", who: str = "@%p1 ") -> str:
    return f"{who}atom.global.{how}.add.u32 %r8, [{at}], 1;"


def run(*bodies: str, order: int = 0, **tensors: torch.Tensor) -> SimpleNamespace:
    """A program a body: the kinds of what was wrong, and what is in memory."""
    given = {
        "data": torch.zeros(64, dtype=torch.int32),
        "first": torch.zeros(1, dtype=torch.int32),
        "second": torch.zeros(1, dtype=torch.int32),
    } | tensors
    machine = Emulator(80)
    machine.options = Options(order=order)
    branches = [f"setp.eq.s32 %p2, %r1, {i}; @%p2 bra $P{i};\n" for i in range(len(bodies))]
    programs = [f"$P{i}:\n{body}\nret;\n" for i, body in enumerate(bodies)]
    text = HEAD + "".join(branches + programs) + "}\n"
    values = [("*i32", tensor) for tensor in given.values()]
    machine.run("k", text, (len(bodies), 1, 1), 0, values)
    errors = machine.launches[0].errors
    return SimpleNamespace(kinds={error.split(": ")[1] for error in errors}, **given)


LEAVE = WRITE + BARRIER + take()
ORDERED = {
    "a barrier, a release, an acquire, a barrier": (LEAVE, take() + BARRIER + READ_OTHERS),
    "and what is written then": (LEAVE, take() + BARRIER + WRITE),
    "a write after a read": (READ_OTHERS + BARRIER + take(), take() + BARRIER + WRITE),
    "a release and an acquire by their names": (
        WRITE + BARRIER + take("gpu.release"), take("gpu.acquire") + BARRIER + READ_OTHERS,
    ),
    "of the whole system": (
        WRITE + BARRIER + take("sys.acq_rel"), take("sys.acq_rel") + BARRIER + READ_OTHERS,
    ),
    "a thread by itself": ("@%p1 " + WRITE + take(), take() + "@%p1 " + READ),
    "over a third program": (
        LEAVE, take() + BARRIER + take(at="%rd3"), take(at="%rd3") + BARRIER + READ_OTHERS
    ),
    "over a thread of a third program": (
        LEAVE, take() + take(at="%rd3"), take(at="%rd3") + BARRIER + READ_OTHERS
    ),
    "past a relaxed one": (LEAVE, take("gpu.relaxed"), take() + BARRIER + READ_OTHERS),
    "past another that releases": (LEAVE, take(), take() + BARRIER + READ_OTHERS),
    "atomics alone": (take("gpu.relaxed"), take("gpu.relaxed", who="")),
    "reads alone": (READ_OTHERS, READ, READ_OTHERS),
}  # fmt: skip


@pytest.mark.parametrize("what", ORDERED)
def test_what_is_ordered_is_no_race(what):
    assert run(*ORDERED[what]).kinds == set()


RACES = {
    "no atomic": (WRITE, READ_OTHERS),
    "a barrier alone": (WRITE + BARRIER, BARRIER + READ_OTHERS),
    "neither releases nor acquires": (
        WRITE + BARRIER + take("gpu.relaxed"), take("gpu.relaxed") + BARRIER + READ_OTHERS
    ),
    "nothing said": (WRITE + BARRIER + take("gpu"), take("gpu") + BARRIER + READ_OTHERS),
    "no release": (WRITE + BARRIER + take("gpu.acquire"), take() + BARRIER + READ_OTHERS),
    "no acquire": (LEAVE, take("gpu.release") + BARRIER + READ_OTHERS),
    "a release of its own program": (
        WRITE + BARRIER + take("cta.acq_rel"), take() + BARRIER + READ_OTHERS
    ),
    "an acquire of its own program": (LEAVE, take("cta.acq_rel") + BARRIER + READ_OTHERS),
    "another ticket": (LEAVE, take(at="%rd3") + BARRIER + READ_OTHERS),
    "no barrier before the release": (WRITE + take(), take() + BARRIER + READ_OTHERS),
    "no barrier after the acquire": (LEAVE, take() + READ_OTHERS),
    "written after the release": (take() + WRITE, take() + BARRIER + READ_OTHERS),
    "written after the release, behind a barrier": (
        take() + BARRIER + WRITE, take() + BARRIER + READ_OTHERS
    ),
    "a thread by itself, after its release": (take() + "@%p1 " + WRITE, take() + "@%p1 " + READ),
    "read before the acquire": (LEAVE, READ_OTHERS + take() + BARRIER),
    "written after others read": (READ_OTHERS, WRITE),
    "written after another read, which did not release": (
        READ_OTHERS + BARRIER + take(), READ_OTHERS, take() + BARRIER + WRITE
    ),
    "past a relaxed one, what it wrote itself": (
        take(), WRITE + BARRIER + take("gpu.relaxed"), take() + BARRIER + READ_OTHERS
    ),
    "another program acquired": (LEAVE, take() + BARRIER, READ_OTHERS),
    "an atomic and a store": (take(), "@%p1 st.global.b32 [%rd2], %r9;"),
    "an atomic and a load": (take(), "ld.global.b32 %r9, [%rd2];"),
    "atomics of their own programs": (take("cta.relaxed"), take()),
}  # fmt: skip


@pytest.mark.parametrize("what", RACES)
def test_what_is_not_ordered_is_a_race(what):
    assert run(*RACES[what]).kinds == {"race in global memory"}


@pytest.mark.parametrize(("order", "seen"), [(0, 1), (1, 0)])
def test_programs_run_first_to_last_or_last_to_first(order, seen):
    """Whoever is second finds what the other added."""
    body = take() + "@%p1 st.global.b32 [%rd3], %r1;"
    found = run(body, body, order=order)
    assert (found.first.item(), found.second.item()) == (2, seen)


def test_programs_run_in_an_order_that_is_drawn():
    bodies = [f"@%p1 st.global.b32 [%rd1+{4 * i}], 1;" + take("gpu.relaxed") for i in range(16)]
    ticket = "@%p1 atom.global.add.u32 %r8, [%rd2], 1; @%p1 st.global.b32 [%rd1+{}], %r8;"
    bodies = [ticket.format(4 * i) for i in range(16)]
    drawn, again = (run(*bodies, order=2).data[:16].tolist() for _ in range(2))
    assert sorted(drawn) == list(range(16))
    assert (drawn == again, drawn != list(range(16))) == (True, True)


# operation -> what the 64 threads of a program make of 5 in memory, each with its own number
VALUES = {
    "add.u32": 5 + sum(range(64)), "add.s32": 5 + sum(range(64)), "min.s32": 0, "max.u32": 63,
    "and.b32": 0, "or.b32": 63, "xor.b32": 5,
}  # fmt: skip


@pytest.mark.parametrize("head", ["atom", "red"])
@pytest.mark.parametrize("operation", VALUES)
def test_values(operation, head):
    result = "%r8, " if head == "atom" else ""
    five = torch.full((1,), 5, dtype=torch.int32)
    found = run(f"{head}.global.{operation} {result}[%rd2], %r2;", first=five)
    assert (found.first.item(), found.kinds) == (VALUES[operation], set())


@pytest.mark.parametrize(
    ("operation", "value", "after"),
    [("min.s32", -3, -3), ("min.u32", -3, 5), ("max.s32", -3, 5), ("add.u64", -3, 2), ("max.s64", 9, 9)],
)  # fmt: skip
def test_signs_and_widths(operation, value, after):
    bits = int(operation[-2:])
    five = torch.full((1,), 5, dtype=getattr(torch, f"int{bits}"))
    register = {32: "%r8", 64: "%rd8"}[bits]
    found = run(
        f"mov.b{bits} {register}, {value}; @%p1 red.global.gpu.{operation} [%rd2], {register};", first=five
    )  # fmt: skip
    assert found.first.item() == after


def test_each_gets_what_was_there():
    """The lanes of a warp take turns."""
    body = "atom.global.add.u32 %r8, [%rd2], 2; st.global.b32 [%rd4], %r8;"
    assert torch.equal(run(body).data, 2 * torch.arange(64, dtype=torch.int32))


def test_an_atomic_outside_of_its_tensors():
    assert run("@%p1 atom.global.add.u32 %r8, [%rd2+4], 1;").kinds == {"out of bounds"}


@pytest.mark.parametrize(
    "text",
    [
        "atom.global.add.f32 %r8, [%rd2], %r9;",  # sums would depend on the order
        "atom.global.cas.b32 %r8, [%rd2], %r9, %r2;",
        "atom.shared.add.u32 %r8, [%rd2], 1;",
        "atom.global.cluster.add.u32 %r8, [%rd2], 1;",
        "red.global.gpu.relaxed.v2.f32.add [%rd2], {%r8, %r9};",
    ],
)
def test_an_atomic_that_is_not_known_is_named(text):
    with pytest.raises(Unknown, match=text.split()[0]):
        run(text)

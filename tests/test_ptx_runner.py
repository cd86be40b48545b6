"""The interpreter of compiled kernels, on PTX written by hand: what it computes, what it counts, and what it finds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fusedres.benchmarks.ptx import build
from fusedres.benchmarks.ptx.decode import COLLECTIVE, NUMBER, OPERATIONS, SECTIONS, Unknown, decode
from fusedres.benchmarks.ptx.driver import Emulator, Options
from fusedres.benchmarks.ptx.instructions import LANEWISE

pytestmark = pytest.mark.once

# Two warps: a is read at %rd4, b is written at %rd5; %r5 and %r7 are a thread's words in shared memory, in order and
# in reverse.
HEAD = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u32 k_param_2) .reqntid 64
{
.reg .pred %p<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>; .reg .b16 %rs<9>;
ld.param.b64 %rd1, [k_param_0]; ld.param.b64 %rd2, [k_param_1]; ld.param.b32 %r1, [k_param_2];
mov.u32 %r2, %tid.x; mul.wide.u32 %rd3, %r2, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
mov.b32 %r3, global_smem; shl.b32 %r4, %r2, 2; add.s32 %r5, %r3, %r4; xor.b32 %r6, %r4, 252; add.s32 %r7, %r3, %r6;
"""
LOAD, STORE = "ld.global.b32 %r8, [%rd4];", "st.global.b32 [%rd5], %r9;"
LANE = torch.arange(64, dtype=torch.int32)


def run(body, shared=8192, **options):
    """The tensors, the launch, and the kinds of what was wrong."""
    machine = Emulator(80)
    machine.options = Options(**options)
    a, b = torch.arange(100, 164, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    values = [("*i32", a), ("*i32", b), ("i32", 7)]
    machine.run("k", HEAD + body + "\nret;\n}\n", (1, 1, 1), shared, values)
    launch = machine.launches[0]
    kinds = {error.split(": ")[1] for error in launch.errors}
    return SimpleNamespace(a=a, b=b, launch=launch, kinds=kinds)


VALUES = {
    "prmt.b32 %r9, 0x33221100, 0x77665544, 0x7531": 0x77553311,
    "bfe.u32 %r9, 0xabcd, 4, 8": 0xBC,
    "bfe.s32 %r9, 0xabcd, 4, 8": -0x44,
    "shr.s32 %r9, -8, 40": -1,
    "shl.b32 %r9, 1, 32": 0,
    "div.s32 %r9, -7, 2": -3,
    "rem.s32 %r9, -7, 2": -1,
    "lop3.b32 %r9, 12, 10, 6, 0x96": 12 ^ 10 ^ 6,
    "max.f32 %r9, 0f7FC00000, 0f3F800000": 0x3F800000,
    "max.f32 %r9, 0f80000000, 0f00000000": 0,
    "cvt.rn.bf16x2.f32 %r9, 0f3F808000, 0f3F818000": 0x3F803F82,
    "cvt.rna.tf32.f32 %r9, 0f3F801000": 0x3F802000,
    "cvt.rzi.s32.f32 %r9, 0fC0200000": -2,
    "cvt.s32.s8 %r9, 0x180": -128,
    "fma.rn.f32 %r9, 0f3F800001, 0f3F800001, 0fBF800002": 0x28800000,
    "mul.ftz.f32 %r9, 0f00000001, 0f3F800000": 0,
    "mad.lo.s32 %r9, 3, -4, 5": -7,
}


@pytest.mark.parametrize("text", VALUES)
def test_values(text):
    assert run(f"{text}; {STORE}").b[0] == VALUES[text]


def test_a_conversion_reads_the_lower_half_of_a_wider_register():
    text = "add.s64 %rd6, %rd3, 4294967292; cvt.s64.s32 %rd7, %rd6; cvt.u32.u64 %r9, %rd7;"
    assert torch.equal(run(f"{text} {STORE}").b, 4 * LANE - 4)


def test_another_width_than_an_instruction_has_is_not_known():
    with pytest.raises(Unknown, match="%rd3 is no register for u32"):
        run(f"add.s32 %r9, %r2, %rd3; {STORE}")


SHUFFLES = {
    "bfly.b32 %r9, %r2, 5, 31": LANE ^ 5,
    "up.b32 %r9, %r2, 2, 0": torch.where(LANE % 32 < 2, LANE, LANE - 2),
    "down.b32 %r9, %r2, 3, 31": torch.where(LANE % 32 > 28, LANE, LANE + 3),
    "idx.b32 %r9, %r2, 9, 7199": LANE // 4 * 4 + 1,  # segments of four lanes
}


@pytest.mark.parametrize("text", SHUFFLES)
def test_shuffles(text):
    assert torch.equal(run(f"shfl.sync.{text}, -1; {STORE}").b, SHUFFLES[text])


@pytest.mark.parametrize(("operation", "expected"), [("add", 496), ("max", 31), ("xor", 0)])
def test_a_reduction_of_a_warp(operation, expected):
    text = f"and.b32 %r10, %r2, 31; redux.sync.{operation}.s32 %r9, %r10, -1; {STORE}"
    assert run(text).b.unique().tolist() == [expected]


SWAP = "st.shared.b32 [%r5], %r8; {} ld.shared.b32 %r9, [%r7];"


def test_values_pass_through_shared_memory():
    found = run(LOAD + SWAP.format("bar.sync 0;") + STORE)
    assert (found.kinds, found.b.tolist()) == (set(), found.a.flip(0).tolist())


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_missing_barrier(order):
    found = run(LOAD + SWAP.format("") + STORE, order=order)
    assert found.kinds & {"uninitialised shared memory", "race in shared memory"}


COPY = "cp.async.ca.shared.global [%r5+0], [%rd4+0], 0x4, {}; cp.async.commit_group; {} {} ld.shared.b32 %r9, [%r7];"
WAIT, BARRIER = "cp.async.wait_group 0;", "bar.sync 0;"


def test_an_asynchronous_copy():
    found = run(COPY.format(4, WAIT, BARRIER) + STORE)
    assert (found.kinds, found.b.tolist()) == (set(), found.a.flip(0).tolist())


def test_an_asynchronous_copy_fills_up_with_zeros():
    assert run(COPY.format(0, WAIT, BARRIER) + STORE).b.tolist() == [0] * 64


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"], ids=["none", "for one too few"])
def test_an_asynchronous_copy_that_is_not_waited_for(wait):
    assert "a copy not waited for" in run(COPY.format(4, wait, BARRIER) + STORE).kinds


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_asynchronous_copy_without_a_barrier(order):
    found = run(COPY.format(4, WAIT, "") + STORE, order=order)
    assert found.kinds & {
        "race in shared memory", "a copy not waited for", "uninitialised shared memory"
    }  # fmt: skip


WRONG = {
    "past the end": ("ld.global.b32 %r9, [%rd4+256];" + STORE, "out of bounds"),
    "before the start": ("ld.global.b32 %r9, [%rd4+-4];" + STORE, "out of bounds"),
    "misaligned": ("ld.global.v2.b32 {%r9, %r8}, [%rd4];" + STORE, "misaligned"),
    "all store at one place": ("mov.b32 %r9, 1; st.global.b32 [%rd2], %r9;", "race in global memory"),
    "past the end of shared memory": ("st.shared.b32 [%r5+8192], %r2;", "outside shared memory"),
    "a barrier of some lanes": (
        "setp.lt.s32 %p1, %r2, 7; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 1; $B: ret;",
        "divergence at a collective",
    ),
    "two barriers": (
        "setp.lt.s32 %p1, %r2, 32; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 1; $B: ret;", "deadlock"
    ),
    "an endless loop": ("$L: bra $L;", "too long"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what):
    body, kind = WRONG[what]
    assert kind in run(body, limit=10_000).kinds


def test_what_is_wrong_is_named_with_its_place():
    body = '.file 1 "/home/kernel.py"\n.loc 1 42 0\nld.global.b32 %r9, [%rd4+256];' + STORE
    (error,) = run(body).launch.errors
    assert error.startswith(
        "k kernel.py:42: out of bounds: ld.global.b32 %r9, [%rd4+256] (block 0, thread 0,"
    )


def test_lanes_that_come_to_a_collective_first_wait_for_the_others():
    body = (
        "mov.b32 %r9, 1; setp.lt.s32 %p1, %r2, 7; @%p1 bra $A;"
        "$B: shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1; bra $C; $A: mov.b32 %r9, 2; bra $B; $C: "
    )
    assert run(body + STORE).b[:9].tolist() == [2] * 6 + [1, 2, 1]


def test_lanes_leave_a_loop_at_different_times():
    """Lane l adds up the numbers below l, and then all take a shuffle."""
    body = (
        "mov.b32 %r9, 0; mov.b32 %r10, 0;"
        "$L: setp.ge.s32 %p1, %r10, %r2; @%p1 bra $E; add.s32 %r9, %r9, %r10; add.s32 %r10, %r10, 1; bra $L;"
        "$E: shfl.sync.idx.b32 %r11, %r2, 3, 31, -1; add.s32 %r9, %r9, %r11;"
    )
    assert torch.equal(run(body + STORE).b, LANE * (LANE - 1) // 2 + LANE // 32 * 32 + 3)


# (requests, units, the fewest) of two warps
COUNTS = {
    "neighbours": (LOAD, "ld.global", (2, 8, 8)),
    "all lanes at one place": ("ld.global.b32 %r8, [%rd1];", "ld.global", (2, 2, 8)),
    "shared, neighbours": ("st.shared.b32 [%r5], %r2;", "st.shared", (2, 2, 2)),
    "shared, one bank": (
        "shl.b32 %r10, %r2, 7; add.s32 %r10, %r10, %r3; st.shared.b32 [%r10], %r2;", "st.shared", (2, 64, 2)
    ),
    "shared, 16 bytes a lane": (
        "shl.b32 %r10, %r2, 4; add.s32 %r10, %r10, %r3; st.shared.v4.b32 [%r10], {%r2, %r2, %r2, %r2};",
        "st.shared", (2, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COUNTS)
def test_counts(what):
    body, opcode, expected = COUNTS[what]
    assert run(body).launch.memory(opcode) == expected


# Matrix products with the fragment layouts written out here as the manual's formulas: row and column of each value.
def test_a_product_of_a_warp():
    """mma.m16n8k8 with tf32: A[r, c] = r + c where r, c < 8 (else 0), B the unit matrix, C = 0."""
    body = (
        "and.b32 %r10, %r2, 31; shr.u32 %r11, %r10, 2; and.b32 %r12, %r10, 3;"  # group, lane in it
        "add.s32 %r13, %r11, %r12; cvt.rn.f32.s32 %r14, %r13; add.s32 %r13, %r13, 4; cvt.rn.f32.s32 %r15, %r13;"
        "mov.b32 %r16, 0; setp.eq.s32 %p1, %r12, %r11; selp.b32 %r17, 0f3F800000, 0, %p1;"
        "add.s32 %r18, %r12, 4; setp.eq.s32 %p2, %r18, %r11; selp.b32 %r19, 0f3F800000, 0, %p2;"
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r14, %r16, %r15, %r16},"
        " {%r17, %r19}, {%r16, %r16, %r16, %r16};"
        "cvt.rni.f32.f32 %r20, %r20; cvt.rzi.s32.f32 %r9, %r20;"
    )
    lane = LANE % 32
    # The first value of a lane is row lane / 4, column 2 * (lane % 4).
    assert torch.equal(run(body + STORE).b, lane // 4 + lane % 4 * 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::ld.sync.aligned"),
        ("mbarrier.test_wait.shared.b64 %p1, [%r5], %rd1;", "mbarrier.test_wait.shared.b64"),
        ("bar.sync 1, 32;", "a barrier of some warps"),
        (".local .align 4 .b8 stack[8]; mov.u64 %rd4, stack;", "local memory"),
    ],
    ids=["tcgen05", "mbarrier", "barrier of some warps", "local memory"],
)
def test_an_instruction_that_is_not_known_is_named(text, named):
    with pytest.raises(Unknown, match=named):
        run(text)


def test_local_memory_that_nothing_uses_is_none():
    assert torch.equal(run(".local .align 4 .b8 stack[8]; mov.b32 %r9, 7;" + STORE).b, LANE * 0 + 7)


def test_every_instruction_names_its_section():
    sections = [SECTIONS.get(name) for name in SECTIONS] + [
        LANEWISE[name].section for name in LANEWISE
    ]
    assert all(section.endswith(("Instructions", "Registers")) for section in sections)


def test_every_operation_has_a_number_of_its_own():
    assert (len(NUMBER), set(range(len(OPERATIONS))) >= COLLECTIVE) == (len(OPERATIONS), True)


def test_what_is_decoded_is_kept_by_its_text():
    ptx = HEAD + STORE + "ret;\n}\n"
    decode.cache_clear()
    first = decode(ptx)
    decode.cache_clear()
    again = decode(ptx)  # from the disk
    assert (first is not again, bytes(first.code) == bytes(again.code)) == (True, True)


def test_without_gcc_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="needs gcc"):
        build._compile({})

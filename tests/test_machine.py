"""The model of what bounds a pass: what is planted in a kernel is found in its machine code, and known rows stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fusedres.benchmarks import compiled, machine, sass
from fusedres.benchmarks.code import Target
from fusedres.benchmarks.compile_only import Launch, Operand, compile_only
from fusedres.benchmarks.floors import OPERATORS
from fusedres.benchmarks.record import Book
from fusedres.benchmarks.report import write_page
from fusedres.benchmarks.sass import Instruction, Listing, Steady, steady

pytestmark = pytest.mark.compiler

BLOCK, WARPS = 1024, 4
FIRST = (256, 256, 56, 56)


@triton.jit
def walk_kernel(
    p_x, p_y, n, programs, step, DIVIDE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y <- x + x, a block a time; then, MASKED, what is left over."""
    for i in tl.range(tl.program_id(0), n // BLOCK, programs, num_stages=1):
        o = i * BLOCK + tl.arange(0, BLOCK) * step
        b_x = tl.load(p_x + o).to(tl.float32)
        b_y = b_x / (b_x + 3.0) if DIVIDE else b_x + b_x
        tl.store(p_y + o, b_y.to(tl.bfloat16))
    if MASKED:
        for i in tl.range(n // BLOCK, tl.cdiv(n, BLOCK), num_stages=1):
            o = i * BLOCK + tl.arange(0, BLOCK) * step
            b_x = tl.load(p_x + o, mask=o < n, other=0.0).to(tl.float32)
            tl.store(p_y + o, tl.sqrt_rn(b_x / (b_x + 5.0)).to(tl.bfloat16), mask=o < n)


@triton.jit
def straight_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    tl.store(p_y + o, b_x / tl.sum(b_x, axis=0))


def straight(block: int = BLOCK, warps: int = WARPS) -> Launch:
    x = torch.empty(1 << 20)
    with compile_only(90) as launches:
        straight_kernel[(64,)](
            x, torch.empty_like(x), block, num_warps=warps, enable_fp_fusion=True
        )
        return launches[0]


def walked(step: int = 1, divide: bool = False, masked: bool = False) -> Launch:
    x = torch.empty(1 << 20, dtype=torch.bfloat16)
    with compile_only(90) as launches:
        walk_kernel[(132,)](
            x, torch.empty_like(x), x.numel(), 132, step, divide, masked, BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return launches[0]


def an_element(launch: Launch) -> float:
    return steady(launch.cubin).instructions * 32 * launch.warps / launch.arguments["BLOCK"]


# --- the reader ------------------------------------------------------------------------------------------------------


def test_a_launch_tells_its_arguments():
    told = walked().arguments
    assert (told["p_x"], told["p_x"].bytes) == (Operand(1 << 20, 2), 2 << 20)
    assert (told["programs"], told["DIVIDE"], told["BLOCK"]) == (132, False, BLOCK)


def test_the_loop_is_found_and_reads_vectors():
    loop = steady(walked().cubin)
    assert loop.looped
    assert (loop.widths("load"), loop.widths("store")) == ({128: 1}, {128: 1})
    a_thread = BLOCK // (32 * WARPS)
    assert (loop.bytes("load"), loop.bytes("store")) == (2 * a_thread, 2 * a_thread)
    assert loop.pipes["unknown"] == 0


def test_a_division_costs_instructions_and_special_functions():
    plain, divided = walked(), walked(divide=True)
    assert an_element(divided) > an_element(plain) + 5
    assert (
        steady(divided.cubin).pipes["xu"] >= BLOCK // (32 * WARPS) > steady(plain.cubin).pipes["xu"]
    )


def test_values_that_do_not_lie_together_are_read_two_bytes_at_a_time():
    loop = steady(walked(step=3).cubin)
    a_thread = BLOCK // (32 * WARPS)
    assert (loop.widths("load"), loop.widths("store")) == ({16: a_thread}, {16: a_thread})
    assert loop.wavefronts == 2 * a_thread


def test_the_loop_of_whole_tiles_is_taken_before_that_of_partial_ones():
    assert an_element(walked(masked=True)) == pytest.approx(an_element(walked()), abs=0.5)


def test_a_spill_is_seen():
    """16384 values in one warp are 512 a thread; there are 255 registers."""
    assert (straight().code.spills, straight(1 << 14, 1).code.spills > 0) == (0, True)


def test_a_kernel_without_a_loop_is_taken_whole():
    body = steady(straight().cubin)
    assert not body.looped
    assert (body.widths("load"), body.widths("store")) == ({128: 2}, {128: 2})


def code(*lines: str) -> list[Instruction]:
    return [Instruction(*line.split("|")) for line in lines]


def test_the_way_through_a_loop_skips_what_is_rare_and_keeps_every_access():
    """Of two branches the shorter one, but not past an access."""
    listing = Listing(
        tuple(code(
            "|LDG.E.128|R4, [R2]",
            "@P0|BRA|`(.L_fast)", "|MUFU.RCP|R5, R4", "|FADD|R5, R5, 1",  # rare
            "|FADD|R5, R4, R4",  # .L_fast
            "@P1|BRA|`(.L_none)", "|STG.E.128|[R2], R5", "|IADD3|R2, R2, 1",
            "@P2|BRA|`(.L_loop)",  # .L_none
            "|EXIT|",
        )),
        {".L_loop": 0, ".L_fast": 4, ".L_none": 8},
    )  # fmt: skip
    assert list(listing.loops()) == [(0, 8)]
    way = [i.name for i in listing.way(0, 8)]
    assert way == ["LDG", "BRA", "FADD", "BRA", "STG", "IADD3", "BRA"]


@pytest.mark.parametrize(
    ("line", "conditional"),
    [("|BRA|`(.L_1)", False), ("@!P0|BRA|`(.L_1)", True), ("|BRA.U|UP0, `(.L_1)", True),
     ("|BRA|!P1, `(.L_1)", True), ("|BRA.DIV|UR4, `(.L_1)", True)],
)  # fmt: skip
def test_which_branches_may_be_passed(line, conditional):
    (branch,) = code(line)
    assert (branch.target, branch.conditional) == (".L_1", conditional)


def test_cycles_of_the_pipes():
    counted = Steady(sass.Counter({"FFMA": 8, "IMAD.U32": 6, "LOP3.LUT": 5, "MUFU.RCP": 2, "DADD": 1, "LDG.E.128": 1,
                                   "STG.E.U16": 1, "SHFL.BFLY": 1, "NEVER.SEEN": 1}), True)  # fmt: skip
    assert counted.instructions == 26
    assert counted.pipes["unknown"] == 1
    assert counted.wavefronts == 4 + 1 + 1
    assert counted.cycles == {"issue": 26, "alu": 12, "fma": 14, "xu": 16, "fp64": 2, "memory": 24}


# --- the model -------------------------------------------------------------------------------------------------------


def passed(**changed) -> machine.Pass:
    """A pass of 64 instructions of a warp, 16 elements a thread."""
    loop = Steady(sass.Counter({"FADD": 64}), True)
    told: dict[str, Any] = {
        "kernel": "bn_stats", "elements": 1 << 24, "tile": 2048, "read": 2.0, "written": 0.0, "warps": 4,
        "registers": 64, "spills": 0, "resident": 4, "programs": 528, "tiles": 2, "steady": loop,
    }  # fmt: skip
    return machine.Pass(**told | changed)


def test_bytes_in_flight_that_latency_asks_for():
    assert machine.bytes_needed("H100") == pytest.approx(17.8e3, rel=0.01)
    assert machine.bytes_needed("H200") == pytest.approx(25.5e3, rel=0.01)


def test_figures_of_a_pass():
    of = passed()
    assert (of.a_thread, of.instructions, of.rounds, of.limiter) == (16, 4, 1, "issue")
    assert of.in_flight == 4 * 2 * 2048 * 2
    # 2 programs a multiprocessor are all there are.
    assert passed(programs=264).in_flight == 2 * 2 * 2048 * 2
    # 4 instructions / 32 lanes / (4 * 132 * 1.7 GHz) over 2 bytes / (0.9 * 4.8 TB/s)
    assert of.ratio("H200") == pytest.approx(4 / 32 / (4 * 132 * 1.7e9) / (2 / (0.9 * 4.8e12)))
    assert of.ratio("H200") / of.ratio("H100") == pytest.approx(4.8 / 3.35)


def target(
    kernel: str, dtype: str = "bfloat16", layout: str = "channels_last", shape=FIRST
) -> Target:
    return Target(90, kernel, "here", shape, dtype, layout)


@pytest.mark.parametrize("kernel", machine.SHAPES)
def test_the_passes_move_what_the_operator_has_to(kernel):
    """Bytes by the launches' arguments: together the floors; and each pass's loads are those of its loop."""
    wanted = target(kernel)
    found = [
        p.of
        for p in machine.places(wanted, machine.code.compile_target(wanted, machine.FINALISING))
    ]
    names = [of.kernel for of in found]
    assert names == ["bn_stats"] * (1 + OPERATORS[kernel].residual_norm) + [
        "bn_apply",
        "bn_grad_reduce",
        "bn_grad_apply",
    ]
    assert sum(of.bytes for of in found) == pytest.approx(OPERATORS[kernel].bytes("step", FIRST, 2))
    for of in found:
        assert of.steady.looped
        assert of.steady.pipes["unknown"] == 0
        # A byte of the mask may be read by more than one thread.
        assert of.steady.bytes("load") / of.a_thread == pytest.approx(of.read, abs=0.3)
        assert of.steady.bytes("store") / of.a_thread == pytest.approx(of.written, abs=0.3)


def test_a_finalising_step_is_no_pass():
    wanted = target("bn_relu")
    every = machine.code.compile_target(wanted)
    assert len(every) == 6
    assert len(list(machine.places(wanted, every))) == 4


def test_a_kernel_is_left_out_by_its_name():
    """Not one that another test has compiled: no other block is 512 long."""
    x = torch.empty(1 << 10)
    for without, launched in ((["straight_kernel"], 0), ([], 1)):
        with compile_only(90, without) as launches:
            straight_kernel[(2,)](
                x, torch.empty_like(x), 512, num_warps=WARPS, enable_fp_fusion=True
            )
            assert len(launches) == launched


def test_the_same_code_on_as_many_values_comes_once():
    fork = [target("bn_add_relu"), target("bn_add_relu_fork")]
    tail, rest = ([p.of.kernel for p in found] for found in machine.survey(fork))
    assert tail == ["bn_stats", "bn_apply", "bn_grad_reduce", "bn_grad_apply"]
    assert rest == ["bn_grad_reduce", "bn_grad_apply"]


def test_every_shape_of_a_resnet50():
    wanted = machine.sites()
    assert len(wanted) == len(set(wanted)) == 3 * 2 * 2 * (8 + 4 + 4 + 4)
    assert {t.shape[0] for t in wanted} == {32, 256}


def test_the_table_says_that_nothing_was_run(capsys):
    machine.main(["bn_relu", "--size", "56", "--dtype", "bfloat16", "--layout", "channels_last"])
    first, head, *lines = capsys.readouterr().out.splitlines()
    assert "modelled for sm_90, nothing was run" in first
    assert head.split("\t")[:2] == ["operator", "shape"]
    assert [line.split("\t")[:5] for line in lines] == [
        ["bn_relu", f"256x{channels}x56x56", "bfloat16", "channels_last", kernel]
        for channels in (64, 128)
        for kernel in ("bn_stats", "bn_apply", "bn_grad_reduce", "bn_grad_apply")
    ]


def test_the_page_has_a_line_for_shapes_with_the_same_figures(tmp_path):
    """Beside the facts, and with a fused operator's passes next to torch.compile's."""
    shapes = [(256, 256, 56, 56), (256, 512, 28, 28)]
    places = [machine.Place(target("bn_add_relu", shape=shape), passed()) for shape in shapes]
    slower = passed(kernel="forward: red_0", resident=1)
    other = machine.Place(target("bn_add_relu", shape=shapes[0]), slower)
    book = Book.open(tmp_path, {})
    book.add(machine.rows_of(places))
    book.add(machine.rows_of([other], "compile"))
    page = write_page(book)[0].read_text()
    assert "## Machine code, modelled" in page
    assert "no figure is a time that a GPU took" in page
    assert "17.8 on an H100, 25.5 on an H200" in page
    assert "## Machine code\n" not in page
    first, second = (line for line in page.splitlines() if "bfloat16" in line)
    where = "N256-C256-H56-W56, N256-C512-H28-W28"
    assert first.startswith(
        f"| BN + add + ReLU | bfloat16 | channels_last | fusedres | bn_stats | {where} | 2.00 | 4.0 |"
    )
    assert second.startswith(
        "| BN + add + ReLU | bfloat16 | channels_last | compile | forward: red_0 | N256-C256-H56-W56 |"
    )


def test_rows_tell_pipes_and_widths():
    loop = Steady(sass.Counter({"FADD": 48, "LOP3.LUT": 14, "LDG.E.128": 2}), True)
    rows = {
        row.metric: row
        for row in machine.rows_of([machine.Place(target("bn"), passed(steady=loop))])
    }
    assert set(rows) == set(machine.METRICS)
    told = "alu 0.9, fp 3.0, memory 0.1; limit: issue; loads 2x128; stores none"
    assert rows["instructions_an_element"].note == told
    assert {row.mode for row in rows.values()} == {machine.MODE}


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_the_kernels_of_torch_compile():
    """Passes and bytes as its schedule has them; its statistics take more instructions than ours."""
    found = [place.of for place in compiled.inductor_passes(target("bn_add_relu"))]
    names = [of.kernel.split("_")[0] for of in found]
    assert names == [
        "forward: red",
        "forward: poi",
        "backward: poi",
        "backward: red",
        "backward: poi",
    ]
    moved = [of.read + of.written for of in found]
    assert moved == pytest.approx([2, 7, 5, 4, 6], abs=0.05)
    assert [of.spills for of in found] == [0] * 5
    assert [of.steady.looped for of in found] == [name.endswith("red") for name in names]
    (stats,) = (
        p.of
        for p in machine.places(
            target("bn_relu"), machine.code.compile_target(target("bn_relu"))[:1]
        )
    )
    assert found[0].instructions > 1.5 * stats.instructions

"""The bench's level `executed`: compiled kernels, run in the interpreter of their PTX, and what is counted then."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fusedres.benchmarks import executed
from fusedres.benchmarks.ptx import counts, emulated
from fusedres.benchmarks.traffic import Site
from fusedres.cli.main import main

pytestmark = pytest.mark.once
IS_OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def bench(folder: Path, *arguments: str) -> int:
    level = ["bench", "--device", "cpu", "--level", "executed", "--quick"]
    return main([*level, "--out", str(folder), *arguments])


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


# --- one quick run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("executed")
    assert bench(made) == 0
    return made


KERNELS = [
    f"{name}_kernel in bn_add_relu"
    for name in ("bn_stats", "bn_finalize", "bn_apply", "bn_grad_reduce", "bn_grad_finalize", "bn_grad_apply")
]  # fmt: skip


def test_every_kernel_has_its_rows(folder):
    found: dict[str, dict] = {}
    for row in results(folder):
        found.setdefault(row["kernel"], {})[row["metric"]] = row["median"]
    assert list(found) == KERNELS
    for figures in found.values():
        classes = [figures[f"{name}_instructions"] for name in (*counts.COMPUTING, *counts.CLASSES)]
        assert figures["instructions"] == pytest.approx(sum(classes))
        assert figures["float_instructions"] > 0
        assert figures["load_sectors"] > 0
        # No bank conflicts; the compiler of an older Triton has some in one kernel (3.6: 2.38).
        most = 2.4 if IS_OLDER else 1.0
        assert 1.0 <= figures.get("shared_load_wavefronts_ratio", 1.0) <= most


def test_the_page_has_a_line_for_each(folder):
    before = results(folder)
    assert bench(folder, "--report") == 0
    page = (folder / "README.md").read_text()
    assert results(folder) == before
    assert "## Machine code, run" in page
    assert all(f"| sm_90 | {name} | bfloat16 | channels_last |" in page for name in KERNELS)


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", executed.ARCHITECTURES)
def test_an_output_is_written_in_whole_sectors(architecture):
    """Without a mask bn_apply stores y only: 16 bytes a lane, so 16 sectors a request, and none twice."""
    target = executed.Target(architecture, Site("bn_relu", (2, 64, 8, 8)))
    rows = [row for of in executed.measure(target) for row in of]
    of_apply = {row.metric: row.median for row in rows if row.kernel == "bn_apply_kernel in bn_relu"}  # fmt: skip
    assert (of_apply["store_sectors"], of_apply["store_sectors_ratio"]) == (16.0, 1.0)


@triton.jit
def scattered_copy_kernel(p_x, p_y, STEP: tl.constexpr, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(p_y + o * STEP, tl.load(p_x + o))


def scatter(x: torch.Tensor, y: torch.Tensor, step: int) -> None:
    scattered_copy_kernel[(4,)](x, y, STEP=step, SIZE=128, num_warps=4, enable_fp_fusion=True)


def copied(step: int) -> dict[str, float]:
    x, y = torch.rand(512), torch.zeros(512 * step)
    with emulated(90) as launches:
        scatter(x, y, step)
    assert torch.equal(y[::step], x)
    return dict(counts.figures(launches, x.numel()))


@pytest.mark.parametrize(("step", "sectors"), [(1, 4), (2, 8), (8, 32)])
def test_scattered_stores_are_seen(step, sectors):
    """A warp's 32 values of 4 bytes fill 4 sectors; eight values apart each lies in one of its own."""
    found = copied(step)
    assert (found["load_sectors"], found["load_sectors_ratio"]) == (4.0, 1.0)
    assert (found["store_sectors"], found["store_sectors_ratio"]) == (sectors, sectors / 4)


def test_a_copy_computes_nothing_and_waits_for_nobody():
    found = copied(1)
    assert (found["float_instructions"], found["barriers"]) == (0, 0)
    assert "shared_load_wavefronts" not in found


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("fma.rn.f32", "float"),
        ("add.bf16x2", "float"),
        ("ex2.approx.ftz.f32", "float"),
        ("mad.wide.u32", "integer"),
        ("and.pred", "integer"),
        ("cvt.rn.bf16x2.f32", "conversion"),
        ("setp.lt.f32", "comparison"),
        ("selp.f32", "move"),
        ("cp.async.cg.shared.global", "memory"),
        ("cp.async.commit_group", "control"),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "tensor_core"),
        ("wgmma.wait_group.sync.aligned", "control"),
    ],
)
def test_classes(opcode, name):
    assert counts.class_of(opcode) == name


# --- where it cannot run ---------------------------------------------------------------------------------------------


def test_a_kernel_that_does_what_it_must_not_has_no_figures(tmp_path, monkeypatch, capsys):
    """Half of what it stores lies behind the end of its output."""
    monkeypatch.setattr(executed, "_run", lambda site: scatter(torch.rand(512), torch.zeros(256), 1))  # fmt: skip
    assert bench(tmp_path) == 0
    (row,) = results(tmp_path)
    assert row["note"].startswith("failed: Faulty: scattered_copy_kernel test_bench_executed.py:")
    assert "out of bounds" in row["note"]


def absent(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, executed.PACKAGE, None)


def without_gcc(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.mark.parametrize(
    ("remove", "said"), [(absent, "it needs a checkout"), (without_gcc, "it needs gcc")]
)
def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch, capsys, remove, said):
    remove(monkeypatch)
    assert bench(tmp_path) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if said in line)
    (row,) = results(tmp_path)
    assert line == f"  executed: kernels: {row['note']}"
    assert f"executed: kernels: {row['note']}" in (tmp_path / "README.md").read_text()

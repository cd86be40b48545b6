"""The same launches compile for AMD's gfx942 (MI300), whose warps have 64 lanes, without spilling. Nothing is run."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.benchmarks.amd import NAMES, CodeObject, read_code_object
from fusedres.benchmarks.compile_only import SHARED_MEMORY, Launch, compile_only
from fusedres.benchmarks.floors import OPERATORS
from fusedres.benchmarks.traffic import backward_of_two
from fusedres.functional import (
    add_act,
    add_batch_norm_act,
    batch_norm_act,
    dual_batch_norm_act,
    projection_batch_norm_act,
    scaled_add_act,
)
from fusedres.kernels.apply import bn_apply_kernel
from fusedres.kernels.chip import current_chip
from fusedres.kernels.launch import REDUCING, choose_tile
from fusedres.kernels.layout import row_map
from fusedres.ops.projection import in_triton, precision

pytestmark = pytest.mark.compiler

CHIP = "gfx942"
NHWC, NCHW = torch.channels_last, torch.contiguous_format
# Of a ResNet-50 at batch 256. A contiguous 7x7 map is walked flat.
FIRST, LAST = (256, 256, 56, 56), (256, 2048, 7, 7)


def _vectors(x):
    return [torch.empty(x.shape[1]) for _ in range(4)]


def _fork(name):
    def run(x, residual):
        mean, var, weight, bias = _vectors(x)
        output = batch_norm_act(x, mean, var, weight, bias, True, residual=residual)
        backward_of_two(OPERATORS[name], output, torch.empty_like(output), torch.empty_like(output))
        return ()

    return run


CASES = {
    "bn": lambda x, r: batch_norm_act(x, *_vectors(x), True),
    "bn eval": lambda x, r: batch_norm_act(x, *_vectors(x), False),
    "add": lambda x, r: batch_norm_act(x, *_vectors(x), True, residual=r),
    "add eval": lambda x, r: batch_norm_act(x, *_vectors(x), False, residual=r),
    "dual": lambda x, r: dual_batch_norm_act(x, r, *_vectors(x), *_vectors(x), True),
    "fork": _fork("bn_add_relu_fork"),
    "strided fork": _fork("bn_add_relu_fork2"),
    "add_act": add_act,
    "scaled": lambda x, r: scaled_add_act(x, r, torch.empty(1).requires_grad_(), activation="relu"),
    "preactivation": lambda x, r: add_batch_norm_act(x, r, *_vectors(x), True),
    "preactivation eval": lambda x, r: add_batch_norm_act(x, r, *_vectors(x), False),
}  # fmt: skip


def launches(run, shape, dtype, layout, architecture=CHIP) -> list[Launch]:
    """Forward and backward; the tensors are never touched."""

    def empty():
        return torch.empty(shape, dtype=dtype, memory_format=layout).requires_grad_()

    leaves = [empty(), empty()]
    with fusedres.backend("triton"), compile_only(architecture) as recorded:
        output = run(*leaves)
        outputs = output if isinstance(output, tuple) else (output,)
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])
        return list(recorded)


def faults(found: list[Launch]) -> dict[str, str]:
    assert found
    return {
        each.kernel: str(each.code_object)
        for each in found
        if each.code_object.spills or each.shared > SHARED_MEMORY[CHIP]
    }


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        pytest.param(FIRST, NHWC, torch.bfloat16, id="first-nhwc-bf16"),
        pytest.param(LAST, NCHW, torch.float32, id="last-nchw-fp32"),
        pytest.param(FIRST, NHWC, torch.float32, id="first-nhwc-fp32", marks=pytest.mark.slow),
        pytest.param(FIRST, NCHW, torch.bfloat16, id="first-nchw-bf16", marks=pytest.mark.slow),
        pytest.param(FIRST, NCHW, torch.float32, id="first-nchw-fp32", marks=pytest.mark.slow),
        pytest.param(LAST, NCHW, torch.bfloat16, id="last-nchw-bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_nothing_spills(case, shape, layout, dtype):
    assert faults(launches(CASES[case], shape, dtype, layout)) == {}


@pytest.mark.by_size
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["bf16", "fp32"]
)  # fmt: skip
def test_nor_does_one_launch_a_direction(dtype, layout):
    """One kernel a direction for all kinds of tails: what the fullest takes, all take."""
    found = launches(CASES["dual"], (32, 2048, 7, 7), dtype, layout)
    assert [each.kernel for each in found] == ["bn_forward_kernel", "bn_backward_kernel"]
    assert faults(found) == {}


@pytest.mark.parametrize("activation", ["gelu", "mish", "silu"])
def test_nor_do_smooth_activations(activation):
    def run(x, r):
        return batch_norm_act(x, *_vectors(x), True, residual=r, activation=activation)

    assert faults(launches(run, FIRST, torch.bfloat16, NHWC)) == {}


def projected(dtype, architecture) -> list[Launch]:
    weight = torch.empty(128, 64, 1, 1, dtype=dtype).requires_grad_()
    shortcut = torch.empty(8, 64, 28, 28, dtype=dtype).to(memory_format=NHWC).requires_grad_()

    def run(x, r):
        return projection_batch_norm_act(
            x, shortcut, weight, *_vectors(x), *_vectors(x), training=True, stride=2
        )

    with in_triton():
        return launches(run, (8, 128, 14, 14), dtype, NHWC, architecture)


def test_the_projection_runs_on_matrix_units():
    found = projected(torch.bfloat16, CHIP)
    assert faults(found) == {}
    assert [each.kernel for each in found].count("projection_kernel") == 2


def test_there_is_no_tf32():
    """So products of float32 are the library's, whatever cuDNN's switch says."""
    assert "projection_kernel" in {each.kernel for each in projected(torch.float32, 90)}
    assert "projection_kernel" not in {each.kernel for each in projected(torch.float32, CHIP)}
    with compile_only(90):
        assert precision(torch.float32) == "tf32"
    with compile_only(CHIP):
        assert precision(torch.float32) == "ieee"


def test_what_the_library_knows_of_the_chip():
    with compile_only(CHIP):
        chip = current_chip()
    assert (chip.backend, chip.warp_size, chip.multiprocessors) == ("hip", 64, 304)
    assert (chip.architecture, chip.shared_memory) == (0, 64 << 10)


def test_a_thread_holds_fewer_rows_where_warps_are_wider():
    """128 threads share a tile of 64 rows by 64 columns on NVIDIA's chips, 256 on AMD's."""
    rows = row_map((256, 256, 56, 56), (256 * 56 * 56, 1, 56 * 256, 256))
    groups = []
    for architecture in (90, CHIP):
        with compile_only(architecture):
            groups.append(choose_tile(rows, 2, REDUCING, current_chip()).group)
    assert groups == [4, 2]


def test_each_launch_is_triton_s_own(monkeypatch):
    """There Triton looks at the size of a tensor too, of which a plan knows nothing."""
    started = []
    run = type(bn_apply_kernel).run

    def counted(self, *arguments, **options):
        started.append(self)
        return run(self, *arguments, **options)

    monkeypatch.setattr(type(bn_apply_kernel), "run", counted)
    case = CASES["bn"]
    first = launches(case, (8, 16, 8, 8), torch.bfloat16, NHWC)
    assert launches(case, (8, 16, 8, 8), torch.bfloat16, NHWC) == first
    assert len(started) == 2 * len(first)


def test_what_a_code_object_tells():
    (first, *_) = launches(CASES["bn"], (8, 16, 8, 8), torch.bfloat16, NHWC)
    found = read_code_object(first.cubin)
    assert 0 < found.vector <= 256
    assert 0 < found.scalar <= 112
    assert (found.matrix, found.spills) == (0, 0)
    values = zip(
        NAMES.values(),
        (b"\x00", b"\x7f", b"\xcc\x80", b"\xcd\x02\x00", b"\x03", b"\x04"),
        strict=True,
    )
    noted = b"".join(bytes([0xA0 + len(name)]) + name.encode() + value for name, value in values)
    assert read_code_object(noted) == CodeObject(0, 127, 128, 512, 3, 4)
    with pytest.raises(ValueError, match=r"^the code object does not tell \.vgpr_count$"):
        read_code_object(b"")

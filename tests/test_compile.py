"""What the compiler makes of the kernels, through the library's own launchers at a real network's shapes; no GPU.

`compile_only` stands in for the driver: launches are recorded with their grid and their machine code.
"""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.activations import is_piecewise
from fusedres.benchmarks.compile_only import (
    MULTIPROCESSORS,
    SHARED_MEMORY,
    Launch,
    compile_only,
)
from fusedres.functional import batch_norm_act, projection_batch_norm_act
from fusedres.ops import batch_norm_act as single
from fusedres.ops import dual
from fusedres.ops.projection import in_triton

pytestmark = pytest.mark.compiler

ARCHITECTURES = [80, 90, 100]
# The layers of a ResNet-50 at batch 256 that differ in kind: stem, first and last stage.
STEM, FIRST, LAST = (256, 64, 112, 112), (256, 256, 56, 56), (256, 2048, 7, 7)
NHWC, NCHW = torch.channels_last, torch.contiguous_format
VECTORISED = [
    pytest.param(shape, layout, architecture, id=f"{name}-{'nhwc' if layout is NHWC else 'nchw'}-sm{architecture}")
    for name, shape, layout, architecture in [
        ("stem", STEM, NHWC, 90), ("first", FIRST, NHWC, 90), ("last", LAST, NHWC, 90),
        ("stem", STEM, NCHW, 90), ("first", FIRST, NCHW, 90),
        ("first", FIRST, NHWC, 80), ("first", FIRST, NHWC, 100),
    ]
]  # fmt: skip


def launches(
    shape, dtype=torch.bfloat16, layout=NHWC, residual=True, training=True, architecture=90
) -> list[Launch]:
    """Forward and backward of one call; the tensors are never touched."""

    def empty():
        return torch.empty(shape, dtype=dtype, memory_format=layout).requires_grad_()

    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.empty(shape[1], dtype=parameter).requires_grad_() for _ in range(2))
    mean, var = (torch.empty(shape[1], dtype=parameter) for _ in range(2))
    leaves = [empty(), weight, bias] + ([empty()] if residual else [])
    with fusedres.backend("triton"), compile_only(architecture) as recorded:
        output = batch_norm_act(
            leaves[0], mean, var, weight, bias, training, residual=leaves[3] if residual else None
        )
        torch.autograd.grad(output, leaves, torch.empty_like(output))
        return list(recorded)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_spills(training, architecture, dtype, layout):
    found = launches(FIRST, dtype, layout, training=training, architecture=architecture)
    assert {launch.kernel: launch.code.spills for launch in found if launch.code.spills} == {}


def reducing_pass_of_two(
    tail, shape, stride, dtype, layout, architecture, activation="relu"
) -> Launch:
    """The launch that adds a second gradient of a tail's output, which came over a skip connection."""
    n, channels, height, width = shape

    def empty(*spatial):
        return torch.empty((n, channels, *spatial), dtype=dtype, memory_format=layout)

    x, residual, dy = (empty(height, width) for _ in range(3))
    skip = empty(height, width) if stride is None else empty(height // 2, width // 2)
    saved, weight = torch.empty(4, channels), torch.empty(channels)
    smooth = not is_piecewise(activation)
    bits = torch.empty(0 if tail == "relu" or smooth else x.numel() // 8, dtype=torch.uint8)
    with fusedres.backend("triton"), compile_only(architecture) as recorded:
        if tail == "dual":
            dual.BACKWARD.op(
                dy, x, residual, weight, weight, saved, saved, bits, True, activation, [True] * 4,
                weight.dtype, weight.dtype, skip, stride,
            )  # fmt: skip
        else:
            residual_dtype = None if tail == "relu" else dtype
            single.BACKWARD.op(
                dy, x, weight, saved, bits, True, activation, residual_dtype, True, tail == "add", True, weight.dtype,
                skip, stride, residual if smooth and tail == "add" else None,
            )  # fmt: skip
        return next(each for each in recorded if each.kernel == "bn_grad_reduce_kernel")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("stride", [None, [2, 2]], ids=["full", "strided"])
@pytest.mark.parametrize("tail", ["add", "relu", "dual"])
def test_the_pass_that_adds_a_second_gradient(tail, stride, layout, dtype, architecture):
    """At a residual's fork: no spills, and the sum is stored in 128 bits."""
    code = reducing_pass_of_two(tail, FIRST, stride, dtype, layout, architecture).code
    assert (code.spills, code.widths["store"][128] > 0) == (0, True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("tail", ["add", "relu", "dual"])
def test_the_same_pass_where_z_is_computed_again(tail, layout, architecture):
    """A smooth activation has no bits."""
    code = reducing_pass_of_two(
        tail, FIRST, None, torch.bfloat16, layout, architecture, "silu"
    ).code
    assert (code.spills, code.widths["store"][128] > 0) == (0, True)


@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
def test_a_second_gradient_of_a_large_tensor_has_64_bit_offsets(layout):
    large, small = (
        reducing_pass_of_two("relu", (n, 64, 64, 64), [2, 2], torch.bfloat16, layout, 90)
        for n in (8192, 256)
    )
    assert (large.code.spills, large.cubin != small.cubin) == (0, True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
def test_a_projected_tail_from_product_to_product(dtype, architecture):
    """The product's moments go into the finalising step: of the two statistics passes one is left."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, memory_format=NHWC).requires_grad_()

    input, shortcut, weight = empty(64, 128, 28, 28), empty(64, 64, 56, 56), empty(128, 64, 1, 1)
    vectors = [torch.empty(128) for _ in range(8)]
    with fusedres.backend("triton"), in_triton(), compile_only(architecture) as recorded:
        output = projection_batch_norm_act(
            input, shortcut, weight, *vectors, training=True, stride=2
        )
        torch.autograd.grad(output, [input, shortcut, weight], torch.empty_like(output))
        found = list(recorded)
    assert {each.kernel: each.code.spills for each in found if each.code.spills} == {}
    names = [each.kernel for each in found]
    assert (names.count("projection_kernel"), names.count("bn_stats_kernel")) == (2, 1)


@pytest.mark.parametrize(
    "shape", [STEM, LAST, (4, 3, 9, 9), (2, 100, 5, 5)], ids=["stem", "last", "C3", "C100"]
)
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
def test_nothing_spills_at_other_shapes(shape, layout):
    found = launches(shape, layout=layout)
    assert {launch.kernel: launch.code.spills for launch in found if launch.code.spills} == {}


@pytest.mark.parametrize(("shape", "layout", "architecture"), VECTORISED)
@pytest.mark.parametrize("residual", [True, False], ids=["add", "plain"])
def test_tensors_are_read_and_written_in_128_bits(shape, layout, residual, architecture):
    """Every access to a tensor of the activation's size; mask bytes and per-channel vectors are narrower."""
    for launch in launches(shape, layout=layout, residual=residual, architecture=architecture):
        if launch.kernel in ("bn_finalize_kernel", "bn_grad_finalize_kernel"):
            continue
        code = launch.code
        wide_loads = sum(
            n
            for name, n in code.instructions.items()
            if name.startswith(("LDG", "LDGSTS")) and ".128" in name
        )
        narrow_stores = sum(
            n for name, n in code.instructions.items() if name.startswith("STG") and "U16" in name
        )
        assert wide_loads > 0, launch
        assert narrow_stores == 0, launch
        if (
            layout is NHWC or launch.kernel != "bn_stats_kernel"
        ):  # there the pivot is a strided vector
            assert not any(
                name.startswith("LDG") and "U16" in name for name in code.instructions
            ), launch
        if launch.kernel in ("bn_apply_kernel", "bn_grad_apply_kernel"):
            assert any(name.startswith("STG") and ".128" in name for name in code.instructions), (
                launch
            )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_fits_the_chip(architecture):
    limit = SHARED_MEMORY[architecture]
    assert all(
        launch.shared <= limit
        for launch in launches(FIRST, torch.float32, architecture=architecture)
    )


@pytest.mark.parametrize("residual", [True, False], ids=["add", "plain"])
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("training", "expected"), [(True, 6), (False, 3)], ids=["train", "eval"])
def test_three_launches_forward_and_three_backward(training, expected, layout, residual):
    """In eval one forward, and two backward as long as weight and bias train."""
    assert len(launches(FIRST, layout=layout, residual=residual, training=training)) == expected


def test_frozen_batch_norm_takes_one_launch_each_way():
    x = torch.empty(FIRST, dtype=torch.bfloat16, memory_format=NHWC).requires_grad_()
    vectors = [torch.empty(FIRST[1]) for _ in range(4)]
    with fusedres.backend("triton"), compile_only(90) as recorded:
        output = batch_norm_act(x, *vectors, training=False)
        torch.autograd.grad(output, x, torch.empty_like(output))
        assert [launch.kernel for launch in recorded] == ["bn_apply_kernel", "bn_grad_apply_kernel"]


@pytest.mark.parametrize(
    "shape", [(256, 64, 56, 56), (32, 2048, 7, 7)], ids=["64 channels, 802816 rows", "2048 channels, 1568 rows"]
)  # fmt: skip
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pass_fills_the_gpu(shape, layout, architecture):
    """At least one program for each multiprocessor, in all passes over the tensor."""
    passes = [
        launch
        for launch in launches(shape, layout=layout, architecture=architecture)
        if "finalize" not in launch.kernel
    ]
    assert len(passes) == 4
    assert min(launch.programs for launch in passes) >= MULTIPROCESSORS[architecture]


def test_offsets_are_64_bit_where_the_tensor_needs_them():
    """A tensor of 2^31 elements and more gets other machine code than a small one of the same class."""
    small = launches((256, 64, 64, 64), residual=False)
    large = launches((8192, 64, 64, 64), residual=False)
    wide = [
        launch.kernel
        for launch, other in zip(large, small, strict=True)
        if "finalize" not in launch.kernel and launch.cubin != other.cubin
    ]
    assert len(wide) == 4

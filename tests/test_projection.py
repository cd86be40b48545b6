"""The 1x1 convolution of a shortcut, alone and before the dual tail; and what the compiler makes of its products.

A result may err as much as PyTorch's convolution in the same dtype does, times 1.1, plus one unit in the last place.
Float32 is multiplied as tf32 on a chip (compiled code on a CPU too, where PyTorch's convolution is exact): there the
measure is the exact product of operands that were rounded to tf32, which is what cuDNN computes.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fusedres
from fusedres.benchmarks.compile_only import compile_only
from fusedres.dispatch import INTERPRET
from fusedres.functional import projection, projection_batch_norm_act
from fusedres.ops.projection import (
    add_input_gradient,
    describe_choice,
    in_triton,
    precision,
    project,
    why_library,
)

from .helpers import DTYPES, lay_out, without_plans


def to_tf32(tensor):
    """float32 values with 10 bits, rounded to nearest; they are products' operands without a rounding."""
    bits = (tensor.detach().contiguous().view(torch.int32) + 0x1000) & -0x2000
    return bits.view(torch.float32).as_strided(tensor.shape, tensor.contiguous().stride())


def takes_tf32(input, weight):
    """Whether this is a product of rounded operands; never in the interpreter."""
    return why_library(input, weight) is None and precision(input.dtype) == "tf32"


def draw(
    shape, channels_out, dtype=torch.float32, layout="channels_last", device="cpu", mean=0.0, fits=False
):  # fmt: skip
    """Input, weight and bias; `fits`: in tf32."""
    generator = torch.Generator().manual_seed(1)
    ones = [1] * (len(shape) - 2)
    sizes = (shape, (channels_out, shape[1], *ones), (channels_out,))
    input, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    input, weight = (input + mean).to(dtype), weight.to(dtype)
    if fits:
        input, weight = to_tf32(input), to_tf32(weight)
    tensors = (lay_out(input, layout), weight, bias.to(dtype))
    return [t.to(device).requires_grad_() for t in tensors]


def gradient(output):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)


def run(function, leaves, dtype, stride):
    """Output, and gradients of input, weight and bias."""
    output = function(*leaves, stride)
    dy = gradient(output).to(dtype).to(output.dtype)
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    return dict(
        zip(names, (output.detach(), *torch.autograd.grad(output, leaves, dy)), strict=True)
    )


def run_tf32(convolution, leaves, stride):
    """As `run`, exact but for operands that are rounded to tf32: the output's gradient is one, too."""
    input, weight, bias = (t.detach() for t in leaves)
    wide = [t.double().requires_grad_() for t in (to_tf32(input), to_tf32(weight), bias)]
    output = convolution(*wide, stride)
    dy = gradient(output).float()
    grads = torch.autograd.grad(output, wide[:2], to_tf32(dy).double())
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    channels = [0, *range(2, dy.dim())]
    return dict(zip(names, (output.detach(), *grads, dy.double().sum(channels)), strict=True))


def off(leaves, stride):
    """What errs by more than PyTorch's convolution does."""
    dtype = leaves[0].dtype
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[leaves[0].dim()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = run(convolution, wide, dtype, stride)
    found = {}
    actual, eager = run(projection, leaves, dtype, stride), run(convolution, leaves, dtype, stride)
    if takes_tf32(*leaves[:2]):
        rounded = run_tf32(convolution, leaves, stride)
        eager = {name: rounded[name].to(t.dtype) for name, t in eager.items()}
    for name, result in actual.items():
        assert result.dtype == eager[name].dtype
        error, allowed = (
            float((t.double() - exact[name]).abs().max()) for t in (result, eager[name])
        )
        # Eager's error on one draw is chance: n products lose some sqrt(n) units of the accumulator.
        terms = (
            leaves[0].shape[1]
            if name in ("output", "grad_input")
            else actual["output"][:, 0].numel()
        )
        unit = torch.finfo(result.dtype).eps * float(exact[name].abs().max())
        wide_unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        allowed = 1.1 * allowed + unit + wide_unit * terms**0.5 * float(exact[name].abs().max())
        if not error <= allowed:
            found[name] = (error, allowed)
    return found


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 8), (7, 8), (8, 7), (7, 9)], ids=str)
# From 9 channels, not from 3: oneDNN's weight gradient of fewer than 8 writes past its workspace where the stride
# divides a channels-last size (oneDNN issue 6035). The kernels take the same tile for both.
@pytest.mark.parametrize("channels", [(9, 16), (16, 3), (24, 100), (64, 24)], ids=str)
def test_strides_and_sizes(stride, size, channels, device):
    assert off(draw((2, channels[0], *size), channels[1], device=device), stride) == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced", "transposed"])
def test_dtypes_and_layouts(dtype, layout, device):
    assert off(draw((3, 24, 7, 8), 40, DTYPES[dtype], layout, device), 2) == {}


@pytest.mark.parametrize("channels", [(100, 256), (256, 2048)], ids=str)
def test_many_channels(channels, device):
    assert off(draw((1, channels[0], 3, 5), channels[1], device=device), 2) == {}


@pytest.mark.parametrize("shape", [(3, 8, 9), (2, 8, 4, 5, 6)], ids=["1d", "3d"])
def test_one_and_three_dimensions(shape, device):
    assert off(draw(shape, 16, device=device), 2) == {}


def test_a_stride_for_each_dimension(device):
    assert off(draw((2, 8, 7, 9), 16, device=device), (2, 3)) == {}


def test_two_runs_give_the_same_bits(device):
    leaves = draw((4, 24, 9, 9), 40, device=device)
    first, second = (run(projection, leaves, torch.float32, 2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.kernels
def test_forced_int64_offsets_give_the_same_bits(device, monkeypatch):
    leaves = draw((2, 24, 9, 9), 40, device=device)
    expected = run(projection, leaves, torch.float32, 2)
    without_plans(monkeypatch)
    narrow = fusedres.ops.projection.gather_map
    monkeypatch.setattr(
        fusedres.ops.projection, "gather_map", lambda *a: dataclasses.replace(narrow(*a), needs_int64=True)
    )  # fmt: skip
    found = run(projection, leaves, torch.float32, 2)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (1, 256, 5, 7)], ids=str)
def test_products_of_positive_values_are_not_too_small(shape, device):
    """A tensor core that cuts float32 operands off makes them 6.5e-4 too small on average."""
    generator = torch.Generator().manual_seed(3)
    input, weight = (torch.rand(s, generator=generator) for s in (shape, (64, shape[1], 1, 1)))
    exact = F.conv2d(input.double(), weight.double())
    output = projection(lay_out(input, "channels_last").to(device), weight.to(device))
    assert abs(float((output.double().cpu() / exact - 1).mean())) < 2e-5


@pytest.mark.kernels
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_what_is_not_finite_stays_so(value, device):
    input, weight, _ = draw((2, 16, 4, 4), 16, device=device)
    with torch.no_grad():
        input[0, 3, 1, 2] = float(value)
    torch.testing.assert_close(
        projection(input, weight).isfinite(), F.conv2d(input, weight).isfinite()
    )


def test_second_derivatives(device):
    leaves = draw((2, 3, 5, 4), 4, torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *t: projection(*t, 2), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: projection(*t, 2), leaves)


def test_compiled_in_one_graph(device):
    leaves = draw((2, 8, 7, 9), 16, device=device, fits=True)
    compiled = torch.compile(lambda *t: projection(*t, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), projection(*leaves, 2))


def test_under_vmap(device):
    leaves = draw((6, 8, 7, 9), 16, device=device, fits=True)
    input, weight, bias = (t.detach() for t in leaves)
    mapped = torch.vmap(lambda x: projection(x, weight, bias, 2))(input.unflatten(0, (3, 2)))
    torch.testing.assert_close(mapped.flatten(0, 1), projection(input, weight, bias, 2))


@pytest.mark.kernels
def test_opcheck(device):
    input, weight, bias = draw((2, 8, 7, 9), 16, device=device)
    torch.library.opcheck(
        torch.ops.fusedres.projection.default,
        (input.detach(), weight.detach(), bias.detach(), [2, 2], False),
    )


@pytest.mark.kernels
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float64", marks=pytest.mark.interpreter)]
)
def test_moments_are_those_of_what_was_written(dtype, mean, device):
    input, weight, _ = draw((8, 16, 17, 8), 24, DTYPES[dtype], device=device, mean=mean)
    with torch.no_grad():
        output, moments = project(input, weight, None, (2, 2), True)
    assert moments is not None
    count, mean, m2 = moments.double().unbind(1)
    total = count.sum(0)
    merged = (count * mean).sum(0) / total
    variance = (m2 + count * (mean - merged).square()).sum(0) / total
    exact_var, exact_mean = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    assert float(((merged - exact_mean) / exact_var.sqrt()).abs().max()) < 1e-4
    assert float((variance / exact_var - 1).abs().max()) < 1e-5


@pytest.mark.kernels
def test_products_of_float64_are_triton_s_in_the_interpreter_only(device):
    input, weight, _ = draw((2, 16, 5, 5), 24, torch.float64, device=device)
    expected = None if INTERPRET else "float64 products are the library's"
    assert why_library(input, weight) == expected


@pytest.mark.kernels
def test_adding_touches_only_visited_rows(device):
    _, weight, _ = draw((2, 8, 7, 7), 16, device=device, fits=True)
    dx = lay_out(torch.full((2, 8, 7, 7), float("nan")), "channels_last").to(device)
    dx[:, :, ::2, ::2] = 1.0
    dy = to_tf32(gradient(torch.empty(2, 16, 4, 4)).float()).to(device)
    add_input_gradient(dx, dy, weight.detach(), (2, 2))
    expected = 1 + F.conv_transpose2d(dy, weight.detach())
    torch.testing.assert_close(dx[:, :, ::2, ::2], expected)
    assert bool(dx.isnan().sum() == 2 * 8 * (49 - 16))


VECTORS = ("running_mean", "running_var", "residual_running_mean", "residual_running_var")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_tail_is_the_composition(training, device):
    shortcut, weight, bias = draw((4, 8, 7, 9), 16, device=device, fits=True)
    input = draw((4, 16, 4, 5), 1, device=device)[0]
    leaves = [input, shortcut, weight, bias]

    def tail():
        buffers = [torch.full((16,), 0.5, device=device) for _ in VECTORS]
        output = projection_batch_norm_act(
            input, shortcut, weight, *buffers, training=training, stride=2, projection_bias=bias
        )
        return [output, *torch.autograd.grad(output, leaves, gradient(output).float()), *buffers]

    actual = tail()
    with fusedres.backend("aten"):
        expected = tail()
    # The bias' gradient is a sum that is zero but for rounding when the statistics are the batch's. Where the products
    # round their operands, each of 16 and 80 terms errs by up to 2^-10.
    tolerance = {"rtol": 1e-4, "atol": 2e-5}
    if takes_tf32(shortcut, weight):
        tolerance = {"rtol": 2e-3, "atol": 80 * 2**-10 * 0.25}
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_derivatives_of_the_tail(training, device):
    shortcut, weight, bias = draw((2, 2, 5, 4), 3, torch.float64, device=device)
    input = draw((2, 3, 3, 2), 1, torch.float64, device=device)[0]
    vectors = [torch.rand(3, dtype=torch.float64, device=device).requires_grad_() for _ in range(4)]
    buffers = [torch.ones(3, dtype=torch.float64, device=device) for _ in VECTORS]

    def tail(input, shortcut, weight, bias, *vectors):
        return projection_batch_norm_act(
            input, shortcut, weight, *(b.clone() for b in buffers), *vectors, training,
            stride=2, projection_bias=bias,
        )  # fmt: skip

    leaves = (input, shortcut, weight, bias, *vectors)
    assert torch.autograd.gradcheck(tail, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(tail, leaves, fast_mode=True)


WRONG = {
    "3x3": ({"projection_weight": torch.ones(16, 8, 3, 3)}, ValueError, "no projection"),
    "dimensions": ({"projection_weight": torch.ones(16, 8, 1)}, RuntimeError, "Cout, Cin, 1, 1"),
    "groups by shape": ({"projection_weight": torch.ones(16, 4, 1, 1)}, RuntimeError, "8 channels"),
    "groups": ({"groups": 2}, ValueError, "groups is 2"),
    "dilation": ({"dilation": 2}, ValueError, "dilation is 2"),
    "padding": ({"padding": 1}, ValueError, "padding is 1"),
    "stride": ({"stride": 1}, RuntimeError, "stride=2 fits"),
    "stride 0": ({"stride": 0}, RuntimeError, "expected 1 or more"),
    "stride of three": ({"stride": (1, 2, 1)}, RuntimeError, "whole number or 2 of them"),
    "stride 1.5": ({"stride": 1.5}, TypeError, "whole number"),
    "bias": ({"projection_bias": torch.ones(3)}, RuntimeError, r"expected \[16\]"),
    "dtype": ({"projection_weight": torch.ones(16, 8, 1, 1).half()}, RuntimeError, "float16"),
    "float64": ({"input": torch.randn(2, 16, 4, 4).double(), "shortcut": torch.randn(2, 8, 7, 7).double()},
                RuntimeError, "float32, expected the dtype of shortcut, torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
def test_wrong_arguments_are_named(change):
    options, error, message = WRONG[change]
    buffers = [torch.ones(16) for _ in VECTORS]
    arguments = {
        "input": torch.randn(2, 16, 4, 4),
        "shortcut": torch.randn(2, 8, 7, 7),
        "projection_weight": torch.ones(16, 8, 1, 1),
        "stride": 2,
        "training": True,
    } | options
    with pytest.raises(error, match=message):
        projection_batch_norm_act(
            arguments.pop("input"),
            arguments.pop("shortcut"),
            arguments.pop("projection_weight"),
            *buffers,
            **arguments,
        )
    assert all(bool((buffer == 1).all()) for buffer in buffers)


@pytest.mark.parametrize(("channels", "where"), [((64, 256), "Triton"), ((1024, 2048), "library")])
def test_who_asks_for_the_triton_product_gets_it_where_memory_is_the_limit(channels, where):
    with in_triton():
        assert where in describe_choice(*channels)


@pytest.mark.once
def test_the_library_is_the_choice():
    assert "library" in describe_choice(64, 256)


@pytest.mark.compiler
def test_the_library_runs():
    input = torch.empty(4, 64, 8, 8, memory_format=torch.channels_last)
    with fusedres.backend("triton"), compile_only(90):
        assert "faster" in why_library(input, torch.empty(256, 64, 1, 1))


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
def test_machine_code(dtype, architecture):
    """Forward with moments, and both gradients, of the first projection of a ResNet-50 at batch 256."""
    shape = (256, 64, 56, 56)
    input = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last).requires_grad_()
    weight = torch.empty(256, 64, 1, 1, dtype=dtype).requires_grad_()
    with fusedres.backend("triton"), in_triton(), compile_only(architecture) as recorded:
        output, _ = project(input, weight, None, (1, 1), True)
        torch.autograd.grad(output, (input, weight), torch.empty_like(output))
        found = list(recorded)
    assert len(found) == 3
    assert {launch.kernel: launch.code.spills for launch in found if launch.code.spills} == {}
    kind = {80: "HMMA", 90: "HGMMA", 100: "UTC"}[architecture]
    assert all(launch.code.count(kind) for launch in found)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("channels_in", "channels_out", "size", "stride"),
    [
        (64, 128, 56, 2), (128, 256, 28, 2), (256, 512, 56, 2), (512, 1024, 28, 2),
        (3, 16, 33, 3), (24, 100, 9, 2), (40, 72, 9, 2),
    ],
)  # fmt: skip
def test_no_projection_spills(channels_in, channels_out, size, stride, dtype, monkeypatch):
    """Those of ResNet-18 to 152 and three odd ones, on sm_90; those of a network's width take tensor cores there."""
    monkeypatch.setattr(fusedres.ops.projection, "why_library", lambda *_: None)
    shape = (64, channels_in, size, size)
    input = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last).requires_grad_()
    weight = torch.empty(channels_out, channels_in, 1, 1, dtype=dtype).requires_grad_()
    with fusedres.backend("triton"), compile_only(90) as recorded:
        output, _ = project(input, weight, None, (stride, stride), True)
        torch.autograd.grad(output, (input, weight), torch.empty_like(output))
        found = list(recorded)
    assert len(found) == 3
    assert {launch.kernel: launch.code.spills for launch in found if launch.code.spills} == {}
    if channels_in >= 64:
        assert all(launch.code.count("HGMMA") for launch in found)

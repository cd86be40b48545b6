"""`scaled_add_act`: a residual block with a learnable scale, and the gradient of the scale."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.activations import NAMES, activate
from fusedres.benchmarks.compile_only import compile_only
from fusedres.functional import scaled_add_act
from fusedres.nn.add import call_scaled_add
from fusedres.ops import scaled

from .helpers import DTYPES, LAYOUTS, exact_hardswish, force_int64, lay_out

SHAPE = (3, 20, 5, 6)
KINDS = ("scalar", "channel")


def draw(
    dtype=torch.float32,
    layout="contiguous",
    residual_layout=None,
    shape=SHAPE,
    kind="channel",
    device="cpu",
):
    """(input, residual, scale), and a gradient."""
    generator = torch.Generator().manual_seed(1)
    layouts = layout, residual_layout or layout, layout
    input, residual, dy = (
        lay_out(torch.randn(shape, generator=generator).to(dtype).to(device), each)
        for each in layouts
    )
    size = () if kind == "scalar" else (shape[1],)
    return [input, residual, torch.randn(size, generator=generator).to(dtype).to(device)], dy  # fmt: skip


def plain(input, residual, scale, activation=None):
    scale = scale if scale.dim() == 0 else scale.view([-1] + [1] * (input.dim() - 2))
    return activate(scale * input + residual, activation)


def gradients(function, leaves, dy, activation):
    """The output, and the gradients of all three."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    output = function(*leaves, activation=activation)
    return [output.detach(), *torch.autograd.grad(output, leaves, dy)]


def wrong(leaves, dy, activation):
    """What errs by more than the composition in the same dtype, times 1.1, and a unit in the last place; of the scale's
    gradient, a sum, a unit of what is added up; of a scale for all channels, a unit of the channels' own sums besides,
    which are rounded to float32 and added up by PyTorch in an order of its own."""
    exact = gradients(plain, [t.double() for t in leaves], dy.double(), activation)
    eager = gradients(plain, leaves, dy, activation)
    found = gradients(scaled_add_act, leaves, dy, activation)
    summed = (dy.double() * leaves[0].double()).square().sum().sqrt()
    if leaves[2].dim() == 0:
        summed += (exact[2] * leaves[0].double()).transpose(0, 1).flatten(1).sum(1).abs().sum()
    bad = []
    for k, (actual, same, right) in enumerate(zip(found, eager, exact, strict=True)):
        error, allowed = (float((t.double() - right).abs().max()) for t in (actual, same))
        size = float(summed if k == 3 else right.abs().max())
        if not error <= 1.1 * allowed + torch.finfo(actual.dtype).eps * size:
            bad.append((k, error, allowed))
    return bad


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu(0.2)", "silu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_results(kind, dtype, activation, device):
    leaves, dy = draw(DTYPES[dtype], "channels_last", kind=kind, device=device)
    assert wrong(leaves, dy, activation) == []


@pytest.mark.parametrize("activation", [None, *NAMES])
def test_double_keeps_its_digits(activation, device):
    leaves, dy = draw(torch.float64, device=device)
    with exact_hardswish(device):
        found, expected = (gradients(f, leaves, dy, activation) for f in (scaled_add_act, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, residual_layout, device):
    leaves, dy = draw(torch.float32, layout, residual_layout, device=device)
    assert wrong(leaves, dy, "relu") == []


def test_the_output_is_laid_out_as_the_input(device):
    leaves, _ = draw(torch.float32, "channels_last", "contiguous", device=device)
    assert scaled_add_act(*leaves).stride() == leaves[0].stride()


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 5), (7, 100, 3, 3), (5, 16), (4, 8, 6), (2, 8, 3, 4, 5), (0, 3, 4, 4)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, shape, device):
    leaves, dy = draw(torch.float64, shape=shape, kind=kind, device=device)
    found, expected = (gradients(f, leaves, dy, "relu") for f in (scaled_add_act, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_at_zero_the_block_is_the_identity_and_its_scale_has_a_gradient(dtype, device):
    (input, residual, _), dy = draw(DTYPES[dtype], device=device)
    scale = torch.zeros((), device=device)
    found = gradients(scaled_add_act, [input, residual, scale], dy, None)
    assert (torch.equal(found[0], residual), float(found[1].abs().max())) == (True, 0.0)
    expected = (dy.double() * input.double()).sum()
    ulp = torch.finfo(DTYPES[dtype]).eps  # PyTorch rounds the products to the input's dtype
    torch.testing.assert_close(found[3].double(), expected, rtol=4 * ulp, atol=64 * ulp)


@pytest.mark.parametrize(
    "needs",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, False)],
    ids=str,
)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_only_the_gradients_that_are_wanted(activation, needs, device):
    leaves, dy = draw(torch.float64, device=device)
    expected = [
        g if n else None for g, n in zip(gradients(plain, leaves, dy, activation)[1:], needs, strict=True)
    ]  # fmt: skip
    leaves = [t.requires_grad_(n) for t, n in zip(leaves, needs, strict=True)]
    scaled_add_act(*leaves, activation=activation).backward(dy)
    torch.testing.assert_close([t.grad for t in leaves], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "leaky_relu(0.2)", "silu"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, activation, device):
    leaves, _ = draw(torch.float64, shape=(2, 2, 2, 2), kind=kind, device=device)
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradgradcheck(
        lambda *t: scaled_add_act(*t, activation=activation), leaves, fast_mode=True
    )


def test_a_nan_and_an_inf_pass(device):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0], device=device)
    leaves = [x.view(1, 5, 1, 1), torch.zeros(1, 5, 1, 1, device=device), torch.zeros((), device=device)]  # fmt: skip
    dy = torch.ones(1, 5, 1, 1, device=device)
    found, expected = (gradients(f, leaves, dy, "relu") for f in (scaled_add_act, plain))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_forced_int64_offsets_give_the_same_bits(layout, device, monkeypatch):
    leaves, dy = draw(torch.float32, layout, device=device)
    expected = gradients(scaled_add_act, leaves, dy, "relu")
    force_int64(monkeypatch)
    found = gradients(scaled_add_act, leaves, dy, "relu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_opcheck(activation, device):
    (input, residual, scale), dy = draw(torch.float32, "channels_last", device=device)
    output, bits = scaled.FORWARD.op(input, residual, scale, activation, True)
    torch.library.opcheck(scaled.FORWARD.op, (input, residual, scale, activation, True))
    smooth = residual if activation == "silu" else None
    arguments = (dy, output.stride(), input, smooth, scale, bits, activation, True, True, True)
    torch.library.opcheck(scaled.BACKWARD.op, arguments)


@pytest.mark.kernels
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_a_backward_may_run_on_the_other_backend(layout, activation, device):
    leaves, dy = draw(torch.float64, layout, device=device)
    leaves = [t.requires_grad_() for t in leaves]

    def results(forward, backward):
        with fusedres.backend(forward):
            output = scaled.scaled_add_act(*leaves, activation)
        with fusedres.backend(backward):
            return [output, *torch.autograd.grad(output, leaves, dy)]

    found = [results(*pair) for pair in (("triton", "aten"), ("aten", "triton"))]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("activation", "forward", "backward"),
    [(None, 3, 3), ("relu", 3 + 1 / 16, 4 + 1 / 16), ("silu", 3, 5)],
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_passes(layout, activation, forward, backward):
    """The scale's gradient costs no pass of its own; within 3 percent."""
    from fusedres.benchmarks.meter import meter

    leaves, dy = draw(torch.bfloat16, layout, shape=(8, 16, 48, 48))
    leaves = [t.requires_grad_() for t in leaves]
    with meter() as first:
        output = scaled_add_act(*leaves, activation=activation)
    with meter() as second:
        torch.autograd.grad(output, leaves, dy)
    size = dy.numel() * dy.element_size()
    assert (first.bytes / size, second.bytes / size) == pytest.approx((forward, backward), rel=0.03)


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])  # fmt: skip
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_machine_code(activation, layout, dtype, architecture):
    """One pass each way and a small step, no spills, stores of 128 bits."""
    x, r = (
        torch.empty(64, 256, 28, 28, dtype=DTYPES[dtype], memory_format=layout).requires_grad_()
        for _ in range(2)
    )
    scale = torch.empty(256).requires_grad_()
    with fusedres.backend("triton"), compile_only(architecture) as recorded:
        output = scaled_add_act(x, r, scale, activation=activation)
        torch.autograd.grad(output, [x, r, scale], torch.empty_like(output))
        found = [(each.kernel, each.code.spills) for each in recorded]
        wide = [each.code.widths["store"].get(128, 0) > 0 for each in list(recorded)[:2]]
    kernels = ["bn_apply_kernel", "bn_grad_reduce_kernel", "bn_grad_finalize_kernel"]
    assert (found, wide) == ([(name, 0) for name in kernels], [True, True])


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"residual": torch.randn(2, 3, 1, 1)}, RuntimeError, r"scaled_add_act: residual .*\[2, 3, 1, 1\]"),
        ({"residual": torch.randn(2, 3, 4, 4).double()}, RuntimeError, "residual has dtype torch.float64"),
        ({"scale": 0.5}, TypeError, "scale is a float, expected a torch.Tensor of one element or of one per channel"),
        ({"scale": torch.ones(4)}, RuntimeError, r"scale has shape \[4\], expected \[3\]"),
        ({"scale": torch.ones(3).double()}, RuntimeError, "scale has dtype torch.float64"),
        ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'"),
    ],
    ids=["shape", "dtype", "number", "size", "scale's dtype", "activation"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, text):
    given = {
        "input": torch.randn(2, 3, 4, 4), "residual": torch.randn(2, 3, 4, 4), "scale": torch.zeros(3), **changes,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        scaled_add_act(**given)


@pytest.mark.parametrize("scale", [None, (), (3,)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 4, 4)], ids=str)
def test_what_broadcasts_is_left_to_pytorch(shape, scale, device):
    x, r = torch.randn(2, 3, 4, 4, device=device), torch.randn(shape, device=device)
    a = None if scale is None else torch.rand(scale, device=device)
    factor = 1.0 if a is None else a if a.dim() == 0 else a.view(3, 1, 1)
    torch.testing.assert_close(call_scaled_add(x, r, a, "relu"), torch.relu(r + factor * x))


def test_it_is_compiled_whole(device):
    leaves, _ = draw(torch.float64, device=device)
    compiled = torch.compile(scaled_add_act, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves, activation="relu"), plain(*leaves, "relu"))

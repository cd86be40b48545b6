"""`add_act`: the sum and the activation at the end of a block that scales what its last BatchNorm gave."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.activations import NAMES, PIECEWISE, activate
from fusedres.benchmarks.compile_only import compile_only
from fusedres.benchmarks.steps import ALLOWED, excess
from fusedres.functional import add_act
from fusedres.nn import add as nn_add
from fusedres.ops import add

from .helpers import DTYPES, LAYOUTS, exact_hardswish, lay_out
from .swap_blocks import fused_copy, images, make

NHWC = torch.channels_last


def draw(
    dtype=torch.float32,
    layout="contiguous",
    residual_layout=None,
    shape=(3, 20, 5, 6),
    device="cpu",
):
    """Two operands and a gradient."""
    generator = torch.Generator().manual_seed(1)
    layouts = layout, residual_layout or layout, layout
    return [
        lay_out(torch.randn(shape, generator=generator).to(dtype).to(device), each)
        for each in layouts
    ]


def gradients(function, input, residual, dy):
    """Output and both gradients."""
    leaves = [t.detach().requires_grad_() for t in (input, residual)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, dy)]


def off(input, residual, dy, activation):
    """What errs by more than the composition in the same dtype, times 1.1, and a unit in the last place."""

    def plain(a, b):
        return activate(a + b, activation)

    exact = gradients(plain, *(t.double() for t in (input, residual, dy)))
    eager = gradients(plain, input, residual, dy)
    found = gradients(lambda a, b: add_act(a, b, activation=activation), input, residual, dy)
    wrong = []
    for k, (actual, same, right) in enumerate(zip(found, eager, exact, strict=True)):
        error, allowed = (float((t.double() - right).abs().max()) for t in (actual, same))
        if not error <= 1.1 * allowed + torch.finfo(actual.dtype).eps * float(right.abs().max()):
            wrong.append((k, error, allowed))
    return wrong


@pytest.mark.parametrize("activation", [*NAMES, "leaky_relu(0.2)", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_results(dtype, activation, device):
    assert off(*draw(DTYPES[dtype], "channels_last", device=device), activation) == []


@pytest.mark.parametrize("activation", NAMES)
def test_double_keeps_its_digits(activation, device):
    tensors = draw(torch.float64, device=device)
    found = gradients(lambda a, b: add_act(a, b, activation=activation), *tensors)
    with exact_hardswish(device):
        expected = gradients(lambda a, b: activate(a + b, activation), *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, residual_layout, activation, device):
    assert off(*draw(torch.float32, layout, residual_layout, device=device), activation) == []


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 5, 5), (7, 100, 3, 3), (5, 16), (4, 8, 6), (2, 8, 3, 4, 5), (0, 3, 4, 4)],
    ids=str,
)
def test_shapes(shape, device):
    tensors = draw(shape=shape, device=device)
    found = gradients(add_act, *tensors)
    expected = gradients(lambda a, b: torch.relu(a + b), *tensors)
    torch.testing.assert_close(found, expected)


def test_a_nan_and_an_inf_pass(device):
    a = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0], device=device)
    a = a.view(1, 5, 1, 1)
    found = gradients(add_act, a, torch.zeros_like(a), torch.ones_like(a))
    expected = gradients(lambda a, b: torch.relu(a + b), a, torch.zeros_like(a), torch.ones_like(a))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "silu", "gelu"])
def test_second_derivatives(activation, device):
    torch.manual_seed(2)
    leaves = [
        torch.randn(3, 2, 2, 2, dtype=torch.float64, device=device).requires_grad_()
        for _ in range(2)
    ]
    assert torch.autograd.gradgradcheck(
        lambda a, b: add_act(a, b, activation=activation), leaves, fast_mode=True
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_operand_alone(which, device):
    a, b, dy = draw(device=device)
    leaves = [t.requires_grad_(k == which) for k, t in enumerate((a, b))]
    add_act(*leaves).backward(dy)
    assert leaves[1 - which].grad is None
    torch.testing.assert_close(leaves[which].grad, torch.where(a + b > 0, dy, 0.0))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_opcheck(activation, device):
    a, b, dy = draw(torch.float32, "channels_last", device=device)
    output, bits = add.FORWARD.op(a, b, activation, True)
    torch.library.opcheck(add.FORWARD.op, (a, b, activation, True))
    operands = (None, None) if activation == "relu" else (a, b)
    arguments = (dy, list(output.stride()), *operands, bits, activation)
    torch.library.opcheck(add.BACKWARD.op, arguments)


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "silu", "hardswish"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_a_backward_may_run_on_the_other_backend(layout, activation, device):
    a, b, dy = draw(torch.float64, layout, device=device)
    leaves = [t.requires_grad_() for t in (a, b)]

    def results(forward, backward):
        with fusedres.backend(forward):
            output = add.add_act(*leaves, activation)
        with fusedres.backend(backward):
            return [output, *torch.autograd.grad(output, leaves, dy)]

    with exact_hardswish(device):
        found = [results(*pair) for pair in (("triton", "aten"), ("aten", "triton"))]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("activation", "forward", "backward"), [("relu", 3 + 1 / 32, 2 + 1 / 32), ("silu", 3, 4)]
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_passes(layout, activation, forward, backward):
    """Within 3 percent, of float32, whose mask is a 32nd."""
    from fusedres.benchmarks.meter import meter

    a, b, dy = draw(torch.float32, layout, shape=(4, 64, 16, 16))
    leaves = [t.requires_grad_() for t in (a, b)]
    with meter() as first:
        output = add_act(*leaves, activation=activation)
    with meter() as second:
        torch.autograd.grad(output, leaves, dy)
    size = a.numel() * a.element_size()
    assert (first.bytes / size, second.bytes / size) == pytest.approx((forward, backward), rel=0.03)


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("activation", [PIECEWISE[0], "silu"])
@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_nothing_spills(layout, activation, architecture):
    leaves = [
        torch.empty(64, 256, 28, 28, dtype=torch.bfloat16, memory_format=layout).requires_grad_()
        for _ in range(2)
    ]
    with fusedres.backend("triton"), compile_only(architecture) as recorded:
        output = add_act(*leaves, activation=activation)
        torch.autograd.grad(output, leaves, torch.empty_like(output))
        found = [(each.kernel, each.code.spills) for each in recorded]
    assert found == [("bn_apply_kernel", 0), ("bn_grad_apply_kernel", 0)]


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"residual": torch.randn(2, 3, 1, 1)}, RuntimeError, r"add_act: residual .*\[2, 3, 1, 1\]"),
        ({"residual": torch.randn(2, 3, 4, 4).double()}, RuntimeError, "add_act: residual has dtype torch.float64"),
        ({"residual": 1.0}, TypeError, "add_act: residual is a float"),
        ({"input": torch.ones(2, 3, 4, 4).long()}, NotImplementedError, "add_act: input has dtype torch.int64"),
        ({"activation": "tanh"}, ValueError, "add_act: unknown activation 'tanh'"),
    ],
    ids=["shape", "dtype", "no tensor", "integers", "activation"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, text):
    given = {"input": torch.randn(2, 3, 4, 4), "residual": torch.randn(2, 3, 4, 4), **changes}
    with pytest.raises(error, match=text):
        add_act(given.pop("input"), given.pop("residual"), **given)


# --- the swap ----------------------------------------------------------------------------------------------------


class Excited(nn.Module):
    """A block with squeeze-and-excitation; `forward` may be another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc, self.act = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

    def excite(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))

    def forward(self, x):
        return self.act(self.excite(self.bn(self.conv(x))) + x)


class InPlace(Excited):
    def forward(self, x):
        out = self.excite(self.bn(self.conv(x)))
        out += x
        return self.act(out)


class Smooth(Excited):
    def forward(self, x):
        return F.silu(x + self.excite(self.bn(self.conv(x))))


class Broadcast(Excited):
    def forward(self, x):
        return self.act(self.excite(self.bn(self.conv(x))) + x.mean((2, 3), keepdim=True))


class IntoTheInput(Excited):
    """Whoever called it sees what is written to its input."""

    def forward(self, x):
        out = self.excite(self.bn(self.conv(x)))
        x += out
        return self.act(x)


class ReadLater(Excited):
    def forward(self, x):
        out = self.excite(self.bn(self.conv(x)))
        total = out + x
        return self.act(total) * out + total


class InChannelsLast(Excited):
    def forward(self, x):
        return super().forward(x.contiguous(memory_format=NHWC))


FOUND = (Excited, InPlace, Smooth, Broadcast, InChannelsLast)
LEFT = (IntoTheInput, ReadLater)


@pytest.fixture
def added(monkeypatch):
    """One entry for each sum that runs fused."""
    calls = []
    monkeypatch.setattr(nn_add, "add_act", lambda *a, **k: calls.append(a) or add_act(*a, **k))
    return calls


def block_of(cls) -> nn.Module:
    torch.manual_seed(0)
    return cls().double()


@pytest.mark.once
@pytest.mark.parametrize("cls", FOUND)
def test_found_and_told(cls):
    row = fusedres.fuse_(block_of(cls)).rows[0]
    end = "SiLU" if cls is Smooth else "ReLU"
    assert row.note.endswith(f"; add+{end} of its block runs as one too")


@pytest.mark.once
def test_told_of_where_its_batch_norm_is_left_alone():
    model = nn.Sequential(block_of(Excited), block_of(Excited))
    model[0].bn.register_forward_hook(lambda *_: None)
    told = [fusedres.explain(model), fusedres.fuse_(model), fusedres.explain(model)]
    model[0].act = nn.Tanh()  # where it no longer runs
    told.append(fusedres.explain(model))
    assert [(report.n_fused, report.n_fusable, report.n_sums) for report in told] == [
        (0, 1, 2), (1, 1, 2), (1, 1, 2), (1, 1, 1)
    ]  # fmt: skip
    assert str(told[1]).startswith(
        "fusedres: 2 BatchNorm: 1 fused, 1 left alone; and 2 add with its activation"
    )
    assert told[1].rows[0].note == "add+ReLU of its block runs as one"
    assert told[3].rows[0].note == ""


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", [*FOUND, ReadLater])
def test_it_computes_the_same(cls, training, device):
    block, x = block_of(cls).to(device).train(training), images(3, 4, 6, 5, device=device)
    assert excess(block, fused_copy(block), x, steps=2) <= ALLOWED


@pytest.mark.once
@pytest.mark.parametrize("cls", LEFT)
def test_left_alone(cls):
    assert "runs as one" not in fusedres.fuse_(block_of(cls)).rows[0].note


@pytest.mark.once
@torch.no_grad()
def test_what_is_written_to_the_input_is_seen_as_before():
    block, x, y = block_of(IntoTheInput), images(3, 4, 6, 5), images(3, 4, 6, 5)
    fused = fused_copy(block)
    torch.testing.assert_close((fused(x), x), (block(y), y), rtol=1e-12, atol=1e-12)


@pytest.mark.interpreter
def test_the_kernels_run_it(added):
    fused_copy(block_of(Excited))(images(3, 4, 6, 5))
    assert len(added) == 1


@pytest.mark.once
def test_a_hook_on_the_activation_is_run():
    block = block_of(Excited)
    fused = fused_copy(block)
    for each in (block, fused):
        each.act.register_forward_hook(lambda *a: a[-1] * 2)
    assert excess(block, fused, images(3, 4, 6, 5)) <= ALLOWED


@pytest.mark.once
@pytest.mark.parametrize(
    "config",
    [{"patterns": ("BN",)}, {"patterns": ("BN", "add+ReLU"), "activations": ("silu",)}],
    ids=["pattern", "activation"],
)
def test_it_can_be_left_out(config):
    row = fusedres.fuse_(block_of(Excited), fusedres.FuseConfig(**config)).rows[0]
    assert "runs as one" not in row.note


@pytest.mark.once
def test_a_sum_of_what_a_tail_gives_is_found_behind_it():
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)) + x)
        return self.relu(y * 2 + x)

    block = make(forward)
    fused = copy.deepcopy(block)
    assert "add+ReLU of its block" in fusedres.fuse_(fused).rows[0].note
    assert excess(block, fused, images(3, 4, 6, 5)) <= ALLOWED

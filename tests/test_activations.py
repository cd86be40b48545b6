"""Activations other than ReLU: by name, against the long-double oracle, at the corners, twice differentiated; in the
dual tail, at a fork; and found by `fuse_` in every spelling."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.activations import NAMES, PIECEWISE, SMOOTH, activate
from fusedres.benchmarks.compile_only import compile_only
from fusedres.benchmarks.steps import ALLOWED, excess
from fusedres.functional import batch_norm_act, dual_batch_norm_act

from .helpers import DTYPES, Case, exact_hardswish, over_budget, run, run_eager
from .swap_blocks import fused_copy, images, make
from .test_dual import draw, off

OTHERS = (*(name for name in NAMES if name != "relu"), "leaky_relu(0.2)", "leaky_relu(-0.5)")
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["add", "plain"])
NHWC = torch.channels_last


# --- results -----------------------------------------------------------------------------------------------------


@RESIDUAL
@MODES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", OTHERS)
def test_results(activation, dtype, training, residual, device):
    case = Case((4, 6, 5, 7), DTYPES[dtype], "channels_last", training=training, residual=residual,
                activation=activation, mean_over_std=0.5, device=device)  # fmt: skip
    assert over_budget(case) == {}


@RESIDUAL
@pytest.mark.parametrize("activation", OTHERS)
def test_double_keeps_its_digits(activation, residual, device):
    """No constant of an activation is rounded to float32 on its way."""
    case = Case(
        (4, 6, 5, 7), torch.float64, residual=residual, activation=activation, device=device
    )
    with exact_hardswish(device):
        torch.testing.assert_close(run(case), run_eager(case), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_layouts(activation, layout, device):
    case = Case((3, 20, 4, 6), layout=layout, residual_layout="channels_last", activation=activation,
                device=device)  # fmt: skip
    assert over_budget(case) == {}


@MODES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("activation", OTHERS)
def test_dual_tail(activation, dtype, training, device):
    tensors = draw((8, 8, 9, 9), DTYPES[dtype], "channels_last", device=device)
    with exact_hardswish(device):
        assert off(tensors, training=training, activation=activation) == {}


def corners(device) -> torch.Tensor:
    """Where derivatives jump, far out, and where numbers end; one value a channel."""
    inf, nan = float("inf"), float("nan")
    values = [-inf, -1e4, -90.0, -3.0, -1e-30, -0.0, 0.0, 1e-30, 3.0, 6.0, 90.0, 1e4, inf, nan]
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


@pytest.mark.kernels
@RESIDUAL
@pytest.mark.parametrize("activation", NAMES)
def test_corners_and_not_finite_values_are_pytorch_s(activation, residual, device):
    """In eval with identity statistics the activation's input is the value itself: 1 + eps is 1. (PyTorch 2.11 refuses
    an eps of 0.)"""
    x = corners(device).requires_grad_()
    n = x.shape[1]
    mean, var = torch.zeros(n, device=device), torch.ones(n, device=device)
    added = torch.zeros_like(x) if residual else None
    y = batch_norm_act(x, mean, var, eps=1e-30, residual=added, activation=activation)
    wide = x.detach().double().requires_grad_()
    expected = activate(wide, activation)
    found = [y, *torch.autograd.grad(y.sum(), x)]
    wanted = [expected, *torch.autograd.grad(expected.sum(), wide)]
    # At -3 gelu's 1 + erf is 2.7e-3: a rounding of erf, 2^-24, is 2.2e-5 of it.
    rtol = 3e-5 if activation == "gelu" else 1e-5
    torch.testing.assert_close(
        [t.double() for t in found], wanted, rtol=rtol, atol=1e-30, equal_nan=True
    )


# --- derivatives, transforms, what is saved ----------------------------------------------------------------------


@MODES
@RESIDUAL
@pytest.mark.parametrize("activation", ["leaky_relu(0.2)", *SMOOTH])
def test_second_derivatives(activation, residual, training, device):
    torch.manual_seed(3)
    leaves = [torch.randn(3, 2, 2, 2, dtype=torch.float64, device=device) for _ in range(2)]
    leaves += [torch.rand(2, dtype=torch.float64, device=device) + 0.5 for _ in range(2)]
    mean, var = (t.detach().clone() for t in leaves[2:])

    def function(x, r, w, b):
        return batch_norm_act(
            x, mean.clone(), var.clone(), w, b, training, residual=r if residual else None, activation=activation
        )  # fmt: skip

    leaves = [t.requires_grad_() for t in leaves]
    used = leaves if residual else [leaves[0], *leaves[2:]]
    called = function if residual else lambda x, w, b: function(x, None, w, b)
    assert torch.autograd.gradgradcheck(called, used, fast_mode=True)


@pytest.mark.parametrize("activation", ["leaky_relu(0.2)", "silu"])
def test_second_derivatives_of_the_dual_tail(activation, device):
    torch.manual_seed(3)
    leaves = [torch.randn(3, 2, 2, 2, dtype=torch.float64, device=device) for _ in range(2)]
    leaves += [torch.rand(2, dtype=torch.float64, device=device) + 0.5 for _ in range(4)]

    def function(x, r, *vectors):
        return dual_batch_norm_act(x, r, *[None] * 4, *vectors, True, activation=activation)

    assert torch.autograd.gradgradcheck(
        function, [t.requires_grad_() for t in leaves], fast_mode=True
    )


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_vmap_over_grad(activation, device):
    torch.manual_seed(3)
    x, residual = torch.randn(2, 3, 4, 5, 2, 2, device=device)

    def loss(x, residual):
        y = batch_norm_act(x, None, None, training=True, residual=residual, activation=activation)
        return y.square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    looped = [torch.stack(pair) for pair in zip(*map(gradient, x, residual), strict=True)]
    torch.testing.assert_close(list(torch.vmap(gradient)(x, residual)), looped)


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", OTHERS)
def test_what_is_saved(activation):
    """A bit an element where the derivative takes two values; else the residual, which the block's other path holds."""
    x, residual = (torch.randn(4, 8, 4, 4, requires_grad=True) for _ in range(2))
    held = {x.data_ptr(), residual.data_ptr()}
    output = batch_norm_act(x, None, None, training=True, residual=residual, activation=activation)
    new = [t for t in output.grad_fn.saved_tensors if t is not None and t.data_ptr() not in held]
    assert sum(t.nbytes for t in new) == 4 * 8 * 4 + (
        x.numel() // 8 if activation.startswith(PIECEWISE) else 0
    )


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_a_chain_of_tails_forks_and_gives_the_gradients_of_pytorch(activation, device):
    torch.manual_seed(3)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)

    def chain(tail):
        y = x * 1
        for _ in range(3):
            y = tail(y * 2, y)
        return torch.autograd.grad(y.square().sum(), [x, weight])

    found = chain(
        lambda a, b: batch_norm_act(
            a, None, None, weight, None, True, residual=b, activation=activation
        )
    )
    expected = chain(
        lambda a, b: activate(F.batch_norm(a, None, None, weight, None, True) + b, activation)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.compiler
@pytest.mark.parametrize("kind", ["plain", "add", "dual"])
@pytest.mark.parametrize("activation", ["leaky_relu", "silu", "mish"])
def test_nothing_spills(activation, kind):
    def empty():
        return torch.empty(
            64, 256, 28, 28, dtype=torch.bfloat16, memory_format=NHWC
        ).requires_grad_()

    x, residual, vectors = empty(), empty(), [torch.empty(256) for _ in range(8)]
    with fusedres.backend("triton"), compile_only(90) as recorded:
        if kind == "dual":
            y = dual_batch_norm_act(x, residual, *vectors, training=True, activation=activation)
        else:
            added = residual if kind == "add" else None
            y = batch_norm_act(x, *vectors[:4], True, residual=added, activation=activation)
        torch.autograd.grad(y, [x] if kind == "plain" else [x, residual], torch.empty_like(y))
        spilled = {each.kernel: each.code.spills for each in recorded if each.code.spills}
    assert spilled == {}


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    "name", ["tanh", "ReLU", "leaky_relu(x)", "leaky_relu(nan)", "leaky_relu()", 3, ["relu"]]
)
def test_an_unknown_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match="batch_norm_act: unknown activation"):
        batch_norm_act(torch.randn(2, 3, 4, 4), None, None, training=True, activation=name)


@pytest.mark.once
def test_the_module_takes_them_too():
    layer = fusedres.nn.BatchNormAct2d(3, activation="leaky_relu(0.3)")
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(
        layer(x), F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.3)
    )


# --- the swap ----------------------------------------------------------------------------------------------------


def child(act):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + x)

    block = make(forward)
    block.relu = act
    return block


def called(function):
    return make(lambda self, x: function(self.bn1(self.conv1(x)) + x))


# name: (block, what the pattern ends in)
SPELLINGS = {
    "ReLU6": (lambda: child(nn.ReLU6(inplace=True)), "ReLU6"),
    "LeakyReLU": (lambda: child(nn.LeakyReLU(0.1)), "LeakyReLU"),
    "SiLU": (lambda: child(nn.SiLU(inplace=True)), "SiLU"),
    "GELU": (lambda: child(nn.GELU()), "GELU"),
    "GELU by tanh": (lambda: child(nn.GELU("tanh")), "GELU"),
    "Hardswish": (lambda: child(nn.Hardswish()), "Hardswish"),
    "Mish": (lambda: child(nn.Mish()), "Mish"),
    "relu6": (lambda: called(F.relu6), "ReLU6"),
    "leaky_relu": (lambda: called(F.leaky_relu), "LeakyReLU"),
    "leaky_relu, a slope": (lambda: called(lambda x: F.leaky_relu(x, 0.3, True)), "LeakyReLU"),
    "leaky_relu, by name": (lambda: called(lambda x: F.leaky_relu(x, negative_slope=0.3)), "LeakyReLU"),
    "silu": (lambda: called(lambda x: F.silu(x, inplace=True)), "SiLU"),
    "gelu": (lambda: called(F.gelu), "GELU"),
    "gelu, tanh": (lambda: called(lambda x: F.gelu(x, approximate="tanh")), "GELU"),
    "hardswish": (lambda: called(F.hardswish), "Hardswish"),
    "mish": (lambda: called(F.mish), "Mish"),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_found(name):
    block, end = SPELLINGS[name]
    row = fusedres.fuse_(block()).rows[0]
    assert (row.pattern, row.status) == (f"BN+add+{end}", "fused")


@MODES
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_computes_the_same(name, training, device):
    block, x = SPELLINGS[name][0]().to(device).train(training), images(3, 4, 6, 5, device=device)
    with exact_hardswish(device):
        assert excess(block, fused_copy(block), x, steps=2) <= ALLOWED


class Sub(nn.SiLU):
    pass


@pytest.mark.once
@pytest.mark.parametrize(
    "act", [nn.Hardtanh(), nn.Sigmoid(), nn.PReLU(), Sub(), nn.ReLU(), nn.Softplus()], ids=lambda a: type(a).__name__
)  # fmt: skip
def test_of_another_activation_the_sum_alone_is_fused(act):
    row = fusedres.fuse_(child(act)).rows[0]
    assert row.pattern == ("BN+add+ReLU" if type(act) is nn.ReLU else "BN+add")


@pytest.mark.once
@pytest.mark.parametrize(
    ("act", "change"),
    [
        (nn.LeakyReLU(0.1), lambda block: setattr(block.relu, "negative_slope", 0.4)),
        (nn.GELU(), lambda block: setattr(block.relu, "approximate", "tanh")),
        (nn.SiLU(), lambda block: setattr(block, "relu", nn.Mish())),
        (nn.SiLU(), lambda block: block.relu.register_forward_hook(lambda *a: a[-1] * 2)),
    ],
    ids=["slope", "tanh", "another", "hook"],
)
def test_what_changes_later_is_seen_at_the_call(act, change):
    block = child(copy.deepcopy(act))
    fused = fused_copy(block)
    for each in (block, fused):
        change(each)
    assert excess(block, fused, images(3, 4, 6, 5)) <= ALLOWED


@pytest.mark.once
class TestControl:
    def test_activations_that_are_not_listed_are_left_out(self):
        config = fusedres.FuseConfig(activations=("relu", "gelu"))
        row = fusedres.fuse_(child(nn.SiLU()), config).rows[0]
        assert (row.status, row.reason) == ("excluded", "config.activations leaves out silu")

    def test_relu_stands_for_any_of_them_in_a_pattern(self):
        row = fusedres.fuse_(child(nn.SiLU()), fusedres.FuseConfig(patterns=("BN+ReLU",))).rows[0]
        assert (row.status, row.reason) == ("excluded", "config.patterns leaves out BN+add+ReLU")

    @pytest.mark.parametrize(
        ("option", "error", "text"),
        [
            ({"activations": "relu"}, TypeError, "activations is 'relu', expected a tuple"),
            ({"activations": ("tanh",)}, ValueError, "unknown activation 'tanh' in activations"),
            ({"min_elements": 1.5}, TypeError, "min_elements is 1.5, expected a whole number"),
            ({"min_elements": -1}, ValueError, "min_elements is -1, expected 0 or more"),
        ],
    )
    def test_bad_options(self, option, error, text):
        with pytest.raises(error, match=text):
            fusedres.FuseConfig(**option)

    @pytest.mark.parametrize(("size", "runs_fused"), [(5, True), (4, False)])
    def test_small_inputs_run_the_block_s_own_forward(self, size, runs_fused, monkeypatch):
        from .swap_blocks import spy_on_sites

        calls = spy_on_sites(monkeypatch)
        block = child(nn.SiLU())
        fusedres.fuse_(block, fusedres.FuseConfig(min_elements=4 * 5 * 5))
        block(images(1, 4, size, 5))
        assert bool(calls) is runs_fused

"""Derivatives: numerically checked, of first and second order, frozen, transformed, checkpointed; both backends."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedres.functional import batch_norm_act

from .helpers import Case, lay_out, over_budget, run, run_eager


def leaves(shape, device, residual=True, layout="contiguous"):
    """Float64 leaves with pre-activations away from the ReLU's corner, where no derivative exists."""
    x = lay_out(torch.randn(shape, dtype=torch.float64, device=device), layout).requires_grad_()
    r = lay_out(torch.randn(shape, dtype=torch.float64, device=device), layout).requires_grad_()
    weight = (torch.rand(shape[1], dtype=torch.float64, device=device) + 0.5).requires_grad_()
    bias = torch.randn(shape[1], dtype=torch.float64, device=device, requires_grad=True)
    return (x, weight, bias, r) if residual else (x, weight, bias)


def call(training, activation):
    def function(x, weight, bias, residual=None):
        mean = torch.linspace(-0.5, 0.5, x.shape[1], dtype=torch.float64, device=x.device)
        var = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64, device=x.device)
        return batch_norm_act(
            x, mean, var, weight, bias, training, 0.0, residual=residual, activation=activation
        )

    return function


CASES = pytest.mark.parametrize(
    ("training", "activation", "residual", "layout"),
    [
        (True, "relu", True, "contiguous"),
        (True, "relu", False, "channels_last"),
        (True, None, True, "channels_last"),
        (False, "relu", True, "channels_last"),
        (False, "relu", False, "contiguous"),
        (False, None, False, "contiguous"),
    ],
)


@CASES
def test_gradcheck(training, activation, residual, layout, device):
    inputs = leaves((2, 3, 2, 2), device, residual, layout)
    assert torch.autograd.gradcheck(call(training, activation), inputs, fast_mode=True)


@pytest.mark.composes("second derivatives", "works")
@CASES
def test_gradgradcheck(training, activation, residual, layout, device):
    inputs = leaves((2, 3, 2, 2), device, residual, layout)
    assert torch.autograd.gradgradcheck(call(training, activation), inputs, fast_mode=True)


def test_second_derivative_through_a_weight_that_depends_on_the_input(device):
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def function(x):
        return batch_norm_act(x, None, None, x.mean((0, 2, 3)) + 2, None, True, residual=x * x)

    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


@pytest.mark.parametrize(
    "frozen",
    [("weight", "bias"), ("input",), ("input", "weight", "bias"), ("residual",), ("weight",)],
    ids="+".join,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_what_trains_alone(frozen, training, device):
    """Each combination takes its own launches; the gradients are those of the full backward."""
    case = Case(training=training, device=device)
    full = run(case)
    tensors = {
        n: case.tensors[n].detach().requires_grad_(n not in frozen)
        for n in ("input", "residual", "weight", "bias")
    }
    output = batch_norm_act(
        tensors["input"], case.tensors["running_mean"].clone(), case.tensors["running_var"].clone(),
        tensors["weight"], tensors["bias"], training, residual=tensors["residual"],
    )  # fmt: skip
    output.backward(case.tensors["grad"])
    assert all(
        t.grad is None if n in frozen else torch.equal(t.grad, full[f"grad_{n}"])
        for n, t in tensors.items()
    )


def test_no_grad_saves_nothing_and_gives_the_same_output(device):
    case = Case(device=device)
    with torch.no_grad():
        output = batch_norm_act(
            *(case.tensors[n].clone() for n in ("input", "running_mean", "running_var", "weight", "bias")),
            True, residual=case.tensors["residual"],
        )  # fmt: skip
    assert torch.equal(output, run(case)["output"])


def test_two_forwards_before_a_backward(device):
    """Running statistics are updated in between; what backward needs must not be among them."""
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    first, second = (batch_norm_act(x, mean, var, training=True) for _ in range(2))
    (first.sum() + second.square().sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.composes("activation checkpointing (`torch.utils.checkpoint`)", "works")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, device):
    case = Case(device=device, tracked=False)

    def checkpointed(
        input, mean, var, weight, bias, training, momentum, eps, *, residual, activation
    ):
        def call(x, r, w, b):
            return batch_norm_act(
                x, mean, var, w, b, training, momentum, eps, residual=r, activation=activation
            )

        return checkpoint(call, input, residual, weight, bias, use_reentrant=False)

    if reentrant:  # which supports backward() alone
        x = case.tensors["input"].detach().requires_grad_()
        output = checkpoint(
            lambda x: batch_norm_act(x, None, None, training=True), x, use_reentrant=True
        )
        output.backward(case.tensors["grad"])
        plain = x.detach().requires_grad_()
        batch_norm_act(plain, None, None, training=True).backward(case.tensors["grad"])
        assert torch.equal(x.grad, plain.grad)
    else:
        assert over_budget(case, run(case, checkpointed)) == {}


@pytest.mark.composes("`torch.func.grad`", "works")
def test_func_grad(device):
    case = Case(device=device, dtype=torch.float64, tracked=False)
    x, r, grad = (case.tensors[n] for n in ("input", "residual", "grad"))

    def loss(x):
        return (
            batch_norm_act(
                x, None, None, case.tensors["weight"], case.tensors["bias"], True, residual=r
            )
            * grad
        ).sum()

    expected = run_eager(case)["grad_input"]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


@pytest.mark.composes("`torch.func.vmap`", "works")
@pytest.mark.parametrize(
    "in_dims", [(0, 0, None), (0, None, None), (None, 0, None), (0, 0, 0), (None, None, 0)]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_vmap(in_dims, training, device):
    """The same as a loop over the mapped dimension."""
    stacked = [
        torch.randn(3, 4, 5, 2, 2, device=device),
        torch.randn(3, 4, 5, 2, 2, device=device),
        torch.rand(3, 5, device=device),
    ]
    arguments = [t if d == 0 else t[0] for t, d in zip(stacked, in_dims, strict=True)]
    mean, var = (
        (None, None) if training else (torch.zeros(5, device=device), torch.ones(5, device=device))
    )

    def function(x, residual, weight):
        return batch_norm_act(x, mean, var, weight, None, training, residual=residual)

    looped = [
        function(*(t[k] if d == 0 else t for t, d in zip(arguments, in_dims, strict=True)))
        for k in range(3)
    ]
    torch.testing.assert_close(torch.vmap(function, in_dims)(*arguments), torch.stack(looped))


@pytest.mark.composes("gradients of each sample (`vmap` of `grad`)", "works")
def test_vmap_over_grad(device):
    """Per-sample gradients."""
    x = torch.randn(3, 4, 5, 2, 2, device=device)
    weight = torch.rand(5, device=device)

    def loss(weight, x):
        return batch_norm_act(x, None, None, weight, None, True, residual=x * x).square().sum()

    expected = torch.stack([torch.func.grad(loss)(weight, x[k]) for k in range(3)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss), (None, 0))(weight, x), expected)


@pytest.mark.composes("a backward under another backend than its forward", "works")
def test_backward_may_run_under_another_backend(device, backend):
    """What forward saves means the same to both."""
    import fusedres

    case = Case(shape=(3, 6, 4, 5), device=device)
    x = case.tensors["input"].detach().requires_grad_()
    output = batch_norm_act(x, None, None, training=True, residual=case.tensors["residual"])
    with fusedres.backend("auto" if backend == "aten" else "aten"):
        (grad,) = torch.autograd.grad(output, x, case.tensors["grad"])
    case = case.with_tensors(weight=None, bias=None, running_mean=None, running_var=None)
    torch.testing.assert_close(grad, run_eager(case)["grad_input"])


def test_gradients_of_each_sample_in_eval(device):
    """torch.func's own recipe: grad under vmap, by a functional call."""
    from torch.func import functional_call, grad, vmap

    from fusedres.nn import BatchNormAct2d

    module = BatchNormAct2d(4).double().eval().to(device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, device=device)

    def loss(parameters, x):
        return functional_call(module, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for k in range(3):
        expected = grad(loss)(parameters, x[k])
        for name in parameters:
            torch.testing.assert_close(found[name][k], expected[name])

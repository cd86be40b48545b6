"""Strides of what comes out: those of the same calls in PyTorch on a CPU, for every layout of what goes in."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from fusedres import functional
from fusedres.activations import activate as fresh
from fusedres.nn.batch_norm import call_batch_norm, is_like
from fusedres.ops.projection import precision, why_library

from .helpers import lay_out, moved

NHWC, NDHWC = torch.channels_last, torch.channels_last_3d


def permuted(shape, order):
    """Dense, with the dimensions in this order in memory."""
    return torch.randn([shape[d] for d in order]).permute(
        [order.index(d) for d in range(len(shape))]
    )


def expanded(shape, dim):
    return torch.randn(shape).narrow(dim, 0, 1).expand(shape)


LAYOUTS = {
    "2-D": torch.randn(4, 6),
    "2-D transposed": torch.randn(6, 4).t(),
    "2-D sliced": torch.randn(4, 12)[:, ::2],
    "3-D": torch.randn(3, 5, 4),
    "3-D channels last": permuted((3, 5, 4), (0, 2, 1)),
    "3-D batch last": permuted((3, 5, 4), (1, 2, 0)),
    "contiguous": torch.randn(2, 3, 4, 5),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=NHWC),
    "transposed": lay_out(torch.randn(2, 3, 4, 5), "transposed"),
    "transposed channels_last": permuted((2, 3, 4, 5), (0, 3, 2, 1)),
    "channels first of all": permuted((2, 3, 4, 5), (1, 0, 2, 3)),
    "batch last": permuted((2, 3, 4, 5), (1, 2, 3, 0)),
    "sliced": lay_out(torch.randn(2, 3, 4, 5), "sliced"),
    "channels_last sliced": torch.randn(2, 3, 8, 10).to(memory_format=NHWC)[:, :, ::2, ::2],
    "channels_last, some channels": torch.randn(2, 6, 4, 5).to(memory_format=NHWC)[:, 1:4],
    "expanded batch": expanded((2, 3, 4, 5), 0),
    "expanded channels": expanded((2, 3, 4, 5), 1),
    "expanded width": expanded((2, 3, 4, 5), 3),
    "one pixel": torch.randn(4, 3, 1, 1),
    "one pixel channels_last": torch.randn(4, 1, 1, 3).permute(0, 3, 1, 2),
    "one channel": torch.randn(2, 1, 4, 5),
    "one channel channels_last": torch.randn(2, 4, 5, 1).permute(0, 3, 1, 2),
    "one image": torch.randn(1, 3, 4, 5).to(memory_format=NHWC),
    "one column": torch.randn(2, 3, 4, 1).to(memory_format=NHWC),
    "one column of many": torch.randn(2, 3, 4, 5).to(memory_format=NHWC)[:, :, :, 2:3],
    "5-D": torch.randn(2, 3, 2, 4, 5),
    "5-D channels_last": torch.randn(2, 3, 2, 4, 5).to(memory_format=NDHWC),
    "5-D permuted": permuted((2, 3, 2, 4, 5), (2, 0, 4, 1, 3)),
    "5-D channels_last sliced": torch.randn(2, 3, 4, 4, 5).to(memory_format=NDHWC)[:, :, ::2],
    "6-D": permuted((2, 3, 2, 2, 2, 3), (0, 2, 3, 4, 5, 1)),
}  # fmt: skip


def activate(x, activation):
    return fresh(x, activation, in_place=True)


def norm(x, training):
    c = x.shape[1]
    return F.batch_norm(x, torch.zeros(c), torch.ones(c), torch.ones(c), torch.zeros(c), training)


def vectors(x):
    zero, one = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    return zero, one, one.clone(), zero.clone()


# Each as (ours, PyTorch's) of two tensors, training and the activation.
FORMS = {
    "norm": (
        lambda x, r, t, a: functional.batch_norm_act(x, *vectors(x), t, activation=a),
        lambda x, r, t, a: activate(norm(x, t), a),
    ),
    "tail": (
        lambda x, r, t, a: functional.batch_norm_act(x, *vectors(x), t, residual=r, activation=a),
        lambda x, r, t, a: activate(norm(x, t).add_(r), a),
    ),
    "dual": (
        lambda x, r, t, a: functional.dual_batch_norm_act(
            x, r, *vectors(x)[:2], *vectors(x)[:2], *vectors(x)[2:], *vectors(x)[2:], t, activation=a
        ),
        lambda x, r, t, a: activate(norm(x, t).add_(norm(r, t)), a),
    ),
    "add": (
        lambda x, r, t, a: functional.add_act(x, r, activation=a),
        lambda x, r, t, a: activate(x + r, a),
    ),
    "scaled": (
        lambda x, r, t, a: functional.scaled_add_act(x, r, vectors(x)[1], activation=a),
        lambda x, r, t, a: activate(torch.ones([x.shape[1]] + [1] * (x.dim() - 2)) * x + r, a),
    ),
    "preactivation": (
        lambda x, r, t, a: functional.add_batch_norm_act(x, r, *vectors(x), t, activation=a),
        lambda x, r, t, a: (total := x + r, activate(norm(total, t), a)),
    ),
}  # fmt: skip


def walked(tensor):
    """The strides of dimensions of more than one place; nobody walks along the others."""
    return [tensor.stride(d) for d in range(tensor.dim()) if tensor.shape[d] > 1]


def strides_and_values(function, x, r, training, activation):
    x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
    outputs = function(x, r, training, activation)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradient = torch.autograd.grad([y.mul(2).sum() for y in outputs], x)[0]
    return [y.stride() for y in outputs], [y.detach() for y in outputs], gradient


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs(layout, form, device):
    """Each layout with itself and with a contiguous second operand, in training and eval."""
    x = LAYOUTS[layout]
    ours, theirs = FORMS[form]
    for r in (x.detach() + 0, torch.randn(x.shape)):
        for training, activation in ((True, "relu"), (False, "silu")):
            there = moved(x, device), moved(r, device)
            found = strides_and_values(ours, *there, training, activation)
            expected = strides_and_values(theirs, x, r, training, activation)
            assert found[0] == expected[0], (r.stride(), training, activation)
            torch.testing.assert_close(
                found[1:], expected[1:], rtol=1e-4, atol=1e-4, check_device=False
            )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [n for n, x in LAYOUTS.items() if 3 <= x.dim() <= 4])
def test_a_projection(layout, stride, device):
    """Not in 5-D, where PyTorch's own choice depends on how many threads there are."""
    x = moved(LAYOUTS[layout], device)
    weight = torch.randn(6, x.shape[1], *[1] * (x.dim() - 2)).to(device)
    convolve = (F.conv1d, F.conv2d)[x.dim() - 3]

    def results(function, x, weight):
        _, outputs, gradient = strides_and_values(
            lambda x, *_: function(x, weight, None, stride), x, x, True, None
        )
        return *outputs, gradient

    found, expected = (results(f, x, weight) for f in (functional.projection, convolve))
    sizes = results(convolve, x.abs(), weight.abs())
    # The compiled kernel rounds both factors of a product to tf32, by 2**-11 each; cuDNN may or may not.
    rounds = why_library(x, weight) is None and precision(x.dtype) == "tf32"
    for ours, theirs, size in zip(found, expected, sizes, strict=True):
        rounding = 2**-10 * float(size.max()) if rounds else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 + rounding)
        assert walked(ours) == walked(theirs)


def draw(rng: random.Random, shape):
    order = list(range(len(shape)))
    kind = rng.random()
    if kind < 0.3:
        order = [0, *range(2, len(shape)), 1]
    elif kind < 0.8:
        rng.shuffle(order)
    steps = [rng.choice([1, 1, 1, 2]) for _ in shape]
    large = torch.randn([shape[d] * steps[d] for d in order])
    view = large.permute([order.index(d) for d in range(len(shape))])
    view = view[tuple(slice(None, None, step) for step in steps)]
    if rng.random() < 0.15:
        dim = rng.randrange(len(shape))
        view = view.narrow(dim, 0, 1).expand(shape)
    return view


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_any_strides(form, device):
    rng = random.Random(form)
    ours, theirs = FORMS[form]
    for _ in range(60):
        shape = [rng.choice([1, 2, 3]) for _ in range(rng.randint(2, 5))]
        shape[0] = max(2, shape[0])
        x, r = draw(rng, shape), draw(rng, shape)
        with torch.no_grad():
            found = ours(moved(x, device), moved(r, device), True, "relu")
            expected = theirs(x, r, True, "relu")
        for y, z in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):  # fmt: skip
            assert walked(y) == walked(z), (x.shape, x.stride(), r.stride())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_input(layout, device):
    """As PyTorch's."""
    x = LAYOUTS[layout]
    ours, theirs = FORMS["norm"]
    found, expected = (
        torch.autograd.grad((y := f(leaf, None, True, "relu")), leaf, torch.randn_like(y))[0]
        for f, leaf in (
            (ours, moved(x, device).requires_grad_()),
            (theirs, x.detach().requires_grad_()),
        )
    )
    assert walked(found) == walked(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("into", ["residual", "residual first"])
def test_a_residual_that_stands_first_decides(layout, into, device):
    """Where a fused call would lay its result out in another way, it is not made."""
    x = LAYOUTS[layout]
    r = torch.empty_strided(x.shape, x.stride()).copy_(x) if 0 not in x.stride() else x.clone()
    bn = getattr(torch.nn, f"BatchNorm{max(x.dim() - 2, 1)}d", None)
    if bn is None or not is_like(r, x, into):
        return
    bn = bn(x.shape[1])
    expected = r + bn(x)
    with torch.no_grad():
        found = call_batch_norm(bn.to(device), moved(x, device), moved(r, device), None)
    assert walked(found) == walked(expected)


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 64, 72, 128])
@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("of_gradient", [NHWC, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_the_mask_is_read_as_it_was_written(of_gradient, layout, channels, device):
    """Whatever the layout of the gradient is: of the residual's, exactly what ReLU lets through."""
    x, r = (torch.randn(9, channels, 3, 5).to(device, memory_format=layout) for _ in range(2))
    output = functional.batch_norm_act(x, None, None, training=True, residual=r.requires_grad_())
    dy = torch.randn(x.shape).to(device, memory_format=of_gradient)
    (found,) = torch.autograd.grad(output, r, dy)
    assert torch.equal(found, torch.where(output > 0, dy, 0.0))

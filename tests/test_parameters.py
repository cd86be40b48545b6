"""A parameter that changes between a forward and its backward: what PyTorch's BatchNorm takes, all fused forms take.

PyTorch keeps BatchNorm's input and weight for the backward, and not its bias. So whoever trains biases alone may step
between two backward passes over one graph, and an optimizer may step while the backward runs.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres import functional
from fusedres.activations import activate

C = 4


def norm(x, mean, var, weight, bias, training):
    return F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-3)


# Each as (ours, PyTorch's) of x, r, the parameters p, the statistics s, and what follows.
FORMS = {
    "norm": (
        lambda x, r, p, s, t, a: functional.batch_norm_act(x, *s[:2], *p[:2], t, 0.1, 1e-3, activation=a),
        lambda x, r, p, s, t, a: activate(norm(x, *s[:2], *p[:2], t), a),
    ),
    "tail": (
        lambda x, r, p, s, t, a: functional.batch_norm_act(
            x, *s[:2], *p[:2], t, 0.1, 1e-3, residual=r, activation=a
        ),
        lambda x, r, p, s, t, a: activate(norm(x, *s[:2], *p[:2], t) + r, a),
    ),
    "dual": (
        lambda x, r, p, s, t, a: functional.dual_batch_norm_act(
            x, r, *s, *p[:4], t, 0.1, 1e-3, 0.1, 1e-3, activation=a
        ),
        lambda x, r, p, s, t, a: activate(norm(x, *s[:2], *p[:2], t) + norm(r, *s[2:], *p[2:4], t), a),
    ),
    "projection": (
        lambda x, r, p, s, t, a: functional.projection_batch_norm_act(
            x, r, p[4], *s, *p[:4], t, 0.1, 1e-3, 0.1, 1e-3, projection_bias=p[5], activation=a
        ),
        lambda x, r, p, s, t, a: activate(
            norm(x, *s[:2], *p[:2], t) + norm(F.conv2d(r, p[4], p[5]), *s[2:], *p[2:4], t), a
        ),
    ),
    "preactivation": (
        lambda x, r, p, s, t, a: torch.cat(
            functional.add_batch_norm_act(x, r, *s[:2], *p[:2], t, 0.1, 1e-3, activation=a), 1
        ),
        lambda x, r, p, s, t, a: torch.cat([x + r, activate(norm(x + r, *s[:2], *p[:2], t), a)], 1),
    ),
}  # fmt: skip


def draw(device):
    """x, r, and weights, biases, a projection's weight and bias; leaves."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        made = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        return made.requires_grad_()

    x, r = (
        normal(2, C, 3, 4).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        for _ in range(2)
    )
    return x, r, [*(normal(C) for _ in range(4)), normal(C, C, 1, 1), normal(C)]


def outcome(form, ours, training, activation, device, order):
    """The gradients of two backward passes over one graph, every bias changed in between; with `order` 2 the second is
    differentiated again."""
    x, r, p = draw(device)
    statistics = [t.to(device) for t in (torch.zeros(C).double(), torch.ones(C).double()) * 2]
    y = FORMS[form][0 if ours else 1](x, r, p, statistics, training, activation)
    scale = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view(y.shape)
    leaves = [x, r, *p]
    first = torch.autograd.grad((y * scale).sum(), leaves, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        for bias in (p[1], p[3], p[5]):
            bias.sub_(100)
    loss = (y * scale.flip(0)).sum()
    if order == 1:
        return [*first, *torch.autograd.grad(loss, leaves, allow_unused=True)]
    once = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    again = sum((g * g).sum() for g in once if g is not None and g.requires_grad)
    return [*first, *once, *torch.autograd.grad(again, leaves, allow_unused=True)]


@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("activation", ["relu", "silu", None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_biases_may_change_between_two_backward_passes(form, training, activation, order, device):
    """The gradients are those of the biases at the forward, as in PyTorch."""
    found = outcome(form, True, training, activation, device, order)
    expected = outcome(form, False, training, activation, device, order)
    for ours, theirs in zip(found, expected, strict=True):
        # A gradient that does not depend on a leaf is None there and may be zeros here.
        ours, theirs = (None if t is None or not t.any() else t for t in (ours, theirs))
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_weight_is_refused_as_pytorch_refuses_it(form, device):
    """It is needed for the gradient, so never silently the wrong one."""
    for ours in (True, False):
        x, r, p = draw(device)
        y = FORMS[form][0 if ours else 1](x, r, p, [None] * 4, True, "relu")
        with torch.no_grad():
            p[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Block(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, channels, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.short = nn.Sequential()
        if stride > 1:
            self.short = nn.Sequential(
                nn.Conv2d(C, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.short(x))


def test_an_optimizer_may_step_while_the_backward_runs(device):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C), nn.ReLU(), Block(C), Block(2 * C, 2)
    )
    plain = network.to(device).double()
    fused = copy.deepcopy(plain)
    assert fusedres.fuse_(fused).n_fused == 4
    for model in (plain, fused):
        steps = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in model.parameters()}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, steps=steps: (steps[p].step(), steps[p].zero_grad(), None)[-1]
            )
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64).to(device)
            model(x).square().mean().backward()
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.kernels
def test_what_is_kept_of_a_bias_is_not_the_bias(device):
    """No saved tensor shares its memory."""
    for form in FORMS:
        x, r, p = draw(device)
        y = FORMS[form][0](x, r, p, [None] * 4, True, "silu")
        nodes, kept = [y.grad_fn], []
        while nodes:
            node = nodes.pop()
            kept += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
            nodes += [n for n, _ in node.next_functions if n is not None]
        assert not {p[k].data_ptr() for k in (1, 3, 5)} & {t.data_ptr() for t in kept}, form

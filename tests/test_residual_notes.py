"""The claims of docs/residual.md, in numbers; and that each one that names a test has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian

import fusedres
from fusedres.nn import BasicBlock, Residual

pytestmark = pytest.mark.once
NOTES = Path(__file__).resolve().parent.parent / "docs" / "residual.md"


def branch(channels: int = 4, gain: float = 1.0) -> nn.Sequential:
    """Convolution, ReLU, convolution, in float64."""
    layers = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    ).double()  # fmt: skip
    for layer in (layers[0], layers[2]):
        nn.init.kaiming_normal_(layer.weight)
        layer.weight.data.mul_(gain)
        nn.init.zeros_(layer.bias)
    return layers


def zeroed(module: nn.Sequential) -> nn.Sequential:
    for parameter in module[-1].parameters():
        nn.init.zeros_(parameter)
    return module


def images(channels: int = 4, size: int = 4, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, size, size, dtype=torch.float64).requires_grad_()


def gradient(module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(module(x), x, dy)[0]


def test_every_test_that_the_notes_name_is_here():
    named = set(re.findall(r"`(test_\w+)`", NOTES.read_text(encoding="utf-8")))
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_every_test_that_the_notes_name_is_here"}


def test_the_jacobian_is_the_identity_plus_that_of_the_branch():
    block, x = branch(2), images(2, 3, 1).detach()
    whole, inner = (
        jacobian(function, x).reshape(x.numel(), x.numel()) for function in (Residual(block), block)
    )
    torch.testing.assert_close(whole, torch.eye(x.numel(), dtype=x.dtype) + inner)


def test_with_a_zeroed_block_the_gradient_passes_to_the_bit():
    x, dy = images(), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert torch.equal(gradient(Residual(zeroed(branch())), x, dy), dy)


def test_a_chain_is_the_input_plus_the_sum_of_its_branches():
    branches, x = [branch(gain=0.5) for _ in range(20)], images()
    y, added = x, torch.zeros_like(x)
    for each in branches:
        added = added + each(y)
        y = Residual(each)(y)
    torch.testing.assert_close(y, x + added)


def test_the_gradient_of_a_chain_is_that_at_its_end_plus_what_the_branches_add():
    """dE/dx_l = dE/dx_L + sum over the units of (dF_i/dx_i)^T dE/dx_(i+1)."""
    branches, x = [branch(gain=0.5) for _ in range(20)], images()
    stream = [x]
    for each in branches:
        stream.append(Residual(each)(stream[-1]))
    dy = torch.randn_like(x)
    at = torch.autograd.grad(stream[-1], stream, dy)
    through = [
        torch.autograd.grad(each(before), before, after_gradient)[0]
        for each, before, after_gradient in zip(branches, stream[:-1], at[1:], strict=True)
    ]
    torch.testing.assert_close(at[0], dy + torch.stack(through).sum(0))


def test_a_plain_chain_loses_the_gradient_and_a_residual_one_does_not():
    branches, x = [branch(gain=0.5) for _ in range(50)], images()
    dy = torch.randn_like(x)
    plain = gradient(nn.Sequential(*branches), x, dy).norm() / dy.norm()
    residual = gradient(nn.Sequential(*map(Residual, branches)), x, dy).norm() / dy.norm()
    # Each plain unit halves the variance of a ReLU network twice over; fifty of them leave nothing.
    assert (plain < 1e-12, residual > 1) == (True, True)


class ScaledShortcut(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x


@pytest.mark.parametrize("depth", [1, 5, 30])
def test_a_scale_on_the_shortcut_is_raised_to_the_depth(depth):
    """A half is a power of two: nothing is rounded."""
    units = [Residual(zeroed(branch()), skip=ScaledShortcut(0.5)) for _ in range(depth)]
    x = images()
    dy = torch.randn_like(x)
    assert torch.equal(gradient(nn.Sequential(*units), x, dy), dy * 0.5**depth)


def test_a_relu_after_the_sum_blocks_the_gradient_where_it_cuts():
    x = images()
    dy = torch.randn_like(x)
    found = gradient(Residual(zeroed(branch()), activation="relu"), x, dy)
    assert torch.equal(found, torch.where(x > 0, dy, 0.0))


def test_behind_a_relu_the_stream_only_grows_where_branches_are_positive():
    """A branch that ends in a ReLU gives nothing negative."""
    x = torch.relu(images())
    y = Residual(nn.Sequential(*branch(), nn.ReLU()), activation="relu")(x)
    assert bool((y >= x).all())


@pytest.mark.parametrize("gain", [0.01, 1.0, 100.0])
def test_a_batch_norm_at_the_end_fixes_the_variance_of_what_is_added(gain):
    norm = nn.BatchNorm2d(4, eps=1e-30).double()
    nn.init.constant_(norm.weight, 0.5)
    x = images()
    added = Residual(nn.Sequential(*branch(gain=gain), norm))(x) - x
    variance = added.var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance, torch.full((4,), 0.25, dtype=torch.float64))


def test_a_batch_norm_on_the_connection_scales_the_gradient():
    """With running statistics: by weight / std."""
    norm = nn.BatchNorm2d(4, eps=1e-9).double().eval()
    norm.running_var.fill_(16.0)
    x = images()
    dy = torch.randn_like(x)
    torch.testing.assert_close(gradient(Residual(zeroed(branch()), skip=norm), x, dy), dy / 4)


@pytest.mark.parametrize(
    ("keeps", "grown"), [(False, 1 + 10), (True, 2.0**10)], ids=["normalised", "keeping"]
)
def test_variance_adds_up_for_normalised_branches_and_doubles_for_others(keeps, grown):
    """Ten units on 4096 channels, whose branches are random rotations: independent of what they are added to."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    first = x.var()
    for _ in range(10):
        order = torch.randperm(4096, generator=generator)
        signs = torch.randint(0, 2, (4096,), generator=generator) * 2 - 1
        f = x[:, order] * signs
        x = x + (f if keeps else f / f.std())
    assert float(x.var() / first) == pytest.approx(grown, rel=0.1)


def test_a_block_whose_last_weight_is_zero_begins_as_its_shortcut():
    model = fusedres.models.resnet20(zero_init_residual=True).double()
    x = torch.relu(torch.randn(2, 16, 8, 8, dtype=torch.float64))
    block = model.layer1[0]
    assert (isinstance(block, BasicBlock), torch.equal(block(x), x)) == (True, True)


def test_a_scale_at_zero_learns_first():
    block = branch()
    unit = Residual(block, scale="scalar").double()
    x = images().detach()
    dy = torch.randn_like(x)
    unit(x).backward(dy)
    assert all(not parameter.grad.any() for parameter in block.parameters())
    torch.testing.assert_close(unit.scale.grad, (dy * block(x)).sum().detach())


def test_after_one_step_the_branch_learns_too():
    unit = Residual(branch(), scale="scalar").double()
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    x = images().detach()
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(unit(x), torch.ones_like(x)).backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in unit.parameters())

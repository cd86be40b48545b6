"""The nearest peer's silent faults, each as a regression test. (Import without a GPU: tests/test_import.py.)"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedres.functional import batch_norm_act
from fusedres.nn import BatchNormAct2d

from .helpers import Case, over_budget

SHAPE = (4, 6, 5, 5)
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@LAYOUTS
def test_gradients_with_an_activation(layout, device):
    """Was: gradients read in memory order where the kernel wrote in logical order, wrong by 4.66."""
    assert over_budget(Case(shape=SHAPE, layout=layout, device=device)) == {}


@LAYOUTS
def test_backward_in_eval_mode(layout, device):
    """Was: the formula of training, on statistics that nobody had written."""
    assert over_budget(Case(shape=SHAPE, layout=layout, training=False, device=device)) == {}


@pytest.mark.parametrize("other", ["residual_layout", "grad_layout"])
@LAYOUTS
def test_one_tensor_in_another_layout(layout, other, device):
    swapped = "contiguous" if layout == "channels_last" else "channels_last"
    assert over_budget(Case(shape=SHAPE, layout=layout, device=device, **{other: swapped})) == {}


def test_momentum_none_is_the_cumulative_average(device):
    """Was: a TypeError inside the kernel."""
    module = BatchNormAct2d(3, momentum=None, device=device)
    batches = torch.randn(3, 4, 3, 5, 5, device=device)
    for batch in batches:
        module(batch)
    torch.testing.assert_close(module.running_mean, batches.mean((0, 1, 3, 4)))


def test_one_value_per_channel_is_refused(device):
    """Was: a running variance of NaN."""
    module = BatchNormAct2d(3, device=device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(torch.randn(1, 3, 1, 1, device=device))
    assert torch.equal(module.running_var, torch.ones(3, device=device))


def test_batches_are_counted(device):
    """Was: 0 after any number of steps."""
    module = BatchNormAct2d(3, device=device)
    module(torch.randn(2, 3, 4, 4, device=device))
    module.eval()(torch.randn(2, 3, 4, 4, device=device))
    assert module.num_batches_tracked.item() == 1


def test_create_graph_keeps_the_second_derivative(device):
    """Was: a gradient that requires no gradient, so that a penalty on it was dropped without a word."""

    def penalty(function):
        x = torch.linspace(-2, 3, 4 * 3 * 4, dtype=torch.float64, device=device).sin()
        x = x.view(4, 3, 2, 2).requires_grad_()
        (slope,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    norm = nn.BatchNorm2d(3).double().to(device)
    expected = penalty(lambda x: torch.relu(norm(x) + x))
    found = penalty(lambda x: batch_norm_act(x, None, None, training=True, residual=x))
    torch.testing.assert_close(found, expected)

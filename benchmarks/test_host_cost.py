"""Host cost of a call: microseconds of Python and dispatch on tensors of 256 values, fused against the composition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres


class Composition(nn.Module):
    """What a ResNet block calls: BatchNorm2d, the add, the shared in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, residual):
        out = self.bn(x)
        out += residual
        return self.relu(out)


PROVIDERS = {"composition": Composition, "BatchNormAct2d": lambda: fusedres.nn.BatchNormAct2d(8)}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward(benchmark, provider, training):
    torch.set_num_threads(1)
    module = PROVIDERS[provider]().train(training)
    x, residual = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    benchmark(module, x, residual)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_and_backward(benchmark, provider):
    torch.set_num_threads(1)
    module = PROVIDERS[provider]()
    x, residual = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    benchmark(lambda: module(x, residual).sum().backward())

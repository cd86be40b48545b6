"""Pre-activation units in one forward: the sum, and the BatchNorm with its activation that begins the next."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess
from fusedres.nn import batch_norm
from fusedres.ops import preactivation

from .swap_blocks import fused_copy, images

X = images(2, 4, 6, 6)
PAIR = "add+BN+ReLU"


class Units(nn.Module):
    """Three units in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def start(self, norm, x):
        return self.act(norm(x))

    def sum(self, x, f):
        return x + f

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.sum(x, conv(self.start(norm, x)))
        return x


class Turned(Units):
    def sum(self, x, f):
        return torch.add(f, x)


class Functional(Units):
    def start(self, norm, x):
        return F.silu(norm(x))


class Bare(Units):
    def start(self, norm, x):
        return norm(x)


class IntoTheBranch(Units):
    """Nobody else has seen what the convolution gave."""

    def sum(self, x, f):
        f += x
        return f


class IntoTheStream(Units):
    """The first sum would be written to the caller's tensor."""

    def sum(self, x, f):
        x += f
        return x


class ReadBefore(Units):
    """Somebody wants the sum before the BatchNorm has run."""

    def start(self, norm, x):
        y = x * 2
        return self.act(norm(x)) + y


class WrittenBefore(Units):
    def forward(self, x):
        f = self.convs[0](x)
        s = x + f
        f *= 2
        return self.act(self.norms[0](s)) + f


class Broadcast(Units):
    def sum(self, x, f):
        return x + f.mean((2, 3), keepdim=True)


class SumIsATail(Units):
    """The sum's other operand is a BatchNorm: it is that one's."""

    def forward(self, x):
        s = self.norms[0](self.convs[0](x)) + x
        return self.act(self.norms[1](s)) + s


# what is found, by the BatchNorms in order
FOUND = {
    Units: ["BN+ReLU", PAIR, PAIR],
    Turned: ["BN+ReLU", PAIR, PAIR],
    Functional: ["BN+SiLU", "add+BN+SiLU", "add+BN+SiLU"],
    Bare: ["BN", "add+BN", "add+BN"],
    IntoTheBranch: ["BN+ReLU", PAIR, PAIR],
    ReadBefore: ["BN+ReLU"] * 3,
    Broadcast: ["BN+ReLU", PAIR, PAIR],
    SumIsATail: ["BN+add", "BN+ReLU"],
}


def made(cls) -> nn.Module:
    torch.manual_seed(0)
    return cls().double()


@pytest.mark.once
@pytest.mark.parametrize("cls", FOUND, ids=lambda cls: cls.__name__)
def test_found(cls):
    rows = sorted(fusedres.fuse_(made(cls)).rows, key=lambda row: row.where)
    assert [row.pattern for row in rows if row.status == "fused"] == FOUND[cls]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", [*FOUND, WrittenBefore], ids=lambda cls: cls.__name__)
def test_it_computes_the_same(cls, training, device):
    model = made(cls).to(device).train(training)
    assert excess(model, fused_copy(model), X.to(device), steps=2) <= ALLOWED


@torch.no_grad()
def test_what_is_written_to_the_input_is_seen_as_before(device):
    model, (x, y) = made(IntoTheStream).to(device), (X.clone().to(device) for _ in range(2))
    fused = fused_copy(model)
    torch.testing.assert_close((fused(x), x), (model(y), y), rtol=1e-11, atol=1e-11)


@pytest.mark.kernels
def test_the_kernels_run_it(monkeypatch, device):
    found, straight = [], batch_norm.straight

    def seen(tail, *arguments):
        output = straight(tail, *arguments)
        found.append(tail is preactivation.TAIL and output is not None)
        return output

    monkeypatch.setattr(batch_norm, "straight", seen)
    fused_copy(made(Units).to(device))(X.to(device))
    assert sum(found) == 2


@pytest.mark.once
def test_it_can_be_left_out():
    model = made(Units)
    fused = copy.deepcopy(model)
    patterns = tuple(p for p in fusedres.FuseConfig().patterns if not p.startswith("add+BN"))
    report = fusedres.fuse_(fused, fusedres.FuseConfig(patterns=patterns))
    assert {row.pattern for row in report.rows} == {"BN+ReLU"}
    assert excess(model, fused, X) <= ALLOWED


@pytest.mark.once
def test_a_hook_on_the_norm_is_run():
    model = made(Units)
    fused = fused_copy(model)
    for each in (model, fused):
        each.norms[1].register_forward_hook(lambda module, inputs, output: output * 2)
    assert excess(model, fused, X) <= ALLOWED


@pytest.mark.once
def test_the_report_counts_its_bytes():
    """[2, 4, 6, 6] in float64: 19 passes, 11 of them fused."""
    rows = fusedres.explain(made(Units), input_shape=(2, 4, 6, 6)).rows
    row = next(row for row in rows if row.pattern == PAIR)
    assert (row.moves, row.saves) == (19 * 288 * 8, 8 * 288 * 8)

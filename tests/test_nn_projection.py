"""`fusedres.nn.Projection` against the convolution, the two BatchNorms, the add and the ReLU."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess
from fusedres.nn import Projection

from .swap_blocks import fused_copy, images, spy_on_sites

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {1: (3, 4, 7), 2: (3, 4, 7, 6), 3: (2, 4, 3, 5, 4)}


class Tail(nn.Module):
    """A main path of one convolution, and a projected shortcut: joined, or one module after the other."""

    def __init__(self, joined: bool, dims: int = 2, **options) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = convolution(4, 8, 3, 2, 1, bias=False)
        self.bn = NORMS[dims](8)
        self.shortcut = Projection(4, 8, 2, dims=dims, **options)
        self.joined, self.activation = joined, "relu"

    def forward(self, x):
        if self.joined:
            return self.shortcut.join(self.bn, self.conv(x), x, self.activation)
        output = self.bn(self.conv(x)) + self.shortcut(x)
        return torch.relu(output) if self.activation else output


def pair(device="cpu", **options) -> tuple[nn.Module, nn.Module]:
    """In float64, with the same state: the modules one by one, and joined."""
    torch.manual_seed(0)
    plain = Tail(False, **options).double().to(device)
    joined = copy.deepcopy(plain)
    joined.joined = True
    return plain, joined


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"dims": 1}, {"dims": 3}, {"bias": True}, {"momentum": None}, {"affine": False},
        {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_joined_it_computes_the_same(options, training, device):
    plain, joined = (model.train(training) for model in pair(device, **options))
    x = images(*SHAPES[options.get("dims", 2)], device=device)
    assert excess(plain, joined, x, steps=2) <= ALLOWED


def test_without_an_activation(device):
    plain, joined = pair(device)
    plain.activation = joined.activation = None
    assert excess(plain, joined, images(*SHAPES[2], device=device)) <= ALLOWED


@pytest.mark.once
def test_joined_it_runs_fused(monkeypatch):
    calls = spy_on_sites(monkeypatch)
    _, joined = pair()
    joined(images(*SHAPES[2]))
    assert calls == [joined.bn]


def replaced(model):
    model.shortcut[1] = nn.Identity()


CHANGES = {
    "hook on it": lambda model: model.shortcut.register_forward_hook(lambda *_: None),
    "hook on its BatchNorm": lambda model: model.shortcut[1].register_forward_hook(lambda *_: None),
    "hook on the main BatchNorm": lambda model: model.bn.register_forward_hook(lambda *_: None),
    "a child more": lambda model: model.shortcut.append(nn.Hardtanh()),
    "a child replaced": replaced,
}


@pytest.mark.once
@pytest.mark.parametrize("name", CHANGES)
def test_what_it_cannot_join_it_calls(name, monkeypatch):
    calls = spy_on_sites(monkeypatch)
    plain, joined = pair()
    for model in (plain, joined):
        CHANGES[name](model)
    x = images(*SHAPES[2])
    assert torch.equal(joined(x), plain(x))
    assert calls == []


class Doubled(nn.Module):
    def forward(self, bias):
        return 2 * bias


@pytest.mark.once
def test_a_bias_may_be_computed():
    plain, joined = pair(bias=True)
    for model in (plain, joined):
        nn.utils.parametrize.register_parametrization(model.shortcut[0], "bias", Doubled())
    x = images(*SHAPES[2])
    torch.testing.assert_close(joined(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.once
def test_its_state_is_that_of_torchvisions_shortcut():
    shortcut = torchvision.models.resnet18().layer2[0].downsample
    projection = Projection(64, 128, 2)
    projection.load_state_dict(shortcut.state_dict())
    shortcut.load_state_dict(projection.state_dict())
    x = torch.randn(2, 64, 6, 6)
    assert torch.equal(projection(x), shortcut(x))


@pytest.mark.once
def test_fuse_takes_it_into_the_tail():
    plain, _ = pair()
    report = fusedres.fuse_(copy.deepcopy(plain))
    assert {row.where for row in report.rows if row.status == "fused"} == {"bn", "shortcut.1"}
    assert excess(plain, fused_copy(plain), images(*SHAPES[2])) <= ALLOWED


@pytest.mark.once
class TestErrors:
    def test_dims(self):
        with pytest.raises(ValueError, match="Projection: dims is 4, expected 1, 2 or 3"):
            Projection(4, 8, dims=4)

    def test_activation(self):
        _, joined = pair()
        joined.activation = "tanh"
        with pytest.raises(ValueError, match=r"Projection.join: unknown activation 'tanh'; choose"):
            joined(images(*SHAPES[2]))

    def test_a_stride_that_does_not_fit_leaves_the_counters(self):
        _, joined = pair()
        joined.shortcut[0].stride = (3, 3)
        with pytest.raises(RuntimeError, match="The size of tensor a"):
            joined(images(*SHAPES[2]))

"""Blocks as other packages write them: shortcuts that are no modules, sums in place onto what a child made."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess

from .swap_blocks import fused_copy, images

pytestmark = pytest.mark.once
X = images(2, 4, 6, 6)
BLOCK = ["BN+ReLU", "BN+add+ReLU"]


def zero_padded(x, channels, stride):
    """Option A."""
    x = F.avg_pool2d(x, 1, stride)
    zeros = torch.zeros(x.size(0), channels - x.size(1), *x.shape[2:], dtype=x.dtype)
    return torch.cat([x, zeros], 1)


class Basic(nn.Module):
    """A block whose shortcut is None, or anything that is called."""

    def __init__(self, downsample=None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6)
        self.downsample = downsample

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        residual = x[:, :1, ::2, ::2] if self.downsample is None else self.downsample(x)
        out += residual
        return F.relu(out)


class Network(nn.Module):
    """One that gives a method of its own to its block, with a pool that it makes at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 6
        self.block = Basic(functools.partial(self._shortcut, stride=2))

    def _shortcut(self, x, stride):
        return zero_padded(nn.AvgPool2d(1)(x), self.channels, stride)

    def forward(self, x):
        return self.block(x)


class Callable:
    def __call__(self, x):
        return zero_padded(x, 6, 2)


class Asks(Basic):
    """It looks at what it calls."""

    def forward(self, x):
        stride = self.downsample.keywords["stride"]
        return F.relu(self.bn1(self.conv1(x)) + self.downsample(x)) * stride


class Branches(Basic):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        if isinstance(self.downsample, functools.partial):
            out = out + self.downsample(x)
        return F.relu(out)


def partial() -> functools.partial:
    return functools.partial(zero_padded, channels=6, stride=2)


SHORTCUTS = {
    "a partial": lambda: Basic(partial()),
    "a callable object": lambda: Basic(Callable()),
    "a method of the network": Network,
    "asked for its class": lambda: Branches(partial()),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_shortcut_that_is_no_module_is_called_as_it_is_found(name):
    torch.manual_seed(0)
    model = SHORTCUTS[name]().double()
    fused = fused_copy(model)
    tails = [row.pattern for row in fusedres.explain(model).rows if row.status == "fusable"]
    assert ("BN+add+ReLU" in tails, excess(model, fused, X, 3) <= ALLOWED) == (True, True)


def another(module: Basic) -> None:
    module.downsample = functools.partial(zero_padded, channels=6, stride=2)
    module.downsample.keywords["stride"] = 2


CHANGES = {
    "none": lambda module: setattr(module, "downsample", None),
    "a module": lambda module: setattr(module, "downsample", nn.Conv2d(4, 6, 1, 2).double()),
    "a function": lambda module: setattr(module, "downsample", lambda x: zero_padded(x, 6, 2) * 2),
    "another partial": another,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_shortcut_that_is_changed_after_fusing(name):
    torch.manual_seed(0)
    model = Basic(partial()).double()
    fused = fused_copy(model)
    for module in (model, fused):
        torch.manual_seed(1)
        CHANGES[name](module)
    assert excess(model, fused, X) <= ALLOWED


def test_what_a_forward_reads_off_what_it_calls_is_not_followed():
    row = fusedres.explain(Asks(partial())).rows[0]
    assert "depends on self.downsample, a partial" in row.reason


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_calls_its_own_network(copied):
    torch.manual_seed(0)
    model = Network().double()
    fused = copied(fused_copy(model))
    assert fused.block.downsample.func.__self__ is fused
    assert excess(model, fused, X) <= ALLOWED


class ByName(nn.Module):
    """It calls a child's forward, past the hooks on that child (HRNet's head)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())])

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + self.down[0].forward(x)


def test_a_forward_that_is_called_by_name_is_called_by_name():
    torch.manual_seed(0)
    model = ByName().double()
    fused = copy.deepcopy(model)
    assert [row.pattern for row in fusedres.fuse_(fused).rows] == ["BN+ReLU"] * 2
    for each in (model, fused):
        each.down[0].register_forward_hook(lambda *_: 1 / 0)
    assert excess(model, fused, X, 3) <= ALLOWED


@pytest.mark.parametrize("replaced", [nn.Identity(), nn.Conv2d(4, 4, 3, padding=1).double()])
def test_a_child_whose_forward_is_called_by_name_may_be_replaced(replaced):
    torch.manual_seed(0)
    model = ByName().double()
    fused = fused_copy(model)
    for each in (model, fused):
        each.down[0] = copy.deepcopy(replaced)
    assert excess(model, fused, X) <= ALLOWED


class ConvNorm(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Excite(nn.Module):
    """No BatchNorm inside: it is not looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]


class InPlace(nn.Module):
    """`y += x`, y being what the last of its layers gave."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x):
        y = x
        for layer in self.layer:
            y = layer(y)
        y += x
        return F.relu(y)


IN_PLACE = {
    "excited before the last": (lambda: InPlace(ConvNorm(nn.ReLU()), Excite(), ConvNorm(nn.Identity())), BLOCK[::-1]),
    "excited last": (lambda: InPlace(ConvNorm(nn.ReLU()), Excite()), ["BN+ReLU"]),
    "a chain last": (lambda: InPlace(nn.Sequential(ConvNorm(nn.ReLU()), Excite())), ["BN+ReLU"]),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_sum_in_place_onto_what_a_child_made_is_fused(name):
    torch.manual_seed(0)
    build, patterns = IN_PLACE[name]
    model = build().double()
    fused = copy.deepcopy(model)
    report = fusedres.fuse_(fused)
    assert [row.pattern for row in report.rows if row.status == "fused"] == patterns
    assert excess(model, fused, X, 3) <= ALLOWED


class OntoChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(4), ConvNorm(nn.ReLU())

    def forward(self, x):
        y = self.layer(x)
        y += self.norm(x)
        return F.relu(y)


def test_a_child_that_stops_to_make_new_memory_is_seen():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1)
            self.block = OntoChild()

        def forward(self, x):
            y = self.first(x)
            return self.block(y) + y

    torch.manual_seed(0)
    model = Reads().double()
    fused = copy.deepcopy(model)
    assert [row.pattern for row in fusedres.fuse_(fused).rows] == BLOCK[::-1]
    for each in (model, fused):
        layer = each.block.layer
        layer.conv = layer.norm = layer.act = nn.Identity()  # it gives back the block's own input
    with torch.no_grad():  # autograd would complain of what is written to
        torch.testing.assert_close(fused(X), model(X))


class GivesTwo(nn.Module):
    def forward(self, x):
        return x, x


class TakesTwo(nn.Module):
    """With a convolution that is not given what the module is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x[0] if isinstance(x, tuple) else x))


def test_a_child_that_takes_anything_is_not_put_in_behind_one_that_is_not_known():
    torch.manual_seed(0)
    model = InPlace(GivesTwo(), TakesTwo()).double()
    assert excess(model, fused_copy(model), X) <= ALLOWED


SWISHES = {"Swish": "SiLU", "HardSwish": "Hardswish", "Mish": "Mish"}


@pytest.mark.parametrize("name", SWISHES)
def test_timm_s_own_spelling_of_an_activation_is_known(name):
    activations = pytest.importorskip("timm.layers.activations")
    model = nn.Sequential(nn.BatchNorm2d(4), getattr(activations, name)()).double()
    fused = copy.deepcopy(model)
    assert [row.pattern for row in fusedres.fuse_(fused).rows] == [f"BN+{SWISHES[name]}"]
    assert excess(model, fused, X) <= ALLOWED


class Dropping(nn.Module):
    """It drops paths before the sum, in place onto what the drop gives (TinyViT's convolutions)."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import DropPath

        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2, self.drop = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), DropPath(0.5)

    def forward(self, x):
        y = self.drop(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y += x
        return F.relu(y)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_sum_onto_what_a_dropped_path_gives_runs_fused(training):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = Dropping().double().train(training)
    fused = fused_copy(model)
    statuses = [row.status for row in fusedres.explain(fused).rows]
    found = []
    for each in (model, fused):
        torch.manual_seed(3)
        found.append(each(X))
    assert (statuses, torch.allclose(*found)) == (["fused", "fused"], True)

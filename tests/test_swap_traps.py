"""Blocks that look as if they could be fused and must be treated with care; each was once got wrong."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess

from .swap_blocks import fused_copy, images

pytestmark = pytest.mark.once
X = images(2, 4, 6, 6)


class Block(nn.Module):
    """conv, bn and the children that it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        for name, child in children.items():
            self.add_module(name, child)


def block(forward, **children: nn.Module) -> nn.Module:
    """A Block of a class of its own, with this forward."""
    torch.manual_seed(0)
    return type("Own", (Block,), {"forward": forward})(**children).double()


class TakesBoth(nn.Module):
    """A tensor or a list of two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.cat([x, x], 1) if isinstance(x, torch.Tensor) else torch.cat(x, 1)
        return self.bn(self.conv(x))


class GivesTwo(nn.Module):
    def forward(self, x):
        return [x, x * 2]


class TakesANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, n):
        return self.bn(torch.full((2, 4, 3, 3), float(n), dtype=torch.float64))


def late_write(self, x):
    h = F.leaky_relu(self.bn(self.conv(x)), 0.2)
    h += x
    return self.conv(h)


def late_write_of_a_sum(self, x):
    h = F.leaky_relu(self.conv(x) + self.bn(x))
    h *= 2
    return h


def residual_written_later(self, x):
    r = self.conv(x)
    h = F.silu(self.bn(x) + r)
    r *= 2
    return h + r


def summand_written_later(self, x):
    r = self.conv(self.bn(x))
    h = F.silu(r + x)
    r *= 2
    return h + r


def size_added(self, x):
    return F.relu(self.bn(self.conv(x)) + x.size(0))


def size_added_to_a_sum(self, x):
    return F.relu(self.bn(self.conv(x)) * 2 + x.size(0))


def other_layout(self, x):
    y = x.contiguous(memory_format=torch.channels_last)
    return F.relu(x + self.bn(y)).view(2, -1)


COMPUTES_THE_SAME = {
    "a list for a child": lambda: block(lambda self, x: F.relu(self.f([x, x * 2])), f=TakesBoth()),
    "a list from a child": lambda: block(lambda self, x: F.relu(self.f(self.k(x))), f=TakesBoth(), k=GivesTwo()),
    "a number for a child": lambda: block(lambda self, x: self.conv(x).sum() + F.relu(self.f(2)), f=TakesANumber()),
    "activation written later": lambda: block(late_write),
    "sum written later": lambda: block(late_write_of_a_sum),
    "residual written later": lambda: block(residual_written_later),
    "summand written later": lambda: block(summand_written_later),
    "a size added": lambda: block(size_added),
    "a size added to a sum": lambda: block(size_added_to_a_sum),
    "another layout": lambda: block(other_layout),
    "cumulative, twice": lambda: block(
        lambda self, x: F.relu(self.n(x) + self.n(x * 2)), n=nn.BatchNorm2d(4, momentum=None)
    ),
    "a Python keyword": lambda: nn.Sequential(
        OrderedDict([("lambda", nn.BatchNorm2d(4)), ("class", nn.ReLU())])
    ).double(),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", COMPUTES_THE_SAME)
def test_it_computes_the_same(name, training):
    model = COMPUTES_THE_SAME[name]().train(training)
    assert excess(model, fused_copy(model), X) <= ALLOWED


@pytest.mark.parametrize(
    "slope", [True, np.float64(0.2), float("inf"), torch.tensor(0.2)], ids=["bool", "numpy", "inf", "tensor"]
)  # fmt: skip
def test_a_slope_that_is_no_plain_number_is_left_alone(slope):
    model = block(lambda self, x: self.act(self.bn(self.conv(x))), act=nn.LeakyReLU(slope))
    assert fusedres.fuse_(model).rows[0].pattern == "BN"


class Memory(nn.Module):
    """It gives back its buffer, to whoever writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 4, 6, 6, dtype=torch.float64))

    def forward(self):
        return self.kept


class GivesItsInputBack(nn.Conv2d):
    def forward(self, x):
        return x


def into_memory(self, x):
    h = self.m()
    h += self.bn(self.conv(x))
    return F.relu(h)


def into_the_input(self, x):
    h = self.m(x)
    h += self.bn(self.conv(x))
    return F.relu(h)


@torch.no_grad()
@pytest.mark.parametrize(
    ("forward", "child"),
    [(into_memory, Memory()), (into_the_input, GivesItsInputBack(4, 4, 1))],
    ids=["a buffer", "the input"],
)
def test_what_somebody_else_holds_is_written_to_as_before(forward, child):
    plain = block(forward, m=copy.deepcopy(child))
    fused = fused_copy(plain)
    x, y = X.clone(), X.clone()
    found = (fused(y), y, fused.state_dict())
    torch.testing.assert_close(found, (plain(x), x, plain.state_dict()), rtol=1e-12, atol=1e-12)


def through_a_child(self, x):
    out = self.p(x)
    out += self.bn(self.conv(x))
    return F.relu(out) + x


@torch.no_grad()
def test_a_child_that_no_longer_makes_new_memory_is_noticed():
    plain = block(through_a_child, p=nn.Conv2d(4, 4, 1))
    fused = fused_copy(plain)
    for each in (plain, fused):
        each.p = nn.Identity()
    torch.testing.assert_close(fused(X.clone()), plain(X.clone()))


@torch.no_grad()
def test_a_hook_that_keeps_what_is_written_to_afterwards_sees_it():
    plain = block(through_a_child, p=nn.Conv2d(4, 4, 1))
    fused, kept = fused_copy(plain), []
    for each in (plain, fused):
        each.p.register_forward_hook(lambda *arguments: kept.append(arguments[-1]))
        each(X)
    torch.testing.assert_close(*kept)


def read_by_an_activation(self, x):
    r = self.conv(x)
    z = self.bn(self.conv(x)) + r
    w = self.a(r)
    return F.relu(z) + w


@torch.no_grad()
def test_an_activation_that_comes_to_work_in_place_is_noticed():
    plain = block(read_by_an_activation, a=nn.ReLU())
    fused = fused_copy(plain)
    for each in (plain, fused):
        each.a.inplace = True
    torch.testing.assert_close(fused(X), plain(X))


def test_a_child_s_class_that_is_patched_runs_as_patched(monkeypatch):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(x)

    fused = block(lambda self, x: F.relu(self.f(x)), f=Child())
    fusedres.fuse_(fused)
    monkeypatch.setattr(Child, "forward", lambda self, x: self.bn(x) * 3 + 1)
    expected = F.relu(F.batch_norm(X, None, None, training=True) * 3 + 1)
    torch.testing.assert_close(fused(X), expected)


def test_a_method_of_tensors_that_is_patched_runs_as_patched_behind_a_child_too(monkeypatch):
    child = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    plain = block(lambda self, x: self.f(x).relu(), f=child)
    fused = fused_copy(plain)
    monkeypatch.setattr(torch.Tensor, "relu", lambda self: self * 3)
    torch.testing.assert_close(fused(X), plain(X))


def test_a_plan_that_no_longer_fits_goes_when_it_is_fused_again():
    model = block(lambda self, x: F.relu(self.f(x)), f=nn.Sequential(nn.BatchNorm2d(4)))
    del model.bn
    fusedres.fuse_(model)
    model.f = nn.Hardtanh()
    fusedres.fuse_(model)
    assert not fusedres.is_fused(model)


def test_a_block_that_is_called_for_its_batch_norm_is_looked_into():
    class ConvBatchNormReLU(nn.Sequential):
        pass

    model = ConvBatchNormReLU(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert [(row.where, row.status) for row in fusedres.fuse_(model).rows] == [("1", "fused")]


class Constant(nn.Module):
    """It adds a tensor that is neither parameter nor buffer, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.plain = nn.BatchNorm2d(4), torch.ones(4, 1, 1)

    def forward(self, x):
        return F.relu(self.bn(x)) + self.plain * torch.rand(1, device=x.device)


def test_bytes_are_estimated_with_plain_tensors_and_draw_nothing():
    torch.manual_seed(5)
    report = fusedres.explain(Constant(), input_shape=(2, 4, 3, 3))
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert (report.bytes_moved, drawn) == (13 * 72 * 4, torch.rand(()))


def test_a_model_that_cannot_be_copied_says_so():
    model = Constant()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="explain: the model does not take a tensor"):
        fusedres.explain(model, input_shape=(2, 4, 3, 3))


def test_bytes_of_a_batch_norm_that_is_called_twice_are_counted_once_each():
    model = block(lambda self, x: F.relu(self.bn(F.relu(self.bn(x)))))
    report = fusedres.explain(model, input_shape=(2, 4, 3, 3))
    assert report.bytes_moved == 2 * 13 * 72 * 8


class Layers(nn.ModuleDict):
    """A ModuleDict that calls what it holds, as torchvision's IntermediateLayerGetter does."""

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


def test_a_module_dict_with_a_forward_owns_its_batch_norms():
    model = Layers({"bn": nn.BatchNorm2d(4), "relu": nn.ReLU()}).double()
    fused = copy.deepcopy(model)
    assert [(row.where, row.pattern) for row in fusedres.fuse_(fused).rows] == [("bn", "BN+ReLU")]
    assert excess(model, fused, X) <= ALLOWED


def test_timm_s_batch_norm_is_told_apart_behind_any_child():
    """What stands in front of a BatchNorm need not be known: it takes nothing but a tensor."""
    from timm.layers import BatchNormAct2d

    class Gate(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    model = block(lambda self, x: self.norm(self.gate(x)), gate=Gate(), norm=BatchNormAct2d(4))
    del model.bn
    assert [(row.pattern, row.status) for row in fusedres.fuse_(model).rows] == [
        ("BN+ReLU", "fused")
    ]

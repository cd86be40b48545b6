"""What the matcher finds in home-made blocks, and what it leaves alone; either way the block computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, difference, excess

from .swap_blocks import (
    BY_ITSELF,
    LEFT_ALONE,
    SPELLINGS,
    added_to_itself,
    by_chance,
    fused_copy,
    images,
    make,
    optional_argument,
    plain,
    relu_after_no_dropout,
    spy_on_sites,
    tail,
    tail_projected,
    tail_skip_between,
    writes_itself,
)

pytestmark = pytest.mark.once
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture
def fused_calls(monkeypatch):
    """One entry for each site that runs fused."""
    return spy_on_sites(monkeypatch)


@pytest.mark.parametrize("forward", SPELLINGS, ids=lambda f: f.__name__)
def test_spelling_is_found(forward):
    found = [row.pattern for row in fusedres.fuse_(make(forward)).rows if row.status == "fused"]
    assert found == SPELLINGS[forward]


@MODES
@pytest.mark.parametrize("forward", SPELLINGS, ids=lambda f: f.__name__)
def test_spelling_computes_the_same(forward, training):
    block = make(forward).train(training)
    assert excess(block, fused_copy(block), images(3, 4, 6, 5), steps=2) <= ALLOWED


@pytest.mark.parametrize("forward", LEFT_ALONE, ids=lambda f: f.__name__)
def test_left_alone_with_its_reason(forward):
    pattern, reason = LEFT_ALONE[forward]
    row = fusedres.fuse_(make(forward)).rows[0]
    assert (row.pattern, row.status) == (pattern, "left alone")
    assert reason in f"{row.where}: {row.reason}"


@MODES
@pytest.mark.parametrize("forward", LEFT_ALONE, ids=lambda f: f.__name__)
@torch.no_grad()  # several of them write to what autograd would need
def test_left_alone_computes_the_same(forward, training):
    block = make(forward).train(training)
    fused, x, y = fused_copy(block), images(3, 4, 6, 5), images(3, 4, 6, 5)
    torch.manual_seed(5)
    expected = {"output": block(x), "input": x, **block.state_dict()}
    torch.manual_seed(5)
    assert difference(expected, {"output": fused(y), "input": y, **fused.state_dict()}) == 0


@pytest.mark.parametrize("forward", BY_ITSELF, ids=lambda f: f.__name__)
def test_a_batch_norm_that_nothing_follows_runs_by_itself(forward):
    row = fusedres.fuse_(make(forward)).rows[0]
    assert (row.pattern, row.status) == ("BN", "fused")
    assert BY_ITSELF[forward] in row.note


@MODES
@pytest.mark.parametrize("forward", BY_ITSELF, ids=lambda f: f.__name__)
def test_by_itself_it_computes_the_same(forward, training):
    block, x = make(forward).train(training), images(3, 4, 6, 5)
    block.dropout.p = 0.0 if training else 0.5
    assert excess(block, fused_copy(block), x, steps=2) <= ALLOWED


@torch.no_grad()
def test_by_itself_it_is_left_to_torch_compile(fused_calls):
    block = fused_copy(make(plain))
    torch.compile(block, backend="eager")(images(2, 4, 5, 5))
    assert fused_calls == []


def test_looking_draws_nothing_from_the_generators():
    torch.manual_seed(3)
    fusedres.explain(make(by_chance))
    after = torch.rand(())
    torch.manual_seed(0)
    make(by_chance)
    assert after == torch.rand(())


@pytest.mark.parametrize("forward", [writes_itself, by_chance, tail], ids=lambda f: f.__name__)
def test_looking_changes_nothing(forward):
    block = make(forward)
    before = {name: id(value) for name, value in vars(block).items()}
    fusedres.explain(block)
    assert {name: id(value) for name, value in vars(block).items()} == before


def test_of_two_added_batch_norms_the_last_is_the_main_path():
    assert [row.where for row in fusedres.fuse_(make(tail_projected)).rows] == ["bn2", "bn1"]


def test_the_other_is_taken_when_the_last_cannot_be_fused():
    block = make(tail_projected)
    block.bn2.register_forward_hook(lambda *_: None)
    report = fusedres.fuse_(block)
    assert [row.where for row in report.rows if row.status == "fused"] == ["bn1"]


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x: block(x, x),
        lambda block, x: block(x, residual=x),
        lambda block, x: block(x, x, False),
        lambda block, x: block(x, flag=False),
        lambda block, x: block(x=x),
        lambda block, x: block(x, None, True),
        lambda block, x: block(flag=True, x=x, residual=None),
    ],
    ids=["positional", "keyword", "both", "flag", "x", "defaults", "all"],
)
def test_optional_arguments(call):
    block, x = make(optional_argument), images(2, 4, 5, 5)
    assert torch.equal(call(fused_copy(block), x), call(block, x))


@pytest.mark.parametrize("keywords", [{}, {"residual": None}], ids=["x", "x and a default"])
def test_a_call_by_keyword_runs_fused(keywords, fused_calls):
    fused_copy(make(optional_argument))(x=images(2, 4, 5, 5), **keywords)
    assert len(fused_calls) == 1


def test_a_residual_of_another_dtype_is_promoted_as_in_pytorch():
    block = make(lambda self, x: self.bn1(self.conv1(x)) + x.double(), double=False)
    assert fused_copy(block)(images(2, 4, 5, 5).float()).dtype == torch.float64


def test_an_in_place_add_keeps_its_dtype():
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out += x.double()
        return out

    block = make(forward, double=False)
    assert fused_copy(block)(images(2, 4, 5, 5).float()).dtype == torch.float32


def test_a_skip_set_after_fusing_is_run():
    block = make(tail_skip_between)
    fused = fused_copy(block)
    for each in (block, fused):
        each.skip = nn.Identity()
    x = images(2, 4, 5, 5)
    assert torch.equal(fused(x), block(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.no_dropout, "p", 0.5),
        lambda block: setattr(block, "identity", nn.Hardtanh()),
        lambda block: block.identity.register_forward_hook(lambda *a: a[-1].abs()),
    ],
    ids=["dropout", "another child", "a hook"],
)
def test_what_gave_back_its_input_and_no_longer_does_is_called(change):
    block = make(relu_after_no_dropout)
    fused = fused_copy(block)
    for each in (block, fused):
        change(each)
    x = images(2, 4, 5, 5)
    found = []
    for each in (block, fused):
        torch.manual_seed(0)
        found.append(each(x))
    assert torch.equal(*found)


def test_timm_puts_identities_between():
    import timm

    with torch.device("meta"):
        report = fusedres.fuse_(timm.create_model("resnet50"))
    assert (report.n_fused, len(report.rows)) == (53, 53)


def test_inside_a_device_context():
    with torch.device("cpu"):
        block = make(lambda self, x: torch.flatten(self.relu(self.bn1(x)), 1))
        assert fusedres.fuse_(block).n_fused == 1


def test_a_registry_of_subclasses_does_not_see_the_swap():
    registry = []

    class Model(type(make(tail))):
        def __init_subclass__(cls):
            registry.append(cls)

    assert fusedres.fuse_(Model()).n_fused == 2
    assert registry == []


def test_a_batch_norm_that_is_never_called_is_told():
    row = fusedres.fuse_(make(added_to_itself)).rows[1]
    assert (row.where, row.reason) == ("bn2", "it is not called by its owner's forward")


def test_batch_norms_in_a_module_list_belong_to_who_calls_them():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            for norm in self.norms:
                x = torch.relu(norm(x))
            return x

    tower = Tower().double()
    fused = copy.deepcopy(tower)
    assert fusedres.fuse_(fused).n_fused == 3
    for each in (tower, fused):
        each.norms.append(nn.BatchNorm2d(4, eps=0.5).double())
    assert torch.equal(fused(images(2, 4, 5, 5)), tower(images(2, 4, 5, 5)))


def test_a_sequential_is_fused_and_notices_what_is_inserted():
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).double()
    fused = copy.deepcopy(plain)
    assert fusedres.fuse_(fused).n_fused == 1
    for each in (plain, fused):
        each.insert(2, nn.Hardtanh())
    assert torch.equal(fused(images(2, 4, 5, 5)), plain(images(2, 4, 5, 5)))

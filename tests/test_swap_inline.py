"""Main paths and shortcuts that a block calls as one child, and BatchNorms with parts of their own inside: what `fuse_`
makes of them, and that the block computes what it did."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, difference, excess, run

from .swap_blocks import fused_copy, images

X = images(3, 4, 6, 5)
CHAIN, TAIL, DUAL = "BN+ReLU", "BN+add+ReLU", "BN+BN+add+ReLU"


def conv(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(4, channels, 3, padding=1, bias=False)


def conv_norm(*rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(), nn.BatchNorm2d(4), *rest)


def two() -> nn.Sequential:
    return conv_norm(nn.ReLU(), conv(), nn.BatchNorm2d(4))


class Residual(nn.Module):
    """`relu(block(x) + skip(x))`, as tutorials write it."""

    def __init__(self, block: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.block, self.skip = block, nn.Identity() if skip is None else skip

    def forward(self, x):
        return F.relu(self.block(x) + self.skip(x))


class Linear(Residual):
    """A linear bottleneck: no activation after the sum."""

    def forward(self, x):
        return x + self.block(x)


class Scaled(Residual):
    """A scale that begins at 0."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.a * self.block(x)


class Spelled(nn.Module):
    """A main path with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(), conv()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        x = F.relu(self.norms[0](self.first(x)))
        return self.norms[1](self.last(x))


class Gated(nn.Module):
    """Its BatchNorm is not the last thing it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.gate = conv(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x * torch.sigmoid(self.gate(x))


# name: (block, the patterns that are fused)
BLOCKS = {
    "Sequential": (lambda: Residual(two()), [CHAIN, TAIL]),
    "Sequential in Sequential": (lambda: Residual(nn.Sequential(conv(), conv_norm())), [TAIL]),
    "own class": (lambda: Residual(Spelled()), [CHAIN, TAIL]),
    "nested": (lambda: Residual(nn.Sequential(Residual(two()), Spelled())), [CHAIN, CHAIN, TAIL, TAIL]),
    "identities at the end": (lambda: Residual(conv_norm(nn.Identity(), nn.Dropout(0.0))), [TAIL]),
    "both": (lambda: Residual(two(), conv_norm()), [CHAIN, DUAL, DUAL]),
    "both long": (lambda: Residual(two(), two()), [CHAIN, CHAIN, DUAL, DUAL]),
    "empty shortcut": (lambda: Residual(two(), nn.Sequential()), [CHAIN, TAIL]),
    "linear": (lambda: Linear(two()), ["BN+add", CHAIN]),
    "conv-bn and a ReLU": (lambda: nn.Sequential(conv_norm(), nn.ReLU()), [CHAIN]),
    "scaled": (lambda: Scaled(two()), ["BN", CHAIN]),
    "gated": (lambda: Residual(Gated()), ["BN"]),
    "1-D": (
        lambda: Residual(nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), nn.Flatten(2)), [TAIL],
    ),
    "3-D": (
        lambda: Residual(
            nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4)), nn.Unflatten(1, (4, 1))
        ),
        [TAIL],
    ),
}  # fmt: skip


def make(block: nn.Module) -> nn.Module:
    """In float64, with something to scale, shift and remember."""
    torch.manual_seed(0)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.normal_(tensor, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return block.double()


def fused_patterns(block: nn.Module) -> list[str]:
    return sorted(row.pattern for row in fusedres.fuse_(block).rows if row.status == "fused")


@pytest.mark.once
@pytest.mark.parametrize("name", BLOCKS)
def test_found(name):
    block, patterns = BLOCKS[name]
    assert fused_patterns(block()) == sorted(patterns)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_it_computes_the_same(name, training, device):
    block = make(BLOCKS[name][0]()).to(device).train(training)
    assert excess(block, fused_copy(block), X.to(device), steps=2) <= ALLOWED


# --- what is changed afterwards ----------------------------------------------------------------------------------


CHANGES = {
    "a hook on the child": lambda b: b.block.register_forward_hook(lambda *a: a[-1] * 2),
    "a hook inside": lambda b: b.block[0].register_forward_hook(lambda *a: a[-1] * 2),
    "another child": lambda b: setattr(b, "block", nn.PReLU(4).double()),
    "another forward": lambda b: setattr(b.block, "forward", lambda x: x * 3),
    "one more": lambda b: b.block.append(nn.Hardtanh()),
    "another activation": lambda b: b.block.__setitem__(2, nn.Hardtanh()),
    "one removed": lambda b: b.block.__delitem__(2),
    "frozen": lambda b: b.block[1].eval(),
    "another class": lambda b: b.block.__setattr__("__class__", Reversed),
}


class Reversed(nn.Sequential):
    def forward(self, x):
        return super().forward(-x)


@pytest.mark.once
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_later_is_seen_at_the_call(name):
    block = make(Residual(two()))
    fused = fused_copy(block)
    for each in (block, fused):
        CHANGES[name](each)
    assert excess(block, fused, X) <= ALLOWED


@pytest.mark.once
def test_a_copy_is_fused_and_computes_the_same():
    fused = fused_copy(make(Residual(two(), conv_norm())))
    twin = copy.deepcopy(fused)
    assert fusedres.explain(twin).n_fused == 3
    assert difference(run(fused, X), run(twin, X)) == 0


@pytest.mark.once
def test_fusing_again_and_taking_it_back():
    block = make(Residual(Residual(two())))
    classes = [type(module) for module in block.modules()]
    first = fusedres.fuse_(block)
    assert fusedres.fuse_(block) == first
    fusedres.unfuse_(block)
    assert [type(module) for module in block.modules()] == classes


# --- control -----------------------------------------------------------------------------------------------------


@pytest.mark.once
class TestControl:
    def test_a_filter_keeps_the_owner_as_it_is(self):
        block = Residual(conv_norm())
        report = fusedres.fuse_(
            block, filter_fn=lambda module, fqn: not isinstance(module, Residual)
        )
        assert [row.pattern for row in report.rows] == ["BN"]  # in the child's own forward
        assert type(block) is Residual

    def test_a_filter_keeps_the_child_as_it_is(self):
        report = fusedres.fuse_(Residual(two()), filter_fn=lambda module, fqn: fqn != "block")
        assert {row.status for row in report.rows} == {"excluded"}

    def test_each_batch_norm_has_one_row(self):
        rows = fusedres.fuse_(nn.Sequential(Residual(two(), two()), Residual(Spelled()))).rows
        assert len({row.where for row in rows}) == len(rows) == 6


# --- BatchNorm called as a function ------------------------------------------------------------------------------


class Functional(nn.Module):
    """F.batch_norm on attributes; `forward` may be another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.gamma, self.beta = nn.Parameter(torch.rand(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.eps = 1e-3

    def norm(self, x, training):
        return F.batch_norm(
            x, self.mean, self.running_var, self.gamma, self.beta, training, 0.2, self.eps
        )

    def forward(self, x):
        return F.relu(self.norm(self.conv(x), self.training) + x)


class FunctionalUnscaled(Functional):
    def forward(self, x):
        out = F.batch_norm(self.conv(x), self.mean, self.running_var, training=self.training)
        out += x
        return torch.relu_(out)


class FunctionalFrozen(Functional):
    def forward(self, x):
        return F.silu(self.norm(self.conv(x), False))


class FunctionalAlways(Functional):
    def forward(self, x):
        return F.relu(self.norm(self.conv(x), True))


class FunctionalUntracked(Functional):
    def forward(self, x):
        return F.relu(F.batch_norm(self.conv(x), None, None, self.gamma, training=True) + x)


class FunctionalPromoted(Functional):
    """What is added has the same values in every pixel."""

    def forward(self, x):
        return F.relu(self.norm(self.conv(x), self.training) + x.mean((2, 3), keepdim=True))


class FunctionalInside(nn.Module):
    """It ends a child."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Functional()

    def forward(self, x):
        return self.block.norm(self.block.conv(x), self.training) + x


FUNCTIONS = {
    Functional: TAIL, FunctionalUnscaled: TAIL, FunctionalFrozen: "BN+SiLU", FunctionalAlways: CHAIN,
    FunctionalUntracked: TAIL, FunctionalPromoted: TAIL,
}  # fmt: skip


class FunctionalTwice(Functional):
    """The second call must see what the first made of the running statistics."""

    def forward(self, x):
        first = self.norm(self.conv(x), self.training)
        second = F.relu(self.norm(self.conv(x) * 2, self.training))
        return F.relu(first + second)


class FunctionalRead(Functional):
    def forward(self, x):
        first = self.norm(self.conv(x), self.training)
        return F.relu(first + x * self.mean.view(1, -1, 1, 1))


class FunctionalOfComputed(Functional):
    """A weight that is computed is no attribute."""

    def forward(self, x):
        x = self.conv(x)
        return F.relu(
            F.batch_norm(x, self.mean, self.running_var, self.gamma * 2, None, self.training)
        )


@pytest.mark.once
@pytest.mark.parametrize("cls", FUNCTIONS, ids=lambda c: c.__name__)
def test_a_function_is_found(cls):
    report = fusedres.fuse_(cls())
    assert [(row.where, row.pattern, row.status) for row in report.rows] == [
        ("gamma" if cls is FunctionalUntracked else "mean", FUNCTIONS[cls], "fused")
    ]


@pytest.mark.once
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "cls",
    [*FUNCTIONS, FunctionalInside, FunctionalTwice, FunctionalRead, FunctionalOfComputed],
    ids=lambda c: c.__name__,
)
def test_a_function_computes_the_same(cls, training):
    block = make(cls()).train(training)
    assert excess(block, fused_copy(block), X, steps=2) <= ALLOWED


@pytest.mark.once
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (FunctionalTwice, "mean is used before the site ends"),
        (FunctionalRead, "mean is used before the site ends"),
    ],
)
def test_a_function_that_may_not_wait_is_left_alone(cls, reason):
    row = fusedres.fuse_(cls()).rows[0]
    assert (row.status, row.reason) == ("left alone", reason)


@pytest.mark.once
def test_a_function_falls_back_when_what_it_read_changes():
    block = make(Functional())
    fused = fused_copy(block)
    for each in (block, fused):
        each.eps = 0.5
    assert excess(block, fused, X) <= ALLOWED


# --- BatchNorms with parts inside, frozen and synchronised ones --------------------------------------------------


def timm_norm(**options):
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(4, **options)


def frozen(**options):
    from timm.layers.norm_act import FrozenBatchNormAct2d

    return FrozenBatchNormAct2d(4, **options)


def torchvision_frozen():
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(4)


class Tail(nn.Module):
    def __init__(self, norm: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv(), norm, nn.ReLU(inplace=True)
        self.shortcut = shortcut

    def forward(self, x):
        out = self.norm(self.conv(x))
        return self.act(out + (x if self.shortcut is None else self.shortcut(x)))


class InPlace(Tail):
    def forward(self, x):
        out = self.norm(self.conv(x))
        out += self.shortcut(x)
        return self.act(out)


def plain_identity(**options):
    return timm_norm(apply_act=False, **options)


# name: (block, the patterns that are fused)
KINDS = {
    "activation inside": (lambda: nn.Sequential(conv(), timm_norm()), [CHAIN]),
    "drop inside": (lambda: nn.Sequential(conv(), timm_norm(drop_layer=nn.Identity)), [CHAIN]),
    "activation inside, then a tail": (lambda: Tail(timm_norm()), [CHAIN]),
    "no activation inside": (lambda: Tail(plain_identity()), [TAIL]),
    "no activation inside, both": (
        lambda: Tail(plain_identity(), nn.Sequential(nn.Conv2d(4, 4, 1), plain_identity())), [DUAL, DUAL],
    ),
    "no activation at all": (lambda: nn.Sequential(conv(), plain_identity()), ["BN"]),
    "something else inside": (lambda: nn.Sequential(conv(), timm_norm(act_layer=nn.Hardtanh)), []),
    "frozen, activation inside": (lambda: nn.Sequential(conv(), frozen()), [CHAIN]),
    "frozen": (lambda: Tail(torchvision_frozen()), [TAIL]),
    "frozen, both": (lambda: Tail(torchvision_frozen(), torchvision_frozen()), [DUAL, DUAL]),
    "frozen, both, in place": (lambda: InPlace(torchvision_frozen(), torchvision_frozen()), [DUAL, DUAL]),
    "frozen and not": (lambda: Tail(nn.BatchNorm2d(4), torchvision_frozen()), [DUAL, DUAL]),
    "cumulative": (lambda: nn.Sequential(conv(), timm_norm(momentum=None)), [CHAIN]),
    "synchronised": (lambda: Tail(nn.SyncBatchNorm(4)), [TAIL]),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", KINDS)
def test_kind_is_found(name):
    block, patterns = KINDS[name]
    assert fused_patterns(block()) == patterns


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "synchronised"])
def test_kind_computes_the_same(name, training, device):
    block = make(KINDS[name][0]()).to(device).train(training)
    assert excess(block, fused_copy(block), X.to(device), steps=2) <= ALLOWED


@pytest.mark.once
def test_a_synchronised_one_computes_the_same_in_eval_mode():
    """In training PyTorch's own takes no CPU tensors."""
    block = make(KINDS["synchronised"][0]()).eval()
    assert excess(block, fused_copy(block), X) <= ALLOWED


@pytest.mark.once
def test_patterns_leave_an_activation_inside_where_it_is():
    block = make(Tail(timm_norm(), conv_norm(nn.ReLU())))
    fused = copy.deepcopy(block)
    report = fusedres.fuse_(fused, fusedres.FuseConfig(patterns=("BN+add",)))
    assert report.n_fused == 0
    assert difference(run(block, X), run(fused, X)) == 0


@pytest.mark.once
@pytest.mark.parametrize("where", ["norm", "norm.act", "norm.drop"])
def test_a_hook_on_a_part_inside_is_run(where):
    block = make(nn.Sequential())
    block.norm = timm_norm().double()
    fused = fused_copy(block)
    for each in (block, fused):
        each.get_submodule(where).register_forward_hook(lambda *a: a[-1] * 2)
    assert excess(block, fused, X) <= ALLOWED


@pytest.mark.once
def test_a_frozen_one_promotes_a_narrower_input_as_its_own_forward_does():
    block = Tail(torchvision_frozen()).eval()
    fused = copy.deepcopy(block)
    assert fusedres.fuse_(fused).n_fused == 1
    for each in (block, fused):
        each.conv.bfloat16()
    x = X.bfloat16()
    assert torch.equal(fused(x), block(x))


@pytest.mark.once
def test_a_synchronised_one_tells_its_processes(monkeypatch):
    """By a group that stands in for one of four processes."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    norm = nn.SyncBatchNorm(4, process_group=SimpleNamespace(group_name="four"))
    row = fusedres.fuse_(Tail(norm)).rows[0]
    assert (row.status, row.note) == ("fused", "statistics of 4 processes in training")


@pytest.mark.once
@pytest.mark.parametrize("residual", [None, X.float()], ids=["plain", "add"])
def test_our_own_module_calls_a_child_with_parts_inside(residual):
    layer = fusedres.nn.BatchNormAct2d(4, activation="relu")
    layer.bn = timm_norm(act_layer=nn.SiLU)
    x = X.float()
    inner = F.silu(F.batch_norm(x, None, None, training=True))
    expected = torch.relu(inner if residual is None else inner + residual)
    torch.testing.assert_close(layer(x, residual), expected)


@pytest.mark.once
def test_a_shortcut_joins_a_norm_with_parts_inside_by_calling_it():
    shortcut, norm = fusedres.nn.Projection(4, 4), timm_norm(act_layer=nn.SiLU)
    x = X.float()
    expected = torch.relu(copy.deepcopy(norm)(x) + copy.deepcopy(shortcut)(x))
    torch.testing.assert_close(shortcut.join(norm, x, x), expected)

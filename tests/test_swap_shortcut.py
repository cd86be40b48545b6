"""What `fuse_` makes of shortcuts: projected ones go into the tail, others stay as they are; either way the block
computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, difference, excess, run
from fusedres.nn import projection as nn_projection
from fusedres.ops.projection import describe_choice

from .swap_blocks import fused_copy, images

X = images(2, 4, 7, 6)
TAIL, PROJECTED = "BN+add+ReLU", "BN+BN+add+ReLU"


class Tail(nn.Module):
    """conv, bn, a shortcut and a ReLU; `forward` may be another one."""

    def __init__(self, shortcut: nn.Module | None, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out += self.shortcut(x)
        return self.relu(out)


class Own(nn.Module):
    """A shortcut with a class and names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 8, 1, 2, bias=False)
        self.normalization = nn.BatchNorm2d(8)

    def forward(self, input):
        hidden = self.convolution(input)
        return self.normalization(hidden)


class Ours(nn.Module):
    """A tail that calls the parts of its shortcut itself, before or after the main path."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv_s, self.bn_s = nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8)
        self.first = first

    def forward(self, x):
        if self.first:
            identity = self.bn_s(self.conv_s(x))
            return F.relu(identity + self.bn1(self.conv1(x)))
        return F.relu(self.bn1(self.conv1(x)) + self.bn_s(self.conv_s(x)))


class Written(Tail):
    def forward(self, x):
        x = x * 1
        identity = self.shortcut(x)
        out = self.bn1(self.conv1(x.relu_()))
        return self.relu(out + identity)


def norm_of(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts, nn.BatchNorm2d(8))


def make(block: nn.Module) -> nn.Module:
    """In float64, with something to scale, shift and remember."""
    torch.manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_var.uniform_(0.5, 1.5)
    return block.double()


WRITTEN = "its input is written to"  # which autograd refuses
MEMORY = "1x1 by the library"
# name: (block, where the shortcut's BatchNorm stands, a part of its note)
PROJECTIONS = {
    "1x1": (lambda: Tail(norm_of(nn.Conv2d(4, 8, 1, 2, bias=False))), "shortcut.1", MEMORY),
    "bias": (lambda: Tail(norm_of(nn.Conv2d(4, 8, 1, 2))), "shortcut.1", MEMORY),
    "stride 1": (lambda: Tail(norm_of(nn.Conv2d(4, 8, 1)), 1), "shortcut.1", MEMORY),
    "dilation": (lambda: Tail(norm_of(nn.Conv2d(4, 8, 1, 2, dilation=3))), "shortcut.1", MEMORY),
    "pooled": (
        lambda: Tail(norm_of(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(4, 8, 1))), "shortcut.2", MEMORY,
    ),
    "identity first": (lambda: Tail(norm_of(nn.Identity(), nn.Conv2d(4, 8, 1, 2))), "shortcut.2", MEMORY),
    "own class": (lambda: Tail(Own()), "shortcut.normalization", MEMORY),
    "own first": (lambda: Ours(True), "bn_s", MEMORY),
    "3x3": (
        lambda: Tail(norm_of(nn.Conv2d(4, 8, 3, 2, 1))), "shortcut.1", "shortcut.0 is called: its kernel is 3x3",
    ),
    "groups": (
        lambda: Tail(norm_of(nn.Conv2d(4, 8, 1, 2, groups=2))), "shortcut.1", "shortcut.0 is called: it has 2 groups",
    ),
    "padded": (
        lambda: Tail(norm_of(nn.ConstantPad2d(-1, 0.0), nn.Conv2d(4, 8, 1, padding=1)), 1),
        "shortcut.2", "shortcut.1 is called: it pads by (1, 1)",
    ),
    "own last": (lambda: Ours(False), "bn_s", MEMORY),
    "pool alone": (
        lambda: Tail(norm_of(nn.Conv2d(4, 8, 1, 2), nn.AvgPool2d(1))), "shortcut.2", "a pass of their own",
    ),
    WRITTEN: (
        lambda: Written(norm_of(nn.Conv2d(4, 8, 1, 2))), "shortcut.1",
        "shortcut.0 is called: its input may be written to before the site ends, by relu_",
    ),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projected_shortcut_goes_into_the_tail(name):
    block, where, note = PROJECTIONS[name]
    rows = {row.where: row for row in fusedres.fuse_(make(block())).rows}
    assert {row.pattern for row in rows.values() if row.status == "fused"} == {PROJECTED}
    assert note in rows[where].note


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name != WRITTEN])
def test_it_computes_the_same(name, training, device):
    block = make(PROJECTIONS[name][0]()).to(device).train(training)
    assert excess(block, fused_copy(block), X.to(device), steps=2) <= ALLOWED


@pytest.mark.interpreter
def test_the_kernels_run_it_channels_last(monkeypatch):
    calls = []
    project = nn_projection.project
    monkeypatch.setattr(
        nn_projection, "project", lambda *args: calls.append(project(*args)) or calls[-1]
    )
    block = make(PROJECTIONS["1x1"][0]()).to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    assert excess(block, fused_copy(block), x) <= ALLOWED
    assert calls[0][1] is not None  # the moments left with the values


# --- what is left as it is ---------------------------------------------------------------------------------------


def hooked(where):
    def make_hooked():
        block = Tail(norm_of(nn.Conv2d(4, 8, 1, 2)))
        block.get_submodule(where).register_forward_hook(lambda *_: None)
        return block

    return make_hooked


class First(Tail):
    """The shortcut is called before the main path."""

    def forward(self, x):
        identity = self.shortcut(x)
        return self.relu(self.bn1(self.conv1(x)) + identity)


def shared():
    block = First(norm_of(nn.Conv2d(4, 8, 1, 2)))
    block.shortcut[1] = block.bn1
    return block


class WrittenOurs(Ours):
    def forward(self, x):
        y = self.conv_s(x)
        identity = self.bn_s(y)
        y.mul_(2)
        return F.relu(identity + self.bn1(self.conv1(x))) + y


class Read(Tail):
    def forward(self, x):
        identity = self.shortcut(x)
        out = self.bn1(self.conv1(x)) * self.shortcut[1].running_mean.mean()
        return self.relu(self.bn1(out) + identity)


class TwoNames(nn.Module):
    """The shortcut's BatchNorm is called in the main path too: inside a child, or under a name of its own."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2), self.norm)
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.inner = nn.Sequential(self.norm, nn.Hardtanh())
        self.inside = inside

    def forward(self, x):
        identity = self.shortcut(x)
        out = self.conv1(x)
        out = self.inner(out) if self.inside else F.hardtanh(self.norm(out))
        return F.relu(self.bn1(out) + identity)


def tied_buffers():
    block = First(norm_of(nn.Conv2d(4, 8, 1, 2))).double()  # else the conversion would untie them
    block.shortcut[1].running_mean = block.bn1.running_mean
    return block


class Twice(Tail):
    def forward(self, x):
        identity = self.shortcut(x)
        return self.relu(self.bn1(self.conv1(x)) + identity) + identity


# block, and a part of the reason why the shortcut's BatchNorm is left alone
LEFT = {
    "hook on the Sequential": (hooked("shortcut"), "shortcut: it has hooks"),
    "hook on the BatchNorm": (hooked("shortcut.1"), "shortcut.1: it has hooks"),
    "one BatchNorm for both": (shared, "it is the BatchNorm of the main path too"),
    WRITTEN: (
        lambda: WrittenOurs(True),
        "its input may be written to before the site ends, by mul_",
    ),
    "read in between": (
        lambda: Read(norm_of(nn.Conv2d(4, 8, 1, 2))),
        "shortcut.1.running_mean is used before the site ends",
    ),
    "under another name": (lambda: TwoNames(False), "it is called again before the site ends"),
    "inside another child": (lambda: TwoNames(True), "inner holds its statistics too"),
    "tied statistics": (
        tied_buffers,
        "it shares its statistics with the BatchNorm of the main path",
    ),
    "used twice": (
        lambda: Twice(norm_of(nn.Conv2d(4, 8, 1, 2))),
        "its output is used elsewhere too",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_its_reason(name):
    block, reason = LEFT[name]
    rows = [row for row in fusedres.fuse_(make(block())).rows if row.pattern == PROJECTED]
    assert [row.status for row in rows] == ["left alone"]
    assert reason in rows[0].reason


@pytest.mark.once
@torch.no_grad()
@pytest.mark.parametrize("cases", [PROJECTIONS, LEFT], ids=["fused", "left"])
def test_what_is_written_to_is_read_before(cases):
    block, x = make(cases[WRITTEN][0]()), X.clone()
    assert difference({"y": block(x)}, {"y": fused_copy(block)(x)}) <= 1e-14


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in LEFT if name != WRITTEN])
def test_left_alone_the_tail_is_fused_and_computes_the_same(name):
    block = make(LEFT[name][0]())
    fused = copy.deepcopy(block)
    assert TAIL in {row.pattern for row in fusedres.fuse_(fused).rows if row.status == "fused"}
    assert excess(block, fused, X) <= ALLOWED


def zero_padded(x):
    """The paper's option A: every second pixel, and channels of zeros."""
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class OptionA(Tail):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + zero_padded(x))


class MainInShortcut(Tail):
    def __init__(self) -> None:
        super().__init__(None)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(self.bn1, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.once
def test_a_main_batch_norm_that_the_shortcut_calls_too_does_not_wait():
    block = make(MainInShortcut())
    fused = copy.deepcopy(block)
    row = fusedres.fuse_(fused).rows[0]
    assert "it is called again before the site ends" in row.reason
    assert difference(run(block, X), run(fused, X)) == 0


class OptionALambda(nn.Module):
    def forward(self, x):
        return zero_padded(x)


@pytest.mark.parametrize(
    "block",
    [
        lambda: OptionA(None),
        lambda: Tail(OptionALambda()),
        lambda: Tail(nn.Conv2d(4, 8, 1, 2)),
        lambda: Tail(nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(4, 8, 1))),
        lambda: Tail(nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.Identity())),
    ],
    ids=["option A", "option A, a module", "1x1 alone", "pool and 1x1", "1x1 and Identity"],
)
def test_a_shortcut_without_batch_norm_is_the_residual_of_a_fused_tail(block, device):
    block = make(block()).to(device)
    fused = copy.deepcopy(block)
    report = fusedres.fuse_(fused)
    assert [(row.pattern, row.status) for row in report.rows] == [(TAIL, "fused")]
    assert excess(block, fused, X.to(device)) <= ALLOWED


# --- at the call -------------------------------------------------------------------------------------------------


def both(device="cpu", **changes) -> tuple[nn.Module, nn.Module]:
    """A block and its fused copy, changed alike afterwards."""
    block = make(Tail(norm_of(nn.Conv2d(4, 8, 1, 2, bias=False)))).to(device)
    fused = fused_copy(block)
    for each in (block, fused):
        for path, change in changes.items():
            change(each.get_submodule(path.replace("__", ".")))
    return block, fused


def absolute(input, weight, bias):
    return F.conv2d(input.abs(), weight, bias, 2)


def another_convolution(shortcut) -> None:
    torch.manual_seed(2)
    shortcut[0] = nn.Conv2d(4, 8, 3, 2, 1).to(shortcut[0].weight)


CHANGES = {
    "frozen shortcut": {"shortcut__1": lambda norm: norm.eval()},
    "frozen main": {"bn1": lambda norm: norm.eval()},
    "cumulative": {"shortcut__1": lambda norm: setattr(norm, "momentum", None)},
    "untracked": {"shortcut__1": lambda norm: setattr(norm, "track_running_stats", False)},
    "eps": {"shortcut__1": lambda norm: setattr(norm, "eps", 0.5)},
    "stride": {"shortcut__0": lambda conv: setattr(conv, "stride", (2, 2))},
    "hook": {"shortcut": lambda child: child.register_forward_hook(lambda *_: None)},
    "another convolution": {"shortcut": another_convolution},
    "its computation": {"shortcut__0": lambda conv: setattr(conv, "_conv_forward", absolute)},
    "a child more": {"shortcut": lambda child: child.append(nn.Hardtanh())},
    "weight norm": {"shortcut__0": lambda conv: nn.utils.parametrizations.weight_norm(conv)},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_later_is_seen_at_the_call(name, device):
    block, fused = both(device, **CHANGES[name])
    assert excess(block, fused, X.to(device), steps=2) <= ALLOWED


@pytest.mark.once
def test_what_no_longer_fits_is_told():
    _, fused = both(**CHANGES["hook"])
    assert "shortcut: it has hooks" in str(fusedres.explain(fused))


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gave(dtype):
    block, fused = both()
    found = []
    for each in (block.float(), fused.float()):
        with torch.autocast("cpu", dtype):
            found.append(run(each, X.float()))
    assert found[0]["output 0 0"].dtype == found[1]["output 0 0"].dtype
    assert difference(*found) <= 2 * torch.finfo(dtype).eps


@pytest.mark.interpreter
def test_autocast_reaches_the_product(monkeypatch):
    seen = []
    project = nn_projection.project
    monkeypatch.setattr(
        nn_projection, "project", lambda *args: seen.append(args[0].dtype) or project(*args)
    )
    _, fused = both()
    fused = fused.float().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = fused(X.float().contiguous(memory_format=torch.channels_last))
    assert (seen, output.dtype) == ([torch.bfloat16], torch.bfloat16)


@pytest.mark.once
def test_on_the_meta_device():
    _, fused = both()
    assert fused.to("meta")(X.to("meta")).shape == (2, 8, 4, 3)


@pytest.mark.once
def test_a_shortcut_of_another_dtype_is_promoted_as_in_pytorch():
    class Wide(nn.Sequential):
        def forward(self, x):
            return super().forward(x.double())

    block = make(Tail(norm_of(nn.Conv2d(4, 8, 1, 2)))).float()
    block.shortcut = Wide(*copy.deepcopy(block.shortcut).double())
    assert fused_copy(block)(X.float()).dtype == block(X.float()).dtype


@pytest.mark.once
def test_an_error_of_the_shortcut_is_the_unfused_one():
    block, fused = both(shortcut__0=lambda conv: setattr(conv, "stride", (3, 3)))
    for each in (block, fused):
        with pytest.raises(RuntimeError, match="The size of tensor a"):
            each(X)


# --- control -----------------------------------------------------------------------------------------------------


@pytest.mark.once
class TestControl:
    def test_filter_leaves_the_shortcut_out(self):
        block = make(Tail(norm_of(nn.Conv2d(4, 8, 1, 2))))
        report = fusedres.fuse_(block, filter_fn=lambda module, fqn: fqn != "shortcut")
        found = {row.where: (row.pattern, row.status) for row in report.rows}
        assert found == {"bn1": (TAIL, "fused"), "shortcut.1": (PROJECTED, "excluded")}

    def test_patterns_leave_the_shortcut_out(self):
        block = make(Tail(norm_of(nn.Conv2d(4, 8, 1, 2))))
        report = fusedres.fuse_(block, fusedres.FuseConfig(patterns=(TAIL,)), strict=True)
        found = {row.where: (row.pattern, row.status) for row in report.rows}
        assert found == {"bn1": (TAIL, "fused"), "shortcut.1": (PROJECTED, "excluded")}

    def test_each_batch_norm_has_one_row(self):
        rows = fusedres.fuse_(torchvision.models.resnet18()).rows
        assert len({row.where for row in rows}) == len(rows) == 20

    @pytest.mark.parametrize(("name", "projections"), [("resnet18", 3), ("wide_resnet50_2", 4)])
    def test_the_report_shows_which_implementation_each_projection_gets(self, name, projections):
        with torch.device("meta"):
            rows = fusedres.explain(torchvision.models.get_model(name)).rows
        notes = [row.note for row in rows if row.note]
        assert sum(note == describe_choice(64, 256) for note in notes) == projections

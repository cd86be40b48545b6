"""The residual blocks against the same thing in plain PyTorch, written out here."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess, run
from fusedres.nn import (
    BasicBlock,
    BatchNormAct2d,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    PreActSequential,
    blocks,
)

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def padded(shortcut, x, f):
    """Option A: every stride-th place of x, and zeros in the channels that it has not."""
    stride = -(-x.shape[-1] // f.shape[-1])
    every = (slice(None), slice(x.shape[1]), *[slice(None)] * (x.dim() - 2))
    out = torch.zeros_like(f)
    out[every] = x[(slice(None), slice(None), *[slice(None, None, stride)] * (x.dim() - 2))]
    return out


def gate(shortcut, x):
    return torch.sigmoid(shortcut.gate(x))


# (skip, f) that are added, of the shortcut's child, x, what a projection is given, and the branch.
FORMULAS = {
    "identity": lambda s, x, a, f: (x, f),
    "project": lambda s, x, a, f: (x if s is None else s(a), f),
    "pad": lambda s, x, a, f: (padded(s, x, f), f),
    "conv": lambda s, x, a, f: (s(a), f),
    "scale": lambda s, x, a, f: (0.5 * padded(s, x, f), 0.5 * f),
    "exclusive_gate": lambda s, x, a, f: (
        (1 - gate(s, x)) * padded(s, x, f),
        gate(s, x) * f,
    ),
    "shortcut_gate": lambda s, x, a, f: ((1 - gate(s, x)) * padded(s, x, f), f),
    "dropout": lambda s, x, a, f: (F.dropout(padded(s, x, f), 0.5, s.training), f),
}


def post_activation(block, x, shortcut="project", act=torch.relu):
    f = block.bn1(block.conv1(x))
    f = block.bn2(block.conv2(act(f)))
    if block.expansion == 4:
        f = block.bn3(block.conv3(act(f)))
    skip, f = FORMULAS[shortcut](block.downsample, x, x, f)
    return act(skip + f)


def pre_activation(block, x, shortcut="project", act=torch.relu):
    a = x if block.bn1 is None else act(block.bn1(x))
    f = block.conv2(act(block.bn2(block.conv1(a))))
    if block.expansion == 4:
        f = block.conv3(act(block.bn3(f)))
    skip, f = FORMULAS[shortcut](block.shortcut, x, a, f)
    return skip + f


class Run(nn.Module):
    """A module, or a formula on its children: one state_dict for both."""

    def __init__(self, module, formula=None):
        super().__init__()
        self.module, self.formula = module, formula

    def forward(self, x):
        return self.module(x) if self.formula is None else self.formula(self.module, x)


def drawn(module, device="cpu"):
    """In float64, with statistics and affine parameters that matter."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim() == 1 and "gate" not in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module.double().to(device)


def images(*shape, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(device)


def formula_of(kind):
    return post_activation if kind in (BasicBlock, Bottleneck) else pre_activation


KINDS = [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck]
# (in_channels, channels, stride), options, input; the widths are those of bottlenecks
SHAPES = {
    "same": ((8, 2, 1), {}, (2, 8, 4, 3)),
    "strided": ((4, 2, 2), {}, (2, 4, 5, 4)),
    "strided 1d": ((4, 2, 2), {"dims": 1}, (3, 4, 7)),
    "strided 3d": ((4, 2, 2), {"dims": 3}, (2, 4, 3, 4, 2)),
    "silu": ((8, 2, 1), {"activation": "silu"}, (2, 8, 4, 3)),
}


def make(kind, sizes, **options):
    inputs, channels, stride = sizes
    return kind(inputs, channels * 4 // kind.expansion, stride, **options)


@MODES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_its_formula(kind, shape, training, device):
    """Outputs, all gradients, parameters after two steps, and buffers."""
    sizes, options, size = SHAPES[shape]
    block = drawn(make(kind, sizes, **options), device).train(training)
    act = F.silu if options.get("activation") == "silu" else torch.relu
    plain = Run(copy.deepcopy(block), partial(formula_of(kind), act=act))
    assert excess(plain, Run(block), images(*size, device=device), steps=2) <= ALLOWED


@pytest.mark.parametrize("sizes", [(8, 2, 1), (4, 2, 2)], ids=["same", "strided"])
@pytest.mark.parametrize("shortcut", sorted(set(FORMULAS) - {"project"}))
@pytest.mark.parametrize("kind", [BasicBlock, PreActBasicBlock])
def test_a_shortcut_is_its_formula(kind, shortcut, sizes, device):
    if shortcut == "identity" and sizes[2] == 2:
        sizes = (8, 2, 1)
    block = drawn(make(kind, sizes, shortcut=shortcut, gate_bias=-1.0), device)
    plain = Run(copy.deepcopy(block), partial(formula_of(kind), shortcut=shortcut))
    x = images(2, sizes[0], 5, 4, device=device)
    assert excess(plain, Run(block), x) <= ALLOWED


@pytest.mark.parametrize("shortcut", ["exclusive_gate", "shortcut_gate"])
def test_a_gate_begins_nearly_shut(shortcut):
    assert (BasicBlock(4, 4, shortcut=shortcut).downsample.gate.bias == -6).all()


@pytest.mark.once
@pytest.mark.parametrize("options", [{}, {"shortcut": "pad"}, {"groups": 2, "base_width": 128}])
@pytest.mark.parametrize("sizes", [(16, 16, 1), (64, 16, 1), (64, 16, 2)])
def test_state_dict_is_that_of_torchvision(sizes, options):
    from torchvision.models import resnet

    inputs, channels, stride = sizes
    ours = Bottleneck(*sizes, **options).state_dict()
    downsample = None
    if options.get("shortcut") != "pad" and (stride != 1 or inputs != 4 * channels):
        downsample = nn.Sequential(nn.Conv2d(inputs, 64, 1, bias=False), nn.BatchNorm2d(64))
    groups, width = options.get("groups", 1), options.get("base_width", 64)
    theirs = resnet.Bottleneck(*sizes, downsample, groups, width).state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize(("stride_on", "strides"), [("3x3", (1, 2, 1)), ("1x1", (2, 1, 1))])
@pytest.mark.parametrize("kind", [Bottleneck, PreActBottleneck])
def test_the_convolution_that_has_the_stride(kind, stride_on, strides):
    block = kind(4, 2, 2, stride_on=stride_on)
    assert tuple(c.stride[0] for c in (block.conv1, block.conv2, block.conv3)) == strides


@pytest.mark.parametrize("kind", KINDS)
def test_zeroed_it_begins_as_its_shortcut_and_learns(kind, device):
    block = make(kind, (8, 2, 1), zero_init_last=True).double().to(device)
    x = images(2, 8, 4, 3, device=device)
    y = block(x)
    y.sum().backward()
    last = [p for name, p in block.named_parameters() if not p.any() and name.endswith("weight")]
    torch.testing.assert_close(y, torch.relu(x) if formula_of(kind) is post_activation else x)
    assert [bool(p.grad.any()) for p in last] == [True]


def stage():
    """Every way in which one unit of a PreActSequential can follow another."""
    return PreActSequential(
        PreActBasicBlock(4, 4, input_activated=True),
        PreActBasicBlock(4, 6, 2, shortcut="pad"),
        PreActSequential(PreActBottleneck(6, 2), nn.AvgPool2d(3, 1, 1)),
        PreActBasicBlock(8, 8, activation="silu"),
        PreActBasicBlock(8, 8, shortcut="exclusive_gate"),
        BatchNormAct2d(8, activation="gelu"),
    )


@MODES
def test_a_sequential_of_blocks_is_block_by_block(training, device):
    fused = drawn(stage(), device).train(training)
    plain = Run(copy.deepcopy(fused), nn.Sequential.forward)
    plain.module[2].__class__ = nn.Sequential
    assert excess(plain, Run(fused), images(2, 4, 5, 4, device=device), steps=2) <= ALLOWED


def test_additions_run_with_the_batch_norm_behind_them(monkeypatch, device):
    seen = []

    def spy(norm, *args):
        seen.append(norm)
        return call(norm, *args)

    call = blocks.call_add_batch_norm
    monkeypatch.setattr(blocks, "call_add_batch_norm", spy)
    net = drawn(stage(), device)
    net(images(2, 4, 5, 4, device=device))
    assert seen == [net[1].bn1, net[2][0].bn1, net[4].bn1, net[5].bn]


def hooked(net, seen):
    net[1].register_forward_hook(lambda *_: seen.append("hook"))


def replaced(net, seen):
    forward = net[1].forward
    net[1].forward = lambda x: [seen.append("forward"), forward(x)][1]


def derived(net, seen):
    class Derived(PreActBasicBlock):
        def forward(self, x):
            seen.append("class")
            return super().forward(x)

    net[1].__class__ = Derived


@pytest.mark.parametrize("change", [hooked, replaced, derived])
def test_a_block_that_must_be_called_is_called(change, device):
    net = drawn(stage(), device)
    x, seen = images(2, 4, 5, 4, device=device), []
    expected = copy.deepcopy(net)(x)
    change(net, seen)
    torch.testing.assert_close(net(x), expected)
    assert len(seen) == 1


def test_hooks_on_all_modules_see_every_block(device):
    net, seen = drawn(stage(), device), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        net(images(2, 4, 5, 4, device=device))
    finally:
        handle.remove()
    assert [child for child in net.modules() if child not in seen and "Act" in str(child)] == []


def test_a_slice_of_a_sequential_runs_as_one(device):
    net = drawn(stage(), device)
    x = images(2, 4, 5, 4, device=device)
    torch.testing.assert_close(net[2:](net[:2](x)), net(x))


NETS = {
    "basic": lambda: BasicBlock(4, 6, 2),
    "bottleneck": lambda: Bottleneck(4, 2, 2, shortcut="shortcut_gate"),
    "sequential": stage,
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), torch.fx.symbolic_trace],
    ids=["deepcopy", "pickle", "fx"],
)
def test_copies_and_traces_compute_the_same(net, copied, device):
    module, x = drawn(NETS[net](), device), images(2, 4, 5, 4, device=device)
    found, expected = run(copied(module), x), run(module, x)
    # The state of a trace has other names.
    names = found.keys() & expected.keys() if copied is torch.fx.symbolic_trace else expected
    assert len(names) > 2
    torch.testing.assert_close({n: found[n] for n in names}, {n: expected[n] for n in names})


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("net", NETS)
def test_trace_in_eval(net, device):
    module, x = drawn(NETS[net](), device).eval(), images(2, 4, 5, 4, device=device)
    traced = torch.jit.trace(module, (x,))
    torch.testing.assert_close(traced(x + 1), module(x + 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
@pytest.mark.parametrize("net", NETS)
def test_compiled_whole(net, device):
    module, x = drawn(NETS[net](), device), images(2, 4, 5, 4, device=device)
    expected = run(module, x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, expected["output 0 0"])


@pytest.mark.parametrize("net", NETS)
def test_sync_batch_norm_conversion(net, device):
    module, x = drawn(NETS[net](), device), images(2, 4, 5, 4, device=device)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    torch.testing.assert_close(converted(x), module(x))


BAD = {
    "shortcut": (
        lambda: BasicBlock(4, 4, shortcut="none"),
        r"BasicBlock: shortcut is 'none', expected one of 'identity', 'project', 'pad', 'conv', 'scale', ",
    ),
    "identity": (
        lambda: Bottleneck(4, 4, 2, shortcut="identity"),
        r"Bottleneck: shortcut='identity' adds the input as it is, and this block goes from 4 to 16 channels with "
        r"stride 2; choose shortcut='project' \(a 1x1 convolution\) or shortcut='pad'",
    ),
    "pad": (
        lambda: PreActBasicBlock(8, 4, shortcut="scale"),
        r"PreActBasicBlock: this shortcut adds channels of zeros and cannot go from 8 channels to 4; choose",
    ),
    "dims": (lambda: BasicBlock(4, 4, dims=4), r"BasicBlock: dims is 4, expected one of 1, 2, 3"),
    "stride_on": (
        lambda: Bottleneck(4, 4, stride_on="7x7"),
        r"Bottleneck: stride_on is '7x7', expected one of '3x3', '1x1'",
    ),
    "basic groups": (
        lambda: BasicBlock(4, 4, groups=2),
        r"BasicBlock: groups is 2, expected 1: it has no 1x1 convolutions around the 3x3; choose a block that is",
    ),
    "activation": (
        lambda: PreActBottleneck(4, 4, activation="tanh"),
        r"PreActBottleneck: unknown activation 'tanh'; choose one of None, 'relu'",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_told(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build()


def told(report):
    return {row.where: (row.pattern, row.status, row.reason or row.note) for row in report.rows}


ITSELF = ("fused", "by the module itself")


@pytest.mark.once
@pytest.mark.parametrize("act", [fusedres.explain, partial(fusedres.fuse_, strict=True)])
def test_a_block_reports_what_it_fuses_and_is_left_as_it_is(act):
    net = nn.Sequential(
        BasicBlock(4, 8, 2, activation="silu"), BasicBlock(8, 8, shortcut="scale"),
        PreActSequential(PreActBottleneck(8, 2), BatchNormAct2d(8, activation=None)), BatchNormAct2d(8),
    )  # fmt: skip
    before = [type(module) for module in net.modules()]
    assert told(act(net)) == {
        "0.bn1": ("BN+SiLU", *ITSELF),
        "0.bn2": ("BN+BN+add+SiLU", *ITSELF),
        "0.downsample.1": ("BN+BN+add+SiLU", *ITSELF),
        "1.bn1": ("BN+ReLU", *ITSELF),
        "1.bn2": ("BN", *ITSELF),
        "2.0.bn1": ("BN+ReLU", *ITSELF),
        "2.0.bn2": ("BN+ReLU", *ITSELF),
        "2.0.bn3": ("BN+ReLU", *ITSELF),
        "2.1": ("BN", *ITSELF),
        "3": ("BN+ReLU", *ITSELF),
    }
    assert [type(module) for module in net.modules()] == before


@pytest.mark.once
def test_a_norm_that_must_be_called_is_not_reported_as_fused():
    block = BasicBlock(4, 4)
    block.bn1.register_forward_hook(lambda *_: None)
    assert told(fusedres.explain(block))["bn1"] == (
        "BN+ReLU",
        "left alone",
        "it has hooks, which run only when the module itself is called",
    )


@pytest.mark.once
def test_a_block_with_another_forward_tells_nothing_of_itself():
    class Derived(BasicBlock):
        def forward(self, x):
            return torch.relu(self.bn1(self.conv1(x)))

    found = told(fusedres.explain(Derived(4, 4)))
    assert (found["bn1"][1], found["bn2"][1]) == ("fusable", "left alone")

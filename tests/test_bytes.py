"""The passes over memory of the table, measured: a pass is one read or write of a tensor of the input's size."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

import fusedres
from fusedres.benchmarks.floors import OPERATORS, projection_bytes
from fusedres.benchmarks.meter import meter
from fusedres.benchmarks.network import count_step
from fusedres.benchmarks.traffic import Site, Traffic, count

pytestmark = pytest.mark.interpreter


SMALL, WIDE, FLOAT32 = (
    ("bfloat16", (8, 16, 48, 48)),
    ("bfloat16", (16, 128, 14, 14)),
    ("float32", (4, 16, 48, 48)),
)
FLAT = (
    "bfloat16",
    (32, 16, 14, 14),
)  # a program has 64 columns of it: few channels keep the interpreter quick
# What the residual comes with changes nothing in how a kernel walks: one shape is enough.
CASES = [
    pytest.param(row, layout, *where, id=f"{row}-{layout}-{where[0]}-C{where[1][1]}")
    for row, operator in OPERATORS.items()
    for layout in ("channels_last", "contiguous_format")
    for where in (
        (SMALL,)
        if operator.skip or operator.moments
        else (SMALL, WIDE if layout == "channels_last" else FLAT, FLOAT32)
    )
]  # fmt: skip


@pytest.mark.parametrize(("row", "layout", "dtype", "shape"), CASES)
def test_passes(row, layout, dtype, shape):
    """Within 3 percent of the table, per-channel vectors and partial sums included."""
    found = count(Site(row, shape, dtype, layout))
    element_size = 4 if dtype == "float32" else 2
    size = math.prod(shape) * element_size
    for mode in ("forward", "backward"):
        passes = OPERATORS[row].passes(mode, element_size)
        assert getattr(found, mode) / size == pytest.approx(passes, rel=0.03), mode


def floor(site: Site) -> Traffic:
    """What the table says of a site, in bytes."""
    row = OPERATORS[site.kernel]
    size = torch.finfo(getattr(torch, site.dtype)).bits // 8
    return Traffic(*(row.bytes(mode, site.shape, size) for mode in ("forward", "backward")), 0, 0)


def block(inputs: int, planes: int, stride: int, projected: bool) -> nn.Module:
    """A Bottleneck of torchvision, its shortcut as ResNet makes it."""
    shortcut = None
    if projected:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
        )
    return torchvision.models.resnet.Bottleneck(inputs, planes, stride, shortcut)


def stage() -> nn.Module:
    """The second stage of a narrow ResNet-50, four blocks, and the block before it, from which the first fork comes."""
    return nn.Sequential(
        block(32, 16, 1, True), block(64, 32, 2, True), *(block(128, 32, 1, False) for _ in range(3))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "channels", "projections"),
    [
        (lambda: block(64, 16, 1, False), 64, []),
        (lambda: block(32, 16, 1, True), 32, [(32, 64, 48 * 48)]),
        (stage, 32, [(32, 64, 48 * 48), (64, 128, 24 * 24)]),
    ],
    ids=["Bottleneck", "projected Bottleneck", "stage"],
)
def test_a_swapped_network_moves_what_its_operators_are_built_to(build, channels, projections):
    """Forward and backward of fused blocks, every kernel of ours counted: within 3 percent of the table."""
    shape = (2, channels, 48, 48)
    counted = count_step(build, [shape], measured=floor, differentiable=True)
    assert counted.operations["add"] == 1  # at the network's input, which no tail of ours made
    counted.bytes["backward"] -= 3 * 2 * math.prod(shape)
    model = build().train()
    for child in model.modules():
        if isinstance(child, nn.Conv2d):
            child.to(torch.bfloat16)
    fusedres.fuse_(model.to(memory_format=torch.channels_last))
    x = torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with meter() as forward:
        output = model(x.requires_grad_())
    with meter() as backward:
        output.backward(torch.randn_like(output))
    found = {"forward": forward.bytes, "backward": backward.bytes}
    for channels_in, channels_out, rows in projections:
        for mode in found:
            found[mode] -= projection_bytes(mode, 2 * rows, channels_in, channels_out, 2)
    assert found == pytest.approx(dict(counted.bytes), rel=0.03)

"""What is measured: the only place with shapes.

Operators at the BatchNorm shapes of ResNet-18 and ResNet-50 and over a grid; blocks as torchvision defines them, each
in the stage where it weighs most; whole networks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..cli.errors import require
from ..cli.models import build_model
from .floors import OPERATORS

LEVELS = ("operator", "block", "model")
CLASSES = 1000

# (channels, height = width) of every BatchNorm at 224x224, by what it is part of.
RESNET18 = {
    "bn_relu": [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)],
    "bn_add_relu": [(64, 56), (128, 28), (256, 14), (512, 7)],
    "bn": [(128, 28), (256, 14), (512, 7)],
}
RESNET50 = {
    "bn_relu": [(64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)],
    "bn_add_relu": [(256, 56), (512, 28), (1024, 14), (2048, 7)],
    "bn": [(256, 56), (512, 28), (1024, 14), (2048, 7)],
}  # fmt: skip
GRID = [(c, h) for h in (1, 7, 8, 14, 28, 56, 112) for c in (16, 64, 256, 2048)]
GRID_BATCH = 32


@dataclass(frozen=True)
class Case:
    """One thing to measure. `shape` is the input's, [N, C, H, W]; `build` makes the plain PyTorch module."""

    level: str
    kernel: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module] = field(repr=False, compare=False)
    residual: bool = False

    @property
    def name(self) -> str:
        return f"{self.kernel} {shape_name(self.shape)}"

    def bytes(self, mode: str, dtype: torch.dtype) -> int | None:
        """What the fused operator must move; None for blocks and models, where convolutions move bytes too."""
        if self.level != "operator":
            return None
        return OPERATORS[self.kernel].bytes(mode, self.shape, dtype.itemsize)


def shape_name(shape: tuple[int, ...]) -> str:
    """[N, C, H, W] as N256-C64-H56-W56."""
    return "-".join(f"{letter}{size}" for letter, size in zip("NCDHW", _five(shape)) if size)  # noqa: B905


def _five(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], 0, *shape[2:]) if len(shape) == 4 else shape


_ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {
    None: nn.Identity,
    "relu": functools.partial(nn.ReLU, inplace=True),
    "silu": functools.partial(nn.SiLU, inplace=True),
}


class Tail(nn.Module):
    """The end of a ResNet's block in plain PyTorch, spelled as torchvision spells it."""

    def __init__(self, channels: int, residual: bool, activation: str | None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.activation = activation
        self.act = _ACTIVATIONS[activation]()
        self.residual = residual
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(x)
        if residual is not None:
            out += residual
        return self.act(out)


class DualTail(Tail):
    """The end of a block whose shortcut has a BatchNorm: the residual is normalised too."""

    def __init__(self, channels: int, activation: str | None) -> None:
        super().__init__(channels, True, activation)
        self.shortcut = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, self.shortcut(residual))


def tail(kernel: str, channels: int) -> Tail:
    """An operator of `floors.OPERATORS` in plain PyTorch."""
    wanted = OPERATORS[kernel]
    if wanted.residual_norm:
        return DualTail(channels, wanted.activation)
    return Tail(channels, wanted.residual, wanted.activation)


def operator(kernel: str, shape: tuple[int, ...]) -> Case:
    """A fused operator of `floors.OPERATORS` at one shape."""
    return Case(
        "operator", kernel, shape, lambda: tail(kernel, shape[1]), OPERATORS[kernel].residual
    )


def operators(batches: tuple[int, ...], grid: bool) -> list[Case]:
    """Every distinct shape of both networks at these batches, largest first, then the grid."""
    found: dict[tuple, Case] = {}
    for batch in batches:
        for network in (RESNET18, RESNET50):
            for kernel, places in network.items():
                for c, h in places:
                    found[kernel, batch, c, h] = operator(kernel, (batch, c, h, h))
                    if kernel == "bn":  # a projected shortcut's, which the block's tail adds
                        tail_of = "bn_bn_add_relu"
                        found[tail_of, batch, c, h] = operator(tail_of, (batch, c, h, h))
    cases = sorted(found.values(), key=lambda case: -math.prod(case.shape))
    if grid:
        more = (operator("bn_add_relu", (GRID_BATCH, c, h, h)) for c, h in GRID)
        cases += [case for case in more if case not in cases]
    return cases


def blocks(batch: int) -> list[Case]:
    """torchvision's blocks at 224x224: the first stage's, and one that projects its shortcut."""

    def build(kind: str, channels: int, planes: int, stride: int) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            resnet = require("torchvision", "models", "the block level").models.resnet
            block = getattr(resnet, kind)
            shortcut = None
            if stride != 1 or channels != planes * block.expansion:
                shortcut = nn.Sequential(
                    resnet.conv1x1(channels, planes * block.expansion, stride),
                    nn.BatchNorm2d(planes * block.expansion),
                )
            return block(channels, planes, stride, shortcut)

        return make

    return [
        Case("block", "BasicBlock", (batch, 64, 56, 56), build("BasicBlock", 64, 64, 1)),
        Case("block", "BasicBlock, projected", (batch, 64, 56, 56), build("BasicBlock", 64, 128, 2)),
        Case("block", "Bottleneck", (batch, 256, 56, 56), build("Bottleneck", 256, 64, 1)),
        Case("block", "Bottleneck, projected", (batch, 256, 56, 56), build("Bottleneck", 256, 128, 2)),
    ]  # fmt: skip


NETWORKS = (
    "resnet50", "resnet18", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "timm:resnet50d", "cifar_resnet18",
)  # fmt: skip


def model(name: str, batch: int, size: int) -> Case:
    """A network of `NETWORKS`; the CIFAR one takes 32x32 images and ten classes."""
    if name == "cifar_resnet18":
        return Case("model", name, (batch, 3, 32, 32), _cifar_resnet18)
    return Case("model", name, (batch, 3, size, size), lambda: build_model(name, CLASSES))


def models(batch: int, size: int, names: tuple[str, ...] = NETWORKS) -> list[Case]:
    return [model(name, batch, size) for name in names]


def _cifar_resnet18() -> nn.Module:
    """torchvision's ResNet-18 as CIFAR code has it: a 3x3 stem of stride 1, no max-pool."""
    network = build_model("resnet18", 10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


class TwoTails(nn.Module):
    """What is left of a BasicBlock without its convolutions: BN + ReLU, then BN + add + ReLU. x forks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        out = self.bn2(out)
        out += x
        return self.relu(out)


def chain(tails: int, channels: int) -> nn.Module:
    """So many tails, one after the other, every other one at the end of a fork."""
    return nn.Sequential(*[TwoTails(channels) for _ in range(tails // 2)])


def narrow(name: str, channels: int) -> nn.Module:
    """torchvision's ResNet-18 or ResNet-50 with so many channels in its stem and in each of its stages."""
    resnet = require("torchvision", "models", f"a narrow {name}").models.resnet
    block, layers = {
        "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
        "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    }[name]

    with torch.device("meta"):  # all that has parameters is replaced
        network = resnet.ResNet(block, layers)
    network.inplanes = channels
    network.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    network.bn1 = nn.BatchNorm2d(channels)
    for i, blocks in enumerate(layers):
        stage = network._make_layer(block, channels, blocks, stride=2 if i else 1)
        setattr(network, f"layer{i + 1}", stage)
    network.fc = nn.Linear(channels * block.expansion, 10)
    return network


def draw(
    case: Case, dtype: torch.dtype, layout: torch.memory_format, device: torch.device, seed: int
) -> list[Tensor]:
    """The inputs of a case: normally distributed about a mean of 1 (never zeros), laid out, in `dtype`."""
    generator = torch.Generator(device).manual_seed(seed)

    def one() -> Tensor:
        values = torch.randn(case.shape, generator=generator, device=device).add_(1.0)
        return values.to(dtype).contiguous(memory_format=layout)

    return [one() for _ in range(2 if case.residual else 1)]

"""A U-Net of residual blocks that are fused by themselves, trained to segment generated shapes.

    python examples/unet.py

fusedres is no ResNet only: `nn.Residual` adds a shortcut to any module, `nn.BatchNormAct2d` is BatchNorm and activation
(and a sum, if it is given one) in as few passes as they need. A model that is built of them needs no `fuse_`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise

import torch
from common import CommandError, at_least, last_loss, recipe, recipe_parser
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.cli.device import choose_device
from fusedres.nn import BatchNormAct2d, Residual

CLASSES = ("background", "disc", "square")


def shapes(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [N, 1, S, S] of one disc and one square each, in noise, and the class of each pixel [N, S, S]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = size // 6
    where = torch.randint(radius, size - radius, (4, count, 1, 1), generator=generator)
    disc = (y - where[0]) ** 2 + (x - where[1]) ** 2 <= radius**2
    square = ((y - where[2]).abs() < radius) & ((x - where[3]).abs() < radius)
    labels = torch.where(square, 2, torch.where(disc, 1, 0))
    noise = torch.randn(count, size, size, generator=generator)
    return ((labels > 0) + 0.3 * noise).unsqueeze(1), labels


def block(channels: int, width: int) -> nn.Sequential:
    """To `width` channels, then relu(x + F(x)): the last BatchNorm, the sum and the ReLU are one operator."""
    branch = nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        BatchNormAct2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        BatchNormAct2d(width),
        Residual(branch, activation="relu"),
    )


class UNet(nn.Module):
    """Down by halves, up again, and what was there on the way down beside it (Ronneberger et al. 2015, 1505.04597)."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        ins, outs = [channels, *widths[:-1]], list(widths)
        self.down = nn.ModuleList(block(i, o) for i, o in zip(ins, outs, strict=True))
        pairs = [(deep, beside) for beside, deep in pairwise(widths)][::-1]
        self.up = nn.ModuleList(block(deep + beside, beside) for deep, beside in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, classes, H, W]; H and W are multiples of 2 ** (len(widths) - 1)."""
        beside = []
        for k, stage in enumerate(self.down):
            x = stage(x if k == 0 else F.max_pool2d(x, 2))
            beside.append(x)
        beside.pop()
        for stage in self.up:
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), beside.pop()], 1))
        return self.head(x)


@torch.no_grad()
def overlap(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Of each class, pixels that are it and are called it, over those that are either."""
    model.eval()
    said = model(images).argmax(1)
    found = {}
    for k, name in enumerate(CLASSES):
        both, either = (said == k) & (labels == k), (said == k) | (labels == k)
        found[name] = (both.sum() / either.sum()).item()
    return found


def train(options: argparse.Namespace) -> int:
    """Train on shapes that are new at each step; 1 if the loss does not go down."""
    if options.size % 4 or options.size < 16:
        raise CommandError(f"--size {options.size} is not a multiple of 4 of at least 16")
    device = choose_device(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    model = UNet(1, len(CLASSES)).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    losses = []
    for step in range(1, options.steps + 1):
        images, labels = (t.to(device) for t in shapes(options.batch, options.size, generator))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, options.steps // 10) == 0:
            print(f"step      {step}/{options.steps}, loss {losses[-1]:.3f}", flush=True)
    images, labels = (t.to(device) for t in shapes(64, options.size, generator))
    for name, share in overlap(model, images, labels).items():
        print(f"overlap   {share:.2f} of {name}")
    fell = last_loss(losses) < losses[0]
    print(f"loss      {losses[0]:.3f} at first, {last_loss(losses):.3f} over the last 10 steps")
    return int(not fell)


def run(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = recipe_parser("unet", __doc__ or "")
    number = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("--steps", default=150, **number, help="of training")
    parser.add_argument("--batch", default=16, **number, help="images a step")
    parser.add_argument("--size", default=48, **number, help="pixels a side, a multiple of 4")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    return recipe(train, parser, arguments)


if __name__ == "__main__":
    sys.exit(run())

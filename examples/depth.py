"""Plain and residual networks as they grow deeper (He et al. 2015, arXiv:1512.03385, section 4.2 and figure 6).

    python examples/depth.py

The networks of that section, for images of 8x8 and half as wide: 6 n + 2 layers, 3x3 convolutions with BatchNorm and
ReLU, three stages of 8, 16 and 32 channels, average pooling and a linear classifier. The residual one adds to every
second convolution what came in two before, with zeros where channels are missing (option A), so that both have the
same parameters, and begins from the same weights. Trained alike, with SGD.

What is compared is the loss on the images that are trained on: a deeper plain network does not overfit more, it is
harder to train, although it could do what the shallower one does by leaving layers as the identity.
"""

from __future__ import annotations

import sys

import torch
from common import (
    Bench,
    Outcome,
    draw,
    initialise,
    last_loss,
    main,
    name_axes,
    name_bands,
    new_figure,
    spread,
)
from torch import nn

from fusedres.cli.picture import BLUE, RED
from fusedres.nn import Residual

SIZE, WIDTHS = 8, (8, 16, 32)
DEPTHS = (8, 20, 32, 56)
KINDS = {"plain": BLUE, "residual": RED}
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4


def convolve(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution and its BatchNorm."""
    return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]


def build(depth: int, kind: str, classes: int) -> nn.Module:
    """The network of `depth` layers, that count as in the paper: convolutions and the classifier."""
    layers = [*convolve(3, WIDTHS[0]), nn.ReLU()]
    channels = WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            pair = nn.Sequential(
                *convolve(channels, width, stride), nn.ReLU(), *convolve(width, width)
            )
            if kind == "plain":
                layers += [*pair, nn.ReLU()]
            else:
                skip = None if channels == width else "pad"
                layers.append(Residual(pair, skip=skip, activation="relu"))
            channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return initialise(nn.Sequential(*layers, *head))


def experiment(bench: Bench) -> Outcome:
    """Training loss of plain and residual networks of 8, 20, 32 and 56 layers."""
    losses: dict[str, dict[int, list[list[float]]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for depth in DEPTHS:
            losses[kind][depth] = [train(bench, kind, depth, seed) for seed in bench.seeds]
    ends = {
        kind: {depth: [last_loss(run) for run in runs] for depth, runs in by_depth.items()}
        for kind, by_depth in losses.items()
    }
    findings = {
        "steps": bench.options.steps,
        "seeds": len(bench.seeds),
        **{
            f"loss_{kind}": {depth: spread(values) for depth, values in by_depth.items()}
            for kind, by_depth in ends.items()
        },
    }
    return Outcome({"losses": losses}, findings)


def train(bench: Bench, kind: str, depth: int, seed: int) -> list[float]:
    """The losses of one network."""
    torch.manual_seed(seed)
    model = build(depth, kind, bench.data.classes)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    return bench.train(f"{kind} {depth}", model, seed, optimizer)


def picture(series):
    """The curves of both kinds, and what they end at over the depth."""
    losses = {
        kind: {int(depth): runs for depth, runs in by_depth.items()}
        for kind, by_depth in series["losses"].items()
    }
    figure, ((first, second, third),) = new_figure(1, 3)
    shades = (0.35, 0.55, 0.75, 1.0)
    for axes, kind in zip((first, second), KINDS, strict=True):
        for depth, shade in zip(DEPTHS, shades, strict=True):
            draw(
                axes, losses[kind][depth], KINDS[kind], f"{depth} layers", 5,
                alpha=shade, linewidth=0.8 + shade,
            )  # fmt: skip
        axes.set_ylim(0, 2.6)
        name_axes(axes, f"{kind} networks: training loss", "step", "")
    for kind, colour in KINDS.items():
        middles = [spread([last_loss(run) for run in losses[kind][depth]]) for depth in DEPTHS]
        third.plot(DEPTHS, [m["median"] for m in middles], "o-", color=colour, label=kind)
        third.fill_between(
            DEPTHS, [m["lowest"] for m in middles], [m["highest"] for m in middles],
            color=colour, alpha=0.18, linewidth=0,
        )  # fmt: skip
    third.set_xticks(DEPTHS)
    third.set_ylim(0, 2.6)
    name_axes(third, "loss over the last 10 steps", "layers", "")
    name_bands(figure, len(losses["plain"][DEPTHS[0]]))
    return figure


def run(arguments: list[str] | None = None) -> int:
    """From the command line."""
    return main(
        experiment,
        picture,
        len(KINDS) * len(DEPTHS),
        SIZE,
        arguments,
        batch=64,
        steps=100,
        repeat=3,
    )


if __name__ == "__main__":
    sys.exit(run())

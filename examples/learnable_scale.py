"""A learnable scale that starts at 0 against the plain sum (Bachlechner et al. 2020, arXiv:2003.04887).

    python examples/learnable_scale.py

    plain sum       y = x + F(x)
    learnable       y = x + a F(x), one number a for each block, a parameter that starts at 0

Each network is a convolution, 16 such blocks of two 3x3 convolutions, average pooling and a linear classifier;
weights as in He et al. 2015 (arXiv:1502.01852), Adam. Two families are run: blocks of ReLU and convolution alone,
where every block of the plain sum doubles the variance or more, and blocks with BatchNorm before each ReLU, which
keeps the branch's variance at about one.
"""

from __future__ import annotations

import statistics
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
    plain_numbers,
    spread,
)
from torch import nn

from fusedres.cli.picture import BLUE, RED
from fusedres.nn import Residual

SIZE, WIDTH, BLOCKS, LEARNING_RATE = 8, 16, 16, 3e-3
FAMILIES = ("without BatchNorm", "with BatchNorm")
SUMS = {"plain": None, "learnable": "scalar"}
COLOURS = {"plain": BLUE, "learnable": RED}
EARLY = 10  # steps


def build(family: str, scale: str | None, classes: int) -> nn.Module:
    """One network."""
    normed = family == "with BatchNorm"

    def half() -> list[nn.Module]:
        norm = [nn.BatchNorm2d(WIDTH)] if normed else []
        return [*norm, nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=not normed)]

    blocks = [Residual(nn.Sequential(*half(), *half()), scale=scale) for _ in range(BLOCKS)]
    stem = [nn.Conv2d(3, WIDTH, 3, padding=1), nn.MaxPool2d(2)]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, classes)]
    return initialise(nn.Sequential(*stem, *blocks, *head))


def follow(bench: Bench, family: str, kind: str, seed: int) -> dict[str, list]:
    """The losses of one training, and each block's scale at each step."""
    torch.manual_seed(seed)
    model = build(family, SUMS[kind], bench.data.classes)
    scales = [block.scale for block in model if isinstance(block, Residual)]
    paths: list[list[float]] = [[] for scale in scales if scale is not None]

    def watch() -> None:
        for path, scale in zip(paths, scales, strict=False):
            path.append(scale.item())

    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = bench.train(f"{kind}, {family}", model, seed, optimizer, watch)
    return {"loss": losses, "scales": paths}


def experiment(bench: Bench) -> Outcome:
    """Training loss of the plain sum and of a scale that is learnt from 0 on, and the path of that scale."""
    runs = {
        family: {kind: [follow(bench, family, kind, seed) for seed in bench.seeds] for kind in SUMS}
        for family in FAMILIES
    }
    findings = {"steps": bench.options.steps, "seeds": len(bench.seeds), "early_steps": EARLY}
    for family, by_kind in runs.items():
        for kind, each in by_kind.items():
            findings[f"{kind} sum, {family}"] = {
                "loss_first": spread([run["loss"][0] for run in each]),
                "loss_early": spread([statistics.fmean(run["loss"][:EARLY]) for run in each]),
                "loss_end": spread([last_loss(run["loss"]) for run in each]),
            }
        sizes = [abs(path[-1]) for run in by_kind["learnable"] for path in run["scales"]]
        findings[f"size of the scales at the end, {family}"] = spread(sizes)
    return Outcome({"runs": runs}, findings)


def picture(series):
    """The losses of both families, and the paths of the first seed."""
    runs = series["runs"]
    figure, axes = new_figure(2, 2, sharex=True)
    for (left, right), family in zip(axes, FAMILIES, strict=True):
        for kind in SUMS:
            losses = [run["loss"] for run in runs[family][kind]]
            label = "plain sum, x + F(x)" if kind == "plain" else "learnable, x + a F(x), a from 0"
            draw(left, losses, COLOURS[kind], label, 3)
        left.set_yscale("log")
        plain_numbers(left.yaxis, (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100))
        name_axes(left, f"{family}: training loss", "step", "")
        for path in runs[family]["learnable"][0]["scales"]:
            right.plot(range(1, len(path) + 1), path, color=RED, linewidth=0.8)
        right.axhline(0, color="black", linewidth=0.6)
        name_axes(right, f"{family}: a of each block (one seed)", "step", "", legend=False)
    name_bands(figure, len(runs[FAMILIES[0]]["plain"]))
    return figure


def run(arguments: list[str] | None = None) -> int:
    """From the command line."""
    runs = len(FAMILIES) * len(SUMS)
    return main(experiment, picture, runs, SIZE, arguments, batch=64, steps=100, repeat=3)


if __name__ == "__main__":
    sys.exit(run())

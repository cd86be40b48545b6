"""Where the activation stands, and what stands on the shortcut (He et al. 2016, arXiv:1603.05027, tables 1 and 2).

    python examples/preactivation.py

Networks of 110 layers, narrow (4, 8 and 16 channels) and on images of 8x8, trained alike with SGD:

    post-activation    y = relu(x + F(x)), F ends in a BatchNorm
    pre-activation     y = x + F(x), F begins with BatchNorm and ReLU

each with the identity as its shortcut; then, post-activation as in the paper's table 1, with something on the
shortcut of every block: a 1x1 convolution, dropout, a constant scale of a half, a gate. All that stands there scales
or cuts what the identity would hand on, over 54 blocks.
"""

from __future__ import annotations

import sys

import torch
from common import (
    Bench,
    Outcome,
    draw,
    last_loss,
    main,
    name_axes,
    name_bands,
    new_figure,
    plain_numbers,
    spread,
)

from fusedres import models
from fusedres.cli.picture import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

SIZE, WIDTHS = 8, (4, 8, 16)
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
# name: (network, shortcut, colour)
ORDERS = {
    "post-activation": (models.resnet110, "pad", BLUE),
    "pre-activation": (models.preact_resnet110, "pad", RED),
}
SHORTCUTS = {
    "identity": (models.resnet110, "pad", BLUE),
    "1x1 convolution": (models.resnet110, "conv", GREEN),
    "constant scale": (models.resnet110, "scale", ORANGE),
    "gate": (models.resnet110, "exclusive_gate", PURPLE),
    "dropout": (models.resnet110, "dropout", GREY),
}
# The paper warms its 110 layers up at a lower rate; with the smaller one nothing needs to be.
RATE = 0.02
PRE_RATE = 0.1


def train(bench: Bench, name: str, build, shortcut: str, rate: float, seed: int) -> list[float]:
    """The losses of one network."""
    torch.manual_seed(seed)
    model = build(widths=WIDTHS, shortcut=shortcut, num_classes=bench.data.classes)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    return bench.train(name, model, seed, optimizer)


def experiment(bench: Bench) -> Outcome:
    """Training loss at 110 layers: post- and pre-activation, and five shortcuts."""
    orders = {
        f"{name}, rate {rate:g}": [
            train(bench, name, build, shortcut, rate, seed) for seed in bench.seeds
        ]
        for name, (build, shortcut, _) in ORDERS.items()
        for rate in (RATE, PRE_RATE)
    }
    shortcuts = {
        name: [train(bench, name, build, shortcut, RATE, seed) for seed in bench.seeds]
        for name, (build, shortcut, _) in SHORTCUTS.items()
        if name != "identity"
    }
    shortcuts = {"identity": orders[f"post-activation, rate {RATE:g}"], **shortcuts}
    findings = {
        "steps": bench.options.steps,
        "seeds": len(bench.seeds),
        "loss_by_order": {name: ends(runs) for name, runs in orders.items()},
        "loss_by_shortcut": {name: ends(runs) for name, runs in shortcuts.items()},
    }
    return Outcome({"orders": orders, "shortcuts": shortcuts}, findings)


def ends(runs: list[list[float]]) -> dict[str, float]:
    """The loss over the last steps."""
    return spread([last_loss(run) for run in runs])


def picture(series):
    """Left the order of the operations at two learning rates, right the shortcuts."""
    orders, shortcuts = series["orders"], series["shortcuts"]
    figure, (panels,) = new_figure(1, 3)
    for axes, rate in zip(panels, (RATE, PRE_RATE), strict=False):
        for name, (_, _, colour) in ORDERS.items():
            draw(axes, orders[f"{name}, rate {rate:g}"], colour, name, 5)
        name_axes(axes, f"110 layers, learning rate {rate:g}: training loss", "step", "")
    # Three of them lie on each other: each has markers where the others have none.
    for k, (name, runs) in enumerate(shortcuts.items()):
        style = {"marker": "Dos^v"[k], "markevery": (3 * k, 15), "markersize": 5}
        draw(panels[2], runs, SHORTCUTS[name][2], name, 5, **style)
    title = f"post-activation, shortcuts (rate {RATE:g}): training loss"
    name_axes(panels[2], title, "step", "", legend=False)
    panels[2].legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for axes, top in zip(panels, (10, 10, 3000), strict=True):
        axes.set_yscale("log")
        axes.set_ylim(0.3, top)
        plain_numbers(axes.yaxis, (0.3, 1, 3, 10, 30, 100, 300))
    name_bands(figure, len(shortcuts["identity"]))
    return figure


def run(arguments: list[str] | None = None) -> int:
    """From the command line."""
    runs = 2 * len(ORDERS) + len(SHORTCUTS) - 1
    return main(experiment, picture, runs, SIZE, arguments, batch=64, steps=60, repeat=3)


if __name__ == "__main__":
    sys.exit(run())

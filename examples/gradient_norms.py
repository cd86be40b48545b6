"""Which way the gradient takes through a residual block, in the first epoch of training.

    python examples/gradient_norms.py

A block gives y = x + F(x), so the gradient of the loss at its input is the sum of two:

    over the residual connection    g_skip = dL/dy, handed on as it is
    through the branch              g_branch = J_F^T dL/dy, J_F the Jacobian of F; it is what arrives at the input of
                                    the branch's first convolution

Both are taken at every step, over the whole batch, and their Euclidean norms recorded. The network: three
convolutions with ReLU, a 4x4 max-pooling, the block (conv, ReLU, conv), a max-pooling, a linear classifier; weights
as in Glorot and Bengio 2010, Adam. The weights decide where the ratio g_branch / g_skip begins: PyTorch's own
initialisation and He's are run beside it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from common import (
    Bench,
    Outcome,
    draw,
    initialise,
    main,
    name_axes,
    name_bands,
    new_figure,
    smooth,
    spread,
)
from torch import Tensor, nn

from fusedres.cli.picture import BLUE, GREEN, GREY, RED
from fusedres.nn import Residual

SIZE, WIDTH, LEARNING_RATE = 32, 16, 4e-3
WINDOW = 20  # steps over which the ratio is smoothed before one asks on which side of 1 it is
INITS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "glorot": nn.init.xavier_uniform_,
    "he": nn.init.kaiming_normal_,
    "pytorch": None,
}
COLOURS = {"glorot": RED, "he": GREEN, "pytorch": GREY}


class Probe(nn.Module):
    """The identity; remembers the norm of the gradient that passed it."""

    norm = math.nan

    def forward(self, x: Tensor) -> Tensor:
        """x, as a tensor of its own: the gradients of both ways are still apart there."""
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(self._remember)
        return x

    def _remember(self, gradient: Tensor) -> None:
        self.norm = gradient.norm().item()


def build(classes: int, weights: str) -> tuple[nn.Module, Probe, Probe]:
    """The network, and the probes over its residual connection and in its branch."""
    skip, branch = Probe(), Probe()

    def convolution(channels: int = WIDTH) -> nn.Module:
        return nn.Conv2d(channels, WIDTH, 3, padding=1)

    block = nn.Sequential(branch, convolution(), nn.ReLU(), convolution())
    model = nn.Sequential(
        *(convolution(3), nn.ReLU()),
        *(convolution(), nn.ReLU()),
        *(convolution(), nn.ReLU()),
        nn.MaxPool2d(4),
        Residual(block, skip=skip),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(WIDTH * (SIZE // 16) ** 2, classes),
    )
    if (draw_weight := INITS[weights]) is not None:
        initialise(model, draw_weight)
    return model, skip, branch


def follow(bench: Bench, weights: str, seed: int) -> dict[str, list[float]]:
    """Both norms and the loss at each step of one training."""
    torch.manual_seed(seed)
    model, skip, branch = build(bench.data.classes, weights)
    found: dict[str, list[float]] = {"skip": [], "branch": []}

    def watch() -> None:
        found["skip"].append(skip.norm)
        found["branch"].append(branch.norm)

    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    found["loss"] = bench.train(weights, model, seed, optimizer, watch)
    return found


def ratio(run: dict[str, list[float]]) -> list[float]:
    """|g_branch| / |g_skip| at each step, its geometric mean over the last steps."""
    pairs = zip(run["branch"], run["skip"], strict=True)
    logarithms = [math.log(max(branch, 1e-30) / max(skip, 1e-30)) for branch, skip in pairs]
    return [math.exp(value) for value in smooth(logarithms, WINDOW)]


def crossing(ratios: list[float]) -> int | None:
    """The first step from which on the ratio stays above 1; None where there is none, 1 where it never was below."""
    below = [step for step, value in enumerate(ratios, 1) if value <= 1]
    if not below:
        return 1
    return below[-1] + 1 if below[-1] < len(ratios) else None


def experiment(bench: Bench) -> Outcome:
    """Gradient norms through a residual block's branch and over its residual connection, in the first epoch."""
    runs = {name: [follow(bench, name, seed) for seed in bench.seeds] for name in INITS}
    ratios = {name: [ratio(run) for run in each] for name, each in runs.items()}
    steps = [crossing(each) for each in ratios["glorot"]]
    crossed = [step for step in steps if step is not None]
    first = min(WINDOW, bench.options.steps) - 1
    findings = {
        "steps": bench.options.steps,
        "seeds": len(steps),
        "seeds_that_cross": len(crossed),
        "crossing_step": spread(crossed) if crossed else None,
        **{
            f"ratio_{name}": {
                "start": spread([each[first] for each in ratios[name]]),
                "end": spread([each[-1] for each in ratios[name]]),
            }
            for name in INITS
        },
    }
    return Outcome({"runs": runs, "crossing_steps": steps}, findings)


def picture(series):
    """Left the two norms, right their ratio."""
    runs = series["runs"]
    figure, ((left, right),) = new_figure(1, 2)
    for key, colour, label in (
        ("skip", BLUE, "over the residual connection"),
        ("branch", RED, "through the branch"),
    ):
        draw(left, [run[key] for run in runs["glorot"]], colour, label, WINDOW)
    left.set_ylim(bottom=0)
    name_axes(left, "norm of the gradient (Glorot's weights)", "step of the first epoch", "")
    for name, each in runs.items():
        draw(right, [ratio(run) for run in each], COLOURS[name], f"weights: {name}")
    right.axhline(1, color="black", linewidth=0.6)
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    name_axes(right, "branch / residual connection", "step of the first epoch", "")
    name_bands(figure, len(runs["glorot"]))
    return figure


def run(arguments: list[str] | None = None) -> int:
    """From the command line."""
    return main(experiment, picture, len(INITS), SIZE, arguments, batch=4, steps=None, repeat=5)


if __name__ == "__main__":
    sys.exit(run())

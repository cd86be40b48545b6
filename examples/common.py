"""What the experiments share: arguments, images, the training loop, the picture's style, the JSON.

An experiment says what is compared and what to look at. Everything else is here, once, so that two curves differ in
what the experiment says and in nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.cli.arguments import at_least
from fusedres.cli.data import Images, batches, load_digits, load_folder
from fusedres.cli.env import versions
from fusedres.cli.errors import CommandError, require
from fusedres.cli.progress import Progress
from fusedres.cli.record import finite

# The tensors are small: a second thread mostly waits. Another number rounds sums differently, so it is not left open.
THREADS = 1
LARGEST_FOLDER = 10_000  # images; a larger folder is sampled, since all of them stay in memory
# Told apart in grey and by colour-blind readers (Okabe and Ito 2008).
BLUE, RED, GREEN = "#0072b2", "#d55e00", "#009e73"
ORANGE, PURPLE, GREY = "#e69f00", "#cc79a7", "#666666"


@dataclass
class Bench:
    """What an experiment is given: its options, its images, and `train`.

    `runs` trainings of `steps` steps are to come; the progress bar counts them together.
    """

    options: argparse.Namespace
    data: Images
    runs: int
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        if self.options.steps is None:
            self.options.steps = max(1, len(self.data.labels) // self.options.batch)
        self.progress = Progress(self.runs * self.options.steps)
        self._ticks = iter(self.progress)
        next(self._ticks)

    @property
    def seeds(self) -> range:
        """One for each repetition: `--seed` and those that follow it."""
        return range(self.options.seed, self.options.seed + self.options.repeat)

    def train(
        self,
        label: str,
        model: nn.Module,
        seed: int,
        optimizer: torch.optim.Optimizer,
        watch: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """The loss of each step; `watch` is called behind each backward pass, before the weights change."""
        model.train()
        losses = []
        # Dropout draws from it; what a model's construction has drawn does not matter.
        torch.manual_seed(seed)
        for images, labels in batches(self.data, self.options.batch, self.options.steps, seed):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            watch()
            optimizer.step()
            losses.append(loss.item())
            self.progress.tell(f"{label}, seed {seed}: loss {losses[-1]:.2f}")
            next(self._ticks, None)
        return losses


@dataclass(frozen=True)
class Outcome:
    """What an experiment gives back: curves by name, the numbers that its caption states, and the picture."""

    series: dict[str, Any]
    findings: dict[str, Any]
    figure: Any


Experiment = Callable[[Bench], Outcome]


def main(
    experiment: Experiment,
    runs: int,
    size: int,
    arguments: Sequence[str] | None = None,
    **defaults: Any,
) -> int:
    """Run an experiment from the command line: 0, or 2 and a line for what the user can put right.

    runs: trainings in one repetition. size: pixels a side. defaults: of batch, steps (None: one epoch) and repeat.
    """
    name = Path(sys.modules[experiment.__module__].__file__ or "").stem
    options = _parser(name, experiment.__doc__ or "", defaults).parse_args(arguments)
    torch.set_num_threads(THREADS)
    try:
        _run(name, experiment, runs * options.repeat, size, options)
    except CommandError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(name: str, description: str, defaults: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python examples/{name}.py",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data",
        default="digits",
        metavar="PATH",
        help="'digits', or a folder with one sub-folder of images for each class",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where PNG and JSON go"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="weights, held-out images, order, dropout"
    )
    number = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("--steps", **number, help="of each training; None: an epoch")
    parser.add_argument("--batch", **number, help="images a step")
    parser.add_argument("--repeat", **number, help="with so many seeds, the first being --seed")
    parser.set_defaults(**defaults)
    return parser


def _run(
    name: str, experiment: Experiment, runs: int, size: int, options: argparse.Namespace
) -> None:
    require("matplotlib", "demo", "the plot")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"--out {str(options.out)!r} cannot be a folder: {error.strerror}"
        ) from error
    data = load(options.data, size, options.seed)
    print(f"data     {data.description}, {size}x{size}", flush=True)
    start = time.perf_counter()
    outcome = experiment(Bench(options, data, runs))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    record = {
        "experiment": name,
        "settings": settings | {"size": size, "threads": THREADS},
        "data": data.description,
        "versions": versions(),
        "findings": outcome.findings,
        "series": outcome.series,
    }
    json_file, picture = (options.out / f"{name}.{suffix}" for suffix in ("json", "png"))
    json_file.write_text(_dump(finite(_rounded(record))) + "\n", encoding="utf-8")
    outcome.figure.savefig(picture, dpi=100)
    for key, value in outcome.findings.items():
        print(f"{key.replace('_', ' ')}: {_short(value)}")
    print(f"wrote {picture} and {json_file} in {time.perf_counter() - start:.0f} s")


# --- images ----------------------------------------------------------------------------------------------------------


def load(source: str, size: int, seed: int) -> Images:
    """The digits, or the images of a folder, at `size` x `size` pixels.

    Raises:
        CommandError: the folder is none, or is not laid out as one sub-folder a class.
    """
    if source == "digits":
        return load_digits(size, seed)
    return load_folder(source, size, seed, LARGEST_FOLDER)


# --- networks --------------------------------------------------------------------------------------------------------


def initialise(
    model: nn.Module, weight: Callable[[Tensor], Tensor] = nn.init.kaiming_normal_
) -> nn.Module:
    """Every convolution's weight drawn anew (by default He et al. 2015, arXiv:1502.01852), its bias zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


# --- curves ----------------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the `window - 1` before it (fewer at the start)."""
    return [statistics.fmean(values[max(0, k - window + 1) : k + 1]) for k in range(len(values))]


def last_loss(losses: Sequence[float], window: int = 10) -> float:
    """The mean over the last steps: a single batch's loss says little."""
    return statistics.fmean(losses[-window:])


def new_figure(rows: int, columns: int, **subplots: Any) -> tuple[Any, Any]:
    """A figure of so many plots, in one style."""
    # A Figure of its own: pyplot would choose a window system and keep global state.
    figure = require("matplotlib.figure", "demo", "the plot").Figure(
        figsize=(4.4 * columns, 3.3 * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    return figure, axes


def draw(
    axes: Any,
    runs: Sequence[Sequence[float]],
    colour: str,
    label: str,
    window: int = 1,
    **style: Any,
) -> None:
    """The median of several curves, smoothed over `window` steps, and the band from their lowest to their highest."""
    curves = [smooth(run, window) for run in runs]
    by_step = list(zip(*curves, strict=True))
    steps = range(1, len(by_step) + 1)
    if len(curves) > 1:
        low, high = map(min, by_step), map(max, by_step)
        axes.fill_between(steps, list(low), list(high), color=colour, alpha=0.18, linewidth=0)
    middle = [statistics.median(values) for values in by_step]
    axes.plot(steps, middle, color=colour, label=label, **{"linewidth": 1.6, **style})


def name_axes(axes: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    """Words around a plot."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    if legend:
        axes.legend(frameon=False, fontsize=8)


# --- the JSON --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """What a caption says of several seeds."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _dump(value: Any, indent: str = "") -> str:
    """As json.dumps, a curve on one line: a reader of the file looks for names, not for the hundredth loss."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {_dump(item, deeper)}" for key, item in value.items()]
        opening, closing = "{}"
    elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        items = [_dump(item, deeper) for item in value]
        opening, closing = "[]"
    else:
        return json.dumps(value)
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(items) + f"\n{indent}{closing}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)

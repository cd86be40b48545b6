"""What the examples share: arguments, images, models by name; of experiments the loop, the picture's style, the JSON.

An experiment says what is compared and what to look at. Everything else is here, once, so that two curves differ in
what the experiment says and in nothing else. A recipe is there to be copied: of it only the frame is here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pickle
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

import fusedres.models
from fusedres.cli.arguments import at_least
from fusedres.cli.data import Images, batches, load_digits, load_folder
from fusedres.cli.env import versions
from fusedres.cli.errors import CommandError, require
from fusedres.cli.models import build_model
from fusedres.cli.progress import Progress
from fusedres.cli.record import finite

# The tensors are small: a second thread mostly waits. Another number rounds sums differently, so it is not left open.
THREADS = 1
LARGEST_FOLDER = 10_000  # images; a larger folder is sampled, since all of them stay in memory
# What a band goes from and to; with three values quartiles would be guessed.
RANGE, QUARTILES = "from the lowest to the highest", "quartiles"


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
    """What an experiment gives back: curves by name, and the numbers that its caption states."""

    series: dict[str, Any]
    findings: dict[str, Any]


Experiment = Callable[[Bench], Outcome]
# From `Outcome.series`, as it comes back from the JSON.
Picture = Callable[[dict[str, Any]], Any]


def main(
    experiment: Experiment,
    picture: Picture,
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

    def work() -> None:
        if options.redraw is None:
            _run(name, experiment, picture, runs * options.repeat, size, options)
        else:
            _save_picture(picture, options.redraw)

    return in_a_line(name, work)


def _parser(name: str, description: str, defaults: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python examples/{name}.py",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where PNG and JSON go"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="weights, held-out images, order, dropout"
    )
    parser.add_argument(
        "--redraw", type=Path, metavar="JSON", help="train nothing; draw what an earlier run wrote"
    )
    number = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("--steps", **number, help="of each training; None: an epoch")
    parser.add_argument("--batch", **number, help="images a step")
    parser.add_argument("--repeat", **number, help="with so many seeds, the first being --seed")
    parser.set_defaults(**defaults)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option --data, as `load` takes it."""
    parser.add_argument(
        "--data",
        default="digits",
        metavar="PATH",
        help="'digits', or a folder with one sub-folder of images for each class",
    )


def _run(
    name: str,
    experiment: Experiment,
    picture: Picture,
    runs: int,
    size: int,
    options: argparse.Namespace,
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
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "redraw")}
    record = {
        "experiment": name,
        "settings": settings | {"size": size, "threads": THREADS},
        "data": data.description,
        "versions": versions(),
        "findings": outcome.findings,
        "series": outcome.series,
    }
    json_file = options.out / f"{name}.json"
    json_file.write_text(_dump(finite(_rounded(record))) + "\n", encoding="utf-8")
    drawn = _save_picture(picture, json_file)
    for key, value in outcome.findings.items():
        print(f"{key.replace('_', ' ')}: {_short(value)}")
    print(f"wrote {drawn} and {json_file} in {time.perf_counter() - start:.0f} s")


def _save_picture(picture: Picture, json_file: Path) -> Path:
    """Draw a run beside its JSON, from that alone; the file names the numbers in its metadata."""
    try:
        text = json_file.read_text(encoding="utf-8")
        series = json.loads(text)["series"]
    except OSError as error:
        raise CommandError(f"{str(json_file)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{str(json_file)!r} is not what an experiment has written") from error
    figure = picture(_as_numbers(series))
    path = json_file.with_suffix(".png")
    figure.savefig(path, dpi=100, metadata={"Source": hashlib.sha256(text.encode()).hexdigest()})
    return path


def _as_numbers(value: Any) -> Any:
    """What JSON has no number for is NaN again."""
    if isinstance(value, dict):
        return {key: _as_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_numbers(item) for item in value]
    return math.nan if value is None else value


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe(
    work: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    given: Sequence[str] | None,
) -> int:
    """Run a recipe from the command line: what `work` returns (None: 0), or 2 and a line as `main`."""
    options = parser.parse_args(given)
    return in_a_line(Path(parser.prog).stem, lambda: work(options))


def recipe_parser(name: str, description: str, model: str | None = None) -> argparse.ArgumentParser:
    """The options that recipes have in common; with a `model`, the default one, `--model` too."""
    parser = argparse.ArgumentParser(
        prog=f"python examples/{name}.py",
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if model is not None:
        parser.add_argument(
            "--model",
            default=model,
            metavar="NAME",
            help="of fusedres.models or torchvision, timm:NAME, FILE.py:CALLABLE",
        )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="weights, order, held-out images"
    )
    return parser


def in_a_line(name: str, work: Callable[[], int | None]) -> int:
    """What `work` returns (None: 0), or 2 and a line for what the user can put right."""
    try:
        return work() or 0
    except CommandError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def build(name: str, classes: int) -> nn.Module:
    """A classifier with fresh weights: of fusedres.models, or by a name that the command line takes.

    Raises:
        CommandError: there is none of this name.
    """
    if name in fusedres.models.list_models():
        return getattr(fusedres.models, name)(num_classes=classes)
    return build_model(name, classes)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file that `torch.save` wrote.

    Raises:
        CommandError: there is no such file, or it holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CommandError(f"{str(path)!r} is not a file that torch.save has written") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CommandError(f"{str(path)!r} holds no state_dict: save model.state_dict() alone")
    return state


def load_weights(model: nn.Module, path: Path, without: str = "") -> None:
    """Load a state_dict from a file, all of it but what belongs to the child `without`.

    Raises:
        CommandError: as `read_weights`; or it is another model's.
    """
    state = read_weights(path)
    if without:
        own = {k: v for k, v in model.state_dict().items() if k.startswith(f"{without}.")}
        state = {k: v for k, v in state.items() if k not in own} | own
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CommandError(
            f"{str(path)!r} is another model's: {str(error).splitlines()[1].strip()}"
        ) from error


def save_weights(model: nn.Module, path: Path) -> None:
    """The state_dict in a file, on the CPU: whoever loads it may have no GPU.

    Raises:
        CommandError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError of a folder
        raise CommandError(f"{str(path)!r} cannot be written") from error


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """The share of images that is named rightly, in eval mode; NaN where there are none."""
    model.eval()
    right = [model(part).argmax(1) for part in images.split(batch)]
    return (torch.cat(right) == labels).double().mean().item()


def largest_difference(values: Tensor, reference: Tensor) -> float:
    """The largest difference, over the largest value of the reference."""
    return ((values - reference).abs().max() / reference.abs().max()).item()


# --- images ----------------------------------------------------------------------------------------------------------


def load(source: str, size: int, seed: int, most: int = LARGEST_FOLDER) -> Images:
    """The digits, or the images of a folder (at most so many), at `size` x `size` pixels.

    Raises:
        CommandError: the folder is none, or is not laid out as one sub-folder a class.
    """
    if source == "digits":
        return load_digits(size, seed)
    return load_folder(source, size, seed, most)


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
    """The median of several curves, smoothed over `window` steps, and a band as `name_bands` says."""
    curves = [smooth(run, window) for run in runs]
    by_step = list(zip(*curves, strict=True))
    steps = range(1, len(by_step) + 1)
    if len(curves) > 1:
        low, high = zip(*map(band, by_step), strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    middle = [statistics.median(values) for values in by_step]
    axes.plot(steps, middle, color=colour, label=label, **{"linewidth": 1.6, **style})


def band(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles, or of fewer than five values the lowest and the highest."""
    if len(values) < 5:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, method="inclusive")
    return low, high


def name_bands(figure: Any, seeds: int) -> None:
    """What lines and bands are, below the plots."""
    kind = RANGE if seeds < 5 else QUARTILES
    words = f"lines: medians of {seeds} seeds; bands: {kind}" if seeds > 1 else "one seed"
    figure.supxlabel(words, fontsize=8)


def plain_numbers(axis: Any, ticks: Sequence[float]) -> None:
    """A logarithmic axis that says 100 and 0.1, not powers of ten."""
    axis.set_major_locator(require("matplotlib.ticker", "demo", "the plot").FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


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

"""What `compare` has found: the two tables that it prints, and the JSON that keeps everything."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..tables import table
from .differences import largest
from .env import versions
from .experiment import Outcome
from .summary import compare_seconds, milliseconds
from .training import Trainee

Accuracies = tuple[float, float] | None


def speed_table(outcome: Outcome, batch: int, accuracies: Accuracies) -> str:
    """Step time, images per second, peak memory, accuracy; and a line that says what to make of the time."""
    trainees = (outcome.original, outcome.fused)
    spreads = [outcome.seconds(trainee) for trainee in trainees]
    peaks = [_peak(trainee) for trainee in trainees]
    low, middle, high = (
        [milliseconds(getattr(spread, name)) for spread in spreads]
        for name in ("low", "median", "high")
    )
    rows = [
        ["", "original", "fused"],
        ["time of a step, median", *middle],
        ["  lower quartile", *low],
        ["  upper quartile", *high],
        ["images per second", *(f"{batch / spread.median:.4g}" for spread in spreads)],
    ]
    if None not in peaks:
        sizes = (f"{peak / 2**20:.4g} MiB" for peak in peaks if peak is not None)
        rows.append(["peak memory beyond weights, data", *sizes])
    if accuracies is not None:
        rows.append(["accuracy, held out", *(f"{share:.1%}" for share in accuracies)])
    return f"{table(rows)}\ntime: {compare_seconds(*spreads)}"


def difference_table(outcome: Outcome) -> str:
    """How far the fused model went from the original, beside how far the original is from itself."""
    columns = (outcome.differences[0], largest(outcome.differences), outcome.itself)
    rows = [["largest relative difference", "first step", "all steps", "original, run twice"]]
    for name in ("loss", "gradients", "running_statistics"):
        values = (f"{getattr(column, name):.1e}" for column in columns)
        rows.append([name.replace("_", " "), *values])
    return table(rows)


def record(options: argparse.Namespace, outcome: Outcome, accuracies: Accuracies) -> dict[str, Any]:
    """Everything, ready for JSON."""
    settings = {name: value for name, value in vars(options).items() if name != "command"}
    both: dict[str, Any] = {
        "settings": settings | {"out": str(options.out)},
        "versions": versions(),
        "interrupted": outcome.interrupted,
        "warm_up_steps": outcome.warm_up,
        "differences": [step.to_dict() for step in outcome.differences],
        "largest_difference": largest(outcome.differences).to_dict(),
        "original_against_itself": outcome.itself.to_dict(),
        "verdict": compare_seconds(*map(outcome.seconds, (outcome.original, outcome.fused))),
    }
    shares = accuracies or (None, None)
    for trainee, accuracy in zip((outcome.original, outcome.fused), shares, strict=True):
        seconds = outcome.seconds(trainee)
        both[trainee.name] = {
            "losses": trainee.losses,
            "step_seconds": trainee.seconds,
            "timed": seconds.to_dict(),
            "images_per_second": options.batch / seconds.median,
            "peak_bytes": _peak(trainee),
            "accuracy": accuracy,
        }
    return both


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _peak(trainee: Trainee) -> int | None:
    return max(trainee.peak_bytes, default=None)

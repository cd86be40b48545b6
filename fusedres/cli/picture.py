"""The picture of a comparison: both loss curves over each other, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import require


def save_losses(path: Path, title: str, original: Sequence[float], fused: Sequence[float]) -> None:
    """Write a PNG: the two losses above, their relative difference below on a logarithmic axis."""
    # A Figure of its own: pyplot would choose a window system and keep global state.
    figure = require("matplotlib.figure", "demo", "the plot").Figure(
        figsize=(7.2, 5.4), layout="constrained"
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = range(1, len(original) + 1)
    above.plot(steps, original, color="#9ab8d8", linewidth=5, label="original")
    above.plot(steps, fused, color="#b3361e", linewidth=1.4, label="fused")
    above.set_ylabel("training loss")
    above.set_title(title, fontsize=10)
    above.legend(frameon=False)
    apart = [abs(b - a) / abs(a) if a != b else 0.0 for a, b in zip(original, fused, strict=True)]
    below.plot(steps, apart, color="#444444", linewidth=1.2, marker=".", markersize=3)
    below.set_yscale("symlog", linthresh=1e-9)
    below.set_ylim(bottom=0.0)
    below.set_ylabel("relative\ndifference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)

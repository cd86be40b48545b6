"""Colours of pictures, one for each thing in all of them; and the picture of a comparison."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from ..words import printable
from .errors import require

# Told apart by colour-blind readers (Okabe and Ito 2008); two greys, of which only lightness tells them apart.
BLUE, RED, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
PURPLE, SKY, YELLOW, BLACK = "#cc79a7", "#56b4e9", "#f0e442", "#000000"
GREY, PALE = "#666666", "#aaaaaa"
# Who computes something has the same colour and marker in every picture; grey is PyTorch as it comes.
COLOURS = {
    "eager": GREY,
    "eager, in place": PALE,
    "compile": BLUE,
    "compile, max-autotune": SKY,
    "fusedres": RED,
    "fusedres + compile": ORANGE,
    "attorch": GREEN,
    "apex groupbn": PURPLE,
    "inplace_abn": YELLOW,
    "copy": BLACK,
}
MARKERS = dict(zip(COLOURS, "sDo^vP<>Xx", strict=True))


def save_losses(path: Path, title: str, original: Sequence[float], fused: Sequence[float]) -> None:
    """Write a PNG: both losses over each other and, where they are not equal to the bit, how far they are apart."""
    differ = {
        step: abs(b - a) / max(abs(a), 1e-30)
        for step, (a, b) in enumerate(zip(original, fused, strict=True), 1)
        if a != b
    }
    # A Figure of its own: pyplot would choose a window system and keep global state.
    figure = require("matplotlib.figure", "demo", "the plot").Figure(
        figsize=(7.2, 5.4 if differ else 4.0), layout="constrained"
    )
    panels = figure.subplots(
        2 if differ else 1, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + bool(differ)]
    )[:, 0]
    steps = range(1, len(original) + 1)
    panels[0].plot(steps, original, color=PALE, linewidth=6, label="original")
    panels[0].plot(steps, fused, color=COLOURS["fusedres"], linewidth=1.4, label="fused")
    panels[0].set_ylabel("training loss")
    equal = len(original) - len(differ)
    said = f"equal to the bit at {equal} of {len(original)} steps"
    # In names of models and folders a dollar is no formula.
    panels[0].set_title(f"{printable(title)}\n{said}", fontsize=10, parse_math=False)
    panels[0].legend(frameon=False)
    if differ:
        panels[1].plot(differ.keys(), differ.values(), ".", color=COLOURS["fusedres"], markersize=5)
        panels[1].set_xlim(panels[0].get_xlim())
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_formatter("{x:.0e}")
        panels[1].yaxis.set_minor_formatter("")
        panels[1].set_ylabel("relative difference,\nwhere there is one", fontsize=8)
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with warnings.catch_warnings():  # of letters that the font lacks, in a user's names
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(path, dpi=150)

"""Pictures of the rows: bytes of a network, the roofline of the operators, the step of each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import COPY
from .record import Row

COLOURS = {"eager": "#9ab8d8", "compile": "#4a6fa5", "fusedres": "#b3361e", COPY: "#444444"}
OTHERS = ("#7a9e7e", "#c9a227", "#8d6a9f", "#5f6b6d", "#d98c5f", "#a3a3a3")


def save_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One PNG for each kind of row that is there; none where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for name, draw in (("network", _network), ("operator", _roofline), ("model", _steps)):
        # A Figure of its own: pyplot would choose a window system and keep global state.
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        if draw(axes, rows):
            axes.spines[["top", "right"]].set_visible(False)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def _network(axes: Any, rows: Sequence[Row]) -> bool:
    """Stacked bars: GB of a training step, forward below backward."""
    found = [row for row in rows if row.level == "network" and row.metric == "bytes" and row.median]
    names = list(dict.fromkeys((row.kernel, row.shape, row.provider) for row in found))
    for i, name in enumerate(names):
        by = {row.mode: row.median / 1e9 for row in found if (row.kernel, row.shape, row.provider) == name}  # type: ignore[operator] # fmt: skip
        colour = COLOURS.get(name[2], OTHERS[0])
        forward, backward = by.get("forward", 0.0), by.get("backward", 0.0)
        axes.bar(i, forward, color=colour, alpha=0.6)
        axes.bar(i, backward, bottom=forward, color=colour)
        axes.text(i, forward + backward, f"{forward + backward:.1f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), [f"{kernel}\n{provider}" for kernel, _, provider in names])
    axes.set_ylabel("GB a training step")
    axes.set_title("BatchNorm, ReLU and residual add (pale: forward)", fontsize=10)
    return bool(names)


def _roofline(axes: Any, rows: Sequence[Row]) -> bool:
    """Bytes against time; the copies of as many bytes are the ceiling."""
    found = [
        row
        for row in rows
        if row.level == "operator" and row.median and row.bytes and row.mode != "step"
        and row.cache == "cold" and not row.graph
    ]  # fmt: skip
    for provider, colour in _coloured(row.provider for row in found):
        points = sorted((row.bytes / 1e6, row.median) for row in found if row.provider == provider)  # type: ignore[operator] # fmt: skip
        is_copy = provider == COPY
        axes.plot(
            *zip(*points, strict=True), linestyle="-" if is_copy else "", marker="" if is_copy else "o",
            markersize=3.5, color=colour, label=provider, alpha=0.8,
        )  # fmt: skip
    if not found:
        return False
    axes.set(xscale="log", yscale="log", xlabel="MB that a fused operator must move", ylabel="us")
    axes.set_title("operators, forward and backward, cold cache; line: a plain copy", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return True


def _steps(axes: Any, rows: Sequence[Row]) -> bool:
    """Groups of bars: the training step of each model, relative to eager."""
    found = [row for row in rows if row.level == "model" and row.mode == "step" and row.median]
    models = list(dict.fromkeys((r.kernel, r.shape, r.dtype, r.layout) for r in found))
    providers = list(_coloured(row.who for row in found))
    width = 0.8 / max(len(providers), 1)
    for k, (provider, colour) in enumerate(providers):
        by = {(r.kernel, r.shape, r.dtype, r.layout): r for r in found if r.who == provider}
        places = [i for i, name in enumerate(models) if name in by]
        heights = [by[models[i]].median / 1e3 for i in places]  # type: ignore[operator]
        bars = axes.bar(
            [i + k * width for i in places], heights, width, color=colour, label=provider
        )
        axes.bar_label(bars, fmt="%.3g", fontsize=6)
    middle = width * (len(providers) - 1) / 2
    axes.set_xticks(
        [i + middle for i in range(len(models))], ["\n".join(name) for name in models], fontsize=6
    )
    axes.set_ylabel("ms a training step")
    if not found:
        return False
    axes.legend(frameon=False, fontsize=7)
    return True


def _coloured(providers) -> list[tuple[str, str]]:
    """Each provider once, with its colour."""
    spare = iter(OTHERS * 4)
    return [(p, COLOURS[p] if p in COLOURS else next(spare)) for p in dict.fromkeys(providers)]

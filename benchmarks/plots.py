"""Pictures of the rows: bytes of a network, the speed of the operators, the step of each model.

    python -m fusedres.benchmarks.plots FOLDER      # draws those of a folder's results.json anew

Each file names, in its metadata, the rows that it was drawn from. Times of a CPU are not drawn: there fusedres is
PyTorch's own passes, and bars of one height say nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..cli.picture import COLOURS, MARKERS
from .measure import COPY
from .record import JSON_FILE, Row, latest, read

NAMES = {
    "bn_relu": "BN + ReLU",
    "bn_add_relu": "BN + add + ReLU",
    "bn_bn_add_relu": "BN + BN + add + ReLU",
    "bn": "BN",
    "bn_add": "BN + add",
}
# Where the rows stand in a picture's metadata.
DRAWN_FROM = "Source"


def save_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One PNG for each kind of row that is there; none where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for name, choose, draw in (
        ("network", _of_networks, _network),
        ("operator", _of_operators, _speed),
        ("model", _of_models, _steps),
    ):
        if found := choose(rows):
            # A Figure of its own: pyplot would choose a window system and keep global state.
            figure = Figure(layout="constrained")
            draw(figure, found)
            for axes in figure.axes:
                axes.spines[["top", "right"]].set_visible(False)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120, metadata={DRAWN_FROM: digest(found)})
            written.append(path)
    return written


def digest(rows: Iterable[Row]) -> str:
    """What changes when a number does."""
    text = "\n".join(f"{row.key} {row.median} {row.bytes}" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def sources(rows: Sequence[Row]) -> dict[str, str]:
    """The digest of each picture that these rows give."""
    chosen = {
        "network": _of_networks(rows), "operator": _of_operators(rows), "model": _of_models(rows)
    }  # fmt: skip
    return {name: digest(found) for name, found in chosen.items() if found}


def _of_networks(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.level == "network" and row.metric == "bytes" and row.median]


def _of_operators(rows: Sequence[Row]) -> list[Row]:
    return [
        row
        for row in rows
        if row.level == "operator" and row.median and row.bytes and row.mode != "step"
        and row.cache == "cold" and not _on_cpu(row)
    ]  # fmt: skip


def _of_models(rows: Sequence[Row]) -> list[Row]:
    return [
        row
        for row in rows
        if row.level == "model" and row.mode == "step" and row.median and not _on_cpu(row)
    ]


def _on_cpu(row: Row) -> bool:
    return row.device.endswith(("thread", "threads"))


def _network(figure: Any, rows: Sequence[Row]) -> None:
    """Stacked bars: GB of a training step, forward below backward."""
    names = list(dict.fromkeys((row.kernel, row.shape, row.provider) for row in rows))
    figure.set_size_inches(max(5.0, 2.0 * len(names)), 4.2)
    axes = figure.subplots()
    for i, name in enumerate(names):
        by = {row.mode: row.median / 1e9 for row in rows if (row.kernel, row.shape, row.provider) == name}  # type: ignore[operator] # fmt: skip
        colour, below = COLOURS[name[2]], 0.0
        for mode, pale in (("forward", 0.55), ("backward", 1.0)):
            height = by.get(mode, 0.0)
            axes.bar(i, height, bottom=below, color=colour, alpha=pale, width=0.7)
            axes.text(
                i, below + height / 2, f"{mode}\n{height:.1f}", ha="center", va="center",
                color="white" if pale == 1.0 else "black", fontsize=9,
            )  # fmt: skip
            below += height
        axes.text(i, below, f"{below:.1f} GB", ha="center", va="bottom", fontweight="bold")
    kernel, shape = names[0][:2]
    one = len({name[:2] for name in names}) == 1
    axes.set_xticks(
        range(len(names)), [who if one else f"{k}\n{who}" for k, _, who in names], fontsize=10
    )
    axes.set_ylabel("GB a training step")
    where = f"\n{kernel}, {_words(shape)}, {rows[0].dtype}" if one else ""
    axes.set_title(f"bytes that BatchNorm, ReLU and residual add move{where}", fontsize=10)


def _speed(figure: Any, rows: Sequence[Row]) -> None:
    """A line a case, a column a direction: the time of a copy of as many bytes over the time that each takes.

    Hollow: launched one by one, where the host may be what is waited for. Full: as a CUDA graph.
    """
    cases = list(dict.fromkeys(_case(row) for row in rows))
    modes = [mode for mode in ("forward", "backward") if any(row.mode == mode for row in rows)]
    providers = [p for p in _providers(row.provider for row in rows) if p != COPY]
    figure.set_size_inches(9.0, 1.5 + 0.5 * len(cases))
    time = {(_case(row), row.mode, row.provider, row.graph): row.median for row in rows}
    columns = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(columns, modes, strict=True):
        for k, provider in enumerate(providers):
            # Below each other: of equal ones both are seen.
            offset = 0.62 * ((k + 0.5) / len(providers) - 0.5)
            for graph in (False, True):
                points = [
                    (100 * copy / taken, i + offset)
                    for i, case in enumerate(cases)
                    if (taken := time.get((case, mode, provider, graph)))
                    and (copy := time.get((case, mode, COPY, False)))
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), MARKERS[provider], color=COLOURS[provider],
                        markersize=4 if graph else 8,  # a graph's is seen inside of the other
                        markerfacecolor=None if graph else "none",
                        label=f"{provider}, as a CUDA graph" if graph else provider,
                    )  # fmt: skip
        for i in range(1, len(cases)):
            axes.axhline(i - 0.5, color="#dddddd", linewidth=0.6)
        axes.axvline(100, color=COLOURS[COPY], linewidth=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("percent of a plain copy's speed", fontsize=9)
        axes.set_title(mode, fontsize=10)
    columns[0].set_yticks(range(len(cases)), [_label(case) for case in cases], fontsize=8)
    columns[0].set_ylim(len(cases) - 0.5, -0.5)
    handles, labels = columns[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8,
        title=f"operators, cold cache, {rows[0].device}", title_fontsize=10,
    )  # fmt: skip


def _steps(figure: Any, rows: Sequence[Row]) -> None:
    """A group of bars for each model: its training step, plain and, hatched, as a CUDA graph."""
    models = list(dict.fromkeys(_case(row) for row in rows))
    providers = _providers(row.provider for row in rows)
    figure.set_size_inches(max(7.2, 0.5 * len(rows)), 4.6)
    axes = figure.subplots()
    place, middles = 0.0, []
    for model in models:
        of = {(row.provider, row.graph): row.median for row in rows if _case(row) == model}
        there = [(p, graph) for p in providers for graph in (False, True) if (p, graph) in of]
        for k, (provider, graph) in enumerate(there):
            bar = axes.bar(
                place + k, of[provider, graph] / 1e3, 0.9, color=COLOURS[provider],  # type: ignore[operator]
                hatch="///" if graph else None, edgecolor="white", linewidth=0,
            )  # fmt: skip
            axes.bar_label(bar, fmt="%.1f", fontsize=7)
        middles.append(place + (len(there) - 1) / 2)
        place += len(there) + 1.2
    axes.set_xticks(middles, [_label(model).replace(", ", "\n", 1) for model in models], fontsize=8)
    axes.set_ylabel("ms a training step")
    axes.set_title(rows[0].device, fontsize=10)
    axes.set_ylim(top=1.05 * axes.get_ylim()[1])
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[provider], label=provider) for provider in providers]
    if any(row.graph for row in rows):
        handles.append(Patch(facecolor="#888888", edgecolor="white", hatch="///", label="as a CUDA graph"))  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=8)


def _case(row: Row) -> tuple[str, str, str, str]:
    return row.kernel, row.shape, row.dtype, row.layout


def _label(case: tuple[str, str, str, str]) -> str:
    kernel, shape, dtype, layout = case
    return f"{NAMES.get(kernel, kernel)}, {_words(shape)}\n{dtype}, {layout}"


def _words(shape: str) -> str:
    """N256-C64-H56-W56 as 256 x 64 x 56 x 56."""
    return " x ".join(part.lstrip("NCDHW") for part in shape.split("-"))


def _providers(names: Iterable[str]) -> list[str]:
    """Each once, in the order of the table of colours."""
    found = set(names)
    return [name for name in COLOURS if name in found]


def main(folders: Sequence[str]) -> Iterator[Path]:
    """Draw the pictures of each folder anew."""
    for folder in map(Path, folders):
        yield from save_plots(latest(read(folder / JSON_FILE)), folder)


if __name__ == "__main__":
    for path in main(sys.argv[1:]):
        print(f"wrote {path}")

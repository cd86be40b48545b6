"""Pictures: a colour for each thing, no hidden series, plain numbers; the committed ones show the committed rows."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fusedres.benchmarks import plots
from fusedres.benchmarks.measure import COPY
from fusedres.benchmarks.providers import PROVIDERS
from fusedres.benchmarks.record import Row, latest, read
from fusedres.cli import picture

pytestmark = pytest.mark.once
figures = pytest.importorskip("matplotlib.figure")
images = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ("gradient_norms", "depth", "learnable_scale", "preactivation")
MEASURED = sorted((ROOT / "benchmarks" / "results").iterdir())
GPU, CPU = "cuda (NVIDIA H200)", "AMD EPYC, 1 thread"
ROW = Row(
    "operator", "bn_relu", "eager", "time_us", "forward", "N2-C4-H5-W5", "bfloat16", "channels_last", "cold",
    median=100.0, bytes=3000, device=GPU,
)  # fmt: skip
MODEL = replace(ROW, level="model", kernel="resnet50", mode="step", bytes=None)
NETWORK = replace(ROW, level="network", metric="bytes", bytes=None, device=CPU)


@pytest.fixture
def figure_of(monkeypatch):
    """The figure of an experiment's committed run."""
    monkeypatch.syspath_prepend(ROOT / "examples")

    def drawn(name: str):
        file = ROOT / "examples" / "results" / f"{name}.json"
        series = json.loads(file.read_text(encoding="utf-8"))["series"]
        return importlib.import_module(name).picture(series)

    return drawn


def drawn_from(path: Path) -> str:
    with images.open(path) as png:
        return png.text["Source"]


def numbers(figure) -> list[str]:
    """What its axes say."""
    figure.canvas.draw()
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    return [label.get_text() for axis in axes for label in axis.get_ticklabels(which="both")]


# --- colours ---------------------------------------------------------------------------------------------------------


def test_each_provider_has_a_colour_and_a_marker_of_its_own():
    assert {*(provider.name for provider in PROVIDERS), COPY} == set(picture.COLOURS)
    assert len(set(picture.COLOURS.values())) == len(set(picture.MARKERS.values())) == len(PROVIDERS) + 1  # fmt: skip


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "fusedres/cli"])
def test_colours_stand_in_one_table(folder):
    files = (path for path in (ROOT / folder).glob("*.py") if path.name != "picture.py")
    used = {hit for path in files for hit in re.findall(r"\"#[0-9a-f]{6}\"", path.read_text())}
    assert used <= {'"#888888"', '"#dddddd"'}  # a legend's hatched square, and rules


# --- the committed ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", MEASURED, ids=lambda path: path.name)
def test_a_committed_plot_shows_the_committed_rows(folder):
    rows = latest(read(folder / "results.json"))
    assert {path.stem: drawn_from(path) for path in folder.glob("*.png")} == plots.sources(rows)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_committed_picture_shows_the_committed_run(name):
    results = ROOT / "examples" / "results"
    numbers = hashlib.sha256((results / f"{name}.json").read_bytes()).hexdigest()
    assert drawn_from(results / f"{name}.png") == numbers


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_axes_have_plain_numbers_and_bands_a_name(name, figure_of):
    figure = figure_of(name)
    assert [text for text in numbers(figure) if "^" in text or "times" in text] == []
    bands = "(3 seeds; bands: from the lowest to the highest|5 seeds; bands: quartiles)"
    assert re.fullmatch(f"lines: medians of {bands}", figure.get_supxlabel())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_curve_is_within_its_axes_at_the_end(name, figure_of):
    outside = [
        line.get_label()
        for axes in figure_of(name).axes
        for line in axes.get_lines()
        if not min(axes.get_ylim()) <= line.get_ydata()[-1] <= max(axes.get_ylim())
    ]
    assert outside == []


def test_an_experiment_that_is_not_one_is_not_redrawn(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    (tmp_path / "a.json").write_text("[]")
    assert importlib.import_module("depth").run(["--redraw", str(tmp_path / "a.json")]) == 2
    assert "a.json' is not what an experiment has written\n" in capsys.readouterr().err


# --- plots of rows ---------------------------------------------------------------------------------------------------


def test_equal_operators_are_both_seen():
    rows = [ROW, replace(ROW, provider="fusedres"), replace(ROW, provider=COPY, median=50.0)]
    figure = figures.Figure()
    plots._speed(figure, rows)
    by = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    ((eager, above),), ((ours, below),) = by["eager"], by["fusedres"]
    assert eager == ours == 50.0
    assert below - above > 0.2


def test_a_cuda_graph_has_the_colour_of_its_provider():
    rows = [MODEL, replace(MODEL, graph=True), replace(MODEL, provider="fusedres", graph=True)]
    figure = figures.Figure()
    plots._steps(figure, rows)
    eager, graph, ours = figure.axes[0].patches
    assert eager.get_facecolor() == graph.get_facecolor() != ours.get_facecolor()
    assert (eager.get_hatch(), graph.get_hatch()) == (None, "///")


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        ([ROW, replace(ROW, provider=COPY), MODEL], ["operator.png", "model.png"]),
        ([replace(ROW, device=CPU), replace(MODEL, device=CPU)], []),
        ([NETWORK], ["network.png"]),
        ([replace(NETWORK, median=None)], []),
    ],
    ids=["times on a GPU", "times on a CPU", "bytes", "nothing"],
)
def test_what_says_something_is_drawn(rows, drawn, tmp_path):
    assert [path.name for path in plots.save_plots(rows, tmp_path)] == drawn


# --- a comparison ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fused", "panels"), [([2.0, 1.0], 1), ([2.0, 1.0001], 2)], ids=["equal", "apart"]
)
def test_no_panel_of_a_comparison_is_empty(fused, panels, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: kept.append(self))
    picture.save_losses(tmp_path / "a.png", "resnet18", [2.0, 1.0], fused)
    (figure,) = kept
    assert len(figure.axes) == panels
    assert [t for t in numbers(figure) if "^" in t] == []
    assert f"equal to the bit at {3 - panels} of 2 steps" in figure.axes[0].get_title()
    assert all(axes.get_lines()[0].get_xydata().size for axes in figure.axes)

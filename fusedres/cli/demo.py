"""`fusedres demo`: what fusedres does, shown on the machine that there is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import fusedres

from ..tables import paragraph, table
from . import arguments, bench, beside, compare
from .device import choose_device
from .experiment import Outcome
from .models import build_model
from .summary import milliseconds

if TYPE_CHECKING:
    from ..benchmarks.record import Row

# Three epochs of the digits in a minute on two cores: enough for held-out accuracy to mean something.
ON_A_CPU = ("--image-size", "32", "--steps", "135")
# A workload at which a GPU works, with as many images as its memory takes of two models in training.
ON_A_GPU = (
    "--data", "synthetic", "--image-size", "224", "--channels-last", "--dtype", "bf16", "--steps", "32",
)  # fmt: skip
# What one would run instead; others take minutes to compile.
MEASURED = (
    "bench", "--level", "model", "--quick", "--budget", "120", "--provider", "fusedres", "--provider", "compile",
)  # fmt: skip
BYTES_AN_IMAGE = 150e6
LARGEST_BATCH = 256
USUAL = (256, 3, 224, 224)  # the step that bytes are counted of


def run(options: argparse.Namespace) -> None:
    """Each part prints a heading, what it found, and nothing that was not."""
    device = choose_device("auto")
    name, how = ("resnet18", ON_A_CPU) if device.type == "cpu" else ("resnet50", _on(device))
    words = ["compare", name, *how, "--out", str(options.out)]
    if options.steps is not None:
        words += ["--steps", str(options.steps)]
    heading = _heading(f"1. A {name} and its fused form, trained side by side")
    report, outcome = compare.run(arguments.parse(words), f"{heading}\n")
    if device.type == "cpu":
        print(
            _heading("2. The Triton kernels beside PyTorch, in Triton's interpreter on this CPU"),
            flush=True,
        )
        print(beside.run())
    else:
        print(_heading("2. The same as CUDA graphs, beside torch.compile"), flush=True)
        words = [
            *MEASURED,
            "--model",
            name,
            "--batch",
            how[-1],
            "--out",
            str(options.out / "bench"),
        ]
        print(f"\n{_times(bench.run(arguments.parse(words)))}")
    print(_heading("3. Bytes that BatchNorm, ReLU and the sums move in a training step, counted"))
    counted, saved = _bytes(name)
    print(counted)
    print(f"\n{paragraph(_sum(report, outcome, saved))}")


def _on(device: torch.device) -> tuple[str, ...]:
    total = torch.get_device_module(device).get_device_properties(device).total_memory
    batch = LARGEST_BATCH
    while batch > 8 and 2 * batch * BYTES_AN_IMAGE > total:
        batch //= 2
    return (*ON_A_GPU, "--batch", str(batch))


def _heading(text: str) -> str:
    return f"\n{text}\n{'=' * len(text)}\n"


def _times(rows: Sequence[Row]) -> str:
    """A step of each that was measured, with its spread; under it, why another was not."""
    found = [["a training step", "median", "spread"]]
    found += [
        [row.who, milliseconds(1e-6 * row.median), milliseconds(1e-6 * (row.spread or 0.0))]
        for row in rows
        if row.metric == "time_us" and row.median is not None
    ]
    missing = [
        paragraph(f"{row.who or row.kernel}: {row.note}")
        for row in rows
        if row.level == "model" and row.median is None
    ]
    return "\n".join([table(found), *missing] if len(found) > 1 else missing)


def _bytes(name: str) -> tuple[str, int]:
    """The table, and the bytes that the usual step saves."""
    report = fusedres.explain(build_model(name), input_shape=USUAL)
    moved, saved = report.bytes_moved or 0, report.bytes_saved or 0
    rows = [
        [f"{name}, {USUAL[0]} images of {USUAL[2]}x{USUAL[3]}, float32", "bytes a step"],
        ["PyTorch eager", f"{moved / 1e9:.1f} GB"],
        ["fused, on a GPU", f"{(moved - saved) / 1e9:.1f} GB"],
    ]
    return table(rows), saved


def _sum(report: fusedres.FuseReport, outcome: Outcome, saved: int) -> str:
    """What it comes to, in a line."""
    difference = max(each.loss for each in outcome.differences)
    losses = "equal to the bit" if difference == 0 else f"equal to {difference:.0e}"
    return (
        f"{report.n_fused} of {len(report.rows)} BatchNorms fused, losses {losses}, "
        f"{saved / 1e9:.1f} GB less a step of {USUAL[0]} images on a GPU."
    )

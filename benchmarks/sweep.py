"""How much of the networks that people use is fused: every architecture with a BatchNorm of the installed packages.

    python -m fusedres.benchmarks.sweep                      # all of them, some minutes; no GPU, no weights
    python -m fusedres.benchmarks.sweep 'resnet*' 'timm:*d'  # those that match a pattern
    python -m fusedres.benchmarks.sweep --parity 'resnet*'   # and whether they compute the same; slow

The packages are torchvision, timm, transformers, segmentation_models_pytorch and MONAI (`packages.py`).

Each is built without memory (on the meta device), run once at its own image size to learn how large each BatchNorm's
output is, and fused. The share is of elements: what a BatchNorm of a large map costs, it counts.

Parity: three training steps and one in eval mode on small images in float64, of the model and of its fused copy, and
how far outputs, gradients, parameters and buffers come apart; the unit is what one ulp in the image makes of the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedres

from ..nn.norms import is_batch_norm
from ..swap.estimate import norm_outputs
from .packages import Architecture, architectures
from .record import first_line
from .steps import ALLOWED, excess

LARGEST = 30_000_000  # parameters of a model that is trained here
_COLUMNS = (
    "architecture",
    "BatchNorms",
    "fused",
    "elements fused",
    "tails",
    "parity",
    "left alone, most of them since",
)


@dataclass(frozen=True)
class Swept:
    """One architecture.

    Args:
        norms, fused: how many BatchNorms there are, and how many are fused.
        share: of the elements that BatchNorms put out in one forward; None where that could not be run.
        tails: how many of the fused ones end a residual block.
        parity: how far training comes apart, at most `steps.ALLOWED`; None where it was not looked at.
        reason: why most of the others are left alone; or what went wrong.
    """

    name: str
    norms: int = 0
    fused: int = 0
    share: float | None = None
    tails: int = 0
    parity: float | None = None
    reason: str = ""


def sweep(name: str, architecture: Architecture, parity: bool = False) -> Swept | None:
    """What `fuse_` makes of one architecture; None where it holds no BatchNorm."""
    try:
        model = _built(architecture.build)
    except Exception as error:  # foreign code: what it raises is the finding
        return Swept(name, reason=f"not built: {first_line(error)}")
    if not any(is_batch_norm(module) for module in model.modules()):
        return None
    sizes, obstacle = _sizes(model.eval(), architecture)
    report = fusedres.fuse_(model.train())
    rows = report.rows
    fused = [row for row in rows if row.status == "fused"]
    reasons = Counter(_in_general(row.reason) for row in rows if row.status != "fused")
    total = sum(sizes.values())
    apart = None
    if parity:
        apart, not_run = compare(architecture, model)
        obstacle = obstacle or not_run
    obstacle = _unprinted(report) or obstacle
    return Swept(
        name,
        len(rows),
        len(fused),
        sum(sizes.get(row.where, 0) for row in fused) / total if total else None,
        sum("add" in row.pattern for row in fused),
        apart,
        obstacle or (reasons.most_common(1)[0][0] if reasons else ""),
    )


def compare(architecture: Architecture, like: nn.Module) -> tuple[float | None, str]:
    """How far a model and its fused copy come apart; or why that was not looked at."""
    if sum(p.numel() for p in like.parameters()) > LARGEST:
        return None, "parity not looked at: too large"
    torch.manual_seed(0)
    model = architecture.build().double()
    module: Any
    for module in model.modules():
        # A scale of zero, with which many a residual branch begins, would hide what the branch computes.
        if is_batch_norm(module) and isinstance(module.weight, nn.Parameter):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    channels, *spatial = architecture.input_shape(model)
    fused = copy.deepcopy(model)
    fusedres.fuse_(fused)
    text = ""
    for side in sorted({min(64, spatial[-1]), min(128, spatial[-1]), spatial[-1]}):
        x = torch.randn(
            4, channels, *spatial[:-2], *(side,) * len(spatial[-2:]), dtype=torch.float64
        )
        try:
            found = [
                excess(model.train(), fused.train(), x, 3),
                excess(model.eval(), fused.eval(), x),
            ]
        except Exception as error:  # foreign code: an image that is too small for it
            text = f"parity not looked at: {first_line(error)}"
            continue
        return max(found), ""
    return None, text


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # a constructor that computes with tensors
        return build().to("meta")


def _sizes(model: nn.Module, architecture: Architecture) -> tuple[dict[str, int], str]:
    """How many elements each BatchNorm puts out for one image, by name; or why the model does not run."""
    try:
        outputs = norm_outputs(model, (1, *architecture.input_shape(model)), "sweep")
    except ValueError as error:
        return {}, f"not run: {error}"
    return {name: count for name, (count, _) in outputs.items()}, ""


def _unprinted(report: fusedres.FuseReport) -> str:
    """What goes wrong where the report is shown; it must not, whatever the modules are called."""
    for form in ("__str__", "to_markdown", "_repr_html_", "to_json"):
        try:
            getattr(report, form)()
        except Exception as error:
            return f"report: {first_line(error)}"
    return ""


def _in_general(reason: str) -> str:
    """A reason without the name of the child that it begins with or ends on."""
    text = reason.partition(": ")[2] or reason
    before, found, child = text.partition("its output goes to ")
    return (
        f"its output goes to {child.rpartition('(')[2].rstrip(')')}"
        if found and not before
        else text
    )


def table(found: list[Swept]) -> str:
    """The findings in Markdown, and a line about all of them."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for each in found:
        share = "?" if each.share is None else f"{100 * each.share:.0f} %"
        parity = "" if each.parity is None else f"{each.parity:.1f}"
        cells = (
            each.name,
            each.norms,
            each.fused,
            share,
            each.tails,
            parity,
            each.reason.replace("|", r"\|"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    residual = [each for each in found if each.tails]
    shares = [each.share for each in residual if each.share is not None]
    whole = sum(share >= 0.95 for share in shares)
    lines += [
        "",
        f"{len(found)} architectures with BatchNorm; {len(residual)} whose residual tails are fused, "
        f"of {whole} of them at least 95 % of the elements.",
    ]
    looked_at = [each.parity for each in found if each.parity is not None]
    if looked_at:
        same = sum(parity <= ALLOWED for parity in looked_at)
        lines.append(f"{same} of {len(looked_at)} train as before.")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedres.benchmarks.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "patterns", nargs="*", default=["*"], help="names, with * and ?; timm's begin with timm:"
    )
    parser.add_argument("--parity", action="store_true", help="train each a little, fused and not")
    parser.add_argument("--out", type=Path, help="a folder for sweep.md and sweep.json")
    return parser


def _swept(patterns: tuple[str, ...], parity: bool) -> Iterator[Swept]:
    wanted = architectures(patterns, _left_out)
    for count, (name, architecture) in enumerate(wanted.items(), 1):
        if count % 50 == 0:
            print(f"{count} of {len(wanted)}: {name}", file=sys.stderr)
        if (found := sweep(name, architecture, parity)) is not None:
            yield found


def _left_out(text: str) -> None:
    print(f"left out: {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    found = list(_swept(tuple(options.patterns), options.parity))
    print(table(found), end="")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "sweep.md").write_text(table(found), encoding="utf-8")
        (options.out / "sweep.json").write_text(
            json.dumps([asdict(each) for each in found], indent=1), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

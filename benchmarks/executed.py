"""What compiled kernels do when they run: instructions an element, sectors a request, bank conflicts, barriers.

The library's own launchers are driven on small CPU tensors, and the PTX of each launch runs in the interpreter of
`ptx/`; no GPU is needed. That package is no part of the wheel: the level needs a checkout, and gcc.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import fusedres
from fusedres.functional import projection
from fusedres.ops.projection import in_triton

from .cases import shape_name
from .floors import OPERATORS
from .record import Row
from .traffic import Site, backward_of_two, run_operator

LEVEL = "executed"
PACKAGE = f"{__package__}.ptx"  # by its name: a type checker sees the wheel, which does not hold it
ARCHITECTURES = (80, 90)
KERNELS = ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_add_relu_fork", "projection")
# The output of each; a projection reads a quarter of the channels. A second or two in the interpreter.
SHAPE = (8, 256, 28, 28)
LAYOUTS = ("channels_last", "contiguous_format")


class Faulty(RuntimeError):
    """A kernel did what it must not: its figures mean nothing."""


@dataclass(frozen=True)
class Target:
    """One operator, forward and backward in training mode, for one chip."""

    architecture: int
    site: Site

    @property
    def name(self) -> str:
        site = self.site
        return f"sm_{self.architecture} {site.kernel}, {site.dtype}, {site.layout}"


def targets(quick: bool) -> list[Target]:
    if quick:
        return [Target(90, Site("bn_add_relu", SHAPE))]
    return [
        Target(architecture, Site(kernel, SHAPE, dtype, layout))
        for architecture in ARCHITECTURES
        for dtype in ("bfloat16", "float32")
        for layout in LAYOUTS
        for kernel in KERNELS
        # Of a contiguous input the projection is PyTorch's.
        if kernel != "projection" or layout == "channels_last"
    ]


def missing() -> str | None:
    """Why nothing can be run here, in a line."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "it needs a checkout of the repository: an installed fusedres has no interpreter of compiled kernels"
    if shutil.which("gcc") is None:
        return "it needs gcc, which is not on the PATH (Debian: apt install gcc)"
    return None


def measure(target: Target) -> Iterator[list[Row]]:
    """A row for each kernel and figure; launches of the same kernel are taken together.

    Raises:
        Faulty: the interpreter saw an access that is wrong.
    """
    from fusedres.kernels.launch import passes

    ptx, counts = (importlib.import_module(name) for name in (PACKAGE, f"{PACKAGE}.counts"))
    torch.manual_seed(0)
    unwatched = {"check_shared": False, "check_global": False}  # twice as fast; the tests watch
    with (
        fusedres.backend("triton"),
        passes("three"),  # as a large batch has them
        ptx.emulated(target.architecture, **unwatched) as launches,
    ):
        _run(target.site)
    kernels: dict[str, list] = {}
    for launch in launches:
        if launch.errors:
            raise Faulty(launch.errors[0])
        kernels.setdefault(launch.kernel, []).append(launch)
    elements = math.prod(target.site.shape)
    for kernel, of in kernels.items():
        yield [_row(target, kernel, *figure) for figure in counts.figures(of, elements)]


def _run(site: Site) -> None:
    """One forward and backward."""
    if site.kernel == "projection":
        output, leaves = _projection(site)
    else:
        output, leaves = run_operator(site)
    gradient = torch.randn_like(output)
    operator = OPERATORS.get(site.kernel)
    if operator is None or operator.skip is None:
        torch.autograd.grad(output, leaves, gradient)
    else:
        backward_of_two(operator, output, gradient, torch.randn_like(output))


def _projection(site: Site) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch, channels, *size = site.shape
    dtype, layout = getattr(torch, site.dtype), getattr(torch, site.layout)
    input = torch.randn(batch, channels // 4, *size).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(channels, channels // 4, 1, 1).to(dtype)
    leaves = [input.requires_grad_(), weight.requires_grad_()]
    with in_triton():
        return projection(leaves[0], leaves[1], stride=1), leaves


def _row(target: Target, kernel: str, metric: str, value: float) -> Row:
    return Row(
        level=LEVEL,
        kernel=f"{kernel} in {target.site.kernel}",
        provider="fusedres",
        metric=metric,
        mode=f"sm_{target.architecture}",
        shape=shape_name(target.site.shape),
        dtype=target.site.dtype,
        layout=target.site.layout.removesuffix("_format"),
        median=value,
    )

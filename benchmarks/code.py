"""What the compiler makes of each kernel: registers, spills, shared memory, occupancy, access widths, tensor cores.

The library's own launchers are driven at a batch-256 ResNet-50's shapes, through a stand-in for Triton's driver; no
GPU is needed, and nothing runs. What bounds the passes is modelled from the same machine code in `machine.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

import fusedres
from fusedres.functional import batch_norm_act, dual_batch_norm_act, projection
from fusedres.ops.projection import in_triton

from .cases import shape_name
from .compile_only import Launch, compile_only
from .floors import OPERATORS
from .record import Row
from .traffic import backward_of_two

ARCHITECTURES = (80, 90, 100)
SHAPES = {"first stage": (256, 256, 56, 56), "last stage": (256, 2048, 7, 7)}
STEM = {"stem": (256, 64, 112, 112)}
# Where a direction is one launch, of one kernel for all tails and forks.
ONE_LAUNCH = {"last stage, 32 images": (32, 2048, 7, 7)}
# The tail of a projected shortcut, the pass that adds at a fork, and the 1x1 convolution itself (its input's shape).
SHORTCUT = {
    "bn_bn_add_relu": (256, 256, 56, 56),
    "bn_add_relu_fork": (256, 256, 56, 56),
    "projection": (256, 64, 56, 56),
}


@dataclass(frozen=True)
class Target:
    """One operator, at one shape, for one chip."""

    architecture: int
    kernel: str
    where: str
    shape: tuple[int, ...]
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return f"sm_{self.architecture} {self.kernel}, {self.where}, {self.dtype}, {self.layout}"


def targets(quick: bool) -> list[Target]:
    """Every dtype on sm_90; on the others bfloat16, which shares its code paths with float16."""
    found = []
    for architecture in (90,) if quick else ARCHITECTURES:
        dtypes = (
            ("bfloat16",) if quick or architecture != 90 else ("bfloat16", "float16", "float32")
        )
        for dtype in dtypes:
            for layout in ("channels_last", "contiguous_format"):
                shapes = [("bn_add_relu", w, s) for w, s in SHAPES.items()]
                shapes += [("bn_relu", w, s) for w, s in STEM.items()]
                shapes += [("bn_bn_add_relu", w, s) for w, s in ONE_LAUNCH.items()]
                if layout == "channels_last":
                    shapes += [(kernel, "first stage", s) for kernel, s in SHORTCUT.items()]
                for kernel, where, shape in shapes[:1] if quick else shapes:
                    found.append(Target(architecture, kernel, where, shape, dtype, layout))
    return found


def compile_target(target: Target, without: Collection[str] = ()) -> list[Launch]:
    """The launches of one forward and backward in training mode, `without` some kernels; the tensors are never
    touched."""
    dtype, layout = getattr(torch, target.dtype), getattr(torch, target.layout)
    with fusedres.backend("triton"), compile_only(target.architecture, without) as recorded:
        if target.kernel == "projection":
            with in_triton():
                _run_projection(target.shape, dtype, layout)
        else:
            _run_operator(target, dtype, layout)
        return list(recorded)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=layout).requires_grad_()


def _run_operator(target: Target, dtype: torch.dtype, layout: torch.memory_format) -> None:
    operator, channels = OPERATORS[target.kernel], target.shape[1]
    vectors = [torch.empty(channels) for _ in range(4)]
    leaves = [_empty(target.shape, dtype, layout), *(v.requires_grad_() for v in vectors[2:])]
    if operator.residual:
        leaves.append(_empty(target.shape, dtype, layout))
    if operator.residual_norm:
        mean, var, weight, bias = vectors
        output = dual_batch_norm_act(
            leaves[0], leaves[3], mean, var, mean, var, weight, bias, weight, bias, operator.training,
            activation=operator.activation,
        )  # fmt: skip
    else:
        output = batch_norm_act(
            leaves[0], vectors[0], vectors[1], leaves[1], leaves[2], operator.training,
            residual=leaves[3] if operator.residual else None, activation=operator.activation,
        )  # fmt: skip
    if operator.skip is None:
        torch.autograd.grad(output, leaves, torch.empty_like(output))
    else:
        backward_of_two(operator, output, torch.empty_like(output), torch.empty_like(output))


def _run_projection(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format):
    weight = torch.empty(4 * shape[1], shape[1], 1, 1, dtype=dtype).requires_grad_()
    input = _empty(shape, dtype, layout)
    output = projection(input, weight, stride=1)
    torch.autograd.grad(output, [input, weight], torch.empty_like(output))


def rows_of(target: Target, launches: Sequence[Launch]) -> Iterator[Row]:
    """A row for each kernel and figure."""
    for launch in launches:
        code = launch.code
        figures = {
            "registers": code.registers,
            "spills": code.spills,
            "shared_bytes": launch.shared,
            "occupancy_percent": 100 * launch.occupancy,
            "tensor_core": code.tensor_core,
        }
        notes = {}
        for kind, widths in code.widths.items():
            figures[f"widest_{kind}_bits"] = max(widths, default=0)
            notes[f"widest_{kind}_bits"] = ", ".join(f"{n} of {w}" for w, n in widths.items())
        for metric, value in figures.items():
            yield Row(
                level="code",
                kernel=f"{launch.kernel} in {target.kernel}, {target.where}",
                provider="fusedres",
                metric=metric,
                mode=f"sm_{target.architecture}",
                shape=shape_name(target.shape),
                dtype=target.dtype,
                layout=target.layout.removesuffix("_format"),
                median=float(value),
                note=notes.get(metric, ""),
            )


def faults(rows: Sequence[Row]) -> list[str]:
    """What must not be: a spill to local memory."""
    return [
        f"{row.kernel} ({row.mode}, {row.dtype}, {row.layout}) spills: {row.median:.0f} accesses to local memory"
        for row in rows
        if row.level == "code" and row.metric == "spills" and row.median
    ]

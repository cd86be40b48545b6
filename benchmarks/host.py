"""Host cost: what Python and PyTorch spend on a call, on tensors so small that nothing else counts.

`fusedres` against the eager composition: one call forward, forward and backward, and the training step of a ResNet-18
on 16x16 images. On a machine without a GPU `fusedres` is the aten backend; what the Triton backend spends before its
kernels are launched is timed apart, with a stand-in for Triton's driver that launches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

import fusedres

from .cases import Tail, model
from .compile_only import compile_only
from .providers import FusedTail
from .record import Row
from .timing import Effort, Step, one_thread, time_steps, verdict
from .workload import Setting, Workload

SHAPE = (2, 8, 4, 4)
EFFORT = Effort(seconds=0.4, repetitions=50, warm_up=20, most=5000)
STEP_EFFORT = Effort(seconds=2.0, repetitions=5, warm_up=2, most=200)
COMPOSITION, FUSED, TRITON = "eager", "fusedres", "fusedres, triton up to the launch"
ALLOWED = 1.0  # of the composition's time


def call_of(module: nn.Module, mode: str, device: torch.device) -> Step:
    """One call of a Tail or of what replaces it: `forward`, `eval`, or `step` (forward and backward)."""
    module = module.to(device).train(mode != "eval")
    x, residual = (torch.randn(SHAPE, device=device) for _ in range(2))
    if mode != "step":
        return Step(lambda _: module(x, residual))
    x.requires_grad_()
    gradient = torch.randn(SHAPE, device=device)
    leaves = [x, *module.parameters()]
    return Step(lambda _: torch.autograd.grad(module(x, residual), leaves, gradient))


def tails() -> dict[str, nn.Module]:
    """The composition and the fused module."""
    return {COMPOSITION: _tail(), FUSED: FusedTail(_tail())}


def _tail() -> Tail:
    return Tail(SHAPE[1], residual=True, activation="relu")


def measure(device: torch.device, quick: bool = False) -> Iterator[list[Row]]:
    """Rows of calls, then of the Triton backend's own cost, then of the step of a ResNet-18."""
    with one_thread():
        for mode in ("forward", "eval", "step"):
            yield compare(tails(), mode, device)
        for mode in ("forward", "eval", "step"):
            yield _up_to_the_launch(mode)
        if not quick:
            yield _step_of_resnet18(device)


def compare(modules: dict[str, nn.Module], mode: str, device: torch.device) -> list[Row]:
    """Time one kind of call of several modules, taking turns."""
    steps = {name: call_of(module, mode, device) for name, module in modules.items()}
    return _rows("call", mode, steps, device, EFFORT, "N2-C8-H4-W4")


def _up_to_the_launch(mode: str) -> list[Row]:
    device = torch.device("cpu")
    try:
        with fusedres.backend("triton"), compile_only(90) as launches:
            step = call_of(FusedTail(_tail()), mode, device)

            def run(argument: object) -> object:
                launches.clear()
                return step.run(argument)

            return _rows("call", mode, {TRITON: Step(run)}, device, EFFORT, "N2-C8-H4-W4")
    except (ImportError, RuntimeError) as error:
        note = f"not measured: {error}"
        return [Row("host", "call", TRITON, "time_us", mode, "N2-C8-H4-W4", "float32", note=note)]


def _step_of_resnet18(device: torch.device) -> list[Row]:
    workload = Workload(
        model("resnet18", 2, 16), Setting(device, torch.float32, torch.contiguous_format)
    )
    fused = workload.build()
    fusedres.fuse_(fused)
    modules = {COMPOSITION: workload.build(), FUSED: fused}
    steps = {name: workload.step(module, "step") for name, module in modules.items()}
    return _rows("resnet18, 16x16", "step", steps, device, STEP_EFFORT, "N2-C3-H16-W16")


def _rows(
    kernel: str,
    mode: str,
    steps: dict[str, Step],
    device: torch.device,
    effort: Effort,
    shape: str,
) -> list[Row]:
    rows = []
    for name, timing in time_steps(steps, device, effort).items():
        row = Row("host", kernel, name, "time_us", mode, shape, "float32", "contiguous")
        rows.append(row.timed(timing))
    return rows


def faults(rows: Sequence[Row]) -> list[str]:
    """Where the fused call costs more than the composition, by more than the spread."""
    found = []
    composition = {row.subject: row for row in rows if row.provider == COMPOSITION}
    for row in rows:
        eager = composition.get(row.subject)
        if row.level != "host" or row.provider != FUSED or eager is None:
            continue
        said = verdict(row.median, row.spread, eager.median, eager.spread)
        if row.median is not None and eager.median is not None and said.startswith("takes"):
            found.append(
                f"{row.kernel}, {row.mode}: {row.median:.1f} us fused, {eager.median:.1f} us eager"
            )
    return found

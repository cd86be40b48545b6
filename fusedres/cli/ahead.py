"""Which kernels a step launches, found without a GPU and without compiling one; and compiling them, in processes.

Triton asks a hook before it compiles. Here the hook notes what would be compiled and takes the launch, so that a step
under `ShapesOnly` leaves a list of everything that the real one would have to wait for.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
import triton
from torch import Tensor, nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

import fusedres

from ..kernels.bind import driven_by
from .shapes import ShapesOnly


@dataclass(frozen=True)
class Chip:
    """What is compiled for: Triton's target, and the multiprocessors, by which the launchers share out their work."""

    backend: str
    architecture: int | str
    warp_size: int
    multiprocessors: int

    @property
    def name(self) -> str:
        known = f"sm_{self.architecture}" if self.backend == "cuda" else f"{self.architecture}"
        return f"{known} with {self.multiprocessors} multiprocessors"


def chip_here() -> Chip:
    """The GPU that is there.

    Raises:
        RuntimeError: there is none.
    """
    active = driver.active
    target, device = active.get_current_target(), active.get_current_device()
    properties = active.utils.get_device_properties(device)
    return Chip(target.backend, target.arch, target.warp_size, properties["multiprocessor_count"])


class _NoDriver:
    """What a launch asks of Triton's driver before there is a kernel. Each is a device of its own: Triton keeps no
    kernel from an earlier one."""

    def __init__(self, chip: Chip) -> None:
        self._target = GPUTarget(chip.backend, chip.architecture, chip.warp_size)
        properties = {"multiprocessor_count": chip.multiprocessors}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_device(self) -> Any:
        return self

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@dataclass(frozen=True)
class Job:
    """A kernel that is to be compiled: which, by what Triton tells one from another, and what the compiler is told.

    options: Triton's own, as JSON. (Its JSON of all, which `preload` takes, loses the names of a named tuple's parts.)
    """

    module: str
    kernel: str
    key: str
    signature: dict[str, Any] = field(repr=False, compare=False)
    constants: dict[Any, Any] = field(repr=False, compare=False)
    attributes: dict[Any, Any] = field(repr=False, compare=False)
    options: str = field(repr=False, compare=False)


def jobs_of(step: Callable[[], Any], chip: Chip) -> list[Job]:
    """The distinct kernels that a step would have to compile on this chip; nothing is compiled, nothing computed."""
    found: dict[Job, None] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        name = fn.name.rpartition(".")[2]
        options = json.dumps(json.loads(compile["specialization_data"])["options"])
        (attributes,) = compile["configs"]
        told = compile["signature"], compile["constants"], attributes, options
        found[Job(fn.module, name, key, *told)] = None
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        with driven_by(_NoDriver(chip)), fusedres.backend("triton"), ShapesOnly():
            step()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


@dataclass(frozen=True)
class Network:
    """A network and what goes in: below float32 it runs under autocast, as `compare` trains it."""

    model: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format

    def _forward(self) -> Any:
        images = torch.empty(self.shape).contiguous(memory_format=self.layout)
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(images)

    def training_step(self) -> None:
        """Forward and backward, as `loss.backward()` goes; the gradients are dropped."""
        outputs = _outputs(self._forward())
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
        self.model.zero_grad(set_to_none=True)

    def step_without_forks(self) -> None:
        """The same by `torch.autograd.grad`, where autograd adds the gradients that meet at a fork."""
        outputs = _outputs(self._forward())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [torch.empty_like(t) for t in outputs]
        torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)

    def inference(self) -> None:
        with torch.no_grad():
            self._forward()


def _outputs(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]


@dataclass(frozen=True)
class Compiled:
    """seconds: of all cores that worked on it. was_there: in Triton's cache."""

    job: Job
    seconds: float
    was_there: bool


def compile_all(jobs: Sequence[Job], chip: Chip, processes: int) -> Iterator[Compiled]:
    """Compile into Triton's cache; each as it is done.

    Raises:
        RuntimeError: one does not compile; the message says which.
    """
    # The largest first, so that no process is left alone with one at the end.
    order = sorted(jobs, key=lambda job: -len(job.key))
    processes = max(1, min(processes, len(order)))
    # Threads of PyTorch's may be running, and a GPU may be in use: no fork survives that.
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_leave_interrupts
    )
    with pool:
        waiting = {pool.submit(_compile, job, chip): job for job in order}
        try:
            for done in as_completed(waiting):
                error = done.exception()
                if error is not None:
                    job = waiting[done]
                    raise RuntimeError(f"{job.kernel} does not compile: {error}") from error
                yield done.result()
        finally:  # of what has not begun, where it ends early
            pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the one that waits for the others answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile(job: Job, chip: Chip) -> Compiled:
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    before = _processor_seconds()
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(job.options).items()
    }
    target = GPUTarget(chip.backend, chip.architecture, chip.warp_size)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    with driven_by(_NoDriver(chip)):
        triton.compile(source, target=target, options=options)
    return Compiled(job, _processor_seconds() - before, hits == [True])


def _processor_seconds() -> float:
    """Of this process, and of the assembler's, which it waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

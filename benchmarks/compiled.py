"""torch.compile's kernels for an operator, compiled for sm_90 and read as the library's own are (`machine.py`).

Inductor writes its Triton source for a stand-in of an H200 (`inductor.py`); here that source is compiled. Of several
launch configurations, among which inductor would choose by timing them, the one with the fewest modelled cycles is
taken. All of this leans on private parts of torch. Nothing runs.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .code import SHAPES, SHORTCUT, STEM, Target
from .compile_only import Launch, compile_only
from .floors import OPERATORS
from .inductor import Source, inductor_sources
from .machine import ARCHITECTURE, LAYOUTS, Pass, Place
from .sass import Steady, steady_loops

_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S)
_BLOCK = re.compile(r"\b([XYZR]\d?_?BLOCK): tl\.constexpr = (\d+)")
# A kernel that moves less of what the largest moves is a finalising step.
SMALLEST = 0.05


def targets() -> list[Target]:
    """The stem, the first and the last stage of a ResNet-50 at batch 256, and a projected shortcut's tail."""
    shapes = [("bn_relu", where, shape) for where, shape in STEM.items()]
    shapes += [("bn_add_relu", where, shape) for where, shape in SHAPES.items()]
    shapes.append(("bn_bn_add_relu", "first stage", SHORTCUT["bn_bn_add_relu"]))
    return [
        Target(ARCHITECTURE, kernel, where, shape, dtype, layout)
        for dtype in ("bfloat16", "float32")
        for layout in LAYOUTS
        for kernel, where, shape in shapes
    ]


def expression(kernel: str) -> tuple[Callable[..., Tensor], int, int]:
    """(an operator of `floors.OPERATORS` in plain PyTorch, tensors of the activation's size, BatchNorms)."""
    operator = OPERATORS[kernel]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        def norm(value: Tensor, vectors: Sequence[Tensor]) -> Tensor:
            weight, bias, mean, var = vectors
            return F.batch_norm(value, mean, var, weight, bias, operator.training)

        if operator.residual_norm:
            z = norm(x, rest[1:5]) + norm(rest[0], rest[5:])
        elif operator.residual:
            z = norm(x, rest[1:]) + rest[0]
        else:
            z = norm(x, rest)
        return torch.relu(z)

    return function, 1 + operator.residual, 1 + operator.residual_norm


def inductor_passes(target: Target) -> list[Place]:
    """The passes over memory of torch.compile's forward and backward; a second gradient (a fork) is not among them.

    Raises:
        RuntimeError: this torch cannot be read so; the message says why.
    """
    function, tensors, norms = expression(target.kernel)
    dtype, layout = getattr(torch, target.dtype), getattr(torch, target.layout)
    inputs = [
        torch.empty(target.shape, dtype=dtype, device="meta").to(memory_format=layout)
        for _ in range(tensors)
    ]
    vectors = [torch.empty(target.shape[1]) for _ in range(4 * norms)]
    for i, leaf in enumerate([*inputs, *vectors]):
        leaf.requires_grad_(i < tensors or (i - tensors) % 4 < 2)
    sources = inductor_sources(function, [*inputs, *vectors], architecture=ARCHITECTURE)
    largest = max(sum(moved) for source in sources for moved in source.moved)
    found = []
    for source in sources:
        for name, body, moved, arguments in _kernels(source):
            if sum(moved) >= SMALLEST * largest:
                found.append(Place(target, _read(source.phase, name, body, moved, arguments)))
    return found


def _kernels(source: Source) -> Iterator[tuple[str, str, tuple[int, int], list[str]]]:
    """(name, module, (bytes read, written), arguments) of each call of a kernel."""
    bodies = dict(_KERNEL.findall(source.text))
    calls = [
        (name, arguments.split(", "))
        for name, arguments in re.findall(r"(\w+)\.run\((.*?), stream=", source.text)
        if name in bodies
    ]
    if len(calls) != len(source.moved):
        raise RuntimeError(
            f"torch {torch.__version__}: {len(calls)} calls of {len(source.moved)} kernels were found"
        )
    for (name, arguments), moved in zip(calls, source.moved, strict=True):
        yield name, bodies[name], moved, arguments


def _read(phase: str, name: str, body: str, moved: tuple[int, int], arguments: list[str]) -> Pass:
    with tempfile.TemporaryDirectory() as folder:
        autotuner = getattr(_module(Path(folder), body), name)
        names = [key for key in autotuner.triton_meta["signature"] if "BLOCK" not in key]
        sizes = {
            key: int(value)
            for key, value in zip(names, arguments, strict=False)
            if key.endswith("numel")
        }
        elements = math.prod(sizes.values())
        passes = [
            _pass_of(f"{phase}: {_short(name)}", autotuner, config, body, sizes, elements, moved)
            for config in autotuner.configs
        ]
    return min(passes, key=lambda each: each.instruction_seconds)


def _short(name: str) -> str:
    """`triton_red_fused__native_batch_norm_legit_functional_0` as `red_0`."""
    parts = name.split("_")
    return f"{parts[1]}_{parts[-1]}"


def _module(folder: Path, body: str) -> ModuleType:
    """The module that inductor wrote, imported without asking for a GPU."""
    from torch._inductor.runtime import triton_helpers

    path = folder / "inductor_kernel.py"
    path.write_text(body, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("inductor_kernel", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.dict(sys.modules, {"inductor_kernel": module}),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        compile_only(ARCHITECTURE),
    ):
        spec.loader.exec_module(module)
    return module


def _pass_of(
    title: str, autotuner: Any, config: Any, body: str, sizes: dict[str, int], elements: int,
    moved: tuple[int, int],
) -> Pass:  # fmt: skip
    """A kernel in one configuration."""
    meta = autotuner._create_compile_meta(config)
    source = ASTSource(autotuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    options = autotuner._create_compile_options(config, meta)
    with compile_only(ARCHITECTURE):
        compiled = triton.compile(
            source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options
        )
    blocks = {name: int(n) for name, n in _BLOCK.findall(body)} | {
        name: n for name, n in config.kwargs.items() if name.endswith("BLOCK")
    }
    programs = math.prod(
        -(-sizes[f"{axis}numel"] // blocks[f"{axis.upper()}BLOCK"])
        for axis in ("x", "y", "z")
        if f"{axis}numel" in sizes and f"{axis.upper()}BLOCK" in blocks
    )
    launch = Launch(
        title, (programs, 1, 1), compiled.metadata.num_warps, compiled.metadata.shared,
        compiled.asm["cubin"], ARCHITECTURE,
    )  # fmt: skip
    loop = _all_loops(launch.cubin)
    return Pass(
        title, elements, math.prod(blocks.values()), moved[0] / elements, moved[1] / elements,
        launch.warps, launch.code.registers, launch.code.spills, launch.resident, programs,
        max(1, compiled.metadata.num_stages - 1) if loop.asynchronous else 1, loop,
    )  # fmt: skip


def _all_loops(cubin: bytes) -> Steady:
    """All loops after each other: inductor's walk the same elements, some of them twice; none is of partial tiles."""
    loops = steady_loops(cubin)
    counts = (loop.opcodes for loop in loops)
    total: Counter[str] = Counter(itertools.chain.from_iterable(c.elements() for c in counts))
    return Steady(total, loops[0].looped)

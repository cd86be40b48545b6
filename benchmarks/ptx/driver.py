"""A stand-in for Triton's driver that runs the PTX of every launch on the CPU tensors it is given.

with emulated(90) as launches:
    ...                       # the library's own calls, on CPU tensors
launches                      # what ran, what it counted, what was wrong
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget

from fusedres.kernels import chip
from fusedres.kernels.bind import driven_by

from ..compile_only import MULTIPROCESSORS, SHARED_MEMORY
from .build import library
from .decode import Program, decode

ARCHITECTURES = (
    80,
    90,
)  # of which all instructions are known; of 100, those of kernels without matrix products
# machine.h has the same, in this order from 1.
KINDS = (
    "out of bounds", "misaligned", "uninitialised shared memory", "race in shared memory", "a copy not waited for",
    "divergence at a collective", "outside shared memory", "deadlock", "too long", "race in global memory",
)  # fmt: skip
MOST_ERRORS = 64
ERROR = np.dtype(
    [(name, "i4") for name in ("kind", "pc", "block", "thread")] + [("address", "u8"), ("other", "u8")]
)  # fmt: skip
COUNT = np.dtype([(name, "u8") for name in ("warps", "lanes", "units", "ideal")])
# Triton caches kernels by device: numbers that no other driver gives.
FIRST_DEVICE = 1000


@dataclass(frozen=True)
class Options:
    """How it is run.

    order: of the programs, and of the warps of one between barriers: 0 first to last, 1 last to first, 2 drawn
    anew each time (by `seed`).
    late: a cp.async lands when it is waited for; else at once.
    check_shared, check_global: watch each byte for races and for what was not written.
    multiprocessors: that the library is told of (few: a program has many tiles); None for those of the chip.
    limit: of warp instructions of a launch.
    rewrite: (kernel, PTX) -> the PTX that runs instead.
    """

    order: int = 0
    late: bool = True
    check_shared: bool = True
    check_global: bool = True
    seed: int = 1
    limit: int = 2_000_000_000
    multiprocessors: int | None = None
    rewrite: Callable[[str, str], str] | None = None


@dataclass(frozen=True)
class Launch:
    """What ran: counts of each instruction of `program`, and one line for each thing that was wrong."""

    kernel: str
    grid: tuple[int, int, int]
    program: Program = field(repr=False)
    counts: np.ndarray = field(repr=False)
    errors: list[str]

    def instructions(self) -> Counter[str]:
        """Instructions that warps issued, by opcode."""
        found: Counter[str] = Counter()
        for opcode, n in zip(self.program.opcode, self.counts["warps"], strict=True):
            found[opcode] += int(n)
        return found

    def memory(self, *prefixes: str) -> tuple[int, int, int]:
        """(requests, units, the fewest units) of the opcodes that begin so; units are sectors of 32 bytes of global
        memory, wavefronts of shared memory."""
        chosen = [i for i, name in enumerate(self.program.opcode) if name.startswith(prefixes)]
        counts = self.counts[chosen]
        counts = counts[counts["lanes"] > 0]
        return int(counts["warps"].sum()), int(counts["units"].sum()), int(counts["ideal"].sum())


class Emulator:
    """What `triton.runtime.jit` asks of a driver, for a chip that is this interpreter."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.options = Options()
        self.launches: list[Launch] = []
        self.utils = SimpleNamespace(
            # The PTX stands where the machine code would (see `_Stages`), and is the handle of each launch.
            load_binary=lambda name, binary, shared, device: (binary, binary.decode(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "multiprocessor_count": self.options.multiprocessors
                or MULTIPROCESSORS[architecture],
                "max_shared_mem": SHARED_MEMORY[architecture],
            },
        )

    def get_current_device(self) -> int:
        return FIRST_DEVICE + self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = list(source.signature.values())

        def launch(x, y, z, stream, ptx, packed, launch_metadata, enter, leave, *arguments) -> None:
            values = list(_flatten(kinds, arguments))
            self.run(metadata.name, ptx, (x, y, z), metadata.shared, values)

        return launch

    def run(
        self, kernel: str, ptx: str, grid: tuple[int, int, int], shared: int, values: list[tuple[str, Any]]
    ) -> None:  # fmt: skip
        """Run a PTX file's kernel with (type, value) arguments and so many bytes of shared memory; record the
        launch.
        """
        options = self.options
        program = decode(ptx if options.rewrite is None else options.rewrite(kernel, ptx))
        table, pointers = _regions([v for _, v in values if isinstance(v, torch.Tensor)])
        counts, errors = np.zeros(len(program.code), COUNT), np.zeros(MOST_ERRORS, ERROR)
        config = struct.pack(
            "<iiiiQQ", options.order, options.late, options.check_shared, options.check_global, options.seed,
            options.limit,
        )  # fmt: skip
        found = library().run_launch(
            _at(program.code), _at(program.operands), program.units, program.constants,
            len(program.constants) // 128, _parameters(program, values, pointers), (ctypes.c_uint32 * 3)(*grid),
            program.threads, shared, _at(table), len(table), config, _at(counts), _at(errors),
        )  # fmt: skip
        lines = [_describe(program, error) for error in errors[:found]]
        self.launches.append(Launch(program.name, grid, program, counts, lines))


def _describe(program: Program, error: np.void) -> str:
    pc = error["pc"]
    where = (
        f"block {error['block']}, thread {error['thread']}, {error['address']:#x}, {error['other']}"
    )
    kind = KINDS[error["kind"] - 1]
    return f"{program.name} {program.place[pc]}: {kind}: {program.text[pc]} ({where})"


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _flatten(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _parameters(program: Program, values: list[tuple[str, Any]], pointers: dict[int, int]) -> bytes:
    """The block of parameters. Triton adds up to two pointers of its own (scratch memory), which stay null."""
    if not len(values) <= len(program.params) <= len(values) + 2:
        raise RuntimeError(
            f"{program.name} takes {len(program.params)} parameters and got {len(values)} arguments"
        )
    block = bytearray(program.param_bytes + 8)
    for (_, offset, size), (kind, value) in zip(program.params, values, strict=False):
        block[offset : offset + size] = _pack(kind, size, value, pointers)
    return bytes(block)


def _pack(kind: str, size: int, value: Any, pointers: dict[int, int]) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else pointers.get(value.data_ptr(), 0))
    if kind.startswith("f"):
        return struct.pack("<d" if size == 8 else "<f", value)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _regions(tensors: list[torch.Tensor]) -> tuple[np.ndarray, dict[int, int]]:
    """The memory that may be touched (tensors that overlap share a region), and the address a kernel gets of each."""
    spans = []
    for t in tensors:
        if t.numel():
            reach = [(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)]
            low = t.data_ptr() + t.element_size() * sum(r for r in reach if r < 0)
            high = t.data_ptr() + t.element_size() * (1 + sum(r for r in reach if r > 0))
            spans.append((low, high))
    merged: list[list[int]] = []
    for low, high in sorted(spans):
        if merged and low < merged[-1][1]:
            merged[-1][1] = max(high, merged[-1][1])
        else:
            merged.append([low, high])
    pointers = {}
    for t in tensors:
        for i, (low, high) in enumerate(merged):
            if t.numel() and low <= t.data_ptr() < high:
                pointers[t.data_ptr()] = (i + 1) << 40 | (t.data_ptr() - (low & ~0xFFFFF))
    table = np.array([(low, low, high) for low, high in merged], "u8").reshape(-1, 3)
    return table, pointers


class _Stages:
    """Triton's hook into its compiler: the last stage, ptxas, gives back the PTX. Asked for no stage, it says what it
    is, for the key under which the compiled kernel is kept (from Triton 3.7 on)."""

    def __call__(self, backend=None, stages=None, *rest: Any) -> tuple[str, str] | None:
        if stages is None:
            return "ptx only", "ptx only"
        stages["cubin"] = lambda source, metadata: source.encode()
        return None


@functools.lru_cache(maxsize=8)
def _emulator(architecture: int) -> Emulator:
    return Emulator(architecture)  # one each: a compiled kernel keeps the launcher it was made with


@contextmanager
def emulated(architecture: int, **options: Any) -> Iterator[list[Launch]]:
    """The active driver is the emulator of this architecture; what is launched is listed. `options`: of `Options`.

    Not beside other threads that launch or compile: Triton's driver and knobs are the process's.
    """
    machine = _emulator(architecture)
    before = machine.options, machine.launches
    machine.options, machine.launches = Options(**options), []
    chip.forget()
    with knobs.cache.scope(), knobs.runtime.scope():
        # Triton 3.6 keeps kernels without asking for the hook: what it keeps here must not be found elsewhere.
        knobs.cache.dir = f"{knobs.cache.dir}/ptx-only"
        knobs.runtime.add_stages_inspection_hook = _Stages()
        try:
            with driven_by(machine):
                yield machine.launches
        finally:
            machine.options, machine.launches = before
            chip.forget()

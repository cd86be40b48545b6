"""A stand-in for Triton's driver: kernels are compiled to machine code, launches are recorded, nothing runs.

With it the library's own launchers can be driven at a real network's shapes, on CPU tensors, without a GPU.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from fusedres.kernels.bind import driven_by

from .amd import CodeObject, read_code_object

Architecture = int | str  # 90 for sm_90, "gfx942"
# A100, H100/H200, B200, MI300X
MULTIPROCESSORS: dict[Architecture, int] = {80: 108, 90: 132, 100: 148, "gfx942": 304}
# Of a program.
SHARED_MEMORY: dict[Architecture, int] = {
    80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10,
}  # fmt: skip
AMD_WARP = 64  # lanes of a warp (a wavefront)
# Of a multiprocessor (CUDA C programming guide, technical specifications per compute capability).
SHARED_MEMORY_IN_ALL: dict[Architecture, int] = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
WARPS, PROGRAMS, REGISTERS = 64, 32, 65536
TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "DMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel was given."""

    numel: int
    element_size: int

    @property
    def bytes(self) -> int:
        return self.numel * self.element_size


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, how many programs, and its machine code (for AMD a code object).

    arguments: by name, constants included; an `Operand` where a tensor was given. A named tuple's parts are there by
    their own names, "of.x.stride".
    """

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    cubin: bytes = field(repr=False)
    architecture: Architecture = 90
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def resident(self) -> int:
        """Programs that registers, shared memory and slots let be on a multiprocessor at a time."""
        # Registers are handed out to warps in units of 256, each program takes 1 KiB of shared memory for itself.
        a_warp = -(-self.code.registers * 32 // 256) * 256
        return min(
            PROGRAMS,
            WARPS // self.warps,
            REGISTERS // (a_warp * self.warps),
            SHARED_MEMORY_IN_ALL[self.architecture] // (self.shared + 1024),
        )

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that are resident."""
        return self.resident * self.warps / WARPS

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def code(self) -> MachineCode:
        return read_machine_code(self.cubin)

    @property
    def code_object(self) -> CodeObject:
        """What `code` is, of a launch for AMD."""
        return read_code_object(self.cubin)


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of a kernel: registers a thread, and its instructions."""

    registers: int
    instructions: Counter = field(repr=False)

    @property
    def spills(self) -> int:
        """Accesses to local memory around which no subroutine is called (a float64 division calls one)."""
        local = self.count("LDL") + self.count("STL")
        return max(0, local - self.count("CALL"))

    @property
    def tensor_core(self) -> int:
        """Tensor-core instructions."""
        return sum(self.count(name) for name in TENSOR_CORE)

    @property
    def widths(self) -> dict[str, dict[int, int]]:
        """Global accesses by kind (load, store) and width in bits. Loads into shared memory (cp.async) are loads."""
        found: dict[str, Counter] = {"load": Counter(), "store": Counter()}
        for name, n in self.instructions.items():
            if name.startswith(("LDG", "STG")):
                found["store" if name.startswith("STG") else "load"][width(name)] += n
        return {kind: dict(sorted(counts.items())) for kind, counts in found.items()}

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))


def width(instruction: str) -> int:
    """Bits a thread moves: `LDG.E.128`, `STG.E.U16`; 32 where nothing is said."""
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction)
    return int(found[1]) if found else 32


def tool(name: str) -> str:
    """The path of a tool that Triton brings."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@functools.lru_cache(maxsize=256)
def read_machine_code(cubin: bytes) -> MachineCode:
    """Read registers, spills and instructions off a cubin with the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
        sass = subprocess.run(
            [tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True
        )
    text = usage.stdout + usage.stderr
    found = re.search(r"REG:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell the registers: {text.strip()[:200]!r}")
    names = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass.stdout, re.M
    )
    return MachineCode(int(found[1]), Counter(names))


class CompileOnlyDriver:
    """What `triton.runtime.jit` asks of a driver, for a chip that is not there."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.launches: list[Launch] = []
        self.utils = SimpleNamespace(
            # The machine code itself is the handle that comes back with each launch.
            load_binary=lambda name, cubin, shared, device: (cubin, cubin, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "multiprocessor_count": MULTIPROCESSORS[architecture],
                "max_shared_mem": SHARED_MEMORY[architecture],
            },
        )

    def get_current_device(self) -> int:
        # Triton caches kernels by device: a number for each chip.
        return int(str(self.architecture).removeprefix("gfx"))

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.architecture, str):
            return GPUTarget("hip", self.architecture, AMD_WARP)
        return GPUTarget("cuda", self.architecture, 32)

    def launcher_cls(self, source, metadata):
        names = list(source.signature)

        def launch(x, y, z, stream, cubin, packed, launch_metadata, enter, leave, *values):
            self.launches.append(
                Launch(
                    metadata.name,
                    (x, y, z),
                    metadata.num_warps,
                    metadata.shared,
                    cubin,
                    self.architecture,
                    dict(
                        told for given in zip(names, values, strict=True) for told in _named(*given)
                    ),
                )
            )

        return launch


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of an argument, or of each of its named parts."""
    if hasattr(value, "_fields"):
        for field_name, part in zip(value._fields, value, strict=True):
            yield from _named(f"{name}.{field_name}", part)
    elif isinstance(value, torch.Tensor):
        yield name, Operand(value.numel(), value.element_size())
    else:
        yield name, value


@contextmanager
def compile_only(
    architecture: Architecture, without: Collection[str] = ()
) -> Iterator[list[Launch]]:
    """`with compile_only(90) as launches:` the active driver is the stand-in; what is launched is listed.

    Kernels named in `without` are not compiled, unless that was done before, and not listed.
    """

    def left_out(*, fn: Any, **told: Any) -> bool:
        return fn.name in without

    stand_in = _stand_in(architecture)
    stand_in.launches.clear()
    with knobs.runtime.scope(), driven_by(stand_in):
        if without:
            knobs.runtime.jit_cache_hook = left_out
        yield stand_in.launches


@functools.lru_cache(maxsize=8)
def _stand_in(architecture: Architecture) -> CompileOnlyDriver:
    # One for each chip: a compiled kernel keeps the launcher it was made with.
    return CompileOnlyDriver(architecture)

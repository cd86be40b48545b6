"""Triton's own launcher, in Python and C, over a libcuda that does nothing (stub.c): all that a launch costs the host
up to the call of the driver, on a machine without a GPU. It needs a C compiler, as Triton does.

Tensors are on the CPU; kernels are compiled for sm_90, and nothing runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget

from fusedres.kernels.bind import driven_by

SOURCE = Path(__file__).with_name("stub.c")
NAME = "libcuda.so.1"


class NoStub(RuntimeError):
    """The stub cannot be used here; the message says why."""


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
    ]


class StubDriver:
    """What Triton and fusedres ask of a driver: Triton's utilities and launcher for CUDA, over the stub."""

    def __init__(self, library: ctypes.CDLL) -> None:
        from triton.backends.nvidia import driver as nvidia

        self.library = library
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    @property
    def launches(self) -> int:
        """How many kernels were launched, ever."""
        return ctypes.c_uint64.in_dll(self.library, "launches").value

    def arriving(self, launch: Callable[[], object], sizes: Sequence[int]) -> tuple:
        """What a launch brings to the driver: grid, block, shared memory, stream, and the parameters of these sizes in
        bytes, as they stand in memory."""
        values = ctypes.create_string_buffer(sum(sizes))
        theirs = (ctypes.c_int * len(sizes))(*sizes)
        self.library.read_parameters(len(sizes), theirs, values)
        try:
            launch()
        finally:
            self.library.read_parameters(0, None, None)
        config = _Config.in_dll(self.library, "config")
        return (*config.grid,), (*config.block,), config.shared, config.stream, values.raw

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """`with stub_driver() as stub:` kernels are launched by Triton's own launcher, and nothing runs.

    Raises:
        NoStub: there is a GPU, no C compiler, or another libcuda in this process.
    """
    made = _driver()
    with knobs.nvidia.scope(), driven_by(made):
        # A launcher is linked against it at a kernel's first launch (Triton 3.6).
        knobs.nvidia.libcuda_path = str(_built().parent)
        yield made


@functools.cache
def _driver() -> StubDriver:
    # One: a compiled kernel keeps the launcher that it was made with.
    if torch.cuda.is_available():
        raise NoStub("there is a GPU, which has a driver of its own")
    library = ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)
    # What is loaded under a name answers for it, in Triton's launcher too; unless another was there before.
    if not hasattr(ctypes.CDLL(NAME), "launches"):
        raise NoStub(f"another {NAME} is loaded in this process already")
    with knobs.nvidia.scope():
        knobs.nvidia.libcuda_path = str(_built().parent)
        return StubDriver(library)


@functools.cache
def _built() -> Path:
    """The stub, kept in Triton's cache."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoStub("there is no C compiler")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = Path(knobs.cache.dir) / f"fusedres-stub-{digest}" / NAME
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / NAME
        command = [
            compiler,
            "-O2",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{NAME}",
            "-o",
            str(made),
            str(SOURCE),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise NoStub(f"{compiler} does not build {SOURCE.name}: {done.stderr.strip()[:200]}")
        os.replace(made, path)  # whole, for whoever builds it at the same time
    return path


def why_no_stub() -> str | None:
    """Why `stub_driver` cannot be used here; None where it can."""
    try:
        _driver()
    except NoStub as error:
        return str(error)
    except Exception as error:  # Triton's own build of its launcher
        return f"Triton's launcher cannot be built over it: {error}"
    return None


__all__ = ["NoStub", "StubDriver", "stub_driver", "why_no_stub"]

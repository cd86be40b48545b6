"""Which implementation runs, and why.

`auto` takes the Triton kernels for tensors on a GPU (and for CPU tensors under Triton's interpreter), plain PyTorch
elsewhere; `triton` and `aten` insist; `off` leaves swapped blocks to their own forward. A reason is always a sentence:
the same string goes into errors, into `repr` and into the report of `fuse_`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("auto", "triton", "aten", "off")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"{where}: the triton backend cannot run: Triton is not installed "
            "(`pip install triton`, on Linux); use 'auto' or 'aten'"
        )
    return name


_backend = _checked(os.environ.get("FUSEDRES_BACKEND", "auto"), "FUSEDRES_BACKEND")


def get_backend() -> str:
    """The backend that is asked for: `auto`, `triton`, `aten` or `off`."""
    return _backend


current_backend = get_backend


def set_backend(name: str) -> None:
    """Choose the backend for the whole process.

    `auto` (the default): Triton where it can run, plain PyTorch elsewhere. `triton`: Triton, or an error that says why
    not. `aten`: plain PyTorch on every device. `off`: swapped blocks run their own forward, and the functional API
    runs plain PyTorch. The variable FUSEDRES_BACKEND sets it from outside.
    """
    global _backend
    _backend = _checked(name, "set_backend")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """`with fusedres.backend("aten"):` the choice of `set_backend`, for a while (for all threads)."""
    global _backend
    before, _backend = _backend, _checked(name, "backend")
    try:
        yield
    finally:
        _backend = before


def resolve(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that runs for tensors of this device and dtype (`triton` or `aten`), and why.

    Raises:
        RuntimeError: `triton` was asked for and cannot run there; the message says why.
    """
    if _backend == "aten" or _backend == "off":
        return "aten", f"the backend is {_backend!r}"
    obstacle = why_not_triton(device, dtype)
    if obstacle is None:
        return "triton", "Triton can run there"
    if _backend == "triton":
        raise RuntimeError(
            f"the triton backend cannot run: {obstacle}; use set_backend('auto') or set_backend('aten')"
        )
    return "aten", obstacle


def wants_triton(on_gpu: bool) -> bool:
    """Whether a tensor may go to the operators; a cheap answer that torch.compile can trace."""
    return _backend == "triton" or (_backend == "auto" and (on_gpu or INTERPRET))


def is_eager() -> bool:
    """Whether PyTorch runs what is called as it is called: nothing is being compiled or transformed (torch.func)."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None


def goes_to_kernels(input: torch.Tensor) -> bool:
    """Whether an input that may go to the operators does: an empty one need not, one without strides cannot."""
    if input.numel() == 0 or input.layout is not torch.strided:
        return False
    # While torch.compile traces, the operator itself chooses when it runs.
    return torch.compiler.is_compiling() or resolve(input.device, input.dtype)[0] == "triton"


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device and dtype; None when they can."""
    if dtype not in DTYPES:
        return f"the kernels do not take {dtype}"
    if _backend == "auto" and not (device.type == "cuda" or (INTERPRET and device.type == "cpu")):
        return f"tensors on {device.type!r} go to plain PyTorch (the kernels run on GPUs)"
    # Asked at each call: a module that is loaded need not be searched for.
    if sys.modules.get("triton") is None and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "meta":  # shapes only, whatever there is to launch on
        return None
    from .kernels.chip import why_not_launchable

    return why_not_launchable(device.type)

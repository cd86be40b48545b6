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
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

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


# What the process does, and what a context (a thread, an asyncio task) does instead.
_of_process = _checked(os.environ.get("FUSEDRES_BACKEND", "auto"), "FUSEDRES_BACKEND")
_of_context: ContextVar[str | None] = ContextVar("fusedres backend", default=None)
# What was chosen last, by whomever. PyTorch 2.11 cannot trace a context variable, and a trace decides only whether
# operators are in the graph: which implementation they run is decided when they run.
_of_traces = _of_process


def get_backend() -> str:
    """The backend that is asked for here: `auto`, `triton`, `aten` or `off`."""
    return _of_traces if torch.compiler.is_compiling() else eager_backend()


def eager_backend() -> str:
    """The same where nothing is being compiled, which the caller knows: in a quarter of the time."""
    return _of_context.get() or _of_process


current_backend = get_backend


def set_backend(name: str) -> None:
    """Choose the backend for the whole process, all threads of it.

    `auto` (the default): Triton where it can run, plain PyTorch elsewhere. `triton`: Triton, or an error that says why
    not. `aten`: plain PyTorch on every device. `off`: swapped blocks run their own forward, and the functional API
    runs plain PyTorch. The variable FUSEDRES_BACKEND sets it from outside.

    Inside of `with backend(...)` the block's own choice goes on until its end.
    """
    global _of_process, _of_traces
    _of_process = _of_traces = _checked(name, "set_backend")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """`with fusedres.backend("aten"):` the choice of `set_backend`, for a while, in this thread (or asyncio task) only.

    Other threads, those that start meanwhile too, have the process's choice. So has a backward of CUDA tensors, which
    PyTorch runs in threads of its own: what was saved is the same on both backends, either can use it.
    """
    global _of_traces
    before = _of_context.get()
    _of_context.set(_checked(name, "backend"))
    _of_traces = name
    try:
        yield
    finally:
        _of_context.set(before)
        _of_traces = before or _of_process


def resolve(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that runs for tensors of this device and dtype (`triton` or `aten`), and why.

    Raises:
        RuntimeError: `triton` was asked for and cannot run there; the message says why.
    """
    asked = get_backend()
    if asked in ("aten", "off"):
        return "aten", f"the backend is {asked!r}"
    obstacle = why_not_triton(device, dtype)
    if obstacle is None:
        return "triton", "Triton can run there"
    if asked == "triton":
        raise RuntimeError(
            f"the triton backend cannot run: {obstacle}; use set_backend('auto') or set_backend('aten')"
        )
    return "aten", obstacle


def wants_triton(on_gpu: bool) -> bool:
    """Whether a tensor may go to the operators; a cheap answer that torch.compile can trace.

    Not where forward-mode AD is on (`forward_ad.dual_level`, `torch.func.jvp`, `jacfwd`, `hessian`): a tangent needs a
    pass for each operation, and PyTorch's own know theirs to any depth, where an operator would lose it in silence.
    """
    asked = get_backend()
    return (asked == "triton" or (asked == "auto" and (on_gpu or INTERPRET))) and not has_tangents()


def has_tangents() -> bool:
    """Whether tensors of this process may carry tangents of forward-mode AD."""
    return forward_ad._current_level >= 0


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
    if get_backend() == "auto" and not (
        device.type == "cuda" or (INTERPRET and device.type == "cpu")
    ):
        return f"tensors on {device.type!r} go to plain PyTorch (the kernels run on GPUs)"
    # Asked at each call: a module that is loaded need not be searched for.
    if sys.modules.get("triton") is None and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "meta":  # shapes only, whatever there is to launch on
        return None
    from .kernels.chip import why_not_launchable

    return why_not_launchable(device.type)

"""Starting a kernel without asking everything again.

Triton's own start looks at every argument at every launch (some 25 us for twenty of them) to find the compiled kernel.
What it looks at is in a key here: dtype and 16-byte alignment of each tensor, each integer, each constant, Triton's own
cache of the kernel for the device. Under that key the compiled kernel is kept, and started by Triton's
`compiled[grid](*arguments)`.

What else it looks at is rare: hooks, debugging, instrumentation, a pipeline of the user's. While any of them is on,
launches go through Triton. (That no global of a kernel has changed is not asked: they are constants.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .bind import is_watched, kernel_is_watched
from .chip import INTERPRETED, current_chip

# (what starts it, the constants in the kernel's order, kernel, Triton's cache and driver: kept, so that nothing else
# gets their ids)
_Started = tuple[Callable[..., None], tuple, Any]
_started: dict[tuple, _Started] = {}
MOST = 4096  # shapes that keep changing must not fill the memory


def start(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    integers: tuple,
    floats: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """`kernel[grid](*tensors, *integers, *floats, **constants, **options)`; integers may be None or tuples of them.

    The kernel's arguments stand in that order; Triton compiles no value of a float into it.

    Raises:
        RuntimeError: the kernel would be compiled while a CUDA graph is captured.
    """
    if INTERPRETED or is_watched() or kernel_is_watched(kernel):
        _start_by_triton(kernel, grid, (*tensors, *integers, *floats), constants | options)
        return
    active = driver.active
    caches = kernel.device_caches[active.get_current_device()]
    key = (
        id(caches), id(active), grid, integers,
        *constants.values(), *options.values(),
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
    )  # fmt: skip
    found = _started.get(key)
    if found is not None:
        found[0](*tensors, *integers, *floats, *found[1])
        return
    given = constants | options
    compiled = _start_by_triton(kernel, grid, (*tensors, *integers, *floats), given)
    # A hook took the launch, or another thread still compiles. On AMD, Triton looks at more than the key holds.
    if compiled is None or hasattr(compiled, "result") or current_chip().backend != "cuda":
        return
    names = kernel.arg_names[len(tensors) + len(integers) + len(floats) :]
    if len(_started) >= MOST:
        _started.clear()
    three = (*grid, 1, 1)[:3]
    _started[key] = compiled[three], tuple(given[name] for name in names), (kernel, caches, active)


def _start_by_triton(kernel: Any, grid: tuple[int, ...], arguments: tuple, given: dict) -> Any:
    if _is_capturing():
        with _nothing_compiles():
            return kernel[grid](*arguments, **given)
    return kernel[grid](*arguments, **given)


def _is_capturing() -> bool:
    """Whether the current stream is recorded into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_hooking = threading.RLock()


@contextmanager
def _nothing_compiles() -> Iterator[None]:
    """In this thread, a kernel that Triton has yet to compile is refused: its code would be loaded into the device
    while a graph is captured, which ends the capture. Triton asks a hook before it compiles.
    """
    with _hooking:
        thread, before = threading.get_ident(), knobs.runtime.jit_cache_hook

        def refuse(**told: Any) -> bool | None:
            if threading.get_ident() != thread:
                return None if before is None else before(**told)
            raise RuntimeError(
                f"{told['fn'].name} is not compiled for these shapes yet and cannot be while a CUDA graph is captured: "
                "warm up first, with the same shapes outside of the capture"
            )

        knobs.runtime.jit_cache_hook = refuse
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before

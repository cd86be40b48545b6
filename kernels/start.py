"""Starting a kernel without asking everything again.

Triton's own start looks at every argument at every launch (some 25 us for twenty of them) to find the compiled kernel.
A `Launch` stands in a plan, which is made for tensors of these dtypes and alignments: what Triton compiled for it at
its first start is kept, and started as Triton's `compiled[grid]` would start it; by plain pointers where `bind` knows
the launcher.

What else Triton looks at is rare: hooks before a run, debugging, instrumentation, a pipeline of the user's, an emptied
cache. While any of them is on, launches go through Triton. (That no global of a kernel has changed is not asked: they
are constants.)
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .bind import Bound, Given, Pointer, bind, is_watched, kernel_is_watched, replaced
from .chip import INTERPRETED, current_chip


class Launch:
    """`kernel[grid](*arguments, **constants, **options)`, but for the tensors and some floats.

    arguments: integers, floats, None, and tuples of them; a `Pointer` says which of a call's tensors stands there, a
    `Given` which of its floats. Triton compiles no value of a float into a kernel.
    """

    __slots__ = (
        "_active", "_compiled", "_values", "_was_tried", "arguments", "bound", "caches", "constants", "grid", "kernel",
        "options",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple,
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        self.kernel, self.grid, self.arguments = kernel, grid, arguments
        self.constants, self.options = constants, options
        self._compiled: Any = None
        self._active: Any = None
        self.caches: Any = None
        self._values: tuple = ()
        self.bound: Bound | None = None
        self._was_tried = False

    def on(self, place: Callable[[int], int]) -> "Launch":
        """The same on other tensors of a call: `place` says where each stands now."""

        def there(value: Any) -> Any:
            return Pointer(place(int(value))) if type(value) is Pointer else value

        arguments = replaced(self.arguments, there)
        return Launch(self.kernel, self.grid, arguments, self.constants, self.options)

    def start(self, tensors: Sequence[Tensor | None], floats: tuple[float, ...]) -> None:
        """Start it on these tensors of the call.

        Raises:
            RuntimeError: the kernel would be compiled while a CUDA graph is captured.
        """

        def brought(value: Any) -> Any:
            if type(value) is Pointer:
                return tensors[value]
            return floats[value] if type(value) is Given else value

        arguments = replaced(self.arguments, brought)
        if INTERPRETED or is_watched() or kernel_is_watched(self.kernel):
            self._start_by_triton(arguments)
            return
        active = driver.active
        device = active.get_current_device()
        if self._compiled is not None and self._active is active and self.is_there(device):
            compiled = self._compiled
            stream = active.get_current_stream(device)
            if (
                not self._was_tried
            ):  # at the second start: binding takes longer than a start, and some come once
                self._was_tried = True
                x, y, z = (*self.grid, 1, 1)[:3]
                self.bound = bind(compiled, (x, y, z), self.arguments, self._values)
            if self.bound is not None:
                self.bound(stream, [0 if t is None else t.data_ptr() for t in tensors], floats)
                return
            compiled.run(
                *(*self.grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None,
                *arguments, *self._values,
            )  # fmt: skip
            return
        compiled = self._start_by_triton(arguments)
        # A hook took the launch, or another thread still compiles. On AMD, Triton looks at more than a plan holds.
        if compiled is None or hasattr(compiled, "result") or current_chip().backend != "cuda":
            return
        names = self.kernel.arg_names[len(arguments) :]
        known = self.constants | self.options
        self._values = tuple(known[name] for name in names)
        self._active, self.caches = active, self.kernel.device_caches[device]
        self._compiled, self.bound, self._was_tried = compiled, None, False

    def is_there(self, device: int) -> bool:
        """Whether Triton still has what it compiled for this launch."""
        return self.kernel.device_caches[device] is self.caches

    def _start_by_triton(self, arguments: tuple) -> Any:
        given = self.constants | self.options
        if _is_capturing():
            with _nothing_compiles():
                return self.kernel[self.grid](*arguments, **given)
        return self.kernel[self.grid](*arguments, **given)


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

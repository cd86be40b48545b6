"""Starting a kernel without asking everything again.

Triton's own start looks at every argument at every launch (some 25 us for twenty of them) to find the compiled kernel.
What it looks at is in a key here: dtype and 16-byte alignment of each tensor, each integer, each constant, the device.
Under that key the compiled kernel is kept, and started by Triton's `compiled[grid](*arguments)`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.runtime import driver

from .chip import current_chip

# (what starts it, the constants in the kernel's order, kernel and driver: kept, so that nothing else gets their ids)
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
    """
    # Elsewhere than on CUDA (and in the interpreter) Triton looks at more than the key holds.
    if current_chip().backend != "cuda":
        kernel[grid](*tensors, *integers, *floats, **constants, **options)
        return
    active = driver.active
    key = (
        id(kernel), id(active), active.get_current_device(), grid, integers,
        *constants.values(), *options.values(),
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
    )  # fmt: skip
    found = _started.get(key)
    if found is not None:
        found[0](*tensors, *integers, *floats, *found[1])
        return
    compiled = kernel[grid](*tensors, *integers, *floats, **constants, **options)
    if compiled is None:  # a hook took the launch
        return
    names = kernel.arg_names[len(tensors) + len(integers) + len(floats) :]
    given = constants | options
    if len(_started) >= MOST:
        _started.clear()
    three = (*grid, 1, 1)[:3]
    _started[key] = compiled[three], tuple(given[name] for name in names), (kernel, active)

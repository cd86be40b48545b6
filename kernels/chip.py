"""What the kernels run on, as Triton's active driver tells it; never asked of torch.cuda.

So a stand-in set with `triton.runtime.driver.set_active` is believed: it may compile without launching.
"""

from dataclasses import dataclass

import triton
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def _probe():
    pass


# Decided when the kernels are decorated, so it is read off a decorated function.
INTERPRETED = isinstance(_probe, InterpretedFunction)


@dataclass(frozen=True)
class Chip:
    """architecture: 90 for sm_90, 0 where it is no number. multiprocessors: how many. shared_memory: bytes a program
    may use. backend: Triton's name for it. warp_size: lanes of a warp."""

    architecture: int
    multiprocessors: int
    shared_memory: int
    backend: str = "cuda"
    warp_size: int = 32


OLDEST = 75  # of the architectures that Triton compiles for
# Few multiprocessors: the interpreter runs programs one after the other, and a handful is enough to merge.
_INTERPRETER = Chip(architecture=0, multiprocessors=2, shared_memory=1 << 16, backend="interpreter")
# For a driver that does not tell: multiprocessors of A100, H100/H200, B200 and MI300X.
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}


def current_chip() -> Chip:
    """The chip of the active driver's current device."""
    if INTERPRETED:
        return _INTERPRETER
    active = driver.active
    key = id(active), active.get_current_device()
    if key not in _chips:
        _chips[key] = active, _chip_of(active, key[1])
    return _chips[key][1]


# By identity, since a stand-in need not be hashable; the driver is kept, so that no other gets its identity.
_chips: dict[tuple[int, int], tuple[object, Chip]] = {}


def forget() -> None:
    """Ask the drivers again: one may be of another chip than before."""
    _chips.clear()


def _chip_of(active, device: int) -> Chip:
    target = active.get_current_target()
    properties = active.utils.get_device_properties(device)
    return Chip(
        architecture=target.arch if isinstance(target.arch, int) else 0,
        multiprocessors=properties.get(
            "multiprocessor_count", _MULTIPROCESSORS.get(target.arch, 132)
        ),
        shared_memory=properties.get("max_shared_mem", 48 << 10),
        backend=target.backend,
        warp_size=target.warp_size,
    )


def why_not_launchable(device_type: str) -> str | None:
    """Why a kernel cannot be launched on tensors of this device type; None when it can."""
    if INTERPRETED:
        return None
    try:
        active = driver.active
    except RuntimeError as error:
        return f"Triton has no active driver ({error})"
    # Triton's own drivers launch on a device and refuse host pointers; a stand-in takes what it is given.
    if device_type == "cpu" and type(active).__module__.startswith("triton.backends."):
        return "the tensors are on the CPU and Triton's driver launches on a GPU"
    target = active.get_current_target()
    if target.backend == "cuda" and target.arch < OLDEST:
        return f"the GPU is of architecture sm_{target.arch}, Triton needs sm_{OLDEST} or newer"
    return None

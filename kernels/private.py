"""What is taken from inside of PyTorch, with what stands for it where a version has it not (tried: 2.11 and 2.15)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:  # Inductor's own; a tenth of the time of the Python binding, which parses a device
    from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda
except ImportError:
    _empty_strided_cpu = _empty_strided_cuda = None

# (shape, stride, dtype) -> an empty tensor on a device of this kind; on a GPU, on the current one.
EMPTY: dict[str, Callable[..., Tensor]] = {
    "cpu": _empty_strided_cpu
    or (lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)),
    "cuda": _empty_strided_cuda
    or (lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda")),
}


def empty_strided(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`torch.empty_strided` on a device; on a GPU, on the current one."""
    if (empty := EMPTY.get(device.type)) is not None:
        return empty(shape, stride, dtype)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def dispatch_keys(tensor: Tensor) -> int:
    """The set of PyTorch's dispatch keys that a tensor has, as bits."""
    return torch._C._dispatch_keys(tensor).raw_repr()


_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled


def is_seen() -> bool:
    """Whether a mode, a transform of torch.func, a profiler or a trace is at work in this thread."""
    return (
        _modes() > 0 or _functions() > 0 or _transforms() or _profiling() or _tracing() is not None
    )


def is_current(device: torch.device) -> bool:
    """Whether launches go to this device without switching to it."""
    return device.type != "cuda" or device.index == torch._C._cuda_getDevice()

"""Empty tensors, by the way that costs least: a hundred nanoseconds count where a call makes eight of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:
    import torch._C._dynamo.guards as _inductor  # whose own take half the time: no device to parse
except ImportError:
    _inductor = None  # type: ignore[assignment]
_empty_strided_cpu, _empty_strided_cuda = (
    getattr(_inductor, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")
)

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

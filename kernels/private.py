"""What is taken from inside of PyTorch, with what stands for it where a version has it not (tried: 2.11 and 2.15)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None
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


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What tells whether as many other tensors are like these: type, dispatch keys (those that a mode of this thread
    adds included), dtype, device, requires_grad, sizes and strides. It holds none of them."""
    sizes, strides = ([list(each) for each in kind] for kind in _shapes(tensors))
    if (
        TensorGuards is not None
    ):  # what torch.compile's own guards are made of: a fortieth of the time
        check = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        if check(*tensors) is True:
            return check
    known = tuple(map(_look, tensors))
    return lambda *others: tuple(map(_look, others)) == known


def _shapes(tensors: Sequence[Tensor]) -> tuple[list, list]:
    return [t.shape for t in tensors], [t.stride() for t in tensors]


def _look(t: Tensor) -> tuple:
    included = torch._C._dispatch_tls_local_include_set().raw_repr()
    return (
        type(t), dispatch_keys(t), included, t.dtype, t.get_device(), t.requires_grad, t.shape, t.stride(),
    )  # fmt: skip


def dispatch_keys(tensor: Tensor) -> int:
    """The set of PyTorch's dispatch keys that a tensor has, as bits."""
    return torch._C._dispatch_keys(tensor).raw_repr()


_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_profiling, _compiling = torch._C._autograd._profiler_enabled, torch.compiler.is_compiling


def is_quiet() -> bool:
    """Whether nobody watches or transforms what PyTorch is called with in this thread: no mode, no transform of
    torch.func, no dual tensors, no profiler, no trace."""
    # First: torch.compile knows the answer, and takes none of what follows into its graph.
    return not (
        _compiling()
        or _modes()
        or _functions()
        or _transforms()
        or _profiling()
        or _tracing() is not None
        or forward_ad._current_level >= 0
    )


def is_current(index: int) -> bool:
    """Whether launches go to this GPU without switching to it; always, of a CPU (-1)."""
    return index < 0 or index == torch._C._cuda_getDevice()

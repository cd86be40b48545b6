"""When a call may go straight to the launches, past `torch.ops`; and what is taken from inside of PyTorch to tell.

The operators are there for whoever looks at what PyTorch runs: torch.compile and export, torch.func, dispatch and
function modes, fake tensors, tracing, profilers, tensor subclasses, forward-mode AD. Where nobody looks, a call of
theirs costs half of what it does. Tried on PyTorch 2.11 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

PLAIN = (Tensor, nn.Parameter)


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What tells whether as many other tensors are like these: type, dispatch keys (those that a mode of this thread
    adds included), dtype, device, requires_grad, sizes and strides. It holds none of them."""
    # What torch.compile's own guards are made of takes a tenth of the time. (It takes no tensor twice.)
    if TensorGuards is not None:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        check = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        if check(*tensors) is True:
            return check
    known = [look(t) for t in tensors]
    return lambda *others: [look(t) for t in others] == known


def look(t: Any) -> tuple:
    """What `guard` compares, of one tensor."""
    if not isinstance(t, Tensor):
        return (type(t),)
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
        or (_functions() and _are_functions_seen())
        or _transforms()
        or _profiling()
        or _tracing() is not None
        or forward_ad._current_level >= 0
    )


def _are_functions_seen() -> bool:
    """Whether a function mode is on that sees more than which device new tensors are made on."""
    modes = (torch._C._get_function_stack_at(k) for k in range(_functions()))
    return any(type(mode) is not DeviceContext for mode in modes)


def is_current(index: int) -> bool:
    """Whether launches go to this GPU without switching to it; always, of a CPU (-1)."""
    return index < 0 or index == torch._C._cuda_getDevice()


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether these are strided tensors of one device themselves, with no view of them by anybody else."""
    return all(
        t is None or (type(t) in PLAIN and _is_plain_set(dispatch_keys(t), t)) for t in tensors
    )


_allowed: dict[str, int] = {}


def _is_plain_set(keys: int, tensor: Tensor) -> bool:
    """Whether these dispatch keys, the tensor's, are those of a dense tensor of its device, or fewer."""
    kind = tensor.device.type
    allowed = _allowed.get(kind)
    if allowed is None:
        if kind not in ("cpu", "cuda"):
            return False
        allowed = _allowed[kind] = dispatch_keys(torch.empty(1, device=kind))
    return keys & ~allowed == 0

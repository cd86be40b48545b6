"""When a call may go straight to the launches, past `torch.ops`.

The operators are there for whoever looks at what PyTorch runs: torch.compile and export, torch.func, dispatch and
function modes, fake tensors, tracing, profilers, tensor subclasses, forward-mode AD. Where nobody looks, a call of
theirs costs half of what it does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..kernels.private import dispatch_keys, is_seen

PLAIN = (Tensor, nn.Parameter)


def is_quiet() -> bool:
    """Whether nobody watches or transforms what PyTorch is called with in this thread."""
    # First: torch.compile knows the answer, and takes none of what follows into its graph.
    return not (torch.compiler.is_compiling() or is_seen() or forward_ad._current_level >= 0)


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether these are strided tensors of one device themselves, with no view of them by anybody else."""
    return all(
        t is None or (type(t) in PLAIN and is_plain_set(dispatch_keys(t), t)) for t in tensors
    )


_allowed: dict[str, int] = {}


def is_plain_set(keys: int, tensor: Tensor) -> bool:
    """Whether these dispatch keys, the tensor's, are those of a dense tensor of its device, or fewer."""
    kind = tensor.device.type
    allowed = _allowed.get(kind)
    if allowed is None:
        if kind not in ("cpu", "cuda"):
            return False
        allowed = _allowed[kind] = dispatch_keys(torch.empty(1, device=kind))
    return keys & ~allowed == 0

"""When a call may go straight to the launches, past `torch.ops`.

The operators are there for whoever looks at what PyTorch runs: torch.compile and export, torch.func, dispatch and
function modes, fake tensors, tracing, profilers, tensor subclasses, forward-mode AD. Where nobody looks, a call of
theirs costs half of what it does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..kernels.private import dispatch_keys, is_quiet

__all__ = ["PLAIN", "are_plain", "is_quiet"]

PLAIN = (Tensor, nn.Parameter)


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

"""What the layers and functions that a fused site stands for are made of, as it was when fusedres was imported.

Somebody may replace one for the whole process (guided backpropagation replaces ReLU's, test-time adaptation
BatchNorm's): a site that stands for it must not run then.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..activations import NAMES
from ..nn.activations import LAYERS
from ..nn.norms import FUSED_NORMS, OWN_FORWARDS, why_not_fused
from ..nn.projection import CONVOLUTIONS
from .guards import INLINE, Guard
from .nodes import Skipped, why_not_skipped

_BEHIND_NORM = ((F, "batch_norm"), (torch, "batch_norm"))
_CLASSES = (*FUSED_NORMS, *CONVOLUTIONS, *LAYERS, nn.SyncBatchNorm, nn.Identity, nn.Sequential)


def _functions_of(activation: str) -> Iterator[tuple[Any, str]]:
    base = activation.partition("(")[0].removesuffix("_tanh")
    for owner in (F, torch):
        for name in (base, f"{base}_"):
            if hasattr(owner, name):
                yield owner, name


def _names_in(cls: type) -> Iterator[tuple[Any, str]]:
    for name in ("forward", "__call__", "_call_impl", "_check_input_dim", "_conv_forward"):
        if hasattr(cls, name):
            yield cls, name


def _is_pytorchs(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__globals__.get("__name__", "").startswith("torch.")
    return isinstance(value, types.BuiltinFunctionType)


_KNOWN: dict[tuple[Any, str], Any] = {
    (owner, name): value if _is_pytorchs(value := getattr(owner, name)) else object()
    for owner, name in (
        *_BEHIND_NORM,
        *(pair for name in NAMES for pair in _functions_of(name)),
        *((F, f"conv{n}d") for n in (1, 2, 3)),
        *(pair for cls in _CLASSES for pair in _names_in(cls)),
        (nn.Module, "__call__"),
    )
}  # fmt: skip


def guards_behind(
    norms: Iterable[nn.Module | None], skipped: Iterable[Skipped], activations: Iterable[str | None]
) -> list[Guard]:
    """That what the BatchNorms, the other children that are not called, and the activations compute is what it was.

    Args:
        norms: None for one that is called as a function.
    """
    wanted: dict[tuple[Any, str], None] = {(nn.Module, "__call__"): None}
    for norm in norms:
        wanted |= dict.fromkeys(_BEHIND_NORM)
        if norm is not None:
            wanted |= dict.fromkeys(_names_in(type(norm)))
    for each in skipped:
        wanted |= dict.fromkeys(_names_in(each.kind))
        if each.kind in CONVOLUTIONS:
            wanted[F, f"conv{CONVOLUTIONS.index(each.kind) + 1}d"] = None
    for name in activations:
        if name is not None:
            wanted |= dict.fromkeys(_functions_of(name))
    return [_stays(owner, name) for owner, name in wanted]


def _stays(owner: Any, name: str) -> Guard:
    # Of a class that is not PyTorch's, what it is now.
    value = _KNOWN.get((owner, name), getattr(owner, name))
    text = f"{owner.__name__.rpartition('.')[2]}.{name}"
    return Guard(
        None, f"{{0}}.{name} is {{1}}", (owner, value), f"{text} was replaced for the whole process"
    )


# --- the usual case of a child that is not called ----------------------------------------------------------------

_NOT_CALLED = (
    "not ({m}._forward_hooks or {m}._forward_pre_hooks or {m}._backward_hooks or {m}._backward_pre_hooks) "
    "and ('forward' not in {m}.__dict__ or type({m}.__dict__['forward']) in {0})"
)
# What they compute is told by their class.
_BY_CLASS = (*CONVOLUTIONS, nn.Sequential, nn.ReLU, nn.SiLU, nn.Hardswish, nn.Mish)


def _usual_norm(guard: Guard) -> Guard:
    test = (
        f"type({{m}}) in {{1}} and {_NOT_CALLED} and type({{m}}._parameters['weight']) is {{2}} "
        "and type({m}._parameters['bias']) is {2}"
    )
    return Guard(guard.path, test, (OWN_FORWARDS, FUSED_NORMS, nn.Parameter))


def _usual_child(guard: Guard) -> Guard | None:
    kind = guard.constants[1].kind
    test = f"type({{m}}) is {{1}} and {_NOT_CALLED}"
    return Guard(guard.path, test, (OWN_FORWARDS, kind)) if kind in _BY_CLASS else None


INLINE.update({why_not_fused: _usual_norm, why_not_skipped: _usual_child})

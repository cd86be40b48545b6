"""Putting a plan into an instance: its class becomes a subclass of its own class, with another forward.

The subclass, not the instance, holds the plan. So forward gets the `self` it is called on (copies and replicas
too), the instance's `__dict__` is left as it is, and taking the plan out is giving the class back.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch import current_backend
from ..nn.norms import ORIGINAL, original_class, why_not_fused
from .nodes import why_not_skipped
from .plan import Plan
from .record import child_at, how_reads_differ
from .rewrite import compile_source, fingerprint
from .subclass import PLAN, subclass

# One class for all blocks of a kind that are fused alike; it goes when the last of them does.
_CLASSES: weakref.WeakValueDictionary[tuple[type[nn.Module], Plan], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)


def plan_of(module: nn.Module) -> Plan | None:
    """The plan a module runs by; None for a module that is not fused."""
    return getattr(type(module), PLAN, None)


def is_covered(module: nn.Module) -> bool:
    """Whether somebody derived a class from the fused one, as parametrizations and FSDP do."""
    return plan_of(module) is not None and PLAN not in vars(type(module))


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Assign the class past any `__setattr__` of the module's own."""
    object.__setattr__(module, "__class__", cls)


def fused_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The subclass of `original` that runs by `plan`.

    Raises:
        TypeError: `original` cannot be derived from.
    """
    found = _CLASSES.get((original, plan))
    if found is None:
        body = {
            PLAN: plan,
            ORIGINAL: original,
            "forward": _make_forward(original, plan),
            "__reduce_ex__": _reduce_ex,
            "__prepare_scriptable__": _prepare_scriptable,
        }
        found = _CLASSES[original, plan] = subclass(original, body)
    return found


def _make_forward(original: type[nn.Module], plan: Plan):
    fused = compile_source(plan.source, plan.imports)
    traced = original.forward
    count, smallest = len(plan.inputs), plan.min_elements
    inner = {each.kind: each.kind.forward for each in plan.skipped}

    @functools.wraps(traced)
    def forward(self, *args, **kwargs):
        if kwargs or len(args) != count:
            args, kwargs = _bind(plan, args, kwargs)
        if (
            kwargs
            or len(args) != count
            or original.forward is not traced
            or any(kind.forward is not known for kind, known in inner.items())
            or why_own_forward(self, plan) is not None
            or not _are_plain_tensors(args)
            or (smallest and any(arg.numel() < smallest for arg in args))
        ):
            return original.forward(self, *args, **kwargs)
        return fused(self, *args)

    return forward


def _bind(plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The call with its required arguments by position and its default ones left out, where it comes to that."""
    count, kwargs = len(plan.inputs), dict(kwargs)
    values = list(args[:count])
    for name in plan.inputs[len(values) :]:
        if name not in kwargs:
            return args, kwargs
        values.append(kwargs.pop(name))
    for value, (_, default) in zip(args[count:], plan.defaults, strict=False):
        if value is not default:
            return args, {
                **kwargs,
                **dict(zip(plan.inputs[len(args) :], values[len(args) :], strict=True)),
            }
    for name, default in plan.defaults:
        if kwargs.get(name, default) is default:
            kwargs.pop(name, None)
    return tuple(values), kwargs


def _are_plain_tensors(args: tuple) -> bool:
    # A proxy, a DTensor or a NestedTensor knows the module's own operations, not ours.
    return all(type(arg) is Tensor or type(arg) is nn.Parameter for arg in args)


def why_own_forward(module: nn.Module, plan: Plan) -> str | None:
    """Why the module runs its own forward if it is called now; None when it runs fused.

    Called at each forward: what the children are, and what else the plan depends on, may change at any time.
    """
    if current_backend() == "off":
        return "the backend is 'off'"
    if torch.jit.is_tracing():
        return "torch.jit.trace records it"
    if _has_any_global_hook():
        return "hooks on all modules are registered, which run only when each child is called"
    return why_plan_is_stale(module, plan)


def why_plan_is_stale(module: nn.Module, plan: Plan) -> str | None:
    """Why the plan no longer fits the module; None when it does."""
    for reads in plan.reads:
        if (reason := how_reads_differ(module, reads)) is not None:
            return reason
    for path in plan.norms:
        norm = child_at(module, path)
        if norm is None or (reason := why_not_fused(norm)) is not None:
            return f"{'.'.join(path)}: {'it was removed' if norm is None else reason}"
    for skipped in plan.skipped:
        if (reason := why_not_skipped(child_at(module, skipped.path), skipped)) is not None:
            return f"{'.'.join(skipped.path)}: {reason}"
    return None


def _reduce_ex(self, protocol):
    """What the original class gives, told to put the plan back in afterwards."""
    original = original_class(self)
    function, arguments, *rest = super(vars_owner(self), self).__reduce_ex__(protocol)
    if is_covered(self):
        return (function, arguments, *rest)
    arguments = tuple(original if item is type(self) else item for item in arguments)
    return (restore, (plan_of(self), function, arguments), *rest)


def vars_owner(module: nn.Module) -> type[nn.Module]:
    """The class in the module's ancestry that holds the plan."""
    return next(cls for cls in type(module).__mro__ if PLAN in vars(cls))


def restore(plan: Plan, function: Any, arguments: tuple) -> nn.Module:
    """Make a fused module again from its pickle, or a plain one if its class's code is not what was traced."""
    module = function(*arguments)
    if fingerprint(type(module), plan.skipped) == plan.fingerprint:
        set_class(module, fused_class(type(module), plan))
    return module


# TorchScript remembers what it has prepared by id, and lets go of the fused module that its double replaces: an id that
# was used again would stand for another module. So a double keeps its module alive.
_DOUBLED: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def _prepare_scriptable(self):
    """The unfused double that TorchScript compiles; it shares parameters and buffers with this module.

    TorchScript's preparation puts what it gets back into the parent. A fused parent is a double itself by then; one
    that is not fused keeps the doubles, which compute the same: script a deepcopy of it.
    """
    return unfused_double(self, {})


def unfused_double(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """The same tree of modules with no fused one in it; TorchScript's preparation writes to it."""
    if id(module) not in memo:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        cls = original_class(module)
        double: nn.Module = object.__new__(cls)
        memo[id(module)] = double
        _DOUBLED[double] = module
        object.__setattr__(double, "__dict__", dict(vars(module)))
        vars(double)["_modules"] = {
            name: None if child is None else unfused_double(child, memo)
            for name, child in module._modules.items()
        }
    return memo[id(module)]

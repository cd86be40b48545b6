"""Putting a plan into an instance, so that its author, and whoever looks at it, notices as little as can be.

The instance gets a `forward` of its own, a `Seat`; its class stays exactly what it was, for who asks by `type(layer) is
nn.Sequential`, for `super(type(self), self)`, for tables by type, for those who derive a class and assign it
(parametrizations, FSDP). Copies, pickles and replicas have a seat of their own; taking it out is removing the entry.

What remains: a clone made by copying the `__dict__` shares its seat, which finds the clone by who calls it; where that
cannot be asked (the clone's `forward` called by name, or under torch.compile) it would run on the original.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from ..dispatch import current_backend, eager_backend
from ..nn.norms import OWN_FORWARDS, is_replaced
from .guards import compiled, why_not
from .plan import Plan
from .rewrite import compile_source, fingerprint

_is_compiling = torch.compiler.is_compiling
_is_tracing, _functions = torch._C._is_tracing, torch._C._len_torch_function_stack
# What a seat puts into an instance.
_ENTRIES = ("forward", "__prepare_scriptable__")
# One function for all blocks of a kind that are fused alike; it goes when the last of them does.
_FORWARDS: weakref.WeakValueDictionary[tuple[type[nn.Module], Plan], Any] = (
    weakref.WeakValueDictionary()
)


def seat_of(module: nn.Module) -> Seat | None:
    """The seat that a module has; None for one that is not fused."""
    forward = vars(module).get("forward")
    return forward if type(forward) is Seat else None


def plan_of(module: nn.Module) -> Plan | None:
    """The plan a module runs by; None for a module that is not fused."""
    seat = seat_of(module)
    return None if seat is None else seat.plan


def install(module: nn.Module, plan: Plan | None) -> None:
    """Let a module run by a plan, or (None) by its own forward again; past any `__setattr__` of its own."""
    if seat_of(module) is not None:
        for name in _ENTRIES:
            vars(module).pop(name, None)
    if plan is not None:
        seat = Seat(module, plan, type(module))
        vars(module).update(zip(_ENTRIES, (seat, seat.double), strict=True))


def fused_forward(original: type[nn.Module], plan: Plan) -> Callable[..., Any]:
    """The forward of a plan, as a function of the module it is called on; one for all that are fused alike.

    Raises:
        SyntaxError: the plan's source is none.
    """
    found = _FORWARDS.get((original, plan))
    if found is None:
        found = _FORWARDS[original, plan] = _make_forward(original, plan)
    return found


def _make_forward(original: type[nn.Module], plan: Plan) -> Callable[..., Any]:
    fused = compile_source(plan.source, plan.imports)
    fits, fits_compiled = compiled(plan.guards, is_eager=True), compiled(plan.guards)
    traced: Any = original.forward
    count, smallest = len(plan.inputs), plan.min_elements
    may_bind = _takes_by_name(traced, plan)

    @functools.wraps(traced)
    def forward(self, *args, **kwargs):
        if may_bind and (kwargs or len(args) != count):
            args, kwargs = _bind(plan, args, kwargs)
        if kwargs or len(args) != count or type(self).forward is not traced:
            return type(self).forward(self, *args, **kwargs)
        # Hooks on all modules wait for the call of each child.
        if _is_compiling():
            is_own = (
                current_backend() == "off"
                or _has_any_global_hook()
                or torch.jit.is_tracing()
                or not fits_compiled(self)
            )
        else:
            is_own = (
                eager_backend() == "off"
                or _has_any_global_hook()
                or _is_tracing()
                or (_functions() > 0 and _sees_functions())
                or not fits(self)
            )
        if not is_own:
            # A proxy, a DTensor or a NestedTensor knows the module's own operations, not ours.
            for arg in args:
                if (type(arg) is not Tensor and type(arg) is not nn.Parameter) or (
                    smallest and arg.numel() < smallest
                ):
                    is_own = True
        return type(self).forward(self, *args) if is_own else fused(self, *args)

    return forward


_ORPHAN = (
    "the forward of a fused module was copied without it; call the copy itself, or fuse it anew"
)


class Seat:
    """The fused forward of one module, `forward` in its `__dict__`.

    It knows its module weakly, so that the module goes when its last owner lets go of it. A clone that was made by
    copying the `__dict__` (replicas of DataParallel, MAML's clone_module) calls it as its own: then it runs on that.

    Args:
        plan: None for one that comes out of a pickle and no longer fits: it runs the module's own forward.
        kind: the class whose forward was traced.
    """

    def __init__(self, module: nn.Module | None, plan: Plan | None, kind: Any) -> None:
        self._module: Callable[[], Any] = _nobody if module is None else weakref.ref(module)
        self.plan = plan
        self.kind = kind
        self._forward: Any = kind.forward if plan is None else fused_forward(kind, plan)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if not _is_compiling() and (module is None or _holders(module.__dict__) != _ONE):
            # nn.Module's call names itself `self`. (What it takes to read that is not asked of each call.)
            caller = sys._getframe(1).f_locals.get("self")
            if caller is not module:
                module = self._owner(module, caller)
        if module is None:
            raise RuntimeError(_ORPHAN)
        return self._forward(module, *args, **kwargs)

    def _owner(self, module: Any, caller: Any) -> Any:
        """The module to run on, where the caller is another one than ours: a clone, which calls this as its own."""
        if not isinstance(caller, nn.Module) or vars(caller).get("forward") is not self:
            return module
        if module is None:
            self._module = weakref.ref(caller)
        return caller

    # What is asked of a bound method: exporters want its code, libraries its arguments.

    @property
    def __self__(self) -> Any:
        return self._module()

    @property
    def __func__(self) -> Any:
        return self._forward

    @property
    def __code__(self) -> types.CodeType:
        return self.kind.forward.__code__

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.kind.forward.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.kind.forward.__get__(self._module()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        # Where its module is not copied, who has the copy is known when it is called.
        return Seat(memo.get(id(self._module())), self.plan, self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return _seated, (self._module(), self.plan, self.kind)

    def double(self) -> nn.Module:
        """`__prepare_scriptable__` of the module: what TorchScript compiles in its place."""
        module = self._owner(self._module(), sys._getframe(1).f_locals.get("self"))
        if module is None:
            raise RuntimeError(_ORPHAN)
        return unfused_double(module, {})


OWN_FORWARDS.add(Seat)


def _nobody() -> None:
    return None


def _holders(state: dict[str, Any], count: Callable[[Any], int] = sys.getrefcount) -> int:
    """How many hold the second entry of a seat, which nobody calls but TorchScript: one for each `__dict__`."""
    return count(state.get("__prepare_scriptable__"))


_ONE = _holders({"__prepare_scriptable__": object()})


def _seated(module: nn.Module | None, plan: Plan | None, kind: type[nn.Module]) -> Seat:
    """The seat of a pickle."""
    is_current = plan is not None and fingerprint(kind, plan.skipped) == plan.fingerprint
    return Seat(module, plan if is_current else None, kind)


def _takes_by_name(forward: Any, plan: Plan) -> bool:
    """Whether a forward has the arguments of its plan itself; a wrapper can tell `forward(x=x)` from `forward(x)`."""
    own = inspect.signature(forward, follow_wrapped=False).parameters
    by_name = [name for name, each in own.items() if each.kind is not each.POSITIONAL_ONLY]
    return {*plan.inputs, *(name for name, _ in plan.defaults)} <= {*by_name}


def _bind(plan: Plan, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The call with its required arguments by position and its default ones left out, where it comes to that."""
    count, kwargs = len(plan.inputs), dict(kwargs)
    if len(args) > count + len(plan.defaults):
        return args, kwargs
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


def _sees_functions() -> bool:
    """Whether a TorchFunctionMode waits for the functions of the forward; that of a default device does not."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)


def why_plan_is_stale(module: nn.Module, plan: Plan) -> str | None:
    """Why the plan no longer fits the module; None when it does."""
    if is_replaced(module):
        return "its forward was replaced on the instance"
    seat = seat_of(module)
    if seat is not None and type(module).forward is not seat.kind.forward:
        return "its class has another forward than when it was fused"
    return why_not(module, plan.guards)


# TorchScript remembers what it has prepared by id, and lets go of the fused module that its double replaces: an id that
# was used again would stand for another module. So a double keeps its module alive.
_DOUBLED: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def unfused_double(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """The same tree of modules with no fused one in it, sharing parameters and buffers: what TorchScript compiles.

    TorchScript's preparation puts what it gets back into the parent. A fused parent is a double itself by then; one
    that is not fused keeps the doubles, which compute the same: script a deepcopy of it.
    """
    if id(module) not in memo:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        double: nn.Module = object.__new__(type(module))
        memo[id(module)] = double
        _DOUBLED[double] = module
        state = dict(vars(module))
        if seat_of(module) is not None:
            for name in _ENTRIES:
                state.pop(name, None)
        object.__setattr__(double, "__dict__", state)
        vars(double)["_modules"] = {
            name: None if child is None else unfused_double(child, memo)
            for name, child in module._modules.items()
        }
    return memo[id(module)]

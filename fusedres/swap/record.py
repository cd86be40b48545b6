"""A twin of a module to trace in its place: same children, nothing shared that can be written, reads written down.

What a forward reads off `self` while it is traced is baked into the graph, so the fused forward is valid only while
those reads give the same answers. They become `Reads`, which are looked at again at each call.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .subclass import subclass

Path = tuple[str, ...]

# Where a twin keeps its notes.
_NOTES = "_fusedres_notes"
# `training` is not a read to guard: both modes are traced, and must give the same graph.
_INTERNAL = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"} | {"forward", _NOTES}
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size,
    torch.memory_format, torch.layout,
)  # fmt: skip
# Kept by reference when a module is copied or pickled, so that they can be compared by identity.
_BY_NAME = (types.FunctionType, types.BuiltinFunctionType, type)
_ABSENT = object()
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class NotTraceable(Exception):
    """Why a module's forward cannot be rewritten; the text goes into the report."""


@dataclass(frozen=True)
class Reads:
    """What the traced forward read off one module, `path` being its place below the owner.

    modules: children that were there. values: plain attributes. own: names that the instance did not have itself
    (methods of the class, attributes that were missing). keys: all children of a container that forward walked through.
    callables: attributes that were called, or asked for what they are, and the names of their classes.
    """

    path: Path
    modules: tuple[str, ...]
    values: tuple[tuple[str, Any], ...]
    own: tuple[str, ...]
    keys: tuple[str, ...] | None = None
    callables: tuple[tuple[str, str], ...] = ()


class Notes:
    """Each (path, name) that was read while `on`, in order."""

    def __init__(self) -> None:
        self.on = False
        self.seen: dict[tuple[Path, str], None] = {}
        self.classes: dict[type, type[nn.Module]] = {}
        # Set by who traces: records a call of the attribute at a path.
        self.call: Callable[[str, tuple[Any, ...], dict[str, Any]], Any] | None = None


class Opaque:
    """Stands for an attribute that is called, and is no module: a functools.partial, a method of another module.

    What it does is not looked into: the graph calls what it finds there.
    """

    def __init__(self, path: str, value: Any, notes: Notes) -> None:
        self._path, self._value, self._notes = path, value, notes

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._notes.call is None:
            raise NotTraceable(f"it calls self.{self._path} outside its forward")
        return self._notes.call(self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        raise NotTraceable(_depends_on(self._path, self._value))


class _Forward:
    """A child's `forward`, which torch.fx reads where the child is called, and some call by name (past the hooks)."""

    def __init__(self, path: Path, forward: Any, notes: Notes) -> None:
        self._path, self._forward, self._notes = path, forward, notes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Opaque(".".join((*self._path, "forward")), self._forward, self._notes)(*args, **kwargs)  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what stands on a module; in a graph, where a target must be known beforehand."""
    return function(*args, **kwargs)


def make_twin(module: nn.Module, original: type[nn.Module], notes: Notes) -> nn.Module:
    """A recording copy of `module` as an instance of `original`, its children twins too."""
    return _twin(module, original, (), notes, {})


def _twin(
    module: nn.Module, cls: type[nn.Module], path: Path, notes: Notes, memo: dict
) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        # Its attributes live in C++; it is only ever called.
        return module
    # The owner's class is its own: the tracer gives it another forward.
    if not path or cls not in notes.classes:
        notes.classes[cls] = _recording_class(cls)
    twin: nn.Module = object.__new__(notes.classes[cls])
    if not path:
        del notes.classes[cls]
    memo[id(module)] = twin
    state = dict(vars(module))
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            # No value to read and none to spoil: a forward that needs one cannot be traced.
            state[name] = torch.empty_like(value, device="meta")
        elif (
            callable(value) and name not in _INTERNAL and not isinstance(value, (*PLAIN, *_BY_NAME))
        ):
            state[name] = Opaque(".".join((*path, name)), value, notes)
    state["_parameters"] = dict(module._parameters)
    state["_buffers"] = dict(module._buffers)
    state["_modules"] = {
        name: None if child is None else _twin(child, type(child), (*path, name), notes, memo)
        for name, child in module._modules.items()
    }
    state[_NOTES] = (path, notes)
    object.__setattr__(twin, "__dict__", state)
    return twin


def _recording_class(cls: type[nn.Module]) -> type[nn.Module]:
    def __getattribute__(self: Any, name: str) -> Any:
        if not (name.startswith("__") and name.endswith("__")):
            path, notes = object.__getattribute__(self, "__dict__")[_NOTES]
            if notes.on:
                notes.seen[path, name] = None
                if name == "forward" and path:
                    return _Forward(path, super(recording, self).__getattribute__(name), notes)
        return super(recording, self).__getattribute__(name)

    recording: type[nn.Module] = subclass(
        cls,
        {
            "__getattribute__": __getattribute__,
            "__class__": property(lambda self: cls),
            "__hash__": object.__hash__,
            "__eq__": object.__eq__,
        },
    )
    return recording


def snapshot(twin: nn.Module) -> dict[str, Any]:
    """The twin's state as it stands, to see whether forward changes it."""
    state = dict(vars(twin))
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = dict(state[name])
    return state


def changed_attribute(before: dict[str, Any], twin: nn.Module) -> str | None:
    """The name of an attribute that is not what it was; None when all are."""
    after = snapshot(twin)
    for name in {**before, **after}:
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if name in ("_parameters", "_buffers", "_modules"):
            for key in {**old, **new}:
                if old.get(key, _ABSENT) is not new.get(key, _ABSENT):
                    return key
        elif old is not new or (isinstance(new, torch.Tensor) and new._version):
            return name
    return None


def collect_reads(twin: nn.Module, notes: Notes) -> tuple[Reads, ...]:
    """The notes as guards, one `Reads` for each module.

    Raises:
        NotTraceable: something was read that cannot be looked at again cheaply.
    """
    grouped: dict[Path, tuple[list, list, list, list]] = {}
    for path, name in notes.seen:
        if name in _INTERNAL:
            continue
        module = twin
        for part in path:
            module = vars(module)["_modules"][part]
        modules, values, own, callables = grouped.setdefault(path, ([], [], [], []))
        value = vars(module).get(name)
        if type(value) is Opaque:
            callables.append((name, _kind(value._value)))
        else:
            _sort_read(module, path, name, modules, values, own)
    return tuple(
        Reads(path, tuple(modules), tuple(values), tuple(own), callables=tuple(callables))
        for path, (modules, values, own, callables) in grouped.items()
        if modules or values or own or callables
    )


def _kind(value: Any) -> str:
    # By name: the class of a bound method cannot be pickled.
    return type(value).__qualname__


def _depends_on(full: str, value: Any) -> str:
    return (
        f"its forward depends on self.{full}, a {type(value).__name__}, whose contents may change"
    )


def _calls_a_method(path: Path, name: str) -> str:
    # Its code would be copied into the owner, and stay when the child is replaced.
    return f"its forward calls self.{'.'.join((*path, name))}, not the child itself"


def _sort_read(module, path, name, modules, values, own) -> None:
    state = vars(module)
    if name in ("_parameters", "_buffers"):
        raise NotTraceable("its forward looks through its own parameters or buffers")
    if name in state:
        _sort_value(".".join((*path, name)), name, state[name], values)
    elif name in state["_modules"]:
        if state["_modules"][name] is None:
            values.append((name, None))
        else:
            modules.append(name)
    elif name in state["_parameters"] or name in state["_buffers"]:
        if state["_parameters"].get(name, state["_buffers"].get(name)) is None:
            values.append((name, None))
    else:
        found = inspect.getattr_static(type(module), name, _ABSENT)
        if isinstance(found, PLAIN):
            values.append((name, found))
        elif path and found is not _ABSENT and not isinstance(module, CONTAINERS):
            raise NotTraceable(_calls_a_method(path, name))
        else:
            own.append(name)


def _sort_value(full: str, name: str, value: Any, values: list[tuple[str, Any]]) -> None:
    if isinstance(value, torch.Tensor):
        return
    if isinstance(value, list) and all(isinstance(item, PLAIN) for item in value):
        # Kept as a tuple, which cannot change with it.
        value = tuple(value)
    items = value if type(value) is tuple else (value,)
    if not all(isinstance(item, (*PLAIN, *_BY_NAME)) for item in items):
        raise NotTraceable(_depends_on(full, value))
    values.append((name, value))


def child_at(module: nn.Module, path: Path) -> nn.Module | None:
    """The module at `path` below another; None where there is none."""
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def how_reads_differ(module: nn.Module, reads: Reads) -> str | None:
    """What is no longer as it was when the forward was traced; None when all is. Called at each forward."""
    target = child_at(module, reads.path)
    if target is None:
        return f"{'.'.join(reads.path)} was removed after it was fused"
    children = target._modules
    if reads.keys is not None and tuple(children) != reads.keys:
        return "its children are no longer those that were fused"
    for name in reads.modules:
        if children.get(name) is None:
            return f"{name} was removed after it was fused"
    for name, value in reads.values:
        now = getattr(target, name, _ABSENT)
        if now is not value and _differs(now, value):
            return f"self.{name} was changed after it was fused"
    state = target.__dict__
    for name, kind in reads.callables:
        if name not in state or _kind(state[name]) != kind:
            return f"self.{name} was changed after it was fused"
    if reads.own:
        for name in reads.own:
            if (
                name in state
                or name in children
                or name in target._parameters
                or name in target._buffers
            ):
                return f"self.{name} was set after it was fused"
    return None


def _differs(now: Any, value: Any) -> bool:
    if isinstance(now, list):
        now = tuple(now)
    return type(now) is not type(value) or now != value

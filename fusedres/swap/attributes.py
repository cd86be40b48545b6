"""Reading an attribute, a global or an item while a forward is interpreted, and the guard that this leaves.

Nothing of the user's runs here: no property, no `__getattr__`, no descriptor is called; those written in Python are
interpreted, others are a reason to leave the module alone.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..words import a_type, with_article
from .guards import Guard, eager_only, stays
from .known import TENSOR_METHODS
from .reads import Reads, described, is_named, is_plain_object
from .values import (
    ABSENT,
    HOLDERS,
    NAMED,
    PLAIN,
    Bound,
    Closure,
    ModuleAt,
    Native,
    NotTraceable,
    Opaque,
    Source,
    Super,
    Symbol,
    SymbolAttribute,
    Thing,
    literal,
    reading,
)

# An nn.Module's own, which no forward should look through, and what `train()` sets.
_INTERNAL = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}


class Attributes(Reads):
    """The part of the interpreter that reads attributes."""

    training: bool
    enter: Callable[..., Any]
    node: Callable[..., Symbol]

    def __init__(self) -> None:
        super().__init__()
        self._children: dict[ModuleAt, set[str]] = {}  # those that were read, by name

    # --- attributes -------------------------------------------------------------------------------------------------

    def attribute(self, value: Any, name: str) -> Any:
        """`value.name`.

        Raises:
            NotTraceable: there is none, or what it gives cannot be known.
        """
        found = self.attribute_or_absent(value, name)
        if found is ABSENT:
            raise NotTraceable(f"{described(value)} has no attribute {name}")
        return found

    def attribute_or_absent(self, value: Any, name: str) -> Any:
        """The same; ABSENT where there is none, with a guard that there is none."""
        if isinstance(value, Symbol):
            return self._of_symbol(value, name)
        if isinstance(value, SymbolAttribute):
            return SymbolAttribute(self.value_of(value), name)
        if isinstance(value, ModuleAt):
            return self.of_module(value, name)
        if isinstance(value, Super):
            return self._behind(value.cls, value.owner, name)
        if isinstance(value, Thing):
            return self._of_thing(value, name)
        if isinstance(value, Opaque):
            raise NotTraceable(
                f"its forward depends on self.{value.path}, {a_type(value.value)}, whose contents may change"
            )
        if isinstance(value, (types.ModuleType, type)):
            return self._of_named(value, name)
        if isinstance(value, (Bound, Native, Closure, types.FunctionType)):
            raise NotTraceable(f"it looks at {described(value)}, a function")
        return self._of_plain(value, name)

    def _of_plain(self, value: Any, name: str) -> Any:
        if id(value) in self.outside and not hasattr(type(value), name):
            return ABSENT
        kind = type(value)
        if isinstance(value, enum.Enum):
            if name not in ("name", "value") or any(name in vars(base) for base in _of_user(kind)):
                raise NotTraceable(f"it reads {name} of {kind.__name__}, an Enum")
            source = Source(None, f"{{0}}.{name}", (value,), f"{kind.__name__}.{value.name}.{name}")
            return self.admitted(getattr(value, name), source)
        fields = getattr(kind, "_fields", ())
        if isinstance(value, tuple) and name in fields:
            return value[fields.index(name)]
        if callable(getattr(kind, name, None)):
            return Native(value, name)
        if isinstance(value, PLAIN) and hasattr(value, name):
            return getattr(value, name)
        if hasattr(kind, name):
            raise NotTraceable(f"it reads {name} of {with_article(kind.__name__)}")
        return ABSENT

    def _of_symbol(self, symbol: Symbol, name: str) -> Any:
        if not symbol.is_tensor:
            return SymbolAttribute(symbol, name)
        if name in TENSOR_METHODS:
            return SymbolAttribute(symbol, name)
        if name.startswith("__"):
            raise NotTraceable(f"it asks a tensor for {name}")
        made = self.node("call_function", getattr, (symbol, name))
        made.is_tensor = name in ("T", "mT", "H", "mH", "data", "real", "imag")
        return made

    def value_of(self, value: Any) -> Any:
        """An attribute of a symbol as a value."""
        if isinstance(value, SymbolAttribute):
            if value.symbol.is_tensor and value.name in TENSOR_METHODS:
                raise NotTraceable(f"it uses a tensor's method {value.name} as a value")
            return self.node("call_function", getattr, (value.symbol, value.name))
        return value

    def _of_named(self, owner: Any, name: str) -> Any:
        """Of a package or a class."""
        if isinstance(owner, types.ModuleType):
            found: Any = vars(owner).get(name, ABSENT)
            if found is ABSENT:
                # A lazy one (module __getattr__) is there once somebody has asked for it.
                raise NotTraceable(f"{owner.__name__} has no attribute {name}")
            text = f"{owner.__name__.rpartition('.')[2]}.{name}"
            return self.admitted(found, Source(None, reading("{0}", name), (owner,), text))
        if any(
            "__getattr__" in vars(meta) for meta in type(owner).__mro__ if meta is not enum.EnumMeta
        ):
            raise NotTraceable(f"what {owner.__name__} has is decided by its metaclass")
        raw = inspect.getattr_static(owner, name, ABSENT)
        source = Source(None, reading("{0}", name), (owner,), f"{owner.__name__}.{name}")
        if raw is ABSENT:
            reason = f"{source.text} was set after it was fused"
            self.guard(Guard(None, f"not hasattr({{0}}, {literal(name)})", (owner,), reason))
            return ABSENT
        if isinstance(raw, staticmethod):
            return self.admitted(raw.__func__, source)
        if isinstance(raw, classmethod):
            self._class_keeps(None, owner, name, raw)
            return Bound(raw.__func__, owner)
        if isinstance(raw, (types.FunctionType, *PLAIN, *HOLDERS)) or is_named(raw):
            return self.admitted(raw, source)
        raise NotTraceable(f"it uses {source.text}, {a_type(raw)}")

    def _of_thing(self, thing: Thing, name: str) -> Any:
        state = getattr(thing.value, "__dict__", {})
        source = thing.source.attribute(name)
        if isinstance(thing.value, functools.partial) or not is_plain_object(type(thing.value)):
            raise NotTraceable(
                f"its forward depends on {thing.source.text}, {a_type(thing.value)}, whose contents may change"
            )
        raw = inspect.getattr_static(type(thing.value), name, ABSENT)
        if name in state and not _is_data(raw):
            return self.admitted(state[name], source)
        if isinstance(raw, PLAIN):
            return self.admitted(raw, source)
        if raw is ABSENT:
            self._thing_has_not(thing, name)
            reason = f"{source.text} was set after it was fused"
            test = f"not hasattr(type({thing.source.expression}), {literal(name)})"
            self.guard(Guard(source.path, test, source.constants, reason))
            return ABSENT
        if isinstance(raw, types.FunctionType):
            self._thing_has_not(thing, name)
            self._class_keeps(None, type(thing.value), name, raw)
            return Bound(raw, thing)
        if isinstance(raw, property) and isinstance(raw.fget, types.FunctionType):
            self._class_keeps(None, type(thing.value), name, raw)
            return self.enter(raw.fget, [thing], {})
        raise NotTraceable(f"it uses {source.text}, {a_type(raw)}")

    def _thing_has_not(self, thing: Thing, name: str) -> None:
        """That nothing of the object hides what its class has, or has not."""
        source = thing.source
        test = f"{literal(name)} not in {source.expression}.__dict__"
        reason = f"{source.text}.{name} was set after it was fused"
        self.guard(Guard(source.path, test, source.constants, reason))

    # --- of a module ------------------------------------------------------------------------------------------------

    def of_module(self, at: ModuleAt, name: str) -> Any:
        """What `module.name` gives, as nn.Module and its class look for it; ABSENT where there is nothing."""
        module, cls = at.module, at.cls
        if cls.__getattribute__ not in (object.__getattribute__, nn.Module.__getattribute__):
            raise NotTraceable(f"its class {cls.__name__} has a __getattribute__ of its own")
        if name == "training":
            return self._mode(at)
        if name == "__class__":
            return cls
        if name in ("__dict__", "_parameters", "_buffers"):
            raise NotTraceable("its forward looks through its own parameters or buffers")
        if name == "_modules":
            found = dict(self.children(at))
            self._hold(found)
            return found
        if name in _INTERNAL:
            raise NotTraceable(f"it reads self.{name}, which belongs to nn.Module")
        if name == "forward" and not at.path:
            raise NotTraceable("its forward calls the module itself")
        if name == "forward":
            return Opaque(".".join((*at.path, "forward")), module)
        raw = inspect.getattr_static(cls, name, ABSENT)
        state = vars(module)
        if raw is not ABSENT and _is_data(raw):
            return self._computed(at, name, raw)
        if name in state:
            if raw is ABSENT:
                self._class_has_not(at, name)
            return self._own(at, name, state[name])
        if raw is not ABSENT:
            return self._of_class(at, name, raw)
        hook = cls.__getattr__
        if hook is not nn.Module.__getattr__:
            if not isinstance(hook, types.FunctionType):
                raise NotTraceable(
                    f"its class {cls.__name__} has a __getattr__ that cannot be read"
                )
            self._class_keeps(at, cls, "__getattr__", hook)
            return self.enter(hook, [at, name], {})
        return self.registered(at, name)

    def registered(self, at: ModuleAt, name: str) -> Any:
        """What nn.Module.__getattr__ gives: a parameter, a buffer, a child; ABSENT where there is none."""
        module = at.module
        for where in ("_parameters", "_buffers"):
            if name in (group := getattr(module, where)):
                if group[name] is None:
                    self.guard(stays(self.source(at, name), None))
                    return None
                test = f"{{m}}.{where}.get({literal(name)}) is not None"
                reason = f"self.{name} was removed after it was fused"
                self.guard(Guard(at.path, test, (), reason))
                return self.get_attr(at, name)
        if name in module._modules:
            child = module._modules[name]
            if child is None:
                self.guard(stays(self.source(at, name), None))
                return None
            return self.child(at, name, child)
        self._absent(at, name)
        self._class_has_not(at, name)
        return ABSENT

    def child(self, at: ModuleAt, name: str, child: nn.Module) -> ModuleAt:
        """A child, with a guard that there is one."""
        reason = f"{name} was removed after it was fused"
        self.guard(Guard(at.path, f"{{m}}._modules[{literal(name)}] is not None", (), reason))
        self._children.setdefault(at, set()).add(name)
        return ModuleAt((*at.path, name), child)

    def guard_children(self) -> None:
        """That no attribute of a module or of its class hides the children that were read, all names at once.

        Under torch.compile, which does not look at a class again, what is read tells.
        """
        for at, names in self._children.items():
            classes = at.cls.__mro__[: at.cls.__mro__.index(nn.Module)]
            places = ["{m}.__dict__", *(f"{{{i}}}.__dict__" for i in range(1, 1 + len(classes)))]
            each = [literal(name) for name in sorted(names)]
            absent = " and ".join(f"{name} not in {place}" for place in places for name in each)
            found = " and ".join(
                f"{reading('{m}', name)} is {{m}}._modules[{literal(name)}]"
                for name in sorted(names)
            )
            reason = f"one of {', '.join(sorted(names))} was hidden after it was fused"
            constants = (torch.compiler.is_compiling, *classes)
            self.guard(Guard(at.path, f"({found} if {{0}}() else {absent})", constants, reason))

    def children(self, at: ModuleAt) -> list[tuple[str, Any]]:
        """All children by name, with a guard that they stay as many, in that order."""
        children = at.module._modules
        reason = "its children are no longer those that were fused"
        if at.path:
            self.guard(Guard(at.path, "isinstance({m}, {0})", (at.cls,), reason))
        self.guard(Guard(at.path, "tuple({m}._modules) == {0}", (tuple(children),), reason))
        for name in (name for name, child in children.items() if child is None):
            test = f"{{m}}._modules[{literal(name)}] is None"
            self.guard(Guard(at.path, test, (), f"{name} was set after it was fused"))
        return [
            (name, None if child is None else self.child(at, name, child))
            for name, child in children.items()
        ]

    def get_attr(self, at: ModuleAt, name: str) -> Symbol:
        """A tensor that stands on a module, read when the forward runs."""
        made = self.node("get_attr", ".".join((*at.path, name)))
        made.is_tensor = True
        return made

    def source(self, at: ModuleAt, name: str) -> Source:
        """An attribute of a module, wherever it stands."""
        text = f"self.{'.'.join((*at.path, name))}"
        return Source(at.path, reading("{m}", name), (), text)

    def _mode(self, at: ModuleAt) -> bool:
        # Both modes are interpreted, and must give one graph.
        if at.path:
            reason = f"{'.'.join(at.path)} is in another mode than its owner"
            self.guard(Guard(at.path, "{m}.training is {s}.training", (), reason))
        return self.training

    def _own(self, at: ModuleAt, name: str, value: Any) -> Any:
        """An attribute that stands in the instance."""
        source = Source(
            at.path, f"{{m}}.__dict__[{literal(name)}]", (), f"self.{'.'.join((*at.path, name))}"
        )
        if isinstance(value, Tensor):
            reason = f"{source.text} was changed after it was fused"
            self.guard(Guard(at.path, f"isinstance({source.expression}, {{0}})", (Tensor,), reason))
            return self.get_attr(at, name)
        if isinstance(value, functools.cached_property):
            raise NotTraceable(f"it uses {source.text}, which is computed once")
        is_called = callable(value) and not isinstance(value, (*PLAIN, *NAMED, nn.Module))
        if is_called:
            # By name: the class of a bound method cannot be pickled.
            kind = type(value).__qualname__
            reason = f"{source.text} was changed after it was fused"
            test = f"type({source.expression}).__qualname__ == {{0}}"
            self.guard(Guard(at.path, test, (kind,), reason))
            return Opaque(".".join((*at.path, name)), value)
        return self.admitted(value, source)

    def _absent(self, at: ModuleAt, name: str) -> None:
        """That a module still has no attribute of this name."""
        places = ("__dict__", "_modules", "_parameters", "_buffers")
        found = " or ".join(f"{literal(name)} in {{m}}.{where}" for where in places)
        # Faster than hasattr, which is what torch.compile looks at again.
        test = f"not (hasattr({{m}}, {literal(name)}) if {{0}}() else {found})"
        reason = f"self.{name} was set after it was fused"
        self.guard(Guard(at.path, test, (torch.compiler.is_compiling,), reason))

    def _class_has_not(self, at: ModuleAt, name: str) -> None:
        """That the class has nothing of this name."""
        reason = f"{at.cls.__name__}.{name} was set after it was fused"
        self.guard(Guard(at.path, f"not hasattr(type({{m}}), {literal(name)})", (), reason))

    def _class_keeps(self, at: ModuleAt | None, cls: type, name: str, raw: Any) -> None:
        """That a name of a class still stands for this; of a module's class, that the instance does not hide it."""
        reason = f"{cls.__name__}.{name} was changed after it was fused"
        value = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
        is_bound = isinstance(raw, classmethod) or (at is not None and raw is value)
        end = ".__func__" if is_bound else ""
        if at is None:
            self.guard(Guard(None, f"{reading('{0}', name)}{end} is {{1}}", (cls, value), reason))
        elif isinstance(raw, property) or name == "__getattr__":
            test = f"{reading('type({m})', name)} is {{0}}"
            self.guard(eager_only(Guard(at.path, test, (value,), reason)))
        else:
            self.guard(Guard(at.path, f"{reading('{m}', name)}{end} is {{0}}", (value,), reason))

    def _of_class(self, at: ModuleAt, name: str, raw: Any) -> Any:
        if isinstance(raw, types.FunctionType):
            self._class_keeps(at, at.cls, name, raw)
            return Bound(raw, at)
        if isinstance(raw, staticmethod):
            self._class_keeps(at, at.cls, name, raw)
            return raw.__func__
        if isinstance(raw, classmethod):
            self._class_keeps(at, at.cls, name, raw)
            return Bound(raw.__func__, at.cls)
        if isinstance(raw, (*PLAIN, *HOLDERS)) or is_named(raw):
            return self.admitted(raw, self.source(at, name))
        raise NotTraceable(
            f"its forward depends on self.{'.'.join((*at.path, name))}, {a_type(raw)} of its class"
        )

    def _computed(self, at: ModuleAt, name: str, raw: Any) -> Any:
        if isinstance(raw, property) and isinstance(raw.fget, types.FunctionType):
            self._class_keeps(at, at.cls, name, raw)
            return self.enter(raw.fget, [at], {})
        raise NotTraceable(
            f"its forward depends on self.{'.'.join((*at.path, name))}, {a_type(raw)} of its class"
        )

    # --- super() ----------------------------------------------------------------------------------------------------

    def super_attribute(self, owner: Any, cls: Any, name: str) -> Any:
        """`super().name` in a method of `cls`."""
        if not isinstance(owner, ModuleAt) or not isinstance(cls, type):
            raise NotTraceable("it calls super() of something else than a module")
        return self._behind(cls, owner, name)

    def _behind(self, cls: type, at: ModuleAt, name: str) -> Any:
        ancestry = at.cls.__mro__
        if cls not in ancestry:
            raise NotTraceable(f"it calls super() of {cls.__name__}, which it is no instance of")
        for base in ancestry[ancestry.index(cls) + 1 :]:
            if name in vars(base):
                raw = vars(base)[name]
                if base is nn.Module and name == "__getattr__":
                    return Bound(nn.Module.__getattr__, at)
                if isinstance(raw, types.FunctionType):
                    # As super() finds it: a class in between may come to have one of its own.
                    test = f"{reading('super({0}, {m})', name)}.__func__ is {{1}}"
                    reason = f"{base.__name__}.{name} was changed after it was fused"
                    self.guard(Guard(at.path, test, (cls, raw), reason))
                    return Bound(raw, at)
                raise NotTraceable(f"it uses super().{name}, {a_type(raw)}")
        test = f"not hasattr(super({{0}}, {{m}}), {literal(name)})"
        self.guard(Guard(at.path, test, (cls,), f"super().{name} was set after it was fused"))
        return ABSENT


def _of_user(kind: type) -> list[type]:
    """The classes of its ancestry that are not Python's own."""
    return [base for base in kind.__mro__ if base.__module__ not in ("enum", "builtins")]


def _is_data(raw: Any) -> bool:
    return hasattr(type(raw), "__set__") or hasattr(type(raw), "__delete__")

"""Python's builtins that look at what they are given, while a forward is interpreted."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from torch import Tensor, nn

from .guards import Guard
from .operators import SYMBOLS, Operators
from .reads import described
from .values import (
    ABSENT,
    Bound,
    Cell,
    Closure,
    ModuleAt,
    Modules,
    Native,
    NotTraceable,
    Opaque,
    Super,
    Symbol,
    Thing,
)


def _isinstance(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> bool:
    value, kinds = args
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not all(isinstance(kind, type) and _is_known_kind(kind) for kind in kinds):
        raise NotTraceable("it asks for a class that decides itself what its instances are")
    if isinstance(value, Symbol):
        if not run.is_tensor(value):
            raise NotTraceable("it asks a value computed from its input for its class")
        run.ask(value)
        if any(kind is nn.Parameter or kind is nn.Buffer for kind in kinds):
            raise NotTraceable("it asks a tensor whether it is a Parameter")
        return any(issubclass(Tensor, kind) for kind in kinds)
    if isinstance(value, ModuleAt):
        if value.path:
            # What stands there may be replaced by another.
            reason = f"{'.'.join(value.path)} is of another class than when it was fused"
            run.guard(Guard(value.path, "type({m}) is {0}", (value.cls,), reason))
        return issubclass(value.cls, kinds)
    if isinstance(value, (Thing, Opaque)):
        return issubclass(type(value.value), kinds)
    if isinstance(value, (Bound, Closure, Native, Modules)):
        raise NotTraceable(f"it asks {described(value)} for its class")
    return isinstance(value, kinds)


def _is_known_kind(kind: type) -> bool:
    """Whether who is an instance of a class is no question to code of the user's."""
    if getattr(kind, "_is_protocol", False):
        return False
    hook = next(base for base in kind.__mro__ if "__subclasshook__" in vars(base))
    packages = (type(kind).__module__.partition(".")[0], hook.__module__.partition(".")[0])
    return {*packages} <= {"builtins", "abc", "collections", "enum", "torch", "typing"}


def _type(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Any:
    if len(args) != 1 or isinstance(args[0], (*SYMBOLS, Bound, Closure, Native, Modules)):
        raise NotTraceable("it asks a value computed from its input for its class")
    if isinstance(args[0], ModuleAt):
        _isinstance(run, [args[0], object], {}, frame)
        return args[0].cls
    return type(args[0].value) if isinstance(args[0], (Thing, Opaque)) else type(args[0])


def _hasattr(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> bool:
    value, name = args
    if isinstance(value, Symbol):
        if value.is_tensor and hasattr(Tensor, name):
            run.ask(value)
            return True
        raise NotTraceable(f"it asks a tensor whether it has {name}")
    return run.attribute_or_absent(value, name) is not ABSENT


def _getattr(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Any:
    value, name, *default = args
    if not isinstance(name, str):
        raise NotTraceable("it reads an attribute whose name is computed from its input")
    if isinstance(value, Symbol) and default and not (value.is_tensor and hasattr(Tensor, name)):
        raise NotTraceable(f"it asks a tensor for {name}, which it may have or not")
    found = run.attribute_or_absent(value, name) if default else run.attribute(value, name)
    return default[0] if found is ABSENT else found


def _super(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Super:
    if not args and frame is not None:
        cell = frame.names.get("__class__")
        first = frame.names.get(frame.code.co_varnames[0])
        args = [getattr(cell, "value", None), first.value if isinstance(first, Cell) else first]
    if len(args) != 2 or not isinstance(args[0], type) or not isinstance(args[1], ModuleAt):
        raise NotTraceable("it calls super() of something else than a module")
    return Super(args[0], args[1])


def _sum(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Any:
    total = args[1] if len(args) > 1 else keywords.get("start", 0)
    for value in run.iterate(args[0]):
        total = run.binary("+", total, value)
    return total


def _any(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> bool:
    return any(run.truth(value) for value in run.iterate(args[0]))


def _all(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> bool:
    return all(run.truth(value) for value in run.iterate(args[0]))


def _map(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Iterator[Any]:
    iterators = [run.iterate(value) for value in args[1:]]
    return (run.call(args[0], list(values), {}, frame) for values in zip(*iterators, strict=False))


def _filter(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Iterator[Any]:
    function, values = args
    return (
        value for value in run.iterate(values)
        if run.truth(value if function is None else run.call(function, [value], {}, frame))
    )  # fmt: skip


def _bool(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> bool:
    return run.truth(args[0]) if args else False


def _iter(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Any:
    return run.iterate(args[0])


def _next(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Any:
    if not isinstance(args[0], (Generator, Iterator)):
        raise NotTraceable(f"it takes the next of {described(args[0])}")
    found = next(args[0], *(args[1:] or [ABSENT]))
    if found is ABSENT:
        raise NotTraceable("it takes the next of nothing")
    return found


def _issubclass(run: Operators, args: list[Any], keywords: dict[str, Any], frame: Any) -> Any:
    kind, kinds = args
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not all(isinstance(each, type) and _is_known_kind(each) for each in (kind, *kinds)):
        raise NotTraceable("it asks for a class that decides itself what its instances are")
    return run.natively(issubclass, [kind, kinds], keywords)


BUILTINS: dict[str, Any] = {
    "isinstance": _isinstance, "issubclass": _issubclass, "type": _type, "hasattr": _hasattr, "getattr": _getattr,
    "super": _super, "sum": _sum, "any": _any, "all": _all, "map": _map, "filter": _filter, "bool": _bool,
    "iter": _iter, "next": _next,
}  # fmt: skip

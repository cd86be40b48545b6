"""What operators, questions and items mean while a forward is interpreted: values are computed, symbols are nodes."""

from __future__ import annotations

import enum
import operator
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import fx, nn

from ..nn.norms import why_called
from ..words import a_type
from . import known
from .attributes import Attributes
from .guards import Guard, Look
from .reads import described
from .values import (
    CONTAINERS,
    HOLDERS,
    PLAIN,
    Bound,
    Closure,
    Given,
    ModuleAt,
    Modules,
    Native,
    NotTraceable,
    Opaque,
    Super,
    Symbol,
    SymbolAttribute,
    Thing,
)

SYMBOLS = (Symbol, SymbolAttribute)
_ITERABLE: Any = (
    *HOLDERS, str, bytes, range, type({}.keys()), type({}.values()), type({}.items()),
)  # fmt: skip
# A copy of one stands for what was read, or one that equals it: by identity it tells nothing.
_COPIED = (*HOLDERS, int, float, complex, str, bytes, slice, range, torch.Size, torch.device)


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """Exactly `count` values, as `a, b = values` takes them."""
    found = tuple(values)
    if len(found) != count:
        many = "too many" if len(found) > count else "not enough"
        raise ValueError(f"{many} values to unpack (expected {count}, got {len(found)})")
    return found


class Operators(Attributes):
    """The part of the interpreter that computes; `graph` is what becomes of a forward.

    asked: whether an input was asked for what it is (isinstance, `is None`), and got the answer of a Tensor.
    """

    call: Callable[..., Any]
    look: Look

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.asked = False
        self._given: dict[int, Any] = {}

    # --- nodes ------------------------------------------------------------------------------------------------------

    def node(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Symbol:
        """A node of the graph, of arguments that stand on the stack."""
        made = self.graph.create_node(
            op, target, self.argument(tuple(args)), self.argument(dict(kwargs or {}))
        )
        of: tuple[Any, ...] = ()
        name = str(target if isinstance(target, str) else getattr(target, "__name__", ""))
        if op in ("call_function", "call_method"):
            if target is operator.getitem:
                of = args[:1]
            elif name.rstrip("_") in known.GIVE_A_TENSOR:
                of = args[:2]
        of = tuple(value for value in of if isinstance(value, Symbol))
        is_tensor = target in (torch.cat, torch.stack) or any(value.is_tensor for value in of)
        return Symbol(made, is_tensor, of)

    def is_tensor(self, symbol: Symbol) -> bool:
        """Whether a symbol is a Tensor for sure, with what its child gives looked at."""
        for each in () if symbol.is_tensor else symbol.of:
            if self.gives_a_tensor(*each) if isinstance(each, Given) else self.is_tensor(each):
                symbol.is_tensor = True
                break
        return symbol.is_tensor

    def gives_a_tensor(self, at: ModuleAt, args: tuple[Any, ...]) -> bool:
        """Whether a child gives a Tensor for sure, with guards that it goes on to do so."""
        of_tensors = all(isinstance(value, Symbol) and self.is_tensor(value) for value in args)
        found = () if known.is_layer(at.module) else self.look(at.module, of_tensors)
        if found is None or why_called(at.module) is not None:
            return False
        self.guard(Guard(at.path, "{0}({m}) is None", (why_called,)))
        reason = f"{'.'.join(at.path)} is of another class than when it was fused"
        self.guard(Guard(at.path, "type({m}) is {0}", (at.cls,), reason))
        for guard in found:
            self.guard(guard.below(at.path))
        return True

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node."""
        if isinstance(value, Symbol):
            return value.node
        if isinstance(value, SymbolAttribute):
            return self.value_of(value).node
        kind = type(value)
        self.not_given(value)
        if kind in (list, tuple):
            return kind(self.argument(item) for item in value)
        if kind is dict or kind is OrderedDict:
            if any(has_symbol(key) for key in value):
                raise NotTraceable("a key of a dict is computed from its input")
            if kind is OrderedDict:
                return self.node("call_function", kind, (list(value.items()),)).node
            return {key: self.argument(item) for key, item in value.items()}
        if kind is slice:
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if kind is torch.Size:
            return self.node("call_function", kind, (tuple(value),)).node
        if kind is range:
            return self.node("call_function", kind, (value.start, value.stop, value.step)).node
        if isinstance(value, (*PLAIN, type)):
            return value
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return self.node("call_function", kind, tuple(value)).node
        raise NotTraceable(f"it gives {described(value)} to a function of tensors, or returns it")

    def give(self, value: Any) -> None:
        """Whoever is given a list, or another that can be written to, may write to it, or keep it."""
        if isinstance(value, HOLDERS):
            if not isinstance(value, (tuple, frozenset)):
                if id(value) in self.outside:
                    raise NotTraceable(f"it hands on {a_type(value)} that outlives the call")
                self._given[id(value)] = value
            for item in value.values() if isinstance(value, dict) else value:
                self.give(item)

    def not_given(self, value: Any) -> None:
        """Refuse what somebody else may have written to."""
        if id(value) in self._given:
            raise NotTraceable(f"it uses {a_type(value)} after it gave it to a child")

    # --- questions --------------------------------------------------------------------------------------------------

    def truth(self, value: Any) -> bool:
        """`bool(value)`, where that is known."""
        if isinstance(value, SYMBOLS):
            raise NotTraceable(
                "it branches on a value computed from its input; take the branch out of this forward, "
                "or decide it in __init__"
            )
        if isinstance(value, ModuleAt):
            if isinstance(value.module, CONTAINERS) and is_inherited(value.cls, "__len__"):
                return bool(self.children(value))
            if hasattr(value.cls, "__bool__") or hasattr(value.cls, "__len__"):
                raise NotTraceable(f"it asks {described(value)} whether it is true")
            return True
        if isinstance(value, (Bound, Native, Closure)):
            return True
        if isinstance(value, (Thing, Opaque)):
            kind = type(value.value)
            if hasattr(kind, "__bool__") or hasattr(kind, "__len__"):
                raise NotTraceable(f"it asks {described(value)} whether it is true")
            return True
        self.not_given(value)
        return bool(value)

    def is_same(self, a: Any, b: Any) -> bool:
        """`a is b`, where that is known."""
        if isinstance(a, _COPIED) and type(a) is type(b) and not isinstance(a, (bool, enum.Enum)):
            raise NotTraceable(f"it asks whether {described(a)} is another, by identity")
        if a is b:
            return True
        for one, other in ((a, b), (b, a)):
            if isinstance(one, SymbolAttribute) or (
                isinstance(one, Symbol) and not self.is_tensor(one)
            ):
                raise NotTraceable(
                    "it asks whether a value computed from its input is a certain object"
                )
            if isinstance(one, Symbol):
                self.ask(one)
                if isinstance(other, Symbol):
                    raise NotTraceable("it asks whether two tensors are one")
                return False
            if isinstance(one, Opaque) and other is not None:
                raise NotTraceable(f"it asks what self.{one.path} is")
        if isinstance(a, Thing) and isinstance(b, Thing):
            raise NotTraceable(f"it asks whether {described(a)} is {described(b)}")
        if isinstance(a, ModuleAt) and isinstance(b, ModuleAt):
            if a.path == b.path:
                return True
            raise NotTraceable(f"it asks whether {described(a)} is {described(b)}")
        if isinstance(a, Bound) or isinstance(b, Bound):
            raise NotTraceable("it asks whether two methods are one")
        return False

    def ask(self, symbol: Symbol) -> None:
        """A symbol said that it is a Tensor."""
        self.asked |= symbol.node.op == "placeholder"

    def contains(self, container: Any, value: Any) -> Any:
        """`value in container`."""
        if isinstance(container, ModuleAt) and isinstance(container.module, nn.ModuleDict):
            if not is_inherited(container.cls, "__contains__"):
                return self.call(self.attribute(container, "__contains__"), [value], {}, None)
            return value in dict(self.children(container))
        if has_symbol(value) or has_symbol(container):
            if isinstance(container, dict) and not has_symbol(value):
                return value in container
            raise NotTraceable("it asks whether a value computed from its input is among others")
        self.only_plain(
            "it looks for a module, a function or an object among others", value, container
        )
        if isinstance(container, (str, *HOLDERS, range, type({}.keys()), type({}.values()))):
            return value in container
        raise NotTraceable(f"it looks for a value in {described(container)}")

    def iterate(self, value: Any) -> Any:
        """An iterator over a value."""
        if isinstance(value, SYMBOLS):
            raise NotTraceable(
                "it goes through a value computed from its input, of a length that is not known"
            )
        if isinstance(value, ModuleAt):
            if isinstance(value.module, CONTAINERS) and is_inherited(value.cls, "__iter__"):
                found = self.children(value)
                keys = isinstance(value.module, nn.ModuleDict)
                return iter([name if keys else child for name, child in found])
            method = self.attribute(value, "__iter__")
            return self.iterate(self.call(method, [], {}, None))
        if isinstance(value, (Generator, Iterator)):
            return value
        if isinstance(value, _ITERABLE):
            self.not_given(value)
            return iter(value)
        raise NotTraceable(f"it goes through {described(value)}")

    # --- operators --------------------------------------------------------------------------------------------------

    def binary(self, sign: str, a: Any, b: Any) -> Any:
        """`a sign b`: arithmetic, in place or not, a comparison, an item."""
        a, b = self.value_of(a), self.value_of(b)
        if sign == "[]":
            return self.item(a, b)
        function = known.BINARY.get(sign) or known.IN_PLACE.get(sign) or known.COMPARE[sign]
        if isinstance(a, Symbol) or isinstance(b, Symbol):
            return self.node("call_function", function, (a, b))
        if sign in known.COMPARE and (isinstance(a, ModuleAt) or isinstance(b, ModuleAt)):
            if sign not in ("==", "!=") or any(
                isinstance(one, ModuleAt) and one.cls.__eq__ is not object.__eq__ for one in (a, b)
            ):
                raise NotTraceable(f"it compares {described(a)} with {described(b)}")
            return self.is_same(a, b) == (sign == "==")
        self.only_plain(f"it computes with {described(a)} and {described(b)}", a, b)
        if sign in known.IN_PLACE:
            self.changes(a)
        if sign in known.COMPARE and (has_symbol(a) or has_symbol(b)):
            raise NotTraceable("it compares values computed from its input")
        return self.natively(function, [a, b], {})

    def unary(self, name: str, value: Any) -> Any:
        """`-value`, `+value`, `~value`."""
        value = self.value_of(value)
        function = {"negative": operator.neg, "positive": operator.pos, "invert": operator.invert}[
            name
        ]
        if isinstance(value, Symbol):
            return self.node("call_function", function, (value,))
        self.only_plain(f"it computes with {described(value)}", value)
        return self.natively(function, [value], {})

    def item(self, container: Any, key: Any) -> Any:
        """`container[key]`."""
        if isinstance(container, Symbol):
            return self.node("call_function", operator.getitem, (container, key))
        if isinstance(container, ModuleAt):
            return self.child_at(container, key)
        if has_symbol(key):
            raise NotTraceable("it looks up a value computed from its input")
        if isinstance(container, (*HOLDERS, str, bytes, range)):
            found = self.natively(operator.getitem, [container, key], {})
            return (
                Modules(found) if isinstance(container, Modules) and type(key) is slice else found
            )
        if isinstance(container, type) or type(container).__module__ == "typing":
            return container  # an annotation
        raise NotTraceable(f"it looks up a value in {described(container)}")

    def child_at(self, at: ModuleAt, key: Any) -> Any:
        if not isinstance(at.module, CONTAINERS) or not is_inherited(at.cls, "__getitem__"):
            return self.call(self.attribute(at, "__getitem__"), [key], {}, None)
        found = self.children(at)
        if isinstance(at.module, nn.ModuleDict) and isinstance(key, str):
            found = [pair for pair in found if pair[0] == key]
            key = 0
        if isinstance(key, slice):
            return Modules(child for _, child in found[key])
        if type(key) is not int or not -len(found) <= key < len(found):
            raise NotTraceable(f"{described(at)} has no child {key!r}")
        return found[key][1]

    def store_item(self, container: Any, key: Any, value: Any) -> None:
        """`container[key] = value`."""
        container = self.value_of(container)
        if isinstance(container, Symbol):
            self.node("call_function", operator.setitem, (container, key, value))
            return
        if type(container) not in HOLDERS or has_symbol(key):
            raise NotTraceable(f"it writes to an item of {described(container)}")
        self.changes(container)
        self.natively(operator.setitem, [container, key, value], {})

    def delete_item(self, container: Any, key: Any) -> None:
        """`del container[key]`."""
        if type(container) not in HOLDERS or has_symbol(key):
            raise NotTraceable(f"it deletes an item of {described(container)}")
        self.changes(container)
        self.natively(operator.delitem, [container, key], {})

    def unpacked(self, value: Any, count: int) -> list[Any]:
        """`a, b = value`."""
        value = self.value_of(value)
        if isinstance(value, Symbol):
            whole = self.node("call_function", unpack, (value, count))
            return [self.node("call_function", operator.getitem, (whole, i)) for i in range(count)]
        values = list(self.iterate(value))
        if len(values) != count:
            raise NotTraceable(f"it unpacks {len(values)} values into {count}")
        return values

    def formatted(self, value: Any, conversion: int, spec: str) -> Any:
        """A value in an f-string."""
        if isinstance(value, SYMBOLS):
            made = self.value_of(value)
            if conversion:
                made = self.node("call_function", (str, repr, ascii)[conversion - 1], (made,))
            return self.node("call_function", format, (made, spec))
        if has_symbol(value) or not isinstance(value, (*PLAIN, *HOLDERS, type)):
            raise NotTraceable(f"it writes {described(value)} into a string")
        self.only_plain("it writes a module or an object into a string", value)
        function = (lambda v: v, str, repr, ascii)[conversion]
        return format(function(value), spec)

    def joined(self, parts: list[Any]) -> Any:
        """An f-string of its parts."""
        if not any(isinstance(part, Symbol) for part in parts):
            return "".join(parts)
        total = parts[0]
        for part in parts[1:]:
            total = self.binary("+", total, part)
        return total

    def only_plain(self, text: str, *values: Any) -> None:
        """Refuse what would be looked at, or run, as something else than it is; within lists and dicts too."""
        for value in values:
            if isinstance(value, (ModuleAt, Bound, Native, Closure, Thing, Opaque, Super)):
                raise NotTraceable(text)
            if isinstance(value, type) and type(value).__module__ not in (
                "builtins",
                "abc",
                "enum",
            ):
                raise NotTraceable(text)
            if isinstance(value, dict):
                self.only_plain(text, *value.keys(), *value.values())
            elif isinstance(value, HOLDERS):
                self.only_plain(text, *value)

    def natively(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Call a function of plain values; what it raises would be raised at each call too."""
        for value in (*args, *keywords.values(), getattr(function, "__self__", None)):
            self.not_given(value)
        try:
            return function(*args, **keywords)
        except StopIteration:
            raise
        except Exception as error:
            raise NotTraceable(f"it raises {type(error).__name__}: {error}") from error


def has_symbol(value: Any) -> bool:
    if isinstance(value, SYMBOLS):
        return True
    if isinstance(value, dict):
        return any(has_symbol(item) for pair in value.items() for item in pair)
    if isinstance(value, slice):
        return any(map(has_symbol, (value.start, value.stop, value.step)))
    return isinstance(value, HOLDERS) and any(map(has_symbol, value))


def is_inherited(cls: type, name: str) -> bool:
    """Whether a container's class has this method from PyTorch."""
    method = getattr(cls, name, None)
    return any(method is vars(base).get(name) for base in CONTAINERS)

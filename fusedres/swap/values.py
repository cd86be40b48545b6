"""What stands on the stack while a forward is interpreted: plain Python values as they are, and these for the rest."""

from __future__ import annotations

import enum
import keyword
import types
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

Path = tuple[str, ...]

# Compared by value: two that are equal and of one type are the same.
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice,
    torch.memory_format, torch.layout, type(...), type(NotImplemented), enum.Enum,
)  # fmt: skip
# Compared by identity.
NAMED = (
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType, types.GenericAlias,
)  # fmt: skip
HOLDERS = (list, tuple, dict, OrderedDict, set, frozenset)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ABSENT = object()


def is_plain(value: Any) -> bool:
    """Whether a value is one of PLAIN that no code of the user's stands behind."""
    if isinstance(value, enum.Enum):
        return not any(
            isinstance(each, types.FunctionType)
            and name.startswith("__")
            and each.__module__ != "enum"
            for base in type(value).__mro__
            if base.__module__ not in ("enum", "builtins")
            for name, each in vars(base).items()
        )
    return isinstance(value, PLAIN) and type(value).__module__ in ("builtins", "torch", "numpy")


def literal(name: str) -> str:
    """A name as a string of a test, where braces stand for modules and constants."""
    return repr(name).replace("{", "\\x7b")


def reading(expression: str, name: str) -> str:
    """`expression.name`; behind a dot what is not ASCII would be normalised."""
    is_name = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
    return f"{expression}.{name}" if is_name else f"getattr({expression}, {literal(name)})"


class NotTraceable(Exception):
    """Why a module's forward cannot be rewritten; the text goes into the report."""


@dataclass(eq=False)
class Symbol:
    """A value that is known when the forward runs.

    is_tensor: that it is a Tensor for sure. of: where it is one if any of these is: symbols, or what a child gave.
    """

    node: fx.Node
    is_tensor: bool = False
    of: tuple[Any, ...] = ()


class Given(NamedTuple):
    """What a child gave for these arguments."""

    at: ModuleAt
    args: tuple[Any, ...]


@dataclass(eq=False)
class SymbolAttribute:
    """An attribute of a symbol that is not a Tensor for sure: a method where it is called, a value elsewhere."""

    symbol: Symbol
    name: str


@dataclass(frozen=True)
class ModuleAt:
    """The module at a path below the one whose forward is interpreted."""

    path: Path
    module: nn.Module = field(compare=False)

    @property
    def cls(self) -> type[nn.Module]:
        """Its class."""
        return type(self.module)


@dataclass(eq=False)
class Bound:
    """A function of a class with the `self` (or the class) that it is called on."""

    function: Any
    owner: Any


@dataclass(eq=False)
class Native:
    """A method of a plain Python value: `items.append`."""

    owner: Any
    name: str


@dataclass(eq=False)
class Super:
    """`super()`: what stands behind `cls` in the ancestry of a module."""

    cls: type
    owner: ModuleAt


@dataclass(eq=False)
class Opaque:
    """An attribute of a module that is called and is no module: a functools.partial, a method of another module.

    What it does is not looked into: the graph calls what it finds there.
    """

    path: str
    value: Any


@dataclass(eq=False)
class Thing:
    """A plain object of the user's, whose attributes can be read and looked at again."""

    value: Any
    source: Source


@dataclass(eq=False)
class Cell:
    """A variable that is shared with an inner function."""

    value: Any = ABSENT


@dataclass(eq=False)
class Closure:
    """A function that a forward defines: a lambda, a comprehension."""

    code: types.CodeType
    scope: dict[str, Any]
    cells: tuple[Cell, ...] = ()
    defaults: tuple[Any, ...] = ()
    keyword_defaults: dict[str, Any] = field(default_factory=dict)


class Modules(list):
    """A slice of a container of modules."""


@dataclass(frozen=True)
class Source:
    """Where a value was read: an expression over the module at `path` (None: of no module) and constants.

    text: as the user wrote it.
    """

    path: Path | None
    expression: str
    constants: tuple[Any, ...]
    text: str

    def attribute(self, name: str) -> Source:
        """Where an attribute of an object stands."""
        read = reading(self.expression, name)
        return Source(self.path, read, self.constants, f"{self.text}.{name}")

    def item(self, holder: str, key: Any) -> Source:
        """Where an item of a holder of an object stands."""
        text = f"{self.text}.{holder}[{key!r}]"
        inside = literal(key) if isinstance(key, str) else repr(key)
        return Source(self.path, f"{self.expression}.{holder}[{inside}]", self.constants, text)

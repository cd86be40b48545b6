"""A graph as the source of a function `forward(self, ...)`."""

from __future__ import annotations

import builtins
import importlib
import keyword
import math
import operator
import re
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import fx

from .values import NotTraceable

# For each global of the source: its name, and the module and attribute to import.
Imports = tuple[tuple[str, str, str], ...]

_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.matmul: "@", operator.eq: "==", operator.ne: "!=",
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
    operator.xor: "^",
}  # fmt: skip
_IN_PLACE = {
    operator.iadd: "+=", operator.isub: "-=", operator.imul: "*=", operator.itruediv: "/=",
    operator.ifloordiv: "//=", operator.imod: "%=", operator.ipow: "**=", operator.iand: "&=", operator.ior: "|=",
    operator.ixor: "^=", operator.imatmul: "@=",
}  # fmt: skip
_OUR_NAMES = re.compile(r"[av]\d+|self|children")
# In the `meta` of a get_attr node: what it reads is a child.
IS_CHILD = "fusedres.is_child"


def source_of(graph: fx.Graph) -> str:
    """The source; two graphs that compute the same way have the same one."""
    return written(graph)[0]


def written(graph: fx.Graph) -> tuple[str, Imports]:
    """The source and where its globals come from.

    Raises:
        NotTraceable: it would need an object that cannot be imported by name.
    """
    return _Writer().write(graph)


class _Writer:
    """Inputs are a0, a1, ..., values v0, v1, ...; globals have the names of what they are.

    Children are read where nn.Module keeps them: as an attribute, which is looked for everywhere else first, each costs
    0.5 us (Python 3.11). That nothing hides them is a guard.
    """

    def __init__(self) -> None:
        self._names: dict[fx.Node, str] = {}
        self._imports: dict[str, tuple[str, str]] = {}

    def write(self, graph: fx.Graph) -> tuple[str, Imports]:
        nodes = list(graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self._names = {node: f"a{i}" for i, node in enumerate(inputs)}
        last = {user: node for node in nodes for user in [node, *node.all_input_nodes]}
        lines = []
        for node in nodes:
            if node.op != "placeholder":
                lines += self._statement(node)
                # What nobody reads any more is let go, as a function's own variables would be.
                gone = [
                    self._names[each]
                    for each in dict.fromkeys((node, *node.all_input_nodes))
                    if last[each] is node and node.op != "output" and self._names[each][0] == "v"
                ]
                lines += [f"del {', '.join(gone)}"] if gone else []
        head = ", ".join(["self", *(self._names[node] for node in inputs)])
        if any(line.find("children[") >= 0 for line in lines):
            lines.insert(0, "children = self._modules")
        body = "".join(f"    {line}\n" for line in lines)
        imports = tuple((name, *where) for name, where in sorted(self._imports.items()))
        return f"def forward({head}):\n{body}", imports

    def _statement(self, node: fx.Node) -> list[str]:
        if node.op == "output":
            return [f"return {self._value(node.args[0])}"]
        name = self._names[node] = f"v{len(self._names)}"
        if node.op == "get_attr":
            read = _child if node.meta.get(IS_CHILD) else _attribute
            return [f"{name} = {read(str(node.target))}"]
        if node.op == "call_module":
            return [f"{name} = {_child(str(node.target))}({self._arguments(node)})"]
        if node.op == "call_method":
            first, *rest = node.args
            call = self._arguments(node, rest)
            return [f"{name} = {self._value(first)}.{node.target}({call})"]
        values = [self._value(value) for value in node.args]
        target: Any = node.target
        if not node.kwargs and target in _INFIX and len(values) == 2:
            return [f"{name} = {values[0]} {_INFIX[target]} {values[1]}"]
        if not node.kwargs and target in _IN_PLACE and len(values) == 2:
            return [f"{name} = {values[0]}", f"{name} {_IN_PLACE[target]} {values[1]}"]
        if not node.kwargs and target is operator.getitem and len(values) == 2:
            return [f"{name} = {values[0]}[{values[1]}]"]
        return [f"{name} = {self._global(target)}({self._arguments(node)})"]

    def _arguments(self, node: fx.Node, args: Any = None) -> str:
        given = [self._value(value) for value in (node.args if args is None else args)]
        for key, value in node.kwargs.items():
            given.append(f"{key}={self._value(value)}")
        return ", ".join(given)

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names[value]
        kind = type(value)
        if kind in (tuple, list) or isinstance(value, (tuple, list)):
            items = ", ".join(map(self._value, value))
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, dict):
            pairs = ", ".join(f"{self._value(k)}: {self._value(v)}" for k, v in value.items())
            is_ordered = isinstance(value, OrderedDict)
            return f"{self._global(OrderedDict)}({{{pairs}}})" if is_ordered else f"{{{pairs}}}"
        if isinstance(value, slice):
            return f"slice({self._value(value.start)}, {self._value(value.stop)}, {self._value(value.step)})"
        if kind is float and not math.isfinite(value):
            return f"float('{value}')"
        if kind is complex:
            return f"complex({self._value(value.real)}, {self._value(value.imag)})"
        if kind is int and value.bit_length() > 64:
            return hex(value)  # the decimal digits of an int are limited
        if kind in (int, float, str, bytes, bool, type(None), type(...)):
            return repr(value)
        if isinstance(value, torch.device):
            return f"{self._global(torch.device)}({str(value)!r})"
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return self._import(
                str(value).rpartition(".")[2], "torch", str(value).rpartition(".")[2]
            )
        return self._global(value)

    def _global(self, value: Any) -> str:
        name = str(getattr(value, "__name__", ""))
        if value is vars(builtins).get(name):
            return name
        where = import_of(value)
        if where is None:
            name = getattr(value, "__qualname__", type(value).__name__)
            raise NotTraceable(f"its forward uses {name}, which cannot be imported by name")
        return self._import(where[1].rpartition(".")[2], *where)

    def _import(self, name: str, module: str, attribute: str) -> str:
        if _OUR_NAMES.fullmatch(name) or hasattr(builtins, name):
            name += "_"
        while self._imports.setdefault(name, (module, attribute)) != (module, attribute):
            name += "_"
        return name


def _child(path: str) -> str:
    return "children" + "._modules".join(f"[{part!r}]" for part in path.split("."))


def _attribute(path: str) -> str:
    """What a module that is a child, or `self`, has under a name."""
    owner, _, name = path.rpartition(".")
    text = _child(owner) if owner else "self"
    is_name = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
    return f"{text}.{name}" if is_name else f"getattr({text}, {name!r})"


def import_of(value: Any) -> tuple[str, str] | None:
    """The module and the name that an object is imported by; None where there is none."""
    module: Any = getattr(value, "__module__", None)
    name: Any = getattr(value, "__qualname__", None)
    owner = getattr(value, "__self__", None)
    if isinstance(owner, type) and name is not None:
        module = owner.__module__  # a method of a class
    short: Any = getattr(value, "__name__", None)
    packages = ("torch", "operator", "torch.nn.functional")
    for place in ((module, name), *((package, short) for package in packages)):
        if not isinstance(place[0], str) or not isinstance(place[1], str):
            continue
        try:
            found = resolve(*place)
        except (ImportError, AttributeError):
            continue
        if found is value or (found == value and isinstance(value, types.MethodType)):
            return place
    return None


def resolve(module: str, attribute: str) -> Any:
    """The object that an import of a plan names."""
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found

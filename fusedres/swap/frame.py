"""One call of a Python function, interpreted instruction by instruction (CPython 3.10 to 3.14).

What an instruction does to the stack stands here; what it means for a value that is known only when the forward runs is
the interpreter's. An instruction that is not known is a reason, never a guess.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Generator
from typing import Any, Protocol

from .values import ABSENT, Cell, NotTraceable

VERSION = sys.version_info[:2]
_LONGEST = 100_000  # instructions of one forward


class _Null:
    def __repr__(self) -> str:
        return "NULL"


NULL = _Null()


class Semantics(Protocol):
    """What a frame asks of the interpreter."""

    steps: int

    def load_global(self, scope: dict[str, Any], name: str) -> Any: ...
    def call(self, function: Any, args: list[Any], keywords: dict[str, Any], frame: Any) -> Any: ...
    def attribute(self, value: Any, name: str) -> Any: ...
    def super_attribute(self, owner: Any, cls: Any, name: str) -> Any: ...
    def binary(self, operation: str, a: Any, b: Any) -> Any: ...
    def unary(self, operation: str, value: Any) -> Any: ...
    def is_same(self, a: Any, b: Any) -> bool: ...
    def contains(self, container: Any, value: Any) -> Any: ...
    def truth(self, value: Any) -> bool: ...
    def iterate(self, value: Any) -> Any: ...
    def store_item(self, container: Any, key: Any, value: Any) -> None: ...
    def delete_item(self, container: Any, key: Any) -> None: ...
    def unpacked(self, value: Any, count: int) -> list[Any]: ...
    def formatted(self, value: Any, conversion: int, spec: str) -> Any: ...
    def joined(self, parts: list[Any]) -> Any: ...
    def imported(self, name: str, level: int, names: Any, scope: dict[str, Any]) -> Any: ...


@functools.lru_cache(maxsize=2048)
def _instructions(
    code: types.CodeType,
) -> tuple[list[dis.Instruction], dict[int, int], list[int], frozenset[int]]:
    """(the instructions, the index of each offset, the line of each, the indices under a try or a with)."""
    found = list(dis.get_instructions(code))
    index = {each.offset: i for i, each in enumerate(found)}
    lines, line = [], code.co_firstlineno
    starts = dict(dis.findlinestarts(code))
    for each in found:
        line = starts.get(each.offset) or line
        lines.append(line)
    return found, index, lines, _protected(code, found, index)


def _protected(
    code: types.CodeType, found: list[dis.Instruction], index: dict[int, int]
) -> frozenset[int]:
    """The instructions whose errors somebody catches; an inlined comprehension only puts a variable back."""
    parse = getattr(dis, "_parse_exception_table", None)
    if parse is None:
        return frozenset()  # 3.10 has an instruction for it
    handled: set[int] = set()
    for entry in parse(code):
        if found[index[entry.target]].opname == "PUSH_EXC_INFO":
            handled.update(
                i for i, each in enumerate(found) if entry.start <= each.offset < entry.end
            )
    return frozenset(handled)


class Frame:
    """A call of a function: its variables, its stack, and where it stands."""

    def __init__(
        self,
        semantics: Semantics,
        code: types.CodeType,
        scope: dict[str, Any],
        variables: dict[str, Any],
        cells: tuple[Cell, ...],
    ) -> None:
        self.semantics, self.code, self.scope = semantics, code, scope
        self.names: dict[str, Any] = variables
        self.stack: list[Any] = []
        self.at = 0
        self.keywords: tuple[str, ...] = ()
        for name, cell in zip(code.co_freevars, cells, strict=True):
            self.names[name] = cell
        if VERSION < (3, 11):
            for name in code.co_cellvars:
                self.names[name] = Cell(self.names.get(name, ABSENT))
        self.found, self.index, self.lines, self.protected = _instructions(code)

    @property
    def line(self) -> int:
        """The line of the source that it stands in."""
        return self.lines[min(self.at, len(self.lines) - 1)]

    def run(self) -> Generator[Any, None, Any]:
        """Interpret it: a generator that yields what the function yields, and returns what it returns."""
        while True:
            self.semantics.steps += 1
            if self.semantics.steps > _LONGEST:
                raise NotTraceable("its forward does not come to an end")
            each = self.found[self.at]
            if self.at in self.protected and each.opname not in _HARMLESS:
                raise NotTraceable(
                    "it catches errors (try, with); what is caught depends on the call"
                )
            name = each.opname
            if name in ("RETURN_VALUE", "RETURN_CONST"):
                return each.argval if name == "RETURN_CONST" else self.stack.pop()
            if name == "YIELD_VALUE":
                yield self.stack.pop()
                self.stack.append(None)
            elif (operation := OPERATIONS.get(name)) is not None:
                target = operation(self, each)
                if target is not None:
                    self.at = target
                    continue
            else:
                raise NotTraceable(f"what it does is not followed ({_DESCRIBED.get(name, name)})")
            self.at += 1

    # --- for the instructions -------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def pops(self, count: int) -> list[Any]:
        """The last `count` values, in the order in which they were pushed."""
        if not count:
            return []
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def load(self, name: str) -> Any:
        value = self.names.get(name, ABSENT)
        if value is ABSENT:
            raise NotTraceable(f"the variable {name} has no value there")
        return value

    def called(self, args: list[Any], keywords: dict[str, Any]) -> None:
        """Take a callable off the stack, call it, and push what it gives."""
        below = self.pop()
        first = self.pop()
        if first is NULL:
            function = below
        elif below is NULL:
            function = first
        else:
            function, args = first, [below, *args]
        self.push(self.semantics.call(function, args, keywords, self))

    def called_with(self, count: int, names: tuple[str, ...]) -> None:
        values = self.pops(count)
        split = count - len(names)
        self.called(values[:split], dict(zip(names, values[split:], strict=True)))

    def target(self, each: dis.Instruction) -> int:
        return self.index[each.argval]


Operation = Callable[[Frame, dis.Instruction], "int | None"]
OPERATIONS: dict[str, Operation] = {}
_HARMLESS = ("NOP", "RESUME", "JUMP_FORWARD", "RERAISE")
_DESCRIBED = {
    "SETUP_FINALLY": "it catches errors with try", "SETUP_WITH": "it enters a context manager",
    "BEFORE_WITH": "it enters a context manager", "LOAD_SPECIAL": "it enters a context manager",
    "STORE_GLOBAL": "it writes to a global variable", "DELETE_GLOBAL": "it writes to a global variable",
    "RAISE_VARARGS": "it raises an error", "RERAISE": "it raises an error", "LOAD_BUILD_CLASS": "it defines a class",
    "YIELD_FROM": "yield from", "SEND": "yield from", "GET_AWAITABLE": "await",
    "DELETE_ATTR": "it deletes an attribute", "IMPORT_STAR": "import *",
}  # fmt: skip


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Register what instructions of these names do; the function gives the index to go on at, or None."""

    def register(function: Operation) -> Operation:
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


# They register themselves.
from . import instructions  # noqa: E402,F401

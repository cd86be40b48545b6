"""Reading what stands outside of a module while its forward is interpreted, and the guard that this leaves."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from torch import Tensor, nn

from ..words import a_type
from .guards import Guard, Held, eager_only, stays
from .known import full_name
from .values import (
    HOLDERS,
    NAMED,
    PLAIN,
    Bound,
    ModuleAt,
    NotTraceable,
    Source,
    Symbol,
    SymbolAttribute,
    Thing,
    is_plain,
    literal,
)

_MOST = 1000  # items of a holder that is read


class Reads:
    """What is read from outside of a module. Guards go into `guards`, in the order in which they were met."""

    guards: dict[Guard, None]

    def __init__(self) -> None:
        self.guards = {}
        self.outside: dict[int, Any] = {}  # holders that were read, and may not be written to
        self._ours: dict[int, str] = {}  # module -> its path, of those below the owner

    # --- globals ---------------------------------------------------------------------------------------------------

    def load_global(self, scope: dict[str, Any], name: str) -> Any:
        """A global of a function, or a builtin that none hides."""
        builtins_now = scope.get("__builtins__", {})
        builtins_now = getattr(builtins_now, "__dict__", builtins_now)
        if name in scope:
            value = scope[name]
            return self.admitted(
                value, Source(None, f"{{0}}[{literal(name)}]", (Held(scope),), name)
            )
        if name not in builtins_now:
            raise NotTraceable(f"it uses {name}, which is not defined")
        reason = f"a global {name} was defined after it was fused"
        self.guard(Guard(None, f"{literal(name)} not in {{0}}", (Held(scope),), reason))
        value = builtins_now[name]
        if getattr(value, "__module__", None) == "builtins":
            return value
        # Somebody put it there.
        source = Source(None, f"{{0}}[{literal(name)}]", (Held(builtins_now),), name)
        return self.admitted(value, source)

    def imported(self, name: str, level: int, names: Any, scope: dict[str, Any]) -> Any:
        """What an import inside a forward gives, where the module is loaded already."""
        if level:
            package = str(scope.get("__package__") or "").split(".")
            name = ".".join([*package[: len(package) - level + 1], *([name] if name else [])])
        found = sys.modules.get(name)
        if found is None:
            raise NotTraceable(f"it imports {name}, which is not loaded yet; import it above")
        if not names:
            name = name.partition(".")[0]
            found = sys.modules[name]
        self.guard(
            stays(Source(None, f"{{0}}.get({literal(name)})", (Held(sys.modules),), name), found)
        )
        return found

    def cell(self, cell: Any, name: str) -> Any:
        """What a variable of an enclosing function holds, of a function that was there before."""
        source = Source(None, "{0}.cell_contents", (Held(cell),), name)
        try:
            value = cell.cell_contents
        except ValueError:
            raise NotTraceable(f"the variable {name} has no value") from None
        known = dict(self.guards)
        admitted = self.admitted(value, source)
        for guard in [guard for guard in self.guards if guard not in known]:
            del self.guards[guard]
            self.guard(eager_only(guard))
        return admitted

    # --- values that come from outside ------------------------------------------------------------------------------

    def guard(self, guard: Guard) -> None:
        self.guards[guard] = None

    def admitted(self, value: Any, source: Source) -> Any:
        """A value that was read at a source, with a guard that it stays; a holder as a copy.

        Raises:
            NotTraceable: it is of a kind whose contents may change unseen.
        """
        if isinstance(value, Tensor):
            raise NotTraceable(
                f"it uses {source.text}, a tensor outside of the module; make it a buffer (register_buffer)"
            )
        if isinstance(value, nn.Module):
            path = self._ours.get(id(value))
            raise NotTraceable(
                f"it uses {source.text}, a module that stands outside; make it a child"
                if path is None
                else f"it reaches {path} through {source.text}, not as self.{path}"
            )
        if isinstance(value, HOLDERS) and type(value) in HOLDERS:
            return self._held(value, source)
        if is_plain(value) or is_named(value):
            self.guard(stays(source, value))
            return value
        if isinstance(value, functools.partial):
            self.guard(stays(source, value))
            return Thing(value, source)
        if is_plain_object(type(value)):
            # Not by identity: a copy of the module has one of its own. What is read off it is looked at.
            reason = f"{source.text} was changed after it was fused"
            test = f"type({source.expression}) is {{{len(source.constants)}}}"
            self.guard(Guard(source.path, test, (*source.constants, type(value)), reason))
            return Thing(value, source)
        raise NotTraceable(
            f"its forward depends on {source.text}, {a_type(value)}, whose contents may change"
        )

    def _held(self, value: Any, source: Source) -> Any:
        if _size(value) > _MOST:
            raise NotTraceable(
                f"its forward depends on {source.text}, too long a {type(value).__name__} to be looked at at each call"
            )
        try:
            self.guard(stays(source, value))
        except NotTraceable as error:
            raise NotTraceable(
                f"its forward depends on {source.text}, {a_type(value)}, whose contents may change"
            ) from error
        return self.held(value)

    def held(self, value: Any) -> Any:
        """A copy of a holder that may be read, and not written to."""
        copy = _copied(value)
        self._hold(copy)
        return copy

    def _hold(self, value: Any) -> None:
        if isinstance(value, HOLDERS):
            self.outside[id(value)] = value
            for item in value.values() if isinstance(value, dict) else value:
                self._hold(item)

    def changes(self, holder: Any) -> None:
        """Refuse to write to what was read from outside."""
        if id(holder) in self.outside and not isinstance(holder, (tuple, frozenset)):
            raise NotTraceable(
                f"it writes to {a_type(holder)} that outlives the call; return the value instead"
            )


def is_named(value: Any) -> bool:
    # typing's and torch's own objects are told by identity too.
    return isinstance(value, NAMED) or type(value).__module__ in ("typing", "torch._ops")


def is_plain_object(kind: type) -> bool:
    """Whether attributes of its instances are what stands in their `__dict__`."""
    reader = next(base for base in kind.__mro__ if "__getattribute__" in vars(base))
    is_plain = reader in (object, types.SimpleNamespace) and not hasattr(kind, "__getattr__")
    return is_plain and not issubclass(kind, (*HOLDERS, *PLAIN)) and kind.__dictoffset__ != 0


def _size(value: Any) -> int:
    """How many values stand in a holder."""
    if not isinstance(value, HOLDERS):
        return 1
    return sum(map(_size, value.values() if isinstance(value, dict) else value))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    return type(value)(map(_copied, value)) if isinstance(value, HOLDERS) else value


def described(value: Any) -> str:
    if isinstance(value, ModuleAt):
        return f"self.{'.'.join(value.path)}" if value.path else "self"
    if isinstance(value, (Symbol, SymbolAttribute)):
        return "a value computed from its input"
    if isinstance(value, Thing):
        return value.source.text
    if isinstance(value, (Bound, types.FunctionType, type, types.ModuleType)):
        return full_name(value.function if isinstance(value, Bound) else value)
    return f"{a_type(value)}"

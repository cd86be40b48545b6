"""What a fused forward depends on, looked at again at each call, as straight-line code.

What a forward reads while it is interpreted is baked into its graph; the fused forward is valid only while those reads
give the same answers. A `Guard` is one of them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import re
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..words import with_article
from .source import import_of, resolve
from .values import HOLDERS, NAMED, PLAIN, NotTraceable, Path, Source, is_plain


@dataclass(frozen=True)
class Guard:
    """One thing that must be as it was.

    Args:
        path: the module below the owner that it is about; None where it is about none.
        test: an expression over {m} (that module), {s} (the owner) and {0}, {1}, ... (the constants), true while it is.
        constants: values, held and compared by identity where they are no plain values.
        reason: what has happened where it is not true; empty where the test is `f(...) is None` and f tells.
    """

    path: Path | None
    test: str
    constants: tuple[Any, ...] = ()
    reason: str = ""

    def below(self, prefix: Path) -> Guard:
        """The same of a module that stands deeper."""
        return self if self.path is None else replace(self, path=(*prefix, *self.path))


# Of a child, and whether it is given Tensors: what it depends on that it gives one; None where that is not known.
Look = Callable[[nn.Module, bool], "tuple[Guard, ...] | None"]


@dataclass(frozen=True, eq=False)
class Held:
    """A constant that is compared by identity: the globals of a function, which are found again by the name of its
    module, or the cell of a variable."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"Held({type(self.value).__name__} at {id(self.value):#x})"


def frozen(value: Any) -> Any:
    """A value with its types, as something that can be compared and does not change with it.

    Raises:
        NotTraceable: it holds something whose contents cannot be compared.
    """
    kind = type(value)
    if kind in (list, tuple):
        return kind, tuple(map(frozen, value))
    if kind in HOLDERS and issubclass(kind, dict):
        return kind, tuple((frozen(key), frozen(item)) for key, item in value.items())
    if kind in (set, frozenset):
        return kind, frozenset(map(frozen, value))
    if kind is slice:
        return kind, (value.start, value.stop, value.step)
    if kind is complex:
        return kind, frozen(value.real), frozen(value.imag)
    if kind is float:
        return kind, value, math.copysign(1, value)  # 0.0 equals -0.0
    if is_plain(value) or isinstance(value, NAMED):
        return kind, value
    raise NotTraceable(f"{with_article(kind.__name__)}, whose contents may change")


def is_same(now: Any, expected: Any) -> bool:
    """Whether a value is what `frozen` gave."""
    try:
        return frozen(now) == expected
    except NotTraceable:
        return False


def stays(source: Source, value: Any) -> Guard:
    """That what is read at a source is this value, or one that equals it where it is a plain one."""
    reason = f"{source.text} was changed after it was fused"
    count = len(source.constants)
    constants: tuple[Any, ...]
    if isinstance(value, (bool, type(None))) or not isinstance(value, (*PLAIN, *HOLDERS)):
        test, constants = f"{source.expression} is {{{count}}}", (value,)
    elif isinstance(value, (*HOLDERS, slice)):
        test = f"{{{count}}}({source.expression}, {{{count + 1}}})"
        constants = is_same, frozen(value)
    else:
        test = (
            f"({source.expression} is {{{count}}} or "
            f"{{{count + 1}}}({source.expression}, {{{count + 2}}}))"
        )
        constants = value, is_same, frozen(value)
    return Guard(source.path, test, (*source.constants, *constants), reason)


def eager_only(guard: Guard) -> Guard:
    """The same, which does not hold under torch.compile: what it reads is not looked at again there."""
    test = f"not {{{len(guard.constants)}}}() and {guard.test}"
    return replace(guard, test=test, constants=(*guard.constants, torch.compiler.is_compiling))


def code_stays(function: types.FunctionType) -> list[Guard]:
    """That a function has the code and the default arguments that were read."""
    name = function.__qualname__
    reason = f"the code of {name} was changed after it was fused"
    guards = [Guard(None, "{0}.__code__ is {1}", (function, function.__code__), reason)]
    for attribute in ("__defaults__", "__kwdefaults__"):
        if (value := getattr(function, attribute)) is not None:
            source = Source(None, f"{{0}}.{attribute}", (function,), f"{name}.{attribute}")
            guards.append(stays(source, value))
    return guards


# --- as code -----------------------------------------------------------------------------------------------------


# For a function that tells why something is not so: the usual case of its guard, spelled out (None: there is none).
INLINE: dict[Any, Callable[[Guard], Guard | None]] = {}


# What nn.Module keeps in the `__dict__` of each instance, and the `__dict__` itself.
_KEPT = re.compile(
    r"\{m\}\.(__dict__|" + "|".join(n for n in vars(nn.Module()) if n.startswith("_")) + r")\b"
)


class _Writer:
    """Source of tests, with names for the modules and constants in it.

    Args:
        is_eager: for calls that nothing compiles: what nn.Module keeps is read where it is kept, past the lookup of
            attributes, which finds in 25 ns (Python 3.11) what a dictionary finds in 12.
    """

    def __init__(self, is_eager: bool = False) -> None:
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {}
        self._is_eager = is_eager
        self._names: dict[tuple[str, Path], str] = {}
        self._constants: dict[int, str] = {}

    def _local(self, what: str, path: Path, value: str) -> str:
        """A name for what is read of the module at a path: `m0` itself, `d0` its `__dict__`, `c0` its children."""
        if (what, path) not in self._names:
            self._names[what, path] = f"{what}{len(self._names)}"
            self.lines.append(f"{self._names[what, path]} = {value}")
        return self._names[what, path]

    def module(self, path: Path) -> str:
        if not path:
            return "self"
        return self._local("m", path, f"{self._kept('_modules', path[:-1])}[{path[-1]!r}]")

    def _kept(self, name: str, path: Path) -> str:
        """What nn.Module keeps under this name."""
        module = self.module(path)
        if not self._is_eager:
            return f"{module}.{name}"
        state = self._local("d", path, f"{module}.__dict__")
        if name == "__dict__":
            return state
        kept = f"{state}[{name!r}]"
        return self._local("c", path, kept) if name == "_modules" else kept

    def constant(self, value: Any) -> str:
        if value is None or value is True or value is False:
            return repr(value)
        if isinstance(value, Held):
            value = value.value
        name = self._constants.setdefault(id(value), f"k{len(self._constants)}")
        self.scope[name] = value
        return name

    def test(self, guard: Guard) -> str:
        """The test; in front of a call that would tell, what is nearly always the case."""
        inline = INLINE.get(guard.constants[0]) if guard.constants else None
        usual = inline(guard) if inline is not None else None
        text = self.written(guard)
        return text if usual is None else f"({self.written(usual)} or {text})"

    def written(self, guard: Guard) -> str:
        """The test as it stands, with names for its places."""
        # Written out, since a test's own braces are none of str.format's.
        text, path = guard.test.replace("{s}", "self"), guard.path
        if path is not None:
            text = _KEPT.sub(lambda found: self._kept(found[1], path), text)
            text = text.replace("{m}", self.module(path))
        for i, value in enumerate(guard.constants):
            place = f"{{{i}}}"
            if self._is_eager and value is torch.compiler.is_compiling:
                text = text.replace(f"{place}()", "False")
            if self._is_eager and isinstance(value, type) and f"{place}.__dict__" in text:
                # What this gives shows what becomes of the class.
                text = text.replace(f"{place}.__dict__", self.constant(vars(value)))
            text = text.replace(place, self.constant(value))
        return text


def compiled(guards: Iterable[Guard], is_eager: bool = False) -> Callable[[nn.Module], bool]:
    """A function that tells of a module whether all of its guards hold; `is_eager`: it is not asked while something
    is being compiled."""
    writer = _Writer(is_eager)
    tests = [writer.test(guard) for guard in dict.fromkeys(guards)]
    found = "\n            and ".join(tests) or "True"
    lines = "".join(f"        {line}\n" for line in writer.lines)
    # As default arguments: in a call whose caches are cold a third of what a global costs.
    constants = "".join(f", {name}={name}" for name in writer.scope)
    source = (
        f"def fits(self{constants}):\n    try:\n{lines}        return (\n            {found}\n        )\n"
        "    except Exception:\n        return False\n"
    )
    exec(compile(source, "<fusedres guards>", "exec", dont_inherit=True), writer.scope)
    return writer.scope["fits"]


def why_not(module: nn.Module, guards: Iterable[Guard]) -> str | None:
    """What is no longer as it was; None when all is."""
    for guard in guards:
        if guard.reason and not compiled((guard,))(module):
            return _removed(module, guard.path) or guard.reason
        if not guard.reason and (reason := _told(module, guard)) is not None:
            return f"{'.'.join(guard.path or ())}: {_removed(module, guard.path) or reason}"
    return None


def _told(module: nn.Module, guard: Guard) -> str | None:
    """What the function in a test says."""
    writer = _Writer()
    text = writer.written(guard).removesuffix(" is None")
    scope = {**writer.scope, "self": module}
    try:
        exec("\n".join(writer.lines), scope)
        return eval(text, scope)
    except Exception:
        return "it was removed"


def _removed(module: nn.Module, path: Path | None) -> str | None:
    for i, name in enumerate(path or (), 1):
        child = module._modules.get(name)
        if child is None:
            return f"{'.'.join((path or ())[:i])} was removed after it was fused"
        module = child
    return None


# --- in a pickle -------------------------------------------------------------------------------------------------


class NotPortable(Exception):
    """A guard is about something that has no name in another process."""


def packed(guard: Guard) -> tuple[Any, ...]:
    """A guard as plain values.

    Raises:
        NotPortable: what it is about cannot be found again by its name.
    """
    constants = [
        ("code", _digest(value)) if isinstance(value, types.CodeType) else _packed(value)
        for value in guard.constants
    ]
    return guard.path, guard.test, tuple(constants), guard.reason


def unpacked(parts: tuple[Any, ...]) -> Guard:
    """The guard again, with what the names stand for here.

    Raises:
        NotPortable: something is not there, or its code is another.
    """
    path, test, packs, reason = parts
    constants: list[Any] = []
    for kind, *pack in packs:
        if kind == "code":
            if _digest(constants[0].__code__) != pack[0]:
                raise NotPortable(reason)
            constants.append(constants[0].__code__)
        else:
            constants.append(_unpacked(kind, *pack))
    return Guard(path, test, tuple(constants), reason)


def _packed(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Held):
        if value.value is sys.modules:
            return ("loaded",)
        name = value.value.get("__name__") if isinstance(value.value, dict) else None
        if name is None or getattr(sys.modules.get(name), "__dict__", None) is not value.value:
            raise NotPortable(name)
        return "scope", name
    if isinstance(value, types.ModuleType):
        if sys.modules.get(value.__name__) is not value:
            raise NotPortable(value.__name__)
        return "module", value.__name__
    if type(value) in (tuple, frozenset):
        return type(value).__name__, tuple(map(_packed, value))
    if isinstance(value, NAMED):
        if (names := import_of(value)) is None:
            raise NotPortable(value)
        return "object", *names
    if isinstance(value, PLAIN) or type(value).__module__.startswith("fusedres."):
        return "plain", value
    raise NotPortable(type(value).__name__)


def _unpacked(kind: str, *pack: Any) -> Any:
    if kind == "plain":
        return pack[0]
    if kind in ("tuple", "frozenset"):
        return (tuple if kind == "tuple" else frozenset)(_unpacked(*each) for each in pack[0])
    if kind == "loaded":
        return Held(sys.modules)
    try:
        module = importlib.import_module(pack[0])
        if kind == "object":
            return resolve(*pack)
    except (ImportError, AttributeError) as error:
        raise NotPortable(pack[0]) from error
    return Held(vars(module)) if kind == "scope" else module


@functools.lru_cache(maxsize=1024)
def _digest(code: types.CodeType) -> str:
    """Of what a function does, the same in each process that runs this Python."""
    digest = hashlib.sha256(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for value in code.co_consts:
        inner = _digest(value) if isinstance(value, types.CodeType) else ""
        # A set prints in an order that differs from process to process.
        plain = sorted(map(repr, value)) if isinstance(value, frozenset) else value
        digest.update((inner or repr(plain)).encode())
    return digest.hexdigest()[:16]


digest = _digest

"""What a call means while a forward is interpreted: a node, a function that is interpreted too, an answer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import types
from collections import OrderedDict
from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..words import a_type
from . import builtin, known
from .attributes import Attributes
from .frame import Frame
from .guards import Guard, code_stays
from .operators import Operators, has_symbol, is_inherited
from .reads import described
from .values import (
    ABSENT,
    CONTAINERS,
    HOLDERS,
    Bound,
    Cell,
    Closure,
    Given,
    ModuleAt,
    Native,
    NotTraceable,
    Opaque,
    Symbol,
    SymbolAttribute,
    Thing,
)

_DEEPEST = 40  # calls within calls


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call what stands on a module; in a graph, where a target must be known beforehand."""
    return function(*args, **kwargs)


class Calls(Operators):
    """The part of the interpreter that calls."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.frames: list[Frame] = []
        # A call that may only be the last thing a forward does: its node, how many guards there were, why.
        self.last: tuple[fx.Node, int, str] | None = None

    # --- calls ------------------------------------------------------------------------------------------------------

    def call(
        self, function: Any, args: list[Any], keywords: dict[str, Any], frame: Frame | None
    ) -> Any:
        """`function(*args, **keywords)`."""
        if isinstance(function, SymbolAttribute):
            return self._call_method(function, args, keywords)
        if isinstance(function, ModuleAt):
            return self._call_module(function, args, keywords)
        if isinstance(function, Opaque):
            attribute = self.node("get_attr", function.path)
            made = self.node("call_function", call, (attribute, *args), keywords)
            self.give([*args, *keywords.values()])
            return made
        if isinstance(function, Bound):
            return self._call_bound(function, args, keywords)
        if isinstance(function, Native):
            return self._call_native(function, args, keywords)
        if isinstance(function, Closure):
            return self._call_closure(function, args, keywords)
        if isinstance(function, Thing):
            return self._call_thing(function, args, keywords)
        if isinstance(function, Symbol):
            raise NotTraceable("it calls a value computed from its input")
        args = [self.value_of(value) for value in args]
        keywords = {name: self.value_of(value) for name, value in keywords.items()}
        if isinstance(function, type) or getattr(function, "__name__", "") in known.SPECIAL:
            special = builtin.BUILTINS.get(getattr(function, "__name__", ""))
            if special is not None and known.SPECIAL[function.__name__] is function:
                return special(self, args, keywords, frame)
        return self._call_function(function, args, keywords)

    def _call_function(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        if known.is_tensor_function(function):
            return self.node("call_function", function, tuple(args), keywords)
        if isinstance(function, types.FunctionType) and function in known.ANSWERS:
            return known.ANSWERS[function]
        if _is_in(function, known.QUESTIONS):
            return self._question(function, args, keywords)
        is_symbolic = any(has_symbol(value) for value in (*args, *keywords.values()))
        if function is len and len(args) == 1 and not isinstance(args[0], Symbol):
            return self._length(args[0])
        if function is functools.reduce:
            return self._reduce(*args, **keywords)
        if known.is_pure(function):
            text = f"it gives a module or a function to {known.full_name(function)}"
            self.only_plain(text, *args, *keywords.values())
            if any(isinstance(value, types.FunctionType) for value in (*args, *keywords.values())):
                raise NotTraceable(text)
            if _is_in(function, known.WRITING) and isinstance(args[0], HOLDERS):
                raise NotTraceable(f"it writes to {a_type(args[0])} by {known.full_name(function)}")
            if is_symbolic:
                return self.node("call_function", function, tuple(args), keywords)
            return self.natively(function, args, keywords)
        if known.is_builder(function):
            return self._built(function, args, keywords)
        if isinstance(function, types.FunctionType) and known.may_be_entered(function):
            return self.enter(function, args, keywords)
        if known.is_plain_namedtuple(function):
            return self.natively(function, args, keywords)
        if isinstance(function, types.MethodType) and _is_autograd(function):
            return self.node("call_function", function, tuple(args), keywords)
        if isinstance(function, type) and dataclasses.is_dataclass(function):
            made = self.node("call_function", function, tuple(args), keywords)
            self.last = made.node, len(self.guards), _why_not_called(function)
            return made
        raise NotTraceable(_why_not_called(function))

    def _question(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        if keywords or not all(isinstance(value, (str, type(None))) for value in args):
            raise NotTraceable(f"it asks {known.full_name(function)}() of what is not known")
        name = known.full_name(function)
        constants = tuple(range(1, 1 + len(args)))
        call_text = f"{{0}}({', '.join(f'{{{i}}}' for i in constants)})"
        value = self.natively(function, args, {})
        reason = f"{name}() gives another answer than when it was fused"
        test = f"{call_text} == {{{1 + len(args)}}}"
        self.guard(Guard(None, test, (function, *args, value), reason))
        return value

    def _length(self, value: Any) -> int:
        if isinstance(value, ModuleAt):
            if not isinstance(value.module, CONTAINERS) or not is_inherited(value.cls, "__len__"):
                raise NotTraceable(f"it asks for the length of {described(value)}")
            return len(self.children(value))
        if isinstance(value, (type, Thing)):
            raise NotTraceable(f"it asks for the length of {described(value)}")
        return self.natively(len, [value], {})

    def _reduce(self, function: Any, values: Any, *initial: Any) -> Any:
        found = itertools.chain(initial, self.iterate(values))
        total = next(found, ABSENT)
        for value in found:
            total = self.call(function, [total, value], {}, None)
        return total

    def _built(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        if function is callable:
            kinds = (Bound, Native, Closure, ModuleAt, Opaque, types.FunctionType, type)
            if isinstance(args[0], kinds):
                return True
            raise NotTraceable(f"it asks whether {described(args[0])} can be called")
        if function in (torch.Size, torch.device, bytes):
            if any(has_symbol(value) for value in args):
                return self.node("call_function", function, tuple(args), keywords)
            return self.natively(function, args, keywords)
        if function in (dict, OrderedDict) and args and not isinstance(args[0], dict):
            pairs = [list(self.iterate(pair)) for pair in self.iterate(args[0])]
            return self.natively(function, [pairs], keywords)
        if function in (list, tuple) and args and isinstance(args[0], Symbol):
            # Of sizes: as long as the tensor has dimensions, which is known when it runs.
            return self.node("call_function", function, tuple(args), keywords)
        if function in (itertools.islice, itertools.repeat):
            return self.natively(function, args, keywords)
        if function in (dict, OrderedDict):
            return self.natively(function, args, keywords)
        if function is enumerate:
            return self.natively(function, [self.iterate(args[0]), *args[1:]], keywords)
        if function is reversed:
            return iter(list(self.iterate(args[0]))[::-1])
        return self.natively(function, [self.iterate(value) for value in args], keywords)

    def _call_method(
        self, method: SymbolAttribute, args: list[Any], keywords: dict[str, Any]
    ) -> Any:
        if method.name.startswith("_"):
            raise NotTraceable(f"it calls a tensor's method {method.name}")
        if self.is_tensor(method.symbol) and method.name not in known.TENSOR_METHODS:
            raise NotTraceable(f"it calls {method.name}, which a Tensor does not have")
        # Of what a child gives, too, which is a Tensor most often.
        if method.name in known.TENSOR_METHODS:
            function = getattr(Tensor, method.name)
            if isinstance(function, types.FunctionType) and known.may_be_entered(function):
                raise NotTraceable(f"Tensor.{method.name} was replaced for the whole process")
            reason = f"Tensor.{method.name} was changed after it was fused"
            self.guard(Guard(None, f"{{0}}.{method.name} is {{1}}", (Tensor, function), reason))
        return self.node("call_method", method.name, (method.symbol, *args), keywords)

    def _call_module(self, at: ModuleAt, args: list[Any], keywords: dict[str, Any]) -> Symbol:
        if not at.path:
            raise NotTraceable("its forward calls the module itself")
        made = self.node("call_module", ".".join(at.path), tuple(args), keywords)
        made.of = (Given(at, tuple(args)),)
        if not known.is_layer(at.module):
            self.give([*args, *keywords.values()])
        return made

    def _call_bound(self, method: Bound, args: list[Any], keywords: dict[str, Any]) -> Any:
        function, owner = method.function, method.owner
        if isinstance(owner, ModuleAt):
            if function is nn.Module.__getattr__:
                return self._registered(owner, args[0])
            if function in (nn.Module.children, nn.Module.named_children):
                pairs = [pair for pair in self.children(owner) if pair[1] is not None]
                modules = list(owner.module._modules.values())
                if len({id(child) for child in modules}) < len(modules):
                    raise NotTraceable("it goes through children of which two are one")
                test = "len({*map(id, {m}._modules.values())}) == {0}"
                reason = "two of its children are one since it was fused"
                self.guard(Guard(owner.path, test, (len(modules),), reason))
                is_named = function is nn.Module.named_children
                return iter(pairs if is_named else [child for _, child in pairs])
            if isinstance(owner.module, CONTAINERS) and is_inherited(owner.cls, function.__name__):
                found = self._of_container(owner, function.__name__, args)
                if found is not ABSENT:
                    return found
            if function.__module__ == nn.Module.__module__:
                raise NotTraceable(f"it calls self.{function.__name__}(), nn.Module's own")
        if not isinstance(function, types.FunctionType) or not known.may_be_entered(function):
            raise NotTraceable(_why_not_called(function))
        return self.enter(function, [owner, *args], keywords)

    def _registered(self, at: ModuleAt, name: str) -> Any:
        found = self.registered(at, name)
        if found is ABSENT:
            raise NotTraceable(f"{described(at)} has no attribute {name}")
        return found

    def _of_container(self, at: ModuleAt, name: str, args: list[Any]) -> Any:
        if name in ("keys", "values", "items"):
            found = dict(self.children(at))
            return {
                "keys": list(found),
                "values": list(found.values()),
                "items": list(found.items()),
            }[name]
        if name == "__iter__":
            return self.iterate(at)
        if name == "__len__":
            return self._length(at)
        if name == "__getitem__":
            return self.child_at(at, args[0])
        return ABSENT

    def _call_native(self, method: Native, args: list[Any], keywords: dict[str, Any]) -> Any:
        owner, name = method.owner, method.name
        kind = type(owner)
        allowed = known.METHODS.get(kind, frozenset())
        if name not in allowed:
            raise NotTraceable(f"it calls {kind.__name__}.{name}(), which is not followed")
        if name in known.CHANGING:
            self.changes(owner)
        values = [self.value_of(value) for value in (*args, *keywords.values())]
        if kind is str and any(has_symbol(value) for value in values):
            raise NotTraceable("it writes a value computed from its input into a string")
        if name in known.COMPARING or kind in (str, bytes):
            text = f"it gives a module or an object to {kind.__name__}.{name}()"
            self.only_plain(text, owner, *values)
        if name in known.COMPARING and name not in ("pop",) and has_symbol((owner, values)):
            raise NotTraceable("it compares values computed from its input")
        if (
            kind in (dict, OrderedDict)
            and name in ("get", "pop", "setdefault")
            and has_symbol(args[0])
        ):
            raise NotTraceable("it looks up a value computed from its input")
        if name == "extend":
            args = [list(self.iterate(args[0]))]
        return self.natively(getattr(owner, name), [self.value_of(v) for v in args], keywords)

    def _call_closure(self, made: Closure, args: list[Any], keywords: dict[str, Any]) -> Any:
        variables = _bound(made.code, made.defaults, made.keyword_defaults, args, keywords)
        return self._frame(made.code, made.scope, variables, made.cells)

    def _call_thing(self, thing: Thing, args: list[Any], keywords: dict[str, Any]) -> Any:
        if isinstance(thing.value, functools.partial):
            function, source = thing.value, thing.source
            given = {
                name: self.admitted(value, source.item("keywords", name))
                for name, value in function.keywords.items()
            }
            test = f"tuple({source.expression}.keywords) == {{{len(source.constants)}}}"
            reason = f"{source.text} has other keywords than when it was fused"
            self.guard(Guard(source.path, test, (*source.constants, tuple(given)), reason))
            first = [
                self.admitted(each, source.item("args", i)) for i, each in enumerate(function.args)
            ]
            called = self.admitted(function.func, source.attribute("func"))
            return self.call(called, [*first, *args], {**given, **keywords}, None)
        raise NotTraceable(_why_not_called(thing.value))

    # --- functions --------------------------------------------------------------------------------------------------

    def enter(self, function: types.FunctionType, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Interpret a function that was there before, with a guard that its code stays."""
        for guard in code_stays(function):
            self.guard(guard)
        defaults = self.held(function.__defaults__ or ())
        named = self.held(function.__kwdefaults__ or {})
        variables = _bound(function.__code__, defaults, named, args, keywords)
        names = function.__code__.co_freevars
        cells = function.__closure__ or ()
        held = tuple(_Outer(self, cell, name) for name, cell in zip(names, cells, strict=True))
        return self._frame(function.__code__, function.__globals__, variables, held)

    def _frame(
        self,
        code: types.CodeType,
        scope: dict[str, Any],
        variables: dict[str, Any],
        cells: tuple[Any, ...],
    ) -> Any:
        if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            raise NotTraceable("its forward is a coroutine")
        frame = Frame(self, code, scope, variables, cells)
        if code.co_flags & inspect.CO_GENERATOR:
            return self._lazily(frame)
        if len(self.frames) >= _DEEPEST:
            raise NotTraceable("its forward calls functions within functions without an end")
        self.frames.append(frame)
        run = frame.run()
        try:
            next(run)
        except StopIteration as stop:
            self.frames.pop()
            return stop.value
        raise NotTraceable("it yields outside of a generator")

    def _lazily(self, frame: Frame) -> Generator[Any, None, None]:
        """A generator of the user's: it goes on when it is asked for the next value."""
        run = frame.run()
        while True:
            self.frames.append(frame)
            try:
                value = next(run)
            except StopIteration:
                self.frames.pop()
                return
            self.frames.pop()
            yield value


class _Outer(Cell):
    """A variable of an enclosing function that exists already: it is read, with a guard, and not written to."""

    def __init__(self, reader: Attributes, cell: Any, name: str) -> None:
        self._reader, self._cell, self._name = reader, cell, name

    @property
    def value(self) -> Any:
        return self._reader.cell(self._cell, self._name)

    @value.setter
    def value(self, value: Any) -> None:
        raise NotTraceable(f"it writes to {self._name}, a variable of an enclosing function")


def _bound(
    code: types.CodeType,
    defaults: tuple[Any, ...],
    keyword_defaults: dict[str, Any],
    args: list[Any],
    keywords: dict[str, Any],
) -> dict[str, Any]:
    """The variables of a call, as Python binds them."""
    count, only = code.co_argcount, code.co_kwonlyargcount
    names = code.co_varnames[: count + only]
    keywords = dict(keywords)
    variables: dict[str, Any] = dict(zip(names[:count], args, strict=False))
    extra = args[count:]
    for i, name in enumerate(names):
        if name in keywords and i >= code.co_posonlyargcount:
            if name in variables:
                raise NotTraceable(f"{code.co_name}() gets {name} twice")
            variables[name] = keywords.pop(name)
    for name, value in zip(names[count - len(defaults) : count], defaults, strict=True):
        variables.setdefault(name, value)
    for name, value in keyword_defaults.items():
        variables.setdefault(name, value)
    place = count + only
    if code.co_flags & inspect.CO_VARARGS:
        variables[code.co_varnames[place]] = tuple(extra)
        extra, place = [], place + 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        variables[code.co_varnames[place]] = keywords
        keywords = {}
    missing = [name for name in names if name not in variables]
    if extra or keywords or missing:
        raise NotTraceable(f"{code.co_name}() is called with arguments that it does not take")
    return variables


def _is_in(function: Any, functions: Iterable[Any]) -> bool:
    return any(function is each for each in functions)


def _is_autograd(function: types.MethodType) -> bool:
    owner = function.__self__
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def _why_not_called(function: Any) -> str:
    name, advice = known.full_name(function), known.advice(function)
    if hasattr(function, "__enter__"):
        return f"it enters {name} on its way; enter it around the call of this module"
    return f"it calls {name}(), and what that does is not known{f'; {advice}' if advice else ''}"

"""Activation checkpointing that moves running statistics once.

`torch.utils.checkpoint` runs a forward again in the backward, and every BatchNorm in it counts the batch a second time:
after one step with momentum m the running statistics have moved by 1 - (1 - m)^2. Here the second run is given copies
of them, which nobody reads after it.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as _torch

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NO_CONTEXTS = _torch.noop_context_fn


def checkpoint(
    function: Callable[..., Any] | None = None,
    *args: Any,
    use_reentrant: bool | None = False,
    **kwargs: Any,
) -> Any:
    """`torch.utils.checkpoint.checkpoint`, with running statistics that move once and not twice.

    The output and all gradients are PyTorch's, bit for bit; `running_mean`, `running_var` and `num_batches_tracked` are
    what they are without checkpointing. It holds for every module with buffers of these names, fused or not.

    Args:
        function: what is run now, and again in the backward. The modules that it runs are found in it: it is a module
            or a method of one, or a function that has them in its closure, its defaults, or under a global that it
            names (of a Python module that it names, too), in lists, tuples, dicts and attributes of objects, up to
            three objects inside of one another. Modules among `args` and `kwargs` are found as well; one that is
            reached in another way (a method of an object that reads a global, a weak reference, a registry that is
            asked by a function of another library) moves its statistics twice.
        args, kwargs: of the function, and the options of `torch.utils.checkpoint.checkpoint` of the installed PyTorch
            (`preserve_rng_state`, `context_fn`, `determinism_check`, ...).
        use_reentrant: as PyTorch's, but False where nothing is said.

    Returns:
        What `function(*args)` returns; without a function, a decorator with these options.

    Raises:
        ValueError, RuntimeError: as PyTorch's own does.

    Under `torch.compile` it is PyTorch's own: what the compiler computes again writes no buffer.
    """
    run: Any = _torch.checkpoint
    if torch.compiler.is_compiling():
        return run(function, *args, use_reentrant=use_reentrant, **kwargs)
    if function is None:
        if args:
            raise ValueError("checkpoint: function is None, expected what is to be run")
        return functools.partial(_decorated, use_reentrant, kwargs)
    found = _modules_of((function, args, kwargs))
    if use_reentrant or use_reentrant is None:
        return run(
            _again_with_copies(function, found), *args, use_reentrant=use_reentrant, **kwargs
        )
    given = kwargs.pop("context_fn", _NO_CONTEXTS)

    def contexts() -> tuple[Any, Any]:
        first, second = given()
        return first, _Copies(found, second)

    return run(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _decorated(use_reentrant: bool | None, options: dict, function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=use_reentrant, **options, **kwargs)

    return run


def _again_with_copies(function: Callable, modules: list[nn.Module]) -> Callable[..., Any]:
    """The function, whose runs after the first have copies of the statistics."""
    has_run = False

    def run(*args: Any) -> Any:
        nonlocal has_run
        if has_run:
            with _Copies(modules):
                return function(*args)
        has_run = True
        return function(*args)

    return run


class _Copies:
    """While it lasts the modules have copies of their running statistics; then comes `inside`, a context of the user's.

    A second backward over a retained graph enters it again.
    """

    def __init__(self, modules: list[nn.Module], inside: Any = None) -> None:
        self._modules, self._inside = modules, inside
        self._before: list[list[tuple[dict, str, Tensor]]] = []

    def __enter__(self) -> _Copies:
        before = [
            (module._buffers, name, buffer)
            for module in self._modules
            for name in _STATISTICS
            if (buffer := module._buffers.get(name)) is not None
        ]
        self._before.append(before)
        # Not before the user's context, which may be a mode that expects the operations of the first run and no others.
        with torch.no_grad():
            for buffers, name, buffer in before:
                buffers[name] = buffer.clone()
        try:
            if self._inside is not None:
                self._inside.__enter__()
        except BaseException:
            self._put_back()
            raise
        return self

    def __exit__(self, *error: Any) -> Any:
        try:
            return None if self._inside is None else self._inside.__exit__(*error)
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for buffers, name, buffer in self._before.pop():
            buffers[name] = buffer


def _modules_of(value: Any) -> list[nn.Module]:
    """The modules with running statistics that can be reached from a function and its arguments."""
    found = dict.fromkeys(
        module
        for root in _roots(value, {})
        for module in root.modules()
        if any(module._buffers.get(name) is not None for name in _STATISTICS)
    )
    return list(found)


def _roots(value: Any, seen: dict[int, int], objects: int = 3) -> Iterator[nn.Module]:
    """objects: how many that are nothing of these, and hold something, may stand inside of one another."""
    waiting = [(value, objects)]
    while waiting:
        value, objects = waiting.pop()
        # Met before with as much left to look into.
        if isinstance(value, _ATOMS) or seen.get(id(value), -1) >= objects:
            continue
        seen[id(value)] = objects
        inside: Iterable[Any] = ()
        if isinstance(value, nn.Module):
            yield value
            # A module may stand in a plain list, too.
            inside = [
                t for m in value.modules() for t in vars(m).values() if isinstance(t, _GROUPS)
            ]
        elif isinstance(value, dict):
            inside = value.values()
        elif isinstance(value, _GROUPS):
            inside = value
        elif isinstance(value, functools.partial):
            inside = (value.func, value.args, value.keywords)
        elif isinstance(value, types.FunctionType):
            inside = _read_by(value)
        elif isinstance(value, types.MethodType):
            inside = (value.__self__, value.__func__)
        elif isinstance(owner := _owner(value), nn.Module):
            yield owner  # of what stands for a method
        elif objects and not isinstance(value, _NO_HOLDERS):
            inside = _attributes(value)
            objects -= 1
        waiting += [(each, objects) for each in inside if not isinstance(each, _ATOMS)]


def _read_by(function: types.FunctionType) -> list[Any]:
    """What a function may read: globals (by name; those of the functions inside of it too), defaults, its closure."""
    inside = [function.__defaults__, function.__kwdefaults__, function.__dict__]
    if not _is_torchs(function.__module__ or ""):
        known, codes = function.__globals__, [function.__code__]
        for code in codes:
            read = [known[name] for name in code.co_names if name in known]
            inside += read
            for module in read:  # `models.net(x)`
                if isinstance(module, types.ModuleType) and not _is_torchs(module.__name__):
                    inside += [vars(module)[n] for n in code.co_names if n in vars(module)]
            codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return inside + [c.cell_contents for c in function.__closure__ or () if _is_filled(c)]


def _is_torchs(name: str) -> bool:
    return name == "torch" or name.startswith("torch.")


def _attributes(value: Any) -> list[Any]:
    """What an object holds, in slots too."""
    found = [*getattr(value, "__dict__", {}).values()]
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = vars(kind).get(name, vars(kind).get(f"_{kind.__name__.lstrip('_')}{name}"))
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found.append(member.__get__(value))
                except AttributeError:  # empty
                    continue
    return found


def _owner(value: Any) -> Any:
    try:
        return getattr(value, "__self__", None)
    except Exception:  # whatever a stranger's __getattr__ raises
        return None


_ATOMS = (int, float, complex, str, bytes, type(None), Tensor)
_GROUPS = (list, tuple, set, frozenset, dict, deque)
_NO_HOLDERS = (type, types.ModuleType)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that is bound later
        return False

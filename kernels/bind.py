"""A launch with everything filled in but what changes from call to call: stream, pointers, some floats.

What is private in Triton's launcher stands here and nowhere else. Tried on Triton 3.6 (torch 2.11) and Triton 3.9
(torch 2.15), and never taken for granted from a version: what the launcher tells its C function is listened to once,
and said again at each launch; a launcher that has more to it than is known here is called itself.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType
from typing import Any, Literal

from triton import knobs
from triton.runtime import driver

try:
    from triton.backends.nvidia import driver as nvidia
except ImportError:  # a Triton without that backend
    nvidia = None


class Given(int):
    """Among the floats of a launch: the k-th of those that a call brings."""


class Pointer(int):
    """Among its arguments: the k-th tensor of the call; to Triton's launcher, its address."""


def replaced(value: Any, by: Callable[[Any], Any]) -> Any:
    """An argument with other parts; those of a tuple keep their names."""
    if not isinstance(value, tuple):
        return by(value)
    parts = [replaced(part, by) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def parts_of(value: Any) -> Iterator[Any]:
    """What an argument consists of, in the order in which the machine code takes it."""
    if isinstance(value, tuple):
        for part in value:
            yield from parts_of(part)
    else:
        yield value


# How far a launch goes, for tests: to the C function of Triton's launcher, to the launcher, or nowhere (None is bound).
LEVEL: Literal["launcher", "run", "triton"] = "launcher"

# Whatever a launcher has in Triton 3.6 to 3.9. Where one of _MORE is not 0, there is more to a launch than arguments.
_KNOWN = {
    "launch", "num_ctas", "launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature",
    "global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align", "gsan_enabled",
}  # fmt: skip
_MORE = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")


class Bound:
    """`launch(gx, gy, gz, stream, *between, *values)`, or with the values in a tuple: `is_packed`.

    Among the values, and in tuples among them, a `Pointer` or a `Given` stands for what comes with the call.
    `bound(stream, pointers, floats)` launches; `text` is the same as an expression, for whoever writes several of them
    into one function.
    """

    def __init__(
        self,
        compiled: Any,
        launch: Callable[..., Any],
        grid: tuple[int, int, int],
        between: tuple,
        values: tuple,
        is_packed: bool,
    ) -> None:
        self.kept = compiled  # when it goes, its code is unloaded
        self._launch, self._grid, self._between = launch, grid, between
        self._values, self._is_packed = values, is_packed
        self._go: Callable[..., None] | None = None

    def __call__(self, stream: int, pointers: Sequence[int], floats: Sequence[float]) -> None:
        if self._go is None:
            text, scope = self.text("launch", "p[{}]", "f[{}]")
            self._go = eval(f"lambda stream, p, f: {text}", scope)
        self._go(stream, pointers, floats)

    def text(self, name: str, pointer: str, given: str) -> tuple[str, dict[str, Any]]:
        """The launch as an expression in `stream`, with these formats for what comes with the call, and the names in
        it, which all begin with `name`."""
        scope: dict[str, Any] = {name: self._launch}

        def said(value: Any) -> str:
            if type(value) is Pointer:
                return pointer.format(int(value))
            if type(value) is Given:
                return given.format(int(value))
            if value is None or type(value) in (int, bool):
                return repr(value)
            if any(type(part) in (Pointer, Given) for part in parts_of(value)):
                return f"({', '.join(map(said, value))},)"
            known = f"{name}_{len(scope)}"
            scope[known] = value
            return known

        values = ", ".join(map(said, self._values))
        if self._is_packed:
            values = f"({values},)" if values else "()"
        parts = [*map(said, self._grid), "stream", *map(said, self._between), values]
        return f"{name}({', '.join(part for part in parts if part)})", scope


def bind(
    compiled: Any,
    grid: tuple[int, int, int],
    arguments: tuple,
    constants: tuple,
) -> Bound | None:
    """What launches `compiled`, which `kernel[grid](...)` returned; None where it is not Triton's launcher for CUDA
    that does.

    It looks at no alignment and calls no hook (`is_watched`).

    Args:
        arguments: in the kernel's order: integers, floats, None, and tuples of them; a `Pointer` for each tensor, a
            `Given` for a float that the call brings.
        constants: those behind them.

    Raises:
        ValueError: these are not the arguments that `compiled` was compiled for.
    """
    run = compiled.run
    if LEVEL == "triton" or nvidia is None or type(run) is not nvidia.CudaLauncher:
        return None
    pointers = tuple(part for part in parts_of(arguments) if type(part) is Pointer)
    arguments = (*arguments, *constants)
    taken = list(_taken(tuple(compiled.src.signature.values()), arguments))
    if tuple(value for kind, value in taken if kind.startswith("*")) != pointers:
        raise ValueError(f"{compiled.name} was compiled for other tensors than {pointers}")
    told = _told(compiled, grid, arguments) if LEVEL == "launcher" else None
    if told is not None and _is_same(told[-1], arguments):  # Triton 3.9: in a tuple
        *before, annotations, signature, _ = told
        if (
            annotations is run.arg_annotations
            and len(before) == 13
            and len(signature) == len(taken)
        ):
            # Without constants and tuples, and so without the annotations that tell Triton of them.
            plain = [nvidia.PyKernelArg(nested_tuple=None, type=nvidia.ARG_KERNEL)] * len(taken)
            values = tuple(value for _, value in taken)
            return Bound(compiled, run.launch, grid, (*before[4:], plain, signature), values, True)
    elif told is not None and _is_same(told[13:], arguments):  # Triton 3.6: one by one
        return Bound(compiled, run.launch, grid, told[4:13], arguments, False)
    between = (compiled.function, compiled.packed_metadata, None, None, None)
    return Bound(compiled, run, grid, between, arguments, False)


def _is_same(told: Any, arguments: tuple) -> bool:
    return (
        isinstance(told, tuple)
        and len(told) == len(arguments)
        and all(a is b for a, b in zip(told, arguments, strict=True))
    )


def _taken(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Type and value of what the machine code takes: no constants, and the parts of tuples."""
    if isinstance(kind, tuple):
        for pair in zip(kind, value, strict=True):
            yield from _taken(*pair)
    elif kind != "constexpr":
        yield kind, value


def _told(compiled: Any, grid: tuple[int, int, int], arguments: tuple) -> tuple | None:
    """What Triton's launcher tells its C function; None where it may not be the same at the next launch."""
    run = compiled.run
    if not vars(run).keys() <= _KNOWN or any(vars(run).get(name) for name in _MORE):
        return None
    if type(run.launch) is not BuiltinFunctionType:  # something in Python makes tensor descriptors
        return None
    said: list[tuple] = []
    listener = copy.copy(run)
    listener.launch = lambda *told: said.append(told)
    stream = object()
    nothing = (None, None, None)  # metadata of the launch, and both hooks
    listener(*grid, stream, compiled.function, compiled.packed_metadata, *nothing, *arguments)
    if len(said) != 1 or said[0][:3] != grid or said[0][3] is not stream:
        return None
    return said[0]


@contextmanager
def driven_by(stand_in: Any) -> Iterator[None]:
    """Triton asks and launches through another driver, of the whole process.

    Whatever it keeps is put back: to ask for the driver that is active is to make one, for which a GPU must be there.
    """
    before = dict(vars(driver))
    driver.set_active(stand_in)
    try:
        yield
    finally:
        vars(driver).update(before)


_runtime, _compilation = knobs.runtime, knobs.compilation


def is_watched() -> bool:
    """Whether Triton does more at a launch than launch, for any kernel: all that `JITFunction.run` of Triton 3.6 to 3.9
    asks and that does not depend on the kernel. Environment variables count as for Triton, which reads them on import.
    """
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(
        _runtime.debug
        or _compilation.instrumentation_mode  # without it, no other of the sanitizers' knobs counts
        or _runtime.add_stages_inspection_hook is not None
        # A chain of hooks, or whatever was put in its place.
        or getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
    )


def kernel_is_watched(kernel: Any) -> bool:
    """What `is_watched` says of all kernels, of this one."""
    return bool(kernel.debug or kernel.pre_run_hooks)

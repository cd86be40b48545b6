"""A launch with everything filled in but what changes from call to call: stream, pointers, some floats.

What is private in Triton's launcher stands here and nowhere else. Tried on Triton 3.6 (torch 2.11) and Triton 3.9
(torch 2.15), and never taken for granted from a version: what the launcher tells its C function is listened to once,
and said again at each launch; a launcher that has more to it than is known here is called itself.
"""

import copy
from collections.abc import Callable, Iterator
from operator import itemgetter
from types import BuiltinFunctionType
from typing import Any, Literal

from triton import knobs

try:
    from triton.backends.nvidia import driver as nvidia
except ImportError:  # a Triton without that backend
    nvidia = None

Go = Callable[[int, tuple, tuple], None]  # (stream, pointers of the call, floats of the call)

# How far a launch goes, for tests: to the C function of Triton's launcher, to the launcher, or nowhere (None is bound).
LEVEL: Literal["launcher", "run", "triton"] = "launcher"

# Whatever a launcher has in Triton 3.6 to 3.9. Where one of _MORE is not 0, there is more to a launch than arguments.
_KNOWN = {
    "launch", "num_ctas", "launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature",
    "global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align", "gsan_enabled",
}  # fmt: skip
_MORE = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")


def bind(
    compiled: Any,
    grid: tuple[int, int, int],
    slots: tuple[int | None, ...],
    integers: tuple,
    floats: tuple[int | float, ...],
    constants: tuple,
) -> Go | None:
    """What launches `compiled`, which `kernel[grid](...)` returned; None where it is not Triton's launcher for CUDA
    that does.

    It keeps `compiled`, looks at no alignment and calls no hook (`is_watched`).

    Args:
        slots: where the address of each tensor stands among the pointers of a call; None for an absent tensor.
        integers: integers, None, and tuples of them.
        floats: a float is the same in each call; an int says where it stands among the floats of a call.
        constants: in the kernel's order.

    Raises:
        ValueError: these are not the arguments that `compiled` was compiled for.
    """
    run = compiled.run
    if LEVEL == "triton" or nvidia is None or type(run) is not nvidia.CudaLauncher:
        return None
    arguments = (*slots, *integers, *floats, *constants)
    taken = list(_taken(tuple(compiled.src.signature.values()), arguments))
    present = [slot for slot in slots if slot is not None]
    if [value for kind, value in taken if kind.startswith("*")] != present:
        raise ValueError(f"{compiled.name} was compiled for other tensors than {slots}")
    go = None
    told = _told(compiled, grid, arguments) if LEVEL == "launcher" else None
    if told is not None and told[-1] == arguments:  # Triton 3.9: in a tuple
        go = _packed(run, told, taken, floats)
    elif told is not None and told[13:] == arguments:  # Triton 3.6: one by one
        go = _spread(run.launch, grid, told[4:13], slots, integers, floats, constants)
    if go is None:
        between = (compiled.function, compiled.packed_metadata, None, None, None)
        go = _spread(run, grid, between, slots, integers, floats, constants)
    go.kept = compiled  # type: ignore[attr-defined]  # when it goes, its code is unloaded
    return go


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


def _packed(run: Any, told: tuple, taken: list[tuple[str, Any]], floats: tuple) -> Go | None:
    """The arguments without constants and tuples, and so without the annotations that tell Triton of them."""
    *before, annotations, signature, _ = told
    if annotations is not run.arg_annotations or len(before) != 13 or len(signature) != len(taken):
        return None
    gx, gy, gz, _, function, cooperative, grids_overlap, metadata, a, b, c, d, e = before
    plain = [nvidia.PyKernelArg(nested_tuple=None, type=nvidia.ARG_KERNEL)] * len(taken)
    values = [value for _, value in taken]
    n = sum(kind.startswith("*") for kind, _ in taken)
    launch, pick = run.launch, _picker(values[:n])
    integers = tuple(values[n : len(values) - len(floats)])
    if tuple(values[n + len(integers) :]) != floats:
        return None
    if all(isinstance(value, float) for value in floats):
        numbers = integers + floats

        def go(stream: int, pointers: tuple, _: tuple) -> None:
            launch(
                gx, gy, gz, stream, function, cooperative, grids_overlap, metadata, a, b, c, d, e,
                plain, signature, pick(pointers) + numbers,
            )  # fmt: skip

        return go
    pick_floats, known = _mixed(floats)

    def go_with_floats(stream: int, pointers: tuple, given: tuple) -> None:
        launch(
            gx, gy, gz, stream, function, cooperative, grids_overlap, metadata, a, b, c, d, e,
            plain, signature, pick(pointers) + integers + pick_floats(given + known),
        )  # fmt: skip

    return go_with_floats


def _spread(
    launch: Callable[..., Any],
    grid: tuple[int, int, int],
    between: tuple,
    slots: tuple[int | None, ...],
    integers: tuple,
    floats: tuple[int | float, ...],
    constants: tuple,
) -> Go:
    """`launch(*grid, stream, *between, *tensors, *integers, *floats, *constants)`."""
    gx, gy, gz = grid
    varying = any(not isinstance(value, float) for value in floats)
    # One look-up for all that is the same in each call, and the pointers behind it.
    known = (
        (None, *between, *integers) if varying else (None, *between, *integers, *floats, *constants)
    )
    first = len(between) + 1
    order = [0 if slot is None else len(known) + slot for slot in slots]
    pick = _picker([*range(1, first), *order, *range(first, len(known))])
    if not varying:

        def go(stream: int, pointers: tuple, _: tuple) -> None:
            launch(gx, gy, gz, stream, *pick(known + pointers))

        return go
    pick_floats, known_floats = _mixed(floats)

    def go_with_floats(stream: int, pointers: tuple, given: tuple) -> None:
        numbers = pick_floats(given + known_floats)
        launch(gx, gy, gz, stream, *pick(known + pointers), *numbers, *constants)

    return go_with_floats


def _picker(places: list[int]) -> Callable[[tuple], tuple]:
    """What takes these places of a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _mixed(floats: tuple[int | float, ...]) -> tuple[Callable[[tuple], tuple], tuple[float, ...]]:
    """What picks the floats out of those of a call and, behind them, the ones that are always the same; and these."""
    known = tuple(value for value in floats if isinstance(value, float))
    behind = iter(range(-len(known), 0))
    places = [next(behind) if isinstance(value, float) else value for value in floats]
    return _picker(places), known


_runtime, _compilation = knobs.runtime, knobs.compilation


def hooks_are_on() -> bool:
    """Whether somebody wants to be told of each launch."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    # A chain of hooks, or whatever was put in its place.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def is_watched() -> bool:
    """Whether Triton does more at a launch than launch, for any kernel: all that `JITFunction.run` of Triton 3.6 to 3.9
    asks and that does not depend on the kernel. Environment variables count as for Triton, which reads them on import.
    """
    return bool(
        _runtime.debug
        or _compilation.instrumentation_mode  # without it, no other of the sanitizers' knobs counts
        or _runtime.add_stages_inspection_hook is not None
        or hooks_are_on()
    )


def kernel_is_watched(kernel: Any) -> bool:
    """What `is_watched` says of all kernels, of this one."""
    return bool(kernel.debug or kernel.pre_run_hooks)

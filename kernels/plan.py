"""A plan: what a call allocates and launches, decided once for all calls whose tensors look alike.

A recipe is written as if it ran: it makes tensors and launches kernels, through a `Planner`, on stand-ins that have
shapes, strides and dtypes and no memory. What it did is the plan. The call itself is then its allocations, its pointers
and its launches, in the recipe's order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from .bind import Pointer, is_watched, replaced
from .chip import current_chip
from .layout import RowMap, bits_layout, row_map_of
from .memory import EMPTY, empty_strided
from .start import Launch

APART = 16  # bytes: as far as vectors of values ask, what is allocated together is aligned


@dataclass(frozen=True)
class Made:
    """A tensor that a call makes; offset: in bytes, where it is made together with others."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    def empty(self, device: torch.device) -> Tensor:
        return empty_strided(self.shape, self.stride, self.dtype, device)

    def within(self, block: Tensor) -> Tensor:
        """The same as a part of a block of bytes."""
        return (
            block[self.offset : self.offset + _size(self)]
            .view(self.dtype)
            .as_strided(self.shape, self.stride)
        )


@dataclass(frozen=True)
class Step:
    """What PyTorch does between the launches, as a copy of what no kernel can walk."""

    function: Callable[..., Any]
    slots: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> None:
        # What autograd follows may be among them; what is done here is no part of its graph.
        self.function(*[t.detach() if t.requires_grad else t for t in tensors])

    def on(self, place: Callable[[int], int]) -> Step:
        return Step(self.function, tuple(map(place, self.slots)))

    def start(self, tensors: Sequence[Any], floats: tuple[float, ...]) -> None:
        self(*(tensors[k] for k in self.slots))


class Planner:
    """What a recipe makes and launches. given: stand-ins for the tensors of the call, None where there is none."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.chip = current_chip()
        self.given = [None if t is None else _stand_in(t) for t in tensors]
        self._slots = {id(t): k for k, t in enumerate(self.given) if t is not None}
        self._made: list[Tensor] = []
        self._kept: set[int] = set()
        self._steps: list[tuple[Any, tuple]] = []

    def _add(self, tensor: Tensor) -> Tensor:
        self._slots[id(tensor)] = len(self.given) + len(self._made)
        self._made.append(tensor)
        return tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A dense tensor: a result of the call if the recipe returns it, else gone after the call."""
        return self._add(torch.empty(shape, dtype=dtype, device="meta"))

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor laid out as this stand-in."""
        strides = tensor.stride()
        return self._add(
            torch.empty_strided(tensor.shape, strides, dtype=dtype or tensor.dtype, device="meta")
        )

    def keep(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A result that nobody sees but the backward: all of them may lie in one block of memory."""
        tensor = self.empty(shape, dtype)
        self._kept.add(id(tensor))
        return tensor

    def dense(self, tensor: Tensor | None) -> Tensor | None:
        """The same, but a vector of one value a channel without strides, which is how the kernels walk it."""
        if tensor is None or tensor.dim() != 1 or tensor.is_contiguous():
            return tensor
        copied = self.empty(tensor.shape, tensor.dtype)
        self.do(Tensor.copy_, copied, tensor)
        return copied

    def do(self, function: Callable[..., Any], *tensors: Tensor) -> None:
        """Have PyTorch do something with tensors of the plan."""
        self._steps.append((function, tensors))

    def copy(self, tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a tensor, laid out as another."""
        copied = self.like(like, dtype or tensor.dtype)
        self.do(Tensor.copy_, copied, tensor)
        return copied

    def start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple,
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        """Launch a kernel; see `start.Launch`. The arguments have the tensors of the plan in them."""
        self._steps.append(((kernel, grid, constants, options), arguments))

    def common_rows(self, output: Tensor, *others: Tensor) -> tuple[RowMap, tuple[Tensor, ...]]:
        """The index map that `output` and the others share; what does not fit is copied into the output's layout."""
        alone = row_map_of(output)
        if alone is None:
            raise RuntimeError(f"no index map for strides {output.stride()}; please report it")
        rows_packed = not bits_layout(alone)[0]

        def fits(rows: RowMap | None) -> bool:
            # Bits are found again only where the rows are split in the same way, if they are packed along the rows.
            return (
                rows is not None
                and rows.spread == alone.spread
                and (not rows_packed or rows.inner == alone.inner)
            )

        rows = row_map_of(output, *others)
        if not fits(rows):
            others = tuple(
                t if fits(row_map_of(output, t)) else self.copy(t, output) for t in others
            )
            rows = row_map_of(output, *others)
            if not fits(rows):
                others = tuple(self.copy(t, output) for t in others)
                rows = row_map_of(output, *others)
        if rows is None:
            raise RuntimeError(
                f"no common index map for strides {output.stride()}; please report it"
            )
        return rows, others

    def plan(self, results: Sequence[Tensor | torch.dtype]) -> Plan:
        """What was done so far. results: what the call returns; a dtype stands for a tensor that was not asked for."""
        returned = {id(t) for t in results if isinstance(t, Tensor)}
        groups: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for tensor in self._made:
            is_result, is_kept = id(tensor) in returned, id(tensor) in self._kept
            groups[1 if is_result and is_kept else 0 if is_result else 2].append(tensor)
        order = [t for group in groups for t in group]
        alone, kept, scratch = (tuple(map(_made, group)) for group in groups)
        slots = {id(t): k for k, t in enumerate(self.given) if t is not None}
        slots |= {id(t): len(self.given) + k for k, t in enumerate(order)}
        steps: list[Launch | Step] = []

        def placed(value: Any) -> Any:
            return Pointer(slots[id(value)]) if isinstance(value, Tensor) else value

        for what, given in self._steps:
            if callable(what):
                steps.append(Step(what, tuple(slots[id(t)] for t in given)))
            else:
                kernel, grid, constants, options = what
                steps.append(Launch(kernel, grid, replaced(given, placed), constants, options))
        return Plan(
            len(self.given),
            alone,
            _together(kept),
            scratch,
            tuple(slots[id(t)] if isinstance(t, Tensor) else t for t in results),
            tuple(steps),
        )


def _stand_in(tensor: Tensor) -> Tensor:
    shape, stride = tensor.shape, tensor.stride()
    if tensor.data_ptr() % 16 == 0:
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device="meta")
    # One element further on, so that its address tells that it is not aligned.
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.empty(extent + 1, dtype=tensor.dtype, device="meta").as_strided(shape, stride, 1)


def _made(tensor: Tensor) -> Made:
    return Made(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _together(parts: Sequence[Made]) -> tuple[Made, ...]:
    """The same in one block of bytes."""
    found, offset = [], 0
    for part in parts:
        found.append(replace(part, offset=offset))
        offset += -(-_size(part) // APART) * APART
    return tuple(found)


def _size(made: Made) -> int:
    return math.prod(made.shape) * made.dtype.itemsize


class Plan:
    """The allocations and launches of one kind of call. Holds no tensor.

    A call's tensors are numbered: those that it is given, its results, what it keeps for the backward, what it needs
    meanwhile (scratch). results: the number of each, or the dtype of one that was not asked for. within: of the last
    that it is given, which are parts of another, (the number of that, where it stands in it). apart: those of the
    results that are not kept.
    """

    def __init__(
        self,
        given: int,
        alone: tuple[Made, ...],
        kept: tuple[Made, ...],
        scratch: tuple[Made, ...],
        results: tuple[int | torch.dtype, ...],
        steps: tuple[Launch | Step, ...],
        within: tuple[tuple[int, Made], ...] = (),
    ) -> None:
        self.given, self.alone, self.kept, self.scratch = given, alone, kept, scratch
        self.results: tuple[Any, ...] = results
        self.steps, self._within = steps, within
        self.launches = tuple(step for step in steps if isinstance(step, Launch))
        first_kept = given + len(alone)
        self.apart = tuple(r for r in results if type(r) is not int or r < first_kept)
        self._written: Callable[[Sequence[Tensor], tuple[float, ...]], tuple | None] | None = None
        self._bound: list[Any] = []  # the launches that are in it

    def __repr__(self) -> str:
        done = (each.function if isinstance(each, Step) else each.kernel for each in self.steps)
        return f"<plan: {', '.join(each.__name__ for each in done)}>"

    def call(
        self, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...], device: torch.device
    ) -> tuple[Tensor, ...]:
        """The results, each in memory of its own."""
        made = [m.empty(device) for m in (*self.alone, *self.kept, *self.scratch)]
        everything: tuple[Any, ...] = (*tensors, *made)
        self._start(everything, floats)
        return tuple(
            everything[r] if type(r) is int else empty_strided((0,), (1,), r, device)
            for r in self.results
        )

    def launch(self, tensors: Sequence[Tensor], floats: tuple[float, ...]) -> tuple | None:
        """The results but for what is kept, with None for those that were not asked for, and one block of bytes with
        all that is kept.

        None where it cannot be: an address is not aligned, another device is the current one, the launches are not
        bound (`start` it), or something has happened since that Triton would look at.
        """
        written = self._written
        return None if written is None else written(tensors, floats)

    def start(
        self, tensors: Sequence[Tensor], floats: tuple[float, ...], device: torch.device
    ) -> tuple:
        """As `launch`, each kernel as Triton starts it."""
        alone = [m.empty(device) for m in self.alone]
        kept = empty_strided((size_of(self.kept),), (1,), torch.uint8, device)
        scratch = [m.empty(device) for m in self.scratch]
        everything = (*tensors, *alone, *self.parts(kept), *scratch)
        self._start(everything, floats)
        bound = [each.bound for each in self.launches]
        if all(bound) and bound != self._bound:
            self._bound, self._written = bound, write(self, device)
        found = [everything[r] if type(r) is int else None for r in self.apart]
        return (*found, kept) if self.kept else tuple(found)

    def _start(self, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...]) -> None:
        for step in self.steps:
            step.start(tensors, floats)

    def kept_results(
        self, parts: Sequence[Tensor], outputs: int, device: torch.device
    ) -> list[Tensor]:
        """The results behind the first ones, the outputs, as `call` returns them: all of them are kept."""
        first = self.given + len(self.alone)
        return [
            parts[r - first] if type(r) is int else empty_strided((0,), (1,), r, device)
            for r in self.results[outputs:]
        ]

    def parts(self, kept: Tensor) -> list[Tensor]:
        """What is kept, as tensors."""
        if (
            kept.storage_offset() % APART
        ):  # a hook of saved tensors put it there, to which it is bytes
            kept = kept.clone()
        return [m.within(kept) for m in self.kept]

    def of_parts(
        self, places: Sequence[int], given: int, block: int, parts: Sequence[Made], results: tuple
    ) -> Plan:
        """The same plan, given other tensors: `given` of them, and the parts of the one that is number `block`.

        places: of what it was given before, where that stands now. results: by their old numbers.
        """
        moved = given + len(parts) - self.given

        def place(slot: Any) -> Any:
            if type(slot) is not int:
                return slot
            return places[slot] if slot < self.given else slot + moved

        steps = tuple(step.on(place) for step in self.steps)
        within = tuple((block, part) for part in parts)
        made = self.alone, self.kept, self.scratch
        return Plan(given + len(parts), *made, tuple(map(place, results)), steps, within)


def size_of(made: Sequence[Made]) -> int:
    """Bytes of a block that has all of these in it."""
    if not made:
        return 0
    last = made[-1]
    return last.offset + _size(last)


def write(plan: Plan, device: torch.device) -> Callable[[Sequence[Tensor], tuple[float, ...]], Any]:
    """`Plan.launch` of a plan whose launches are bound, as a function without a loop or a look-up."""
    active = driver.active
    number = active.get_current_device()
    scope: dict[str, Any] = {
        "empty": EMPTY[device.type], "uint8": torch.uint8, "driver": driver, "active": active,
        "stream_of": active.get_current_stream, "is_watched": is_watched,
    }  # fmt: skip
    first_part = plan.given - len(plan._within)
    lines = [f"{', '.join(f't{k}' for k in range(first_part))}, = tensors"]
    lines += [f"p{k} = t{k}.data_ptr()" for k in range(first_part)]
    doubts = [f"({' | '.join(f'p{k}' for k in range(first_part))}) & 15"]
    if device.type == "cuda":
        scope["current_device"] = torch._C._cuda_getDevice
        doubts.append(f"current_device() != {device.index}")
    doubts += ["driver.active is not active", "is_watched()"]
    for kernel in {id(each.kernel): each for each in plan.launches}.values():
        name = f"kernel{len(scope)}"
        scope[name], scope[f"{name}_there"] = kernel.kernel, kernel.caches
        doubts.append(f"{name}.device_caches[{number}] is not {name}_there")
        doubts.append(f"{name}.debug or {name}.pre_run_hooks")
    lines.append(f"if {' or '.join(doubts)}: return None")
    touched = {slot for step in plan.steps if isinstance(step, Step) for slot in step.slots}

    def part_of(block: str, made: Made, k: int) -> None:
        """A part of a block: its address, and the tensor where PyTorch works on it."""
        if k in touched:
            scope[f"part{k}"] = made.within
            lines.append(f"t{k} = part{k}({block})")

    for k, (block, part) in enumerate(plan._within, first_part):
        lines.append(f"p{k} = p{block} + {part.offset}")
        part_of(f"t{block}", part, k)

    def made_alone(made: Made, k: int) -> None:
        scope[f"dtype{k}"] = made.dtype
        lines.append(f"t{k} = empty({made.shape}, {made.stride}, dtype{k})")
        lines.append(f"p{k} = t{k}.data_ptr()")

    numbers = itertools.count(plan.given)
    alone, kept, scratch = (
        {k: made for made, k in zip(group, numbers)}  # noqa: B905
        for group in (plan.alone, plan.kept, plan.scratch)
    )
    # What PyTorch works on must be a tensor.
    alone |= {k: made for k, made in scratch.items() if k in touched}
    scratch = {k: made for k, made in scratch.items() if k not in touched}
    scratch = dict(zip(scratch, _together([*scratch.values()]), strict=True))
    for k, made in alone.items():
        made_alone(made, k)
    for name, parts in (("kept", kept), ("scratch", scratch)):
        if parts:
            lines.append(f"{name} = empty(({size_of([*parts.values()])},), (1,), uint8)")
            lines.append(f"start = {name}.data_ptr()")
        for k, part in parts.items():
            lines.append(f"p{k} = start + {part.offset}")
            part_of(name, part, k)
    lines.append(f"stream = stream_of({number})")
    for i, step in enumerate(plan.steps):
        if isinstance(step, Step):
            scope[f"step{i}"] = step
            given = (f"t{slot}" for slot in step.slots)
            lines.append(f"step{i}({', '.join(map(str, given))})")
            continue
        bound: Any = step.bound
        text, known = bound.text(f"launch{i}", "p{}", "floats[{}]")
        scope |= known
        lines.append(text)
    results = [f"t{r}" if type(r) is int else "None" for r in plan.apart]
    results += ["kept"] if plan.kept else []
    lines.append(f"return {', '.join(results)},")
    exec("def launch(tensors, floats):\n    " + "\n    ".join(lines), scope)
    return scope["launch"]

"""A model of what bounds each pass over memory: its instructions, or the memory. Nothing runs, and no time is measured.

    python -m fusedres.benchmarks.machine [operator ...] [--batch 256] [--dtype bfloat16] [--layout channels_last]

The library's own launchers are driven at a ResNet-50's shapes, and the steady loop of each kernel is read from its
machine code for sm_90 (`sass.py`). Counted, and facts of the code: instructions an element by pipe, registers, resident
programs, bytes of a tile, access widths. Modelled:

- instruction time: cycles of the pipe that is taken longest (`Steady.cycles`), in four quarters of each multiprocessor
  at CLOCK. What stands before and after the loop, waiting, and an issue rate that stays below one a cycle are left out,
  so it is a lower bound: above 0.7 of the memory time a pass should be thought of as bound by its instructions.
- memory time: the bytes that the pass has to move, at COPY_SHARE of the memory's bandwidth.
- bytes in flight a multiprocessor: of the resident programs' tiles that are under way, what they read and write. The
  memory asks for bandwidth x LATENCY over the multiprocessors (Little).
- rounds: programs over those that are resident at once. A round that is begun is waited for.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import code
from .cases import RESNET50, shape_name
from .code import Target
from .compile_only import MULTIPROCESSORS, Launch, Operand
from .record import Row
from .sass import Steady, steady

CLOCK = 1.7e9  # below the boost clock of 1.98 GHz, which is not held under load
COPY_SHARE = 0.9  # of the bandwidth on paper; a copy reaches about that
LATENCY = 700e-9  # of a load from memory under load
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # SXM, NVIDIA's data sheets
ARCHITECTURE = 90
# Tensors of the activation's size that a kernel writes; of the others that it gets it reads all.
WRITTEN = {
    "bn_stats_kernel": ("of.total.p",),
    "bn_apply_kernel": ("out.y.p", "out.bits.p"),
    "bn_grad_reduce_kernel": ("incoming.dz", "of.x.scaled"),
    "bn_grad_apply_kernel": ("of.x.gradient", "of.residual.gradient"),
}
FINALISING = ("bn_finalize_kernel", "bn_grad_finalize_kernel")
REDUCING = ("bn_stats_kernel", "bn_grad_reduce_kernel")
# A mask is an eighth of a byte an element; what is smaller is a vector or a partial sum.
SMALLEST = 1 / 10


def bytes_needed(chip: str) -> float:
    """Bytes in flight that keep a multiprocessor's share of the memory busy."""
    return BANDWIDTH[chip] * LATENCY / MULTIPROCESSORS[ARCHITECTURE]


@dataclass(frozen=True)
class Pass:
    """One pass over memory of one launch.

    elements: of the tensor. tile: elements that a program does at a time. read, written: bytes an element. tiles: that
    a program has under way.
    """

    kernel: str
    elements: int
    tile: int
    read: float
    written: float
    warps: int
    registers: int
    spills: int
    resident: int
    programs: int
    tiles: int
    steady: Steady

    @property
    def a_thread(self) -> float:
        """Elements that a thread does once through the loop."""
        return self.tile / (32 * self.warps)

    @property
    def bytes(self) -> float:
        return self.elements * (self.read + self.written)

    @property
    def instructions(self) -> float:
        """Of a thread, an element."""
        return self.steady.instructions / self.a_thread

    @property
    def pipes(self) -> dict[str, float]:
        """Instructions an element by pipe."""
        return {pipe: n / self.a_thread for pipe, n in self.steady.pipes.items()}

    @property
    def limiter(self) -> str:
        """The pipe that is taken longest."""
        cycles = self.steady.cycles
        return max(cycles, key=cycles.__getitem__)

    @property
    def rounds(self) -> float:
        return self.programs / (self.resident * MULTIPROCESSORS[ARCHITECTURE])

    @property
    def in_flight(self) -> float:
        """Bytes a multiprocessor, read and written, of the tiles under way."""
        programs = min(self.resident, self.programs / MULTIPROCESSORS[ARCHITECTURE])
        return programs * self.tiles * self.tile * (self.read + self.written)

    @property
    def instruction_seconds(self) -> float:
        """Modelled, an element."""
        cycles = max(self.steady.cycles.values()) / (32 * self.a_thread)
        return cycles / (4 * MULTIPROCESSORS[ARCHITECTURE] * CLOCK)

    def ratio(self, chip: str) -> float:
        """Modelled instruction time over modelled memory time."""
        memory = (self.read + self.written) / (COPY_SHARE * BANDWIDTH[chip])
        return self.instruction_seconds / memory


def read_pass(launch: Launch) -> Pass | None:
    """The pass over memory that a launch makes; None for a launch that makes none (a finalising step, a product).

    All but the loop comes from the launch's arguments: the rows and columns, the tile's, and the tensors.
    """
    if launch.kernel not in WRITTEN:
        return None
    given = launch.arguments
    elements = math.prod(given[name] for name in ("outer", "inner", "channels", "spread"))
    tile = math.prod(given[f"TILE.{name}"] for name in ("outer", "inner", "channels"))
    moved = {True: 0, False: 0}
    for name, operand in given.items():
        if isinstance(operand, Operand) and operand.bytes >= SMALLEST * elements:
            moved[name in WRITTEN[launch.kernel]] += operand.bytes
    loop = steady(launch.cubin)
    return Pass(
        launch.kernel.removesuffix("_kernel"),
        elements,
        tile,
        moved[False] / elements,
        moved[True] / elements,
        launch.warps,
        launch.code.registers,
        launch.code.spills,
        launch.resident,
        launch.programs,
        max(1, given["TILE.stages"] - 1) if loop.asynchronous else 1,
        loop,
    )


@dataclass(frozen=True)
class Place:
    """A pass, and the operator and shape it belongs to."""

    target: Target
    of: Pass


def survey(targets: Iterable[Target]) -> Iterator[list[Place]]:
    """The passes of each target in the order of their launches; a forward and backward in training mode.

    The same code on as many values comes once: the statistics of both tensors of a dual tail, a fork's forward.
    """
    seen: set[tuple] = set()
    for target in targets:
        new = []
        for launch in code.compile_target(target, FINALISING):
            key = launch.kernel, launch.cubin, launch.grid, target.shape
            if key not in seen:
                seen.add(key)
                new.append(launch)
        yield list(places(target, new))


def places(target: Target, launches: Iterable[Launch]) -> Iterator[Place]:
    """The passes over memory among the launches of a target."""
    for launch in launches:
        of = read_pass(launch)
        if of is not None:
            yield Place(target, of)


# A ResNet-50's BatchNorms by the operator that they are part of. All tails but the last are a residual's fork.
SHAPES = {
    "bn_relu": RESNET50["bn_relu"],
    "bn_add_relu": RESNET50["bn_add_relu"],
    "bn_bn_add_relu": RESNET50["bn"],
    "bn_add_relu_fork": RESNET50["bn_add_relu"],
}
BATCHES = (256, 32)
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("channels_last", "contiguous_format")


def sites(
    batches: Sequence[int] = BATCHES,
    operators: Sequence[str] = tuple(SHAPES),
    dtypes: Sequence[str] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
) -> list[Target]:
    """Every shape of a ResNet-50's BatchNorms at 224x224, as targets for sm_90."""
    return [
        Target(ARCHITECTURE, operator, f"batch {batch}", (batch, c, h, h), dtype, layout)
        for dtype in dtypes
        for layout in layouts
        for operator in operators
        for batch in batches
        for c, h in SHAPES[operator]
    ]


MODE = "modelled"  # in the mode of each row, beside the rows of `code.py`
METRICS = (
    "bytes_an_element", "registers", "spills", "resident_programs", "rounds", "bytes_in_flight",
    "instructions_an_element", "instruction_to_memory_H100", "instruction_to_memory_H200",
)  # fmt: skip


def rows_of(places: Iterable[Place], provider: str = "fusedres") -> Iterator[Row]:
    """A row for each pass and metric; pipes and access widths stand in the note of `instructions_an_element`."""
    for place in places:
        target, of = place.target, place.of
        values = (of.read + of.written, of.registers, of.spills, of.resident, of.rounds, of.in_flight, of.instructions,
                  *(of.ratio(chip) for chip in BANDWIDTH))  # fmt: skip
        for metric, value in zip(METRICS, values, strict=True):
            yield Row(
                level="code",
                kernel=f"{of.kernel} in {target.kernel}",
                provider=provider,
                metric=metric,
                mode=MODE,
                shape=shape_name(target.shape),
                dtype=target.dtype,
                layout=target.layout.removesuffix("_format"),
                median=float(value),
                note=told(of) if metric == "instructions_an_element" else "",
            )


def told(of: Pass) -> str:
    """Instructions an element by pipe, which pipe is taken longest, and how many accesses have how many bits."""
    pipes = ", ".join(f"{pipe} {n:.1f}" for pipe, n in sorted(of.pipes.items()) if n >= 0.05)
    loads, stores = (_widths(of.steady.widths(kind)) for kind in ("load", "store"))
    return f"{pipes}; limit: {of.limiter}; loads {loads}; stores {stores}"


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{n}x{bits}" for bits, n in widths.items()) or "none"


HEAD = (
    "operator", "shape", "dtype", "layout", "kernel", "regs", "spills", "resident", "rounds", "KB in flight",
    "inst/el", "loads", "stores", "limiter", "H100", "H200",
)  # fmt: skip


def line(place: Place) -> list[str]:
    """The cells of HEAD."""
    target, of = place.target, place.of
    widths = (_widths(of.steady.widths(kind)) for kind in ("load", "store"))
    return [
        target.kernel, "x".join(map(str, target.shape)), target.dtype, target.layout.removesuffix("_format"),
        of.kernel, f"{of.registers}", f"{of.spills}", f"{of.resident}", f"{of.rounds:.2f}",
        f"{of.in_flight / 1e3:.0f}", f"{of.instructions:.1f}", *widths, of.limiter,
        *(f"{of.ratio(chip):.2f}" for chip in BANDWIDTH),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedres.benchmarks.machine", description="The model's table."
    )
    parser.add_argument(
        "operators", nargs="*", default=list(SHAPES), metavar="operator", help=", ".join(SHAPES)
    )
    parser.add_argument("--batch", type=int, action="append", help="(default 256)")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="(default bfloat16 and float32)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="(default both)")
    parser.add_argument("--size", type=int, action="append", help="only shapes of this height")
    parser.add_argument("--kernel", help="only kernels with this in their name")
    wish: Any = parser.parse_args(arguments)
    targets = sites(
        wish.batch or (256,), wish.operators, wish.dtype or ("bfloat16", "float32"), wish.layout or LAYOUTS
    )  # fmt: skip
    chosen = (t for t in targets if not wish.size or t.shape[2] in wish.size)
    print(f"# modelled for sm_90, nothing was run; KB in flight asked for: {_needs()}")
    print("\t".join(HEAD))
    for places in survey(chosen):
        for place in places:
            if not wish.kernel or wish.kernel in place.of.kernel:
                print("\t".join(line(place)), flush=True)


def _needs() -> str:
    return ", ".join(f"{chip} {bytes_needed(chip) / 1e3:.1f}" for chip in BANDWIDTH)


if __name__ == "__main__":
    main()

"""The Markdown page, made from the rows of a folder. Rows that fusedres loses stand with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from . import host, machine
from .compile_time import METRICS as TO_COMPILE
from .measure import COPY
from .plots import NAMES, save_plots
from .providers import BASELINE, OURS
from .record import Book, Row
from .timing import verdict

PAGE = "README.md"
SELF = "fusedres"


def write_page(book: Book) -> list[Path]:
    """Write the page and its plots beside the rows; the paths of what was written."""
    rows = book.latest
    plots = save_plots(rows, book.folder)
    path = book.folder / PAGE
    path.write_text("\n".join(_page(rows, plots)) + "\n", encoding="utf-8")
    return [path, *plots]


def _page(rows: Sequence[Row], plots: Sequence[Path]) -> Iterator[str]:
    yield "# Benchmark results"
    yield ""
    yield "Made by `python -m fusedres bench` from `results.json` beside this page."
    yield ""
    for device in _distinct(row.device for row in rows):
        of = [row for row in rows if row.device == device]
        dates = sorted({row.date for row in of})
        span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        yield f"- **{device}**: {'; '.join(_distinct(row.versions for row in of))}; {span}"
    sections = {
        "bytes": _bytes, "network": _network, "operator": _times, "block": _times, "model": _times,
        "host": _host, "code": _code, "executed": _executed, "state": _state,
    }  # fmt: skip
    drawn = {path.stem: path.name for path in plots}
    for level, section in sections.items():
        of = [row for row in rows if row.level == level]
        if any(row.median is not None for row in of):
            yield ""
            yield from section(of)
            if level in drawn:
                yield ""
                yield f"![{level}]({drawn[level]})"
    yield from _unmeasured(rows)


def _bytes(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Bytes of an operator"
    yield ""
    yield (
        "In passes: one pass is one full read or write of the activation. eager: counted from the operations that "
        "reach PyTorch's dispatcher. compile: inductor's own count of its schedule for sm_90. fusedres: 32-byte "
        "sectors that the kernels touch, measured in Triton's interpreter. Forward + backward; kernels in brackets."
    )
    yield ""
    cell: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.median is not None:
            cell.setdefault((row.kernel, row.shape, row.provider), {})[
                f"{row.metric} {row.mode}"
            ] = row
    providers = _distinct(key[2] for key in cell)
    places = _distinct((key[0], key[1]) for key in cell)

    def shown(found: dict[str, Row] | None) -> str:
        if not found:
            return "-"
        text = " + ".join(
            f"{found[f'passes {mode}'].median:.2f}" for mode in ("forward", "backward")
        )
        kernels = [found.get(f"kernels {mode}") for mode in ("forward", "backward")]
        if None not in kernels:
            text += f" ({' + '.join(f'{row.median:.0f}' for row in kernels if row is not None)})"
        return text

    yield from _table(
        ["operator", "shape, bfloat16, channels_last", *providers],
        [
            [
                NAMES.get(kernel, kernel),
                shape,
                *(shown(cell.get((kernel, shape, p))) for p in providers),
            ]
            for kernel, shape in places
        ],
    )


def _network(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Bytes of a whole network"
    yield ""
    yield (
        "What BatchNorm, ReLU and the residual add move in one training step, the adds of gradients at the forks "
        "included; convolutions, pooling and the classifier left out. In GB."
    )
    yield ""
    found = {
        (row.kernel, row.shape, row.dtype, row.provider, row.mode): row.median
        for row in rows
        if row.metric == "bytes" and row.median is not None
    }
    lines = []
    for kernel, shape, dtype, provider in _distinct(key[:4] for key in found if key[4] == "step"):
        figures = [
            found[kernel, shape, dtype, provider, mode] for mode in ("forward", "backward", "step")
        ]
        lines.append([kernel, shape, dtype, provider, *(f"{x / 1e9:.1f}" for x in figures)])
    yield from _table(["network", "input", "dtype", "", "forward", "backward", "step"], lines)


def _times(rows: Sequence[Row]) -> Iterator[str]:
    level = rows[0].level
    yield f"## Time: {level}"
    yield ""
    yield (
        "Microseconds, median (20th to 80th percentile). The verdicts compare fusedres with eager and with the fastest "
        "of the others; a difference within the run-to-run spread is none."
    )
    timed = [row for row in rows if row.median is not None]
    for (dtype, layout, cache, graph), group in _grouped(
        timed, lambda row: (row.dtype, row.layout, row.cache, row.graph)
    ):
        words = [dtype, layout, f"{cache} cache"] + ["CUDA graph"] * graph
        yield ""
        yield f"### {', '.join(words)}"
        yield ""
        yield from _side_by_side(group)


def _side_by_side(rows: Sequence[Row]) -> Iterator[str]:
    providers = _distinct(row.provider for row in rows)
    has_copy = COPY in providers
    head = ["", "input", "mode", *providers, "fusedres against eager", "against the fastest other"]
    lines = []
    for (kernel, shape, mode), group in _grouped(
        rows, lambda row: (row.kernel, row.shape, row.mode)
    ):
        by = {row.provider: row for row in group}
        ours, eager = by.get(SELF), by.get(BASELINE)
        others = [row for name, row in by.items() if name not in (*OURS, COPY)]
        fastest = min(others, key=lambda row: row.median or 0.0, default=None)
        line = [NAMES.get(kernel, kernel), shape, mode]
        line += [_microseconds(by.get(name)) for name in providers]
        line += [_verdict(ours, eager), _verdict(ours, fastest, named=True)]
        if has_copy:
            line.append(_share(ours, by.get(COPY)))
        lines.append(line)
    yield from _table(head + ["% of copy"] * has_copy, lines)


def _verdict(ours: Row | None, other: Row | None, named: bool = False) -> str:
    if ours is None or other is None:
        return "-"
    said = verdict(ours.median, ours.spread, other.median, other.spread)
    return f"{said} ({other.provider})" if named and other.provider != BASELINE else said


def _share(ours: Row | None, copy: Row | None) -> str:
    """Achieved bandwidth over that of a copy of as many bytes."""
    if ours is None or copy is None or not ours.median or not copy.median:
        return "-"
    return f"{100 * copy.median / ours.median:.0f}"


def _microseconds(row: Row | None) -> str:
    if row is None or row.median is None or row.p20 is None or row.p80 is None:
        return "-"
    return f"{_short(row.median)} ({_short(row.p20)} to {_short(row.p80)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _host(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Host cost"
    yield ""
    yield (
        "Microseconds of processor time that Python and PyTorch spend, one thread, tensors of 256 values: the least of "
        "many turns (10th percentile, median), and both as a share of eager's; allowed is what `faults` holds them to. "
        "A step is forward and backward."
    )
    yield from _distinct(f"{row.provider}: {row.note}." for row in rows if row.p10 and row.note)
    yield ""
    lines = []
    for row in rows:
        if row.minimum is None or row.p10 is None or row.median is None:
            continue
        allowed = host.ALLOWED.get((row.kernel, row.provider))
        lines.append([
            row.kernel, row.mode, row.provider,
            f"{_short(row.minimum)} ({_short(row.p10)}, {_short(row.median)})",
            "" if row.provider == BASELINE else str(host.share(row, rows) or "-"),
            "" if allowed is None else f"{allowed}",
        ])  # fmt: skip
    yield from _table(["what", "mode", "", "time", "of eager's", "allowed"], lines)


def _code(rows: Sequence[Row]) -> Iterator[str]:
    steps = [row for row in rows if row.metric in TO_COMPILE]
    modelled = [row for row in rows if row.mode == machine.MODE and row not in steps]
    facts = [row for row in rows if row.mode != machine.MODE and row not in steps]
    sections = [
        section(of)
        for section, of in ((_facts, facts), (_modelled, modelled), (_to_compile, steps))
        if of
    ]
    for i, lines in enumerate(sections):
        yield from [""] * (i > 0)
        yield from lines


def _to_compile(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Kernels to compile"
    yield ""
    yield (
        "Distinct kernels of a whole training step, which its first run waits for (or `python -m fusedres warm` "
        "compiles before it); how many another batch, or another image size, adds; and the processor time that "
        "compiling them takes, from nothing."
    )
    yield ""
    lines = []
    for (step, shape, dtype, layout), group in _grouped(
        rows, lambda row: (row.kernel, row.shape, row.dtype, row.layout)
    ):
        by = {row.metric: row for row in group}
        cells = [
            "-" if (row := by.get(metric)) is None else f"{row.median:.0f} ({row.note})"
            for metric in TO_COMPILE
        ]
        lines.append([step, shape, dtype, layout, *cells])
    heads = ["kernels", "added by the batch", "added by the image", "seconds"]
    yield from _table(["step", "shape", "dtype", "layout", *heads], lines)


def _facts(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Machine code"
    yield ""
    yield (
        "Compiled through the library's own launchers at a batch-256 ResNet-50's shapes. Occupancy: what registers, "
        "shared memory and slots allow, percent of a multiprocessor's warps. Widths: the widest global load and store "
        "of a thread, in bits."
    )
    yield ""
    columns = (
        "registers",
        "spills",
        "shared_bytes",
        "occupancy_percent",
        "widest_load_bits",
        "widest_store_bits",
        "tensor_core",
    )
    lines = []
    for (chip, kernel, dtype, layout), group in _grouped(
        rows, lambda row: (row.mode, row.kernel, row.dtype, row.layout)
    ):
        by = {row.metric: row for row in group}
        figures = [by[c].median if c in by else None for c in columns]
        lines.append(
            [chip, kernel, dtype, layout, *("-" if v is None else f"{v:.0f}" for v in figures)]
        )
    heads = ["registers", "spills", "shared", "occupancy", "load", "store", "tensor core"]
    yield from _table(["chip", "kernel", "dtype", "layout", *heads], lines)


def _modelled(rows: Sequence[Row]) -> Iterator[str]:
    """Shapes whose figures are the same share a line."""
    yield "## Machine code, modelled"
    yield ""
    needed = ", ".join(f"{machine.bytes_needed(c) / 1e3:.1f} on an {c}" for c in machine.BANDWIDTH)
    yield (
        "Read from the steady loop of each kernel for sm_90, at a ResNet-50's shapes; nothing was run, and no figure "
        "is a time that a GPU took. Of an element of the activation: the bytes that the pass moves, and its "
        "instructions. Programs: resident on a multiprocessor. Rounds: programs over all that are resident at once. "
        "KB in flight: on a multiprocessor; a memory latency of "
        f"{1e9 * machine.LATENCY:.0f} ns asks for {needed}. H100, H200: modelled time of the instructions over "
        "modelled time of the memory (benchmarks/README.md has what is assumed); above 1 the instructions are the "
        "limit, and from 0.7 on they may be."
    )
    yield ""
    lines: dict[tuple, list[str]] = {}
    for (operator, dtype, layout), group in _grouped(
        (row for row in rows if row.median is not None),
        lambda row: (row.kernel.rpartition(" in ")[2], row.dtype, row.layout),
    ):
        for (kernel, provider, shape), of in _grouped(
            group, lambda row: (row.kernel.rpartition(" in ")[0], row.provider, row.shape)
        ):
            by = {row.metric: row.median for row in of}
            figures = [
                f"{by['bytes_an_element']:.2f}", f"{by['instructions_an_element']:.1f}",
                f"{by['registers']:.0f}", f"{by['spills']:.0f}", f"{by['resident_programs']:.0f}",
                f"{by['rounds']:.1f}", f"{by['bytes_in_flight'] / 1e3:.0f}",
                *(f"{by[f'instruction_to_memory_{chip}']:.2f}" for chip in machine.BANDWIDTH),
            ]  # fmt: skip
            line = (NAMES.get(operator, operator), dtype, layout, provider, kernel, *figures)
            lines.setdefault(line, []).append(shape)
    heads = ["operator", "dtype", "layout", "", "kernel", "shapes", "bytes", "instructions", "registers", "spills",
             "programs", "rounds", "KB in flight", *machine.BANDWIDTH]  # fmt: skip
    table = [[*line[:5], ", ".join(shapes), *line[5:]] for line, shapes in lines.items()]
    yield from _table(heads, table)


def _executed(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Machine code, run"
    yield ""
    shapes = ", ".join(_distinct(row.shape for row in rows if row.shape))
    yield (
        f"The PTX of a forward and a backward pass at {shapes}, run in an interpreter. Instructions of threads an "
        "element of the output, 32 for each that a warp issues: all, then by class (memory, comparisons and control "
        "are the rest). Global loads and stores: 32-byte sectors a request, in brackets over the fewest that hold the "
        "bytes asked for (below 1: lanes ask for the same). Shared loads and stores: wavefronts over the fewest; 1.00 "
        "is no bank conflict. Barriers a warp."
    )
    yield ""
    classes = ("float", "integer", "conversion", "move", "shuffle", "tensor_core")
    accesses = ("load_sectors", "store_sectors")
    shared = ("shared_load_wavefronts_ratio", "shared_store_wavefronts_ratio")
    lines = []
    for (chip, kernel, dtype, layout), group in _grouped(
        (row for row in rows if row.median is not None),
        lambda row: (row.mode, row.kernel, row.dtype, row.layout),
    ):
        by = {row.metric: row.median for row in group}
        counted = ("instructions", *(f"{name}_instructions" for name in classes))
        cells = [f"{by[name]:.2f}" if name in by else "-" for name in counted]
        cells += [f"{by[a]:.1f} ({by[f'{a}_ratio']:.2f})" if a in by else "-" for a in accesses]
        cells += [f"{by[name]:.2f}" if name in by else "-" for name in shared]
        cells.append(f"{by['barriers']:.1f}" if "barriers" in by else "-")
        lines.append([chip, kernel, dtype, layout, *cells])
    heads = ["instructions", *(name.replace("_", " ") for name in classes)]
    heads += ["global loads", "global stores", "shared loads", "shared stores", "barriers"]
    yield from _table(["chip", "kernel", "dtype", "layout", *heads], lines)


def _state(rows: Sequence[Row]) -> Iterator[str]:
    yield "## The device while it measured"
    yield ""
    lines = []
    for metric, group in _grouped(rows, lambda row: row.metric):
        values = [row.median for row in group if row.median is not None]
        if values:
            lines.append([metric.replace("_", " "), f"{min(values):.6g}", f"{max(values):.6g}"])
    yield from _table(["", "lowest", "highest"], lines)


def _unmeasured(rows: Sequence[Row]) -> Iterator[str]:
    """Everything without a number, with its reason; the same reason once."""
    without = [row for row in rows if row.median is None and row.note]
    if not without:
        return
    yield ""
    yield "## Not measured"
    yield ""
    for (who, note), group in _grouped(without, lambda row: (row.who, row.note)):
        kernels = _distinct(f"{row.level}: {row.kernel}" for row in group)
        where = kernels[0] if len(kernels) == 1 else f"{len(kernels)} cases"
        yield f"- {f'{who}, ' if who else ''}{where}: {note}"


def _grouped(rows: Iterable[Row], key: Callable) -> Iterator[tuple]:
    """(key, rows) in the order in which the keys first come."""
    rows = list(rows)
    order = {k: i for i, k in enumerate(_distinct(map(key, rows)))}
    for k, group in groupby(sorted(rows, key=lambda row: order[key(row)]), key):
        yield k, list(group)


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for line in lines:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in line)} |"

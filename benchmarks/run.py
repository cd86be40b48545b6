"""What `python -m fusedres bench` does: the levels that were asked for, one after the other, into one folder."""

from __future__ import annotations

import datetime
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..cli.device import device_name
from ..cli.env import versions
from ..cli.errors import CommandError
from . import bytes_level, cases, code, compile_time, compiled, executed, host, machine
from .cases import Case
from .measure import Plan, measure
from .providers import PROVIDERS, Provider
from .record import Book, Row, first_line
from .state import device_state
from .timing import QUICK, Effort
from .workload import Setting

TIMED = ("operator", "block", "model")
UNTIMED = ("bytes", "code", executed.LEVEL, "host")
LEVELS = (*TIMED, *UNTIMED)
NHWC, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Wish:
    """What was asked for. `batch` None, `dtypes`, `layouts`, `models` empty: what suits the device."""

    device: torch.device
    levels: Sequence[str] = LEVELS
    quick: bool = False
    budget: float | None = None
    batch: int | None = None
    dtypes: Sequence[torch.dtype] = ()
    layouts: Sequence[torch.memory_format] = ()
    models: Sequence[str] = ()
    providers: Sequence[Provider] = PROVIDERS
    graphs: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


Unit = tuple[str, Callable[[], Iterator[list[Row]]]]


def stamp(device: torch.device) -> dict[str, str]:
    """Device, versions and date, as every row carries them."""
    name = device_name(device)
    if device.type == "cpu":
        name = (
            f"{_processor()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
        )
    told = versions()
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": name,
        "versions": ", ".join(
            f"{package} {told[package]}" for package in ("fusedres", "python", "torch", "triton")
        ),
        "date": now.isoformat(timespec="seconds"),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.processor() or "cpu"


def run(wish: Wish, book: Book, say: Callable[[str], None], progress) -> bool:
    """Measure everything; each unit's rows are written as soon as they exist. False where Ctrl-C has ended it.

    What a level cannot do here becomes a row that says why. Units that the budget has no time for are named likewise.
    """
    units = list(plan(wish))
    end = None if wish.budget is None else time.monotonic() + wish.budget
    bar = progress(len(units))
    for i in bar:
        name, start = units[i]
        if end is not None and time.monotonic() > end:
            book.add([_skipped(name, f"not run: the budget of {wish.budget:.0f} s was over")])
            bar.tell(f"{name}: no time left")
            continue
        bar.tell(name)
        try:
            for rows in start():
                book.add(rows)
                if end is not None and time.monotonic() > end:
                    book.add(
                        [
                            _skipped(
                                name,
                                f"the budget of {wish.budget:.0f} s was over: what would follow is left out",
                            )
                        ]
                    )
                    break
        except KeyboardInterrupt:
            book.add([_skipped(name, "stopped from outside; what would follow is left out")])
            say(f"  stopped at {name}; what was measured is kept")
            return False
        except CommandError as error:
            book.add([_skipped(name, f"not run: {error}")])
            say(f"  {name}: not run: {error}")
        except Exception as error:
            book.add([_skipped(name, f"failed: {first_line(error)}")])
            say(f"  {name} failed: {first_line(error)}")
    return True


def _skipped(name: str, note: str) -> Row:
    level, _, subject = name.partition(": ")
    return Row(level, subject or level, "", "", note=note)


def plan(wish: Wish) -> Iterator[Unit]:
    """Units of work with their names, the most telling first."""
    for level in wish.levels:
        if level in TIMED:
            yield from _timed_units(level, wish)
        elif level == "bytes":
            yield "bytes: operators and networks", partial(bytes_level.measure, wish.quick)
        elif level == "code":
            yield from _code_units(wish.quick)
            yield from compile_time.units(wish.quick)
        elif level == executed.LEVEL:
            yield from _executed_units(wish)
        elif level == "host":
            yield "host: calls and steps", partial(host.measure, wish.device, wish.quick)


def _executed_units(wish: Wish) -> Iterator[Unit]:
    why = executed.missing()
    if why is not None:
        yield f"{executed.LEVEL}: kernels", partial(_refused, why)
        return
    for target in executed.targets(wish.quick):
        yield f"{executed.LEVEL}: {target.name}", partial(executed.measure, target)


def _refused(why: str) -> Iterator[list[Row]]:
    raise CommandError(why)


def _code_units(quick: bool) -> Iterator[Unit]:
    for target in code.targets(quick):
        yield f"code: {target.name}", partial(_code_rows, target, quick)
    if quick:
        return
    for dtype, layout, operator in itertools.product(
        machine.DTYPES, machine.LAYOUTS, machine.SHAPES
    ):
        sites = machine.sites(operators=[operator], dtypes=[dtype], layouts=[layout])
        name = f"code: the model of {operator}, {dtype}, {layout}"
        yield name, partial(_modelled_rows, sites)
    for target in compiled.targets():
        name = f"code: the model of compile, {target.kernel}, {target.dtype}, {target.layout}, {target.where}"
        yield name, partial(_compiled_rows, target)


def _code_rows(target: code.Target, modelled: bool) -> Iterator[list[Row]]:
    launches = code.compile_target(target)
    yield list(code.rows_of(target, launches))
    if modelled:  # else at all shapes, later
        yield list(machine.rows_of(machine.places(target, launches)))


def _modelled_rows(sites: Sequence[code.Target]) -> Iterator[list[Row]]:
    found = itertools.chain.from_iterable(machine.survey(sites))
    yield list(machine.rows_of(found))


def _compiled_rows(target: code.Target) -> Iterator[list[Row]]:
    yield list(machine.rows_of(compiled.inductor_passes(target), "compile"))


def _timed_units(level: str, wish: Wish) -> Iterator[Unit]:
    for setting in _settings(level, wish):
        for case in cases_for(level, wish):
            name = f"{level}: {case.name} {setting.dtype_name} {setting.layout_name}"
            yield name, partial(_measured, case, setting, wish)


def _measured(case: Case, setting: Setting, wish: Wish) -> Iterator[list[Row]]:
    effort = QUICK if wish.quick else Effort()
    if case.level == "model":
        effort = replace(effort, repetitions=3, most=30, seconds=5 * effort.seconds)
    modes = ("step",) if wish.quick and case.level == "model" else ("forward", "backward", "step")
    plan = Plan(setting, effort, modes, wish.providers, wish.graphs, hot=not wish.quick)
    yield from measure(case, plan)
    yield device_state(wish.device, f"after {case.name}")


def _settings(level: str, wish: Wish) -> Iterator[Setting]:
    """What suits the device: on a GPU everything (bfloat16 channels_last first), on a CPU what can be waited for."""
    if wish.on_gpu and not wish.quick:
        dtypes = wish.dtypes or (torch.bfloat16, torch.float16, torch.float32)
        layouts = wish.layouts or (NHWC, NCHW)
    elif wish.on_gpu:
        dtypes, layouts = wish.dtypes or (torch.bfloat16,), wish.layouts or (NHWC,)
    else:
        both = level == "operator" and not wish.quick
        dtypes = wish.dtypes or ((torch.float32, torch.bfloat16) if both else (torch.float32,))
        layouts = wish.layouts or ((NHWC, NCHW) if both else (NHWC,))
    for dtype in dtypes:
        for layout in layouts:
            yield Setting(wish.device, dtype, layout)


def cases_for(level: str, wish: Wish) -> list[Case]:
    """The cases of a level; on a CPU fewer and smaller ones."""
    batch, quick = wish.batch, wish.quick
    if level == "operator" and wish.on_gpu:
        batches = (batch,) if batch else (256,) if quick else (256, 32)
        return cases.operators(batches, grid=not quick)
    if level == "operator":
        n = batch or 4
        found = [cases.operator("bn_add_relu", (n, 64, 56, 56))]
        return found if quick else [*found, cases.operator("bn_relu", (n, 256, 14, 14))]
    if level == "block":
        found = cases.blocks(batch or (128 if wish.on_gpu else 2))
        return found if wish.on_gpu and not quick else found[-1:] if quick else found[1:4:2]
    if wish.on_gpu:
        names = wish.models or (("resnet50",) if quick else cases.NETWORKS)
        return cases.models(batch or 256, 224, tuple(names))
    names = wish.models or (("cifar_resnet18",) if quick else ("resnet18", "cifar_resnet18"))
    return cases.models(batch or 4, 64, tuple(names))


def faults(rows: Sequence[Row]) -> list[str]:
    """What bytes, machine code and host cost must not be."""
    return [*bytes_level.faults(rows), *code.faults(rows), *host.faults(rows)]


__all__ = ["LEVELS", "Wish", "cases_for", "faults", "plan", "run", "stamp"]

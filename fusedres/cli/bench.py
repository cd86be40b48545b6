"""`fusedres bench`: fusedres beside what one would run instead, measured here, as rows, plots and a page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from .. import dispatch
from .arguments import LEVELS
from .device import choose_device
from .errors import CommandError, Interrupted
from .progress import Progress
from .training import DTYPES, LAYOUTS

if TYPE_CHECKING:
    from ..benchmarks.record import Row


def run(options: argparse.Namespace) -> list[Row]:
    """Everything that can be wrong is looked at before the first measurement, and before a folder is made.

    Returns the rows that were measured now.
    """
    # The suite loads Triton, torch.compile and what it compares with; `env` and `explain` do without.
    from ..benchmarks.timing import one_thread

    with one_thread():
        return _run(options, choose_device(options.device))


def _run(options: argparse.Namespace, device: torch.device) -> list[Row]:
    from ..benchmarks import changes, record, report
    from ..benchmarks import run as suite

    if dispatch.INTERPRET and not options.report:
        raise CommandError(
            "TRITON_INTERPRET is set: the kernels would be interpreted, and their times mean nothing; unset it "
            "(the byte level interprets them by itself)"
        )
    if options.report and not (options.out / record.JSON_FILE).exists():
        raise CommandError(f"--report: {options.out} has no {record.JSON_FILE}")
    providers = _providers(options.provider)
    for name in () if options.report else options.model or ():
        _check_model(name)
    try:
        old = record.read(options.compare) if options.compare else None
        book = record.Book.open(options.out, suite.stamp(device))
    except record.RecordError as error:
        raise CommandError(str(error)) from error
    whole, before = True, len(book.rows)
    if not options.report:
        wish = suite.Wish(
            device=device,
            levels=tuple(dict.fromkeys(options.level or LEVELS)),
            quick=options.quick,
            budget=options.budget,
            batch=options.batch,
            dtypes=[DTYPES[name] for name in options.dtype or ()],
            layouts=[LAYOUTS[name == "channels_last"] for name in options.layout or ()],
            models=options.model or (),
            providers=providers,
            graphs=not options.no_graphs,
        )
        whole = suite.run(wish, book, print, lambda units: Progress(units, lines=max(units, 1)))
        print(f"{len(book.rows) - before} rows")
    for path in report.write_page(book):
        print(f"wrote {path}")
    for fault in suite.faults(book.latest):
        print(f"fault: {fault}")
    if old is not None:
        print(f"\nsince {options.compare}:\n{changes.compare(old, book.rows)}")
    if not whole:
        raise Interrupted(f"interrupted; what was measured is in {options.out}")
    return book.rows[before:]


def _providers(names):
    from ..benchmarks.providers import BASELINE, PROVIDERS

    known = {provider.name: provider for provider in PROVIDERS}
    if not names:
        return PROVIDERS
    for name in names:
        if name not in known:
            raise CommandError(f"unknown provider {name!r}; there are {', '.join(known)}")
    return tuple(p for p in PROVIDERS if p.name in (BASELINE, *names))


def _check_model(name: str) -> None:
    """A name that cannot be built is an error now, not a row an hour later."""
    from ..benchmarks.cases import model

    with torch.device("meta"):
        model(name, 1, 32).build()

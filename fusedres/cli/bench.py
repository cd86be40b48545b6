"""`python -m fusedres bench`: fusedres beside what one would run instead, measured here, as rows, plots and a page."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import dispatch
from .compare import DTYPES, LAYOUTS, at_least
from .device import choose_device
from .errors import CommandError
from .progress import Progress

LEVELS = ("operator", "block", "model", "bytes", "code", "executed", "host")


def add_to(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="the benchmark suite",
        description="Measure fusedres beside PyTorch eager, torch.compile and other peers: the time of operators, "
        "blocks and models, and what needs no GPU: bytes, machine code, what it executes, host cost. Every result is "
        "checked before it is timed. Rows are appended to results.json and results.csv; plots and a page are made from "
        "them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--level",
        action="append",
        choices=LEVELS,
        metavar="LEVEL",
        help=f"{', '.join(LEVELS)}; may be given more than once; without it, all of them",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter rounds")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench"),
        metavar="DIR",
        help="where rows, plots and page go",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="print what got slower or larger since that file",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing: make the page (and the comparison) from --out again",
    )
    parser.add_argument(
        "--budget",
        type=at_least(1),
        metavar="SECONDS",
        help="start nothing new after that time, and name what was left out",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one"
    )
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N", help="instead of what suits the device"
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may be given more than once"
    )
    parser.add_argument(
        "--layout",
        action="append",
        choices=("channels_last", "contiguous"),
        help="may be given more than once",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="for --level model: a torchvision model, timm:NAME or cifar_resnet18; may be given more than once",
    )
    parser.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="only these (eager is always there); may be given more than once",
    )
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Everything that can be wrong is looked at before the first measurement."""
    # The suite loads Triton, torch.compile and what it compares with; `env` and `explain` do without.
    from ..benchmarks.timing import one_thread

    with one_thread():
        _run(options, choose_device(options.device))


def _run(options: argparse.Namespace, device: torch.device) -> None:
    from ..benchmarks import changes, record, report
    from ..benchmarks import run as suite

    if dispatch.INTERPRET and not options.report:
        raise CommandError(
            "TRITON_INTERPRET is set: the kernels would be interpreted, and their times mean nothing; unset it "
            "(the byte level interprets them by itself)"
        )
    try:
        old = record.read(options.compare) if options.compare else None
        book = record.Book.open(options.out, suite.stamp(device))
    except record.RecordError as error:
        raise CommandError(str(error)) from error
    if options.report:
        if not book.rows:
            raise CommandError(f"--report: {options.out} has no {record.JSON_FILE}")
    else:
        for name in options.model or ():
            _check_model(name)
        wish = suite.Wish(
            device=device,
            levels=tuple(dict.fromkeys(options.level or LEVELS)),
            quick=options.quick,
            budget=options.budget,
            batch=options.batch,
            dtypes=[DTYPES[name] for name in options.dtype or ()],
            layouts=[LAYOUTS[name == "channels_last"] for name in options.layout or ()],
            models=options.model or (),
            providers=_providers(options.provider),
            graphs=not options.no_graphs,
        )
        before = len(book.rows)
        suite.run(wish, book, print, lambda units: Progress(units, lines=max(units, 1)))
        print(f"{len(book.rows) - before} rows")
    for path in report.write_page(book):
        print(f"wrote {path}")
    for fault in suite.faults(book.latest):
        print(f"fault: {fault}")
    if old is not None:
        print(f"\nsince {options.compare}:\n{changes.compare(old, book.rows)}")


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

"""`python -m fusedres warm MODEL`: compile the kernels of a model's training step before it is run."""

from __future__ import annotations

import argparse
import time

import fusedres
from fusedres import dispatch

from .compare import DTYPES, LAYOUTS, at_least
from .errors import CommandError
from .explain import shape
from .models import build_model
from .progress import Progress

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_to(commands) -> None:
    parser = commands.add_parser(
        "warm",
        help="compile a model's kernels ahead of its first step",
        description="Compile the Triton kernels of a model's training step into Triton's cache, in parallel, so that "
        "its first step need not wait for them. Nothing is computed, and no GPU is needed: the step's shapes are "
        "followed through forward and backward.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="a torchvision model (resnet50), or timm:NAME")
    parser.add_argument(
        "--input",
        metavar="N,C,H,W",
        type=shape,
        required=True,
        help="what a step takes: the batch counts too",
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *SHORT),
        default="float32",
        metavar="DTYPE",
        help=f"{', '.join((*DTYPES, *SHORT))}; below float32: autocast",
    )
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    parser.add_argument(
        "--eval",
        action="store_true",
        help="the forward of model.eval() without gradients, instead of a training step",
    )
    parser.add_argument(
        "--arch",
        type=at_least(75),
        metavar="N",
        help="80, 90, 100 for sm_80 and so on; without it, the GPU that is there",
    )
    parser.add_argument(
        "--multiprocessors",
        type=at_least(1),
        metavar="N",
        help="of the GPU that --arch means; without it, those of an A100 (80), H100 or H200 (90), B200 (100)",
    )
    parser.add_argument(
        "--processes",
        type=at_least(1),
        metavar="N",
        help="how many compile; without it, one a core",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if dispatch.INTERPRET:
        raise CommandError("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    try:
        from . import ahead
    except ImportError as error:
        raise CommandError(f"there is nothing to compile with: {error}") from error
    dtype = SHORT.get(options.dtype, options.dtype)
    layout = LAYOUTS[options.channels_last]
    chip = _chip(options)
    model = build_model(options.model).train(not options.eval).to(memory_format=layout)
    fusedres.fuse_(model)
    network = ahead.Network(model, options.input, DTYPES[dtype], layout)
    step = network.inference if options.eval else network.training_step
    try:
        jobs = ahead.jobs_of(step, chip)
    except Exception as error:  # whatever the model says to an input that it does not take
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CommandError(
            f"{options.model} does not take {'x'.join(map(str, options.input))}: {first}"
        ) from error
    what = "an evaluation" if options.eval else "a training step"
    of = f"{what} of {options.model}, {'x'.join(map(str, options.input))}, {dtype}, for {chip.name}"
    if not jobs:
        print(f"no kernels: {of} launches none of fusedres (`fusedres explain` says why)")
        return
    processes = min(options.processes or ahead.cores(), len(jobs))
    print(f"{len(jobs)} kernels of {of}, in {processes} processes", flush=True)
    start, done = time.perf_counter(), []
    compiling = ahead.compile_all(jobs, chip, processes)
    progress = Progress(len(jobs))
    try:
        for _ in progress:
            done.append(next(compiling))
            progress.tell(done[-1].job.kernel)
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    there = sum(each.was_there for each in done)
    print(
        f"{len(done) - there} compiled, {there} were there: {time.perf_counter() - start:.1f} s, "
        f"{sum(each.seconds for each in done):.1f} s of processor time; they are in {_cache()}"
    )


def _chip(options: argparse.Namespace):
    from ..benchmarks.compile_only import MULTIPROCESSORS
    from . import ahead

    if options.arch is None:
        if options.multiprocessors is not None:
            raise CommandError(
                "--multiprocessors goes with --arch; the GPU that is there has its own"
            )
        try:
            return ahead.chip_here()
        except RuntimeError as error:
            raise CommandError(
                f"there is no GPU to compile for ({error}); name one, as --arch 90"
            ) from error
    multiprocessors = options.multiprocessors or MULTIPROCESSORS.get(options.arch)
    if multiprocessors is None:
        known = ", ".join(map(str, MULTIPROCESSORS))
        raise CommandError(
            f"--arch {options.arch}: how many multiprocessors the GPU has is known for {known}; "
            "say it with --multiprocessors (`fusedres env` on that machine tells)"
        )
    return ahead.Chip("cuda", options.arch, 32, multiprocessors)


def _cache() -> str:
    from triton import knobs

    return str(knobs.cache.dir)

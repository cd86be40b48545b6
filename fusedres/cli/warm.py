"""`fusedres warm MODEL`: compile the kernels of a model's training step before it is run."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryFile

import fusedres
from fusedres import dispatch

from .errors import CommandError, Interrupted, first_line
from .models import build_model, settle
from .progress import Progress
from .training import DTYPES, LAYOUTS


def run(options: argparse.Namespace) -> None:
    if dispatch.INTERPRET:
        raise CommandError("TRITON_INTERPRET is set: the kernels are interpreted, not compiled")
    try:
        from . import ahead
    except ImportError as error:
        raise CommandError(f"there is nothing to compile with: {error}") from error
    layout = LAYOUTS[options.channels_last]
    chip = _chip(options)
    model = settle(options.model, build_model(options.model), options.input)
    model.train(not options.eval).to(memory_format=layout)
    fusedres.fuse_(model)
    network = ahead.Network(model, options.input, DTYPES[options.dtype], layout)
    step = network.inference if options.eval else network.training_step
    try:
        jobs = ahead.jobs_of(step, chip)
    except Exception as error:  # whatever the model says to an input that it does not take
        raise CommandError(
            f"{options.model} does not take {'x'.join(map(str, options.input))}: {first_line(error)}"
        ) from error
    what = "an evaluation" if options.eval else "a training step"
    of = f"{what} of {options.model}, {'x'.join(map(str, options.input))}, {options.dtype}, for {chip.name}"
    if not jobs:
        print(f"no kernels: {of} launches none of fusedres (`fusedres explain` says why)")
        return
    _check_cache()
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
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {len(done)} of {len(jobs)} kernels are in {_cache()}"
        ) from None
    finally:
        progress.close()
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


def _check_cache() -> None:
    """What is compiled must be kept, or it was for nothing."""
    folder = Path(_cache())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(
            f"Triton's cache {folder} cannot be written to: {error.strerror}; set TRITON_CACHE_DIR to a folder that can"
        ) from error


def _cache() -> str:
    from triton import knobs

    return str(knobs.cache.dir)

"""How many kernels a training step of a whole network has to wait for, and what compiling them takes.

The step's launches are found as `python -m fusedres warm` finds them: by their shapes alone. Counted are the kernels of
the first step, and how many a second batch or image size adds; a cold cache of Triton's is filled to time them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import fusedres
from fusedres.ops.projection import in_triton

from ..cli.ahead import Chip, Job, Network, compile_all, cores, jobs_of
from ..cli.models import build_model
from .cases import CLASSES, shape_name
from .compile_only import MULTIPROCESSORS
from .record import Row

CHIP = Chip("cuda", 90, 32, MULTIPROCESSORS[90])
NETWORK, BATCH, IMAGE = "resnet50", 256, 224
# Few images, and a number of them that two does not divide, have been kernels of their own.
OTHER_BATCHES, OTHER_IMAGES = (128, 32, 8, 7, 4, 2), (160, 192, 256)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# What is counted. Tails: every BatchNorm with what follows it, projected shortcuts with their two BatchNorms.
TAILS, FORKS, PRODUCTS = "tails", "tails and forks", "tails, forks and products"
METRICS = ("kernels", "kernels_added_by_batch", "kernels_added_by_image", "compile_seconds")


class Counted:
    """A network's step in one dtype and layout, whose kernels are told part by part."""

    def __init__(self, dtype: torch.dtype, layout: str) -> None:
        self.dtype, self.layout = dtype, layout
        model = build_model(NETWORK, CLASSES).train().to(memory_format=LAYOUTS[layout])
        fusedres.fuse_(model)
        self._model = model
        self._jobs: dict[tuple[str, int, int], list[Job]] = {}

    def jobs(self, part: str, batch: int = BATCH, image: int = IMAGE) -> list[Job]:
        """The kernels of a step; found once."""
        key = part, batch, image
        if key not in self._jobs:
            self._jobs[key] = self._found(*key)
        return self._jobs[key]

    def _found(self, part: str, batch: int, image: int) -> list[Job]:
        shape = (batch, 3, image, image)
        network = Network(self._model, shape, self.dtype, LAYOUTS[self.layout])
        step = network.step_without_forks if part == TAILS else network.training_step
        with in_triton() if part == PRODUCTS else contextlib.nullcontext():
            return jobs_of(step, CHIP)

    def added(self, part: str, batch: int = BATCH, image: int = IMAGE) -> int:
        """How many kernels another size needs that the first one did not."""
        return len(set(self.jobs(part, batch, image)) - set(self.jobs(part)))

    def rows(self, part: str, times: bool) -> Iterator[Row]:
        jobs = self.jobs(part)
        by_kernel = Counter(job.kernel for job in jobs)
        images = {image: self.added(part, image=image) for image in OTHER_IMAGES}
        yield self._row(part, "kernels", len(jobs), _listed(by_kernel))
        batches = {batch: self.added(part, batch=batch) for batch in OTHER_BATCHES}
        named = {f"{batch} images": more for batch, more in batches.items()}
        yield self._row(part, "kernels_added_by_batch", max(batches.values()), _listed(named))
        named = {f"{image}x{image}": more for image, more in images.items()}
        yield self._row(part, "kernels_added_by_image", max(images.values()), _listed(named))
        if times:
            seconds = processor_seconds(jobs)
            yield self._row(part, "compile_seconds", seconds, "of processor time, from nothing")

    def _row(self, part: str, metric: str, value: float, note: str) -> Row:
        return Row(
            level="code",
            kernel=f"{NETWORK}, {part}",
            provider="fusedres",
            metric=metric,
            mode=f"sm_{CHIP.architecture}",
            shape=shape_name((BATCH, 3, IMAGE, IMAGE)),
            dtype=str(self.dtype).removeprefix("torch."),
            layout=self.layout,
            median=float(value),
            note=note,
        )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def processor_seconds(jobs: list[Job]) -> float:
    """What compiling them takes of all cores together, with a cache that has none of them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        return sum(each.seconds for each in compile_all(jobs, CHIP, cores()))


def units(quick: bool) -> Iterator[tuple[str, Callable[[], Iterator[list[Row]]]]]:
    """Units of work for `run`; only bfloat16 is timed, with everything in it."""
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for layout in LAYOUTS:

            def measure(dtype=dtype, layout=layout) -> Iterator[list[Row]]:
                counted = Counted(dtype, layout)
                for part in (TAILS, FORKS, PRODUCTS):
                    times = part == PRODUCTS and dtype == torch.bfloat16 and not quick
                    yield list(counted.rows(part, times))

            name = str(dtype).removeprefix("torch.")
            yield f"code: kernels of a training step, {name}, {layout}", measure

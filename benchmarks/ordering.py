"""Whether the last program of the statistics sees what the others left: a stress of `kernels.merging`, on a GPU.

    python -m fusedres.benchmarks.ordering

Many programs, many launches. Before each, the partials are poisoned with NaN, and two inputs take turns, so that a
value that was read too early, or is an older launch's, is another one. Every launch must give the bits of the first one
on its input, and that one the mean and the deviation of two launches. What must hold for `launch.LAST_MERGES` to be
switched on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

EPS, MOMENTUM = 1e-5, 0.1
# Blocks of channels from one to many, one to eight warps' worth of rows, programs up to the most that merge so.
SHAPES = ((256, 512, 28, 28), (64, 2048, 7, 7), (256, 1024, 14, 14), (32, 384, 56, 56))
LAYOUTS = (torch.channels_last, torch.contiguous_format)


class Statistics:
    """Those of x, in one launch or in two: (saved [4, C], running mean, running var)."""

    def __init__(self, x: Tensor) -> None:
        from fusedres.kernels import chip, launch
        from fusedres.kernels.layout import row_map_of

        self.x, rows = x, row_map_of(x, x)
        if rows is None:
            raise RuntimeError(f"no index map for strides {x.stride()}")
        self.rows = rows
        tile = launch.choose_tile(rows, x.element_size(), launch.STATISTICS, chip.current_chip())
        self.merges = rows.spread == 1 and tile.programs <= launch.FEW_PARTIALS
        self._plans: dict[bool, Any] = {}

    def __call__(self, in_one: bool) -> list[Tensor]:
        channels, device = self.rows.channels, self.x.device
        mean, var = (torch.ones(channels, device=device) for _ in range(2))
        saved = torch.full((4, channels), float("nan"), device=device)
        given = (self.x, saved, mean, var)
        if in_one not in self._plans:
            self._plans[in_one] = self._planned(given, in_one)
        self._plans[in_one].call(given, (), device)
        return [saved, mean, var]

    def _planned(self, given: tuple[Tensor, ...], in_one: bool) -> Any:
        from fusedres.kernels.finalize import Partial, Running, launch_bn_finalize
        from fusedres.kernels.merging import launch_bn_stats_finalize
        from fusedres.kernels.plan import Planner
        from fusedres.kernels.stats import launch_bn_stats

        class Poisoned(Planner):
            def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
                made = super().empty(shape, dtype)
                if dtype.is_floating_point:
                    self.do(lambda t: t.fill_(float("nan")), made)
                return made

        p = Poisoned(given)
        stand_ins: list[Any] = p.given
        x, saved, mean, var = stand_ins
        running = Running(mean, var, None, MOMENTUM)
        if in_one:
            launch_bn_stats_finalize(p, x, None, saved, running, EPS, self.rows)
        else:
            values, tile = launch_bn_stats(p, x, None, None, self.rows)
            launch_bn_finalize(p, Partial(values, x, self.rows, 1, tile), None, saved, running, EPS)
        return p.plan(())


def faults(
    shape: tuple[int, ...], layout: torch.memory_format, repetitions: int, device: str
) -> Iterator[str]:
    """A line for each launch that gave other bits."""
    made = [
        Statistics(torch.randn(shape, device=device).to(torch.bfloat16).contiguous(memory_format=layout) + shift)
        for shift in (0, 3)
    ]  # fmt: skip
    if not made[0].merges:
        return
    firsts = [each(in_one=True) for each in made]
    for each, first in zip(made, firsts, strict=True):
        two = each(in_one=False)
        if not torch.equal(first[0][::2], two[0][::2]):
            yield f"{shape}: the first launch is not what two launches give"
    for i in range(repetitions):
        found = made[i % 2](in_one=True)
        if not all(torch.equal(a, b) for a, b in zip(found, firsts[i % 2], strict=True)):
            yield f"{shape}: launch {i} of {repetitions} gave other bits"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedres.benchmarks.ordering")
    parser.add_argument("--repetitions", type=int, default=2000, help="launches of each shape")
    parser.add_argument("--device", default="cuda")
    wish = parser.parse_args(arguments)
    wrong = 0
    for shape in SHAPES if wish.device != "cpu" else ((4, 12, 20, 20),):
        for layout in LAYOUTS:
            lines = list(faults(shape, layout, wish.repetitions, wish.device))
            wrong += len(lines)
            print(
                f"{shape}, {layout}: {len(lines)} of {wish.repetitions} wrong", *lines[:5], sep="\n"
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

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

        rows = row_map_of(x, x)
        if rows is None:
            raise RuntimeError(f"no index map for strides {x.stride()}")
        self.x, self.rows = x, rows
        self.tile = launch.choose_tile(
            rows, x.element_size(), launch.STATISTICS, chip.current_chip()
        )
        self.merges = rows.spread == 1 and self.tile.programs <= launch.FEW_PARTIALS
        dtype = torch.float64 if x.element_size() >= 4 else torch.float32
        self.partial = x.new_empty((self.tile.programs, 3, self.tile.width), dtype=dtype)

    def __call__(self, in_one: bool) -> list[Tensor]:
        import triton.language as tl

        from fusedres.kernels import finalize, merging, stats

        self.partial.fill_(float("nan"))
        channels = self.rows.channels
        mean, var = (torch.ones(channels, device=self.x.device) for _ in range(2))
        saved = torch.full((4, channels), float("nan"), device=self.x.device)
        given = (None, saved, mean, var)  # no bias
        if in_one:
            done = merging.counters(self.x.device, self.tile.channel_blocks)
            merging.launch_bn_stats_finalize(
                self.x, self.partial, done, *given, self.rows, self.tile, MOMENTUM, EPS, tl.int64
            )
        else:
            stats.launch_bn_stats(self.x, None, None, self.partial, self.rows, self.tile, tl.int64)
            finalize.launch_bn_finalize(
                self.partial, self.x, *given, self.rows, 1, self.tile, MOMENTUM, EPS
            )
        return [saved, mean, var]


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

"""The statistics and their final step in one launch: the last program of a block of channels merges all partials.

What `stats` and `finalize` compute, by their device functions. Each program leaves its partials and takes a ticket
(`done` [blocks], int32, 0 before each launch); who takes the last has every other's partials before it: the
stores of a program come before its ticket by a barrier and the ticket's release, the loads of the last one after the
ticket's acquire, past the cache of the multiprocessor. Who is last differs from run to run, the merge does not: it is
one fixed tree over all partials.

By PTX's memory model that order holds, whoever is last: the compiled kernel runs without a race under a watch that
knows of no other order between programs (tests/test_merging.py). Whether a chip keeps it nothing but a GPU can show
(`benchmarks/ordering.py` stresses it), so it is off: `launch.LAST_MERGES`. To pay, `done` would have to come zeroed
with memory that is there anyway; here PyTorch zeroes it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import current_chip
from .dtypes import partial_dtype
from .finalize import (
    Moving,
    Partials,
    Parts,
    Running,
    finish_moments,
    load_running,
    merging_options,
    partial_offsets,
)
from .launch import REGISTERS, STATISTICS, Tile, choose_tile, is_aligned
from .layout import RowMap
from .moments import Summed, load_pivot, merge, store_sums
from .norm import Vectors
from .plan import Planner
from .stats import group_moments
from .tile import ANY_MULTIPLE, ANY_VALUE, Sizes, View, walk_of


class Between(NamedTuple):
    """What the programs leave each other: partial sums, and tickets."""

    partial: Any
    done: Any


@triton.jit
def _finish(partial, x, norm, o_channel, walk, sizes, moving, MERGE: tl.constexpr):
    """What `bn_finalize_kernel` does, of these channels."""
    channels = walk.channels
    ACC: tl.constexpr = norm.saved.dtype.element_ty
    m_channel = o_channel < channels
    old = load_running(norm, o_channel, m_channel)
    o, m = partial_offsets(o_channel, m_channel, partial.width, sizes, 3, MERGE)
    b_count = tl.load(partial.p + o, mask=m, other=0.0, cache_modifier=".cg")
    b_mean = tl.load(partial.p + partial.width + o, mask=m, other=0.0, cache_modifier=".cg")
    b_m2 = tl.load(partial.p + 2 * partial.width + o, mask=m, other=0.0, cache_modifier=".cg")
    tl.debug_barrier()  # several threads hold a channel, and one of them stores it
    b_n, b_mean, b_m2 = merge(b_count.to(tl.float64), b_mean.to(tl.float64), b_m2.to(tl.float64))
    o_first = o_channel.to(tl.int64)
    b_first = load_pivot(Summed(x, None, None), o_first, m_channel, walk, ACC, tl.int64)
    finish_moments(
        (b_n, b_mean, b_m2, b_first.to(tl.float64)), old, norm, o_channel, m_channel, channels, moving, False
    )  # fmt: skip


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_stats_finalize_kernel(
    x,
    between,
    norm,
    outer,
    inner,
    channels,
    whole,
    programs,
    width,
    keep,
    momentum: "fp64",
    eps: "fp64",
    TILE: tl.constexpr,
    MERGE: tl.constexpr,
):
    """between.partial [programs, 3, width], as `bn_stats_kernel`; saved [4, C] and the running statistics, as
    `bn_finalize_kernel`, MERGE.channels at a time."""
    ACC: tl.constexpr = norm.saved.dtype.element_ty
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    walk = walk_of(Sizes(outer, inner, 1, programs=programs), channels, 1, TILE)
    b_pivot = load_pivot(Summed(x, None, None), walk.o_column, walk.m_column, walk, ACC, OFFSET)
    b_count, b_mean, b_m2 = group_moments(Summed(x, None, None), b_pivot, walk, whole, TILE, ACC)
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    p_row = between.partial + walk.first * 3 * width
    store_sums(p_row, b_n, walk, None, False)
    store_sums(p_row + width, b_mean, walk, None, False)
    store_sums(p_row + 2 * width, b_m2, walk, None, False)

    tl.debug_barrier()
    i_ticket = tl.atomic_add(between.done + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if i_ticket == walk.programs - 1:
        tl.debug_barrier()
        for i in range(TILE.channels // MERGE.channels):
            o_channel = tl.program_id(0) * TILE.channels + i * MERGE.channels
            o_channel += tl.arange(0, MERGE.channels)
            _finish(
                Parts(between.partial, width), x, norm, o_channel, walk, Partials(walk.programs, 1, 0, 1),
                Moving(momentum, eps, keep), MERGE,
            )  # fmt: skip


def launch_bn_stats_finalize(
    p: Planner,
    x: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    running: Running,
    eps: float,
    rows: RowMap,
) -> None:
    """saved [4, C] <- moments of x, which is rows.strides[1], and bias; what is running is updated in place."""
    tile = choose_tile(rows, x.element_size(), STATISTICS, p.chip)
    partial = p.empty((tile.programs, 3, tile.width), partial_dtype(x.dtype))
    done = p.empty((tile.channel_blocks,), torch.int32)
    p.do(Tensor.zero_, done)
    merging, _ = merging_options(tile.programs)
    groups = tile.groups(rows.channels_fastest or is_aligned(x))
    p.start(
        bn_stats_finalize_kernel,
        tile.grid,
        (
            View(x, rows.strides[1]),
            Between(partial, done),
            Vectors(None, bias, running.mean, running.var, running.batches, saved),
            rows.outer,
            rows.inner,
            rows.channels,
            tile.whole,
            tile.programs,
            tile.width,
            int(running.keep),
            running.momentum,
            eps,
        ),
        {
            "TILE": tile.block(rows)._replace(even=tile.even, **groups),
            "MERGE": merging._replace(channels=min(merging.channels, tile.block_channels)),
        },
        tile.options | _registers(tile),
    )


def _registers(tile: Tile) -> dict[str, int]:
    """As many as let the statistics' programs be resident; the final step alone would take more. On sm_100 that spills,
    and AMD's compiler is not told."""
    chip = current_chip()
    if not 80 <= chip.architecture < 100:
        return {}
    return {"maxnreg": REGISTERS // (chip.warp_size * tile.warps * STATISTICS.programs)}

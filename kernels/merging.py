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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import current_chip
from .dtypes import partial_dtype
from .finalize import Running, finish_moments, merging_options, partial_offsets
from .launch import REGISTERS, STATISTICS, Tile, choose_tile, is_aligned
from .layout import RowMap
from .moments import load_pivot, merge, store_sums
from .plan import Planner
from .stats import group_moments
from .tile import ANY_MULTIPLE, ANY_VALUE, arithmetic, load_vector, row_vectors, tile_columns


@triton.jit
def _finish(
    p_x,
    p_partial,
    p_bias,
    p_saved,
    p_running_mean,
    p_running_var,
    p_batches,
    x_stride,
    o_channel,
    outer,
    inner,
    channels,
    programs,
    width,
    momentum,
    eps,
    keep,
    BLOCK_PARTIALS: tl.constexpr,
):
    """What `bn_finalize_kernel` does, of these channels."""
    ACC: tl.constexpr = p_saved.dtype.element_ty
    m_channel = o_channel < channels
    b_old_mean = load_vector(p_running_mean, o_channel, m_channel, 0.0, tl.float64)
    b_old_var = load_vector(p_running_var, o_channel, m_channel, 0.0, tl.float64)
    o, m = partial_offsets(o_channel, m_channel, programs, 1, width, 1, 0, 3, 0, BLOCK_PARTIALS)
    b_count = tl.load(p_partial + o, mask=m, other=0.0, cache_modifier=".cg")
    b_mean = tl.load(p_partial + width + o, mask=m, other=0.0, cache_modifier=".cg")
    b_m2 = tl.load(p_partial + 2 * width + o, mask=m, other=0.0, cache_modifier=".cg")
    tl.debug_barrier()  # several threads hold a channel, and one of them stores it
    moments = merge(b_count.to(tl.float64), b_mean.to(tl.float64), b_m2.to(tl.float64))
    b_first = load_pivot(
        p_x, None, None, o_channel.to(tl.int64), m_channel, outer, inner, 1, x_stride, None, ACC, tl.int64
    )  # fmt: skip
    finish_moments(
        moments, b_first.to(tl.float64), b_old_mean, b_old_var, p_bias, p_saved, p_running_mean, p_running_var,
        p_batches, o_channel, m_channel, channels, momentum, eps, keep, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_stats_finalize_kernel(
    p_x,
    p_partial,
    p_done,
    p_bias,
    p_saved,
    p_running_mean,
    p_running_var,
    p_batches,
    x_stride,
    outer,
    inner,
    channels,
    whole,
    programs,
    width,
    keep,
    momentum: "fp64",
    eps: "fp64",
    ONE_OUTER: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    ROW_VECTORS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [programs, 3, width], as `bn_stats_kernel`; saved [4, C] and the running statistics, as
    `bn_finalize_kernel`, MERGED channels at a time."""
    ACC: tl.constexpr = p_saved.dtype.element_ty
    inner = row_vectors(inner, ROW_VECTORS)
    i_program = tl.program_id(1)
    o_column, m_column = tile_columns(channels, None, BLOCK_CHANNELS, OFFSET)
    b_pivot = load_pivot(
        p_x, None, None, o_column, m_column, outer, inner, 1, x_stride, None, ACC, OFFSET
    )
    b_count, b_mean, b_m2 = group_moments(
        p_x, None, None, b_pivot, x_stride, None, None, o_column, m_column, outer, inner, 1, whole,
        i_program, programs, ACC, ONE_OUTER, EVEN, GROUP, RUN, BLOCK_OUTER, BLOCK_INNER, OFFSET, STAGES,
    )  # fmt: skip
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    p_row = p_partial + i_program * 3 * width
    store_sums(p_row, b_n, o_column, m_column, 1, 0, False)
    store_sums(p_row + width, b_mean, o_column, m_column, 1, 0, False)
    store_sums(p_row + 2 * width, b_m2, o_column, m_column, 1, 0, False)

    tl.debug_barrier()
    i_ticket = tl.atomic_add(p_done + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if i_ticket == programs - 1:
        tl.debug_barrier()
        for i in range(BLOCK_CHANNELS // MERGED):
            o_channel = tl.program_id(0) * BLOCK_CHANNELS + i * MERGED + tl.arange(0, MERGED)
            _finish(
                p_x, p_partial, p_bias, p_saved, p_running_mean, p_running_var, p_batches, x_stride, o_channel,
                outer, inner, channels, programs, width, momentum, eps, keep, BLOCK_PARTIALS,
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
    merging = merging_options(tile.programs)
    p.start(
        bn_stats_finalize_kernel,
        tile.grid,
        (x, partial, done, bias, saved, running.mean, running.var, running.batches),
        (
            rows.strides[1],
            rows.outer,
            rows.inner,
            rows.channels,
            tile.whole,
            tile.programs,
            tile.width,
            int(running.keep),
        ),
        (running.momentum, eps),
        {
            "ONE_OUTER": rows.outer == 1,
            "EVEN": tile.even,
            **tile.groups(rows.channels_fastest or is_aligned(x)),
            "ROW_VECTORS": rows.row_vectors,
            "BLOCK_PARTIALS": merging["BLOCK_PARTIALS"],
            "MERGED": min(merging["BLOCK_CHANNELS"], tile.block_channels),
            "OFFSET": arithmetic(x.dtype, rows)["OFFSET"],
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

"""What one process has of each channel, in float64, for several processes to put together.

    forward    moments [3, C] = (count, mean, M2 = sum((x - mean)^2))
    backward   sums [2, C] = (sum(dz), sum(dz * (x - mean))); of the same sums dweight and dbias, which stay local

Nothing is normalised yet: the partials of all programs are merged as `finalize` merges them, in the same fixed tree.
What the processes gathered, [P, 3, C], is then merged by `bn_finalize_kernel`, as if P programs had left it, and what
their sums come to, divided by the total count, goes to `bn_grad_finalize_kernel`. Reads the partials once, writes a few
values a channel. Parallel over blocks of channels.
"""

import triton
import triton.language as tl
from torch import Tensor

from .finalize import ANY_SIZE, Partial, finish_sums, merging_options, partial_offsets, share
from .grad import Operand
from .launch import Tile
from .layout import RowMap
from .moments import load_pivot, merge
from .plan import Planner
from .tile import arithmetic, load_vector


@triton.jit(do_not_specialize=[*ANY_SIZE, "first"])
def bn_moments_kernel(
    p_partial,
    p_x,
    p_moments,
    x_stride,
    outer,
    inner,
    channels,
    spread,
    programs,
    width,
    each,
    slots,
    first,
    COLUMNS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Rows first to first + 2 of moments [3 K, C] <- partial [P, 3, width].

    The means in partial are relative to the pivots of x; without x they are the means themselves.
    """
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    o, m = partial_offsets(
        o_channel, m_channel, programs, spread, width, each, slots, 3, COLUMNS, BLOCK_PARTIALS
    )
    b_count = tl.load(p_partial + o, mask=m, other=0.0).to(tl.float64)
    b_mean = tl.load(p_partial + width + o, mask=m, other=0.0).to(tl.float64)
    b_m2 = tl.load(p_partial + 2 * width + o, mask=m, other=0.0).to(tl.float64)
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    if p_x is not None:
        ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
        b_pivot = load_pivot(
            p_x, None, None, o_channel.to(tl.int64) * spread, m_channel, outer, inner, spread, x_stride, None,
            ACC, tl.int64,
        )  # fmt: skip
        b_mean += b_pivot.to(tl.float64)
    p_row = p_moments + first * channels + o_channel
    tl.store(p_row, b_n, mask=m_channel)
    tl.store(p_row + channels, b_mean, mask=m_channel)
    tl.store(p_row + 2 * channels, b_m2, mask=m_channel)


def launch_bn_moments(p: Planner, partial: Partial, moments: Tensor, which: int) -> None:
    """moments [which] of [K, 3, C], float64 <- partial [P, 3, width]."""
    programs, _, width = partial.values.shape
    channels, rows = moments.shape[2], partial.rows
    walk: tuple = (None, None, None)
    spread = 1
    if rows is not None:
        spread, walk = rows.spread, (rows.strides[partial.which], rows.outer, rows.inner)
    each, columns, slots = share(spread, partial.tile)
    options = merging_options(programs * each)
    p.start(
        bn_moments_kernel,
        (-(-channels // options["BLOCK_CHANNELS"]),),
        (partial.values, partial.x, moments),
        (*walk, channels, spread, programs, width, each, slots, 3 * which),
        (),
        {"COLUMNS": columns},
        options,
    )


@triton.jit(do_not_specialize=[*ANY_SIZE, "first"])
def bn_grad_sums_kernel(
    p_partial,
    p_saved,
    p_sums,
    p_dweight,
    p_dbias,
    channels,
    spread,
    programs,
    width,
    each,
    slots,
    first,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Rows first and first + 1 of sums [2 K, C], dweight and dbias [C] (each where given) <- partial [P, 2, width]."""
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    o, m = partial_offsets(
        o_channel, m_channel, programs, spread, width, each, slots, 2, COLUMNS, BLOCK_PARTIALS
    )
    b_dz = tl.sum(tl.load(p_partial + o, mask=m, other=0.0).to(tl.float64), axis=0)
    b_dzx = tl.sum(tl.load(p_partial + width + o, mask=m, other=0.0).to(tl.float64), axis=0)
    p_row = p_sums + first * channels + o_channel
    tl.store(p_row, b_dz, mask=m_channel)
    tl.store(p_row + channels, b_dzx, mask=m_channel)
    b_invstd = load_vector(p_saved + 2 * channels, o_channel, m_channel, 0.0, ACC)
    finish_sums(
        b_dz, b_dzx, b_invstd, None, p_dweight, p_dbias, o_channel, m_channel, 0.0, ACC
    )  # fmt: skip


def launch_bn_grad_sums(
    p: Planner, of: Operand, sums: Tensor, which: int, rows: RowMap, tile: Tile
) -> None:
    """sums [which] of [K, 2, C], float64, and of.dweight, of.dbias <- of.partial [P, 2, width] of such a walk."""
    programs, _, width = of.partial.shape
    each, columns, slots = share(rows.spread, tile)
    options = merging_options(programs * each)
    p.start(
        bn_grad_sums_kernel,
        (-(-rows.channels // options["BLOCK_CHANNELS"]),),
        (of.partial, of.norm.saved, sums, of.dweight, of.dbias),
        (rows.channels, rows.spread, programs, width, each, slots, 2 * which),
        (),
        {"ACC": arithmetic(of.x.dtype, rows)["ACC"], "COLUMNS": columns},
        options,
    )

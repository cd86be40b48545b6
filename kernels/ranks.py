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

from .finalize import (
    ANY_SIZE,
    Gradients,
    Partial,
    Partials,
    Parts,
    finish_sums,
    load_moments,
    load_sums,
    merging_options,
    share,
)
from .grad import Operand
from .launch import Tile
from .layout import RowMap
from .moments import Summed, load_pivot, merge
from .plan import Planner
from .tile import Sizes, View, arithmetic, load_vector


@triton.jit(do_not_specialize=[*ANY_SIZE, "first"])
def bn_moments_kernel(
    partial,
    x,
    p_moments,
    outer,
    inner,
    channels,
    spread,
    programs,
    each,
    slots,
    first,
    MERGE: tl.constexpr,
):
    """Rows first to first + 2 of moments [3 K, C] <- partial [P, 3, width].

    The means in partial are relative to the pivots of x; without x they are the means themselves.
    """
    o_channel = tl.program_id(0) * MERGE.channels + tl.arange(0, MERGE.channels)
    m_channel = o_channel < channels
    sizes = Partials(programs, each, slots, spread)
    b_count, b_mean, b_m2 = load_moments(partial, o_channel, m_channel, sizes, MERGE)
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)
    if x is not None:
        ACC: tl.constexpr = tl.float64 if x.p.dtype.element_ty == tl.float64 else tl.float32
        o_first, rows = o_channel.to(tl.int64) * spread, Sizes(outer, inner, spread)
        b_pivot = load_pivot(Summed(x, None, None), o_first, m_channel, rows, ACC, tl.int64)
        b_mean += b_pivot.to(tl.float64)
    p_row = p_moments + first * channels + o_channel
    tl.store(p_row, b_n, mask=m_channel)
    tl.store(p_row + channels, b_mean, mask=m_channel)
    tl.store(p_row + 2 * channels, b_m2, mask=m_channel)


def launch_bn_moments(p: Planner, partial: Partial, moments: Tensor, which: int) -> None:
    """moments [which] of [K, 3, C], float64 <- partial [P, 3, width]."""
    programs, _, width = partial.values.shape
    channels, rows, x = moments.shape[2], partial.rows, None
    spread = 1 if rows is None else rows.spread
    each, columns, slots = share(spread, partial.tile)
    outer = inner = None
    if rows is not None and partial.x is not None:
        x = View(partial.x, rows.strides[partial.which])
        outer, inner = rows.outer, rows.inner
    merging, options = merging_options(programs * each)
    p.start(
        bn_moments_kernel,
        (-(-channels // merging.channels),),
        (
            Parts(partial.values, width),
            x,
            moments,
            outer,
            inner,
            channels,
            spread,
            programs,
            each,
            slots,
            3 * which,
        ),
        {"MERGE": merging._replace(columns=columns)},
        options,
    )


@triton.jit(do_not_specialize=[*ANY_SIZE, "first"])
def bn_grad_sums_kernel(
    partial,
    p_saved,
    p_sums,
    out,
    channels,
    spread,
    programs,
    each,
    slots,
    first,
    ACC: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Rows first and first + 1 of sums [2 K, C], dweight and dbias [C] (each where given) <- partial [P, 2, width]."""
    o_channel = tl.program_id(0) * MERGE.channels + tl.arange(0, MERGE.channels)
    m_channel = o_channel < channels
    sizes = Partials(programs, each, slots, spread)
    b_dz, b_dzx = load_sums(partial, o_channel, m_channel, sizes, MERGE)
    p_row = p_sums + first * channels + o_channel
    tl.store(p_row, b_dz, mask=m_channel)
    tl.store(p_row + channels, b_dzx, mask=m_channel)
    b_invstd = load_vector(p_saved + 2 * channels, o_channel, m_channel, 0.0, ACC)
    finish_sums((b_dz, b_dzx), b_invstd, None, out, o_channel, m_channel, 0.0, ACC)


def launch_bn_grad_sums(
    p: Planner, of: Operand, sums: Tensor, which: int, rows: RowMap, tile: Tile
) -> None:
    """sums [which] of [K, 2, C], float64, and of.dweight, of.dbias <- of.partial [P, 2, width] of such a walk."""
    programs, _, width = of.partial.shape
    each, columns, slots = share(rows.spread, tile)
    merging, options = merging_options(programs * each)
    p.start(
        bn_grad_sums_kernel,
        (-(-rows.channels // merging.channels),),
        (
            Parts(of.partial, width),
            of.norm.saved,
            sums,
            Gradients(of.dweight, of.dbias),
            rows.channels,
            rows.spread,
            programs,
            each,
            slots,
            2 * which,
        ),
        {"ACC": arithmetic(of.x.dtype, rows)["ACC"], "MERGE": merging._replace(columns=columns)},
        options,
    )

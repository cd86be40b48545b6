"""The small steps between the passes: partial sums of all programs into one value a channel.

Reads the partials once ([P, k, width], a few hundred KiB at most), writes per-channel vectors. Parallel over blocks of
channels; all partials of a block are merged at once, in a fixed tree. A channel has one of each row program; in a flat
walk one of each row program and block of columns that it has a part in.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .grad import Operand
from .launch import Tile, partials_a_channel
from .layout import RowMap
from .moments import inverse_std, load_pivot, merge
from .plan import Planner
from .tile import arithmetic, load_vector

BLOCK_CHANNELS = 8  # one 32-byte sector of float32
MOST_VALUES = 4096  # of a kind in a program: 8 a thread with 16 warps
# Partials that a program has room for: a kernel each. What a channel lacks of them is masked, and not read.
ROOM = (128, 512)
# Triton need not compile these steps anew for a size that is 1, or that 16 divides: they take no time.
ANY_SIZE = ["outer", "inner", "spread", "programs", "each", "slots", "keep"]


def share(spread: int, tile: Tile | None) -> tuple[int, int, int]:
    """Who left the partials of a channel: how many blocks, of how many columns (0: it has a column) and slots each."""
    if tile is None or not tile.slots:
        return 1, 0, 0
    return partials_a_channel(spread, tile.block_channels), tile.block_channels, tile.slots


@functools.lru_cache(maxsize=1024)
def merging_options(partials: int) -> dict[str, int]:
    """How many partials and channels a program merges at a time."""
    block = next((n for n in ROOM if n >= partials), triton.next_power_of_2(partials))
    channels = max(1, min(BLOCK_CHANNELS, MOST_VALUES // block))
    warps = max(4, min(16, block * channels // 128))  # 4 values a thread, where 16 warps do
    return {
        "BLOCK_PARTIALS": block,
        "BLOCK_CHANNELS": channels,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


@triton.jit
def partial_offsets(
    o_channel, m_channel, programs, spread, width, each, slots,
    KINDS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr,
):  # fmt: skip
    """(offsets, mask) [partials, channels] of the first of KINDS values; each: blocks of COLUMNS that a channel may
    have a part in, which have `slots`; COLUMNS is 0 where a channel has one column."""
    o_partial = tl.arange(0, BLOCK_PARTIALS)
    m = (o_partial < programs * each)[:, None] & m_channel[None, :]
    if COLUMNS == 0:
        o = (o_partial * (KINDS * width))[:, None] + o_channel[None, :]
    else:
        o_first = o_channel * spread
        o_block = (o_first // COLUMNS)[None, :] + (o_partial % each)[:, None]
        m = m & (o_block * COLUMNS < (o_first + spread)[None, :])
        o_slot = o_channel[None, :] - (o_block * COLUMNS) // spread
        o = ((o_partial // each) * (KINDS * width))[:, None] + o_block * slots + o_slot
    return o, m


@triton.jit
def _count_batch(p_batches, o_channel, m_moves):
    """One batch more, where there is a counter and the first channel moves. Every warp loads, and one thread stores."""
    if p_batches is not None and tl.program_id(0) == 0:
        m_first = m_moves & (o_channel == 0)
        p_counter = p_batches + o_channel * 0
        b_batches = tl.load(p_counter, mask=m_first, other=0)
        tl.debug_barrier()
        tl.store(p_counter, b_batches + 1, mask=m_first)


@triton.jit
def finish_moments(
    moments, b_first, b_old_mean, b_old_var, p_bias, p_saved, p_running_mean, p_running_var, p_batches,
    o_channel, m_channel, channels, momentum, eps, keep, MAY_BE_ONE: tl.constexpr,
):  # fmt: skip
    """(mean, mean_low, invstd, bias) [channels], which are left in saved [4, C]; the running statistics move from their
    old values, and batches, where given, is one more. moments: (count, mean, M2) in float64, the mean relative to
    b_first. With keep, a channel of which either would not be finite stays, and batches goes with the first one.
    MAY_BE_ONE: whether there may be one value only, or none, which has no variance: what is running stays.
    """
    ACC: tl.constexpr = p_saved.dtype.element_ty
    b_n, b_offset, b_m2 = moments
    b_exact = b_first + b_offset
    b_mean = b_exact.to(ACC)
    # What the two roundings took off (Knuth's two-sum, then the cast); nothing where the mean is not finite.
    b_back = b_exact - b_first
    b_low = (b_first - (b_exact - b_back)) + (b_offset - b_back) + (b_exact - b_mean.to(tl.float64))
    b_low = tl.where(tl.abs(b_mean) < float("inf"), b_low, 0.0).to(ACC)
    b_var = b_m2 / tl.maximum(b_n, 1.0)
    b_invstd = inverse_std(b_var.to(ACC), eps, ACC)
    tl.store(p_saved + o_channel, b_mean, mask=m_channel)
    tl.store(p_saved + channels + o_channel, b_low, mask=m_channel)
    tl.store(p_saved + 2 * channels + o_channel, b_invstd, mask=m_channel)
    b_bias = load_vector(p_bias, o_channel, m_channel, 0.0, ACC)
    tl.store(p_saved + 3 * channels + o_channel, b_bias, mask=m_channel)
    m_moves = m_channel
    if p_running_mean is not None:
        b_momentum = tl.full(o_channel.shape, momentum, tl.float64)
        b_new = b_old_mean * (1.0 - b_momentum) + b_exact * b_momentum
        b_new_mean = b_new.to(ACC).to(p_running_mean.dtype.element_ty)
        b_new = b_old_var * (1.0 - b_momentum) + b_m2 / (b_n - 1.0) * b_momentum
        b_new_var = b_new.to(ACC).to(p_running_var.dtype.element_ty)
        # As they are stored: what is not finite is no more 0 less itself.
        b_none = (b_new_mean.to(ACC) - b_new_mean.to(ACC)) + (b_new_var.to(ACC) - b_new_var.to(ACC))
        m_finite = b_none == 0.0
        m_moves = m_channel & (m_finite | (tl.full(o_channel.shape, keep, tl.int32) == 0))
        m_stored = m_moves
        if MAY_BE_ONE:
            m_stored = m_moves & (b_n > 1.0)
        tl.store(p_running_mean + o_channel, b_new_mean, mask=m_stored)
        tl.store(p_running_var + o_channel, b_new_var, mask=m_stored)
    _count_batch(p_batches, o_channel, m_moves)
    return b_mean, b_low, b_invstd, b_bias


@triton.jit(do_not_specialize=ANY_SIZE)
def bn_finalize_kernel(
    p_partial,
    p_x,
    p_bias,
    p_saved,
    p_running_mean,
    p_running_var,
    p_batches,
    x_stride,
    outer,
    inner,
    channels,
    spread,
    programs,
    width,
    each,
    slots,
    keep,
    momentum: "fp64",
    eps: "fp64",
    COLUMNS: tl.constexpr,
    MAY_BE_ONE: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """saved [4, C] <- mean, mean_low, invstd, bias; the running statistics move towards the batch's (var unbiased).

    batches, where given, is one more. keep: see `finish_moments`.

    The backward, which computes z again, is to have the bias of the forward, whatever has become of it since. The means
    in partial are relative to the pivots of x; without x they are the means themselves.
    """
    ACC: tl.constexpr = p_saved.dtype.element_ty
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    # Several threads hold a channel, and one of them stores it: all have read before the merge, whose barriers come
    # between.
    b_old_mean = load_vector(p_running_mean, o_channel, m_channel, 0.0, tl.float64)
    b_old_var = load_vector(p_running_var, o_channel, m_channel, 0.0, tl.float64)
    o, m = partial_offsets(
        o_channel, m_channel, programs, spread, width, each, slots, 3, COLUMNS, BLOCK_PARTIALS
    )
    b_count = tl.load(p_partial + o, mask=m, other=0.0).to(tl.float64)
    b_mean = tl.load(p_partial + width + o, mask=m, other=0.0).to(tl.float64)
    b_m2 = tl.load(p_partial + 2 * width + o, mask=m, other=0.0).to(tl.float64)
    moments = merge(b_count, b_mean, b_m2)

    if p_x is not None:
        b_pivot = load_pivot(
            p_x, None, None, o_channel.to(tl.int64) * spread, m_channel, outer, inner, spread, x_stride, None,
            ACC, tl.int64,
        )  # fmt: skip
        b_first = b_pivot.to(tl.float64)
    else:
        b_first = tl.zeros([BLOCK_CHANNELS], tl.float64)
    finish_moments(
        moments, b_first, b_old_mean, b_old_var, p_bias, p_saved, p_running_mean, p_running_var, p_batches,
        o_channel, m_channel, channels, momentum, eps, keep, MAY_BE_ONE,
    )  # fmt: skip


class Running(NamedTuple):
    """What a batch moves: the running statistics [C] and how many batches there were ([], int64), each or None.

    keep: not where they would not be finite."""

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float = 0.0
    keep: bool = False


class Partial(NamedTuple):
    """What a reducing pass left, and of what: x is rows.strides[which] of the map that it was walked by. Without x the
    means are absolute, of [P, 3, C]. may_be_one: of one value in all, or none, as the launcher cannot tell."""

    values: Tensor
    x: Tensor | None = None
    rows: RowMap | None = None
    which: int = 0
    tile: Tile | None = None
    may_be_one: bool = False


def launch_bn_finalize(
    p: Planner, partial: Partial, bias: Tensor | None, saved: Tensor, running: Running, eps: float
) -> None:
    """saved [4, C] <- partial [P, 3, width], bias; what is running is updated in place where given."""
    programs, _, width = partial.values.shape
    channels = saved.shape[1]
    walk: tuple = (None, None, None)
    spread, rows = 1, partial.rows
    if rows is not None:
        spread, walk = rows.spread, (rows.strides[partial.which], rows.outer, rows.inner)
    each, columns, slots = share(spread, partial.tile)
    options = merging_options(programs * each)
    p.start(
        bn_finalize_kernel,
        (-(-channels // options["BLOCK_CHANNELS"]),),
        (partial.values, partial.x, bias, saved, running.mean, running.var, running.batches),
        (*walk, channels, spread, programs, width, each, slots, int(running.keep)),
        (running.momentum, eps),
        {"COLUMNS": columns, "MAY_BE_ONE": partial.may_be_one},
        options,
    )


@triton.jit
def finish_sums(
    b_dz, b_dzx, b_invstd, p_weight, p_dweight, p_dbias, o_channel, m_channel, inverse_count,
    ACC: tl.constexpr,
):  # fmt: skip
    """(slope, level) [channels] of dx = scale * dz + slope * (x - mean) + level, of the two sums in float64; dweight
    and dbias are written.
    """
    if p_dweight is not None:
        tl.store(
            p_dweight + o_channel,
            (b_dzx * b_invstd).to(ACC).to(p_dweight.dtype.element_ty),
            mask=m_channel,
        )
    if p_dbias is not None:
        tl.store(p_dbias + o_channel, b_dz.to(ACC).to(p_dbias.dtype.element_ty), mask=m_channel)
    b_scale = b_invstd * load_vector(p_weight, o_channel, m_channel, 1.0, ACC)
    b_share = b_scale * tl.full(o_channel.shape, inverse_count, tl.float64)
    b_slope = -(b_share * b_invstd) * (b_dzx * b_invstd)
    return b_slope.to(ACC), -(b_share * b_dz).to(ACC)


@triton.jit(do_not_specialize=ANY_SIZE)
def bn_grad_finalize_kernel(
    p_partial,
    p_saved,
    p_weight,
    p_coefficients,
    p_dweight,
    p_dbias,
    channels,
    spread,
    programs,
    width,
    each,
    slots,
    inverse_count: "fp64",
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """dweight, dbias [C], and the coefficients [2, C] of dx = scale * dz + slope * (x - mean) + level.

    Without saved nothing was normalised: invstd is 1.
    """
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    o, m = partial_offsets(
        o_channel, m_channel, programs, spread, width, each, slots, 2, COLUMNS, BLOCK_PARTIALS
    )
    b_dz = tl.sum(tl.load(p_partial + o, mask=m, other=0.0).to(tl.float64), axis=0)
    b_dzx = tl.sum(tl.load(p_partial + width + o, mask=m, other=0.0).to(tl.float64), axis=0)

    if p_saved is None:
        b_invstd = tl.full([BLOCK_CHANNELS], 1.0, ACC)
    else:
        b_invstd = load_vector(p_saved + 2 * channels, o_channel, m_channel, 0.0, ACC)
    b_slope, b_level = finish_sums(
        b_dz,
        b_dzx,
        b_invstd,
        p_weight,
        p_dweight,
        p_dbias,
        o_channel,
        m_channel,
        inverse_count,
        ACC,
    )
    if p_coefficients is not None:
        tl.store(p_coefficients + o_channel, b_slope, mask=m_channel)
        tl.store(p_coefficients + channels + o_channel, b_level, mask=m_channel)


def launch_bn_grad_finalize(
    p: Planner,
    of: Operand,
    coefficients: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    rows: RowMap,
    tile: Tile | None,
) -> None:
    """coefficients [2, C], dweight [C], dbias [C] (each where given) <- of.partial [P, 2, width] of such a walk.

    Without a tile they are sums of more than these rows, [P, 2, C], which their count has divided already.
    """
    programs, _, width = of.partial.shape
    each, columns, slots = share(rows.spread, tile)
    options = merging_options(programs * each)
    p.start(
        bn_grad_finalize_kernel,
        (-(-rows.channels // options["BLOCK_CHANNELS"]),),
        (of.partial, of.norm.saved, of.norm.weight, coefficients, dweight, dbias),
        (rows.channels, rows.spread, programs, width, each, slots),
        (1.0 if tile is None else 1.0 / rows.values,),
        {"ACC": arithmetic(of.x.dtype, rows)["ACC"], "COLUMNS": columns},
        options,
    )

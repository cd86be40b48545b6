"""The small steps between the passes: partial sums of all programs into one value a channel.

Reads the partials once ([P, k, width], a few hundred KiB at most), writes per-channel vectors. Parallel over blocks of
channels; all partials of a block are merged at once, in a fixed tree. A channel has one of each row program; in a flat
walk one of each row program and block of columns that it has a part in.
"""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .grad import Operand
from .launch import Tile, partials_a_channel
from .layout import RowMap
from .moments import Summed, inverse_std, load_pivot, merge
from .norm import Vectors
from .plan import Planner
from .tile import Sizes, View, arithmetic, load_vector

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


class Merging(NamedTuple):
    """What a merging kernel is compiled for: how many partials and channels a program merges at a time.

    columns: of a block of a flat walk, where a channel may have several partials of a row program; else 0.
    may_be_one: see `finish_moments`.
    """

    partials: int
    channels: int
    columns: int = 0
    may_be_one: bool = False


class Partials(NamedTuple):
    """How many there are of a channel. programs: that left some; each: blocks of columns that a channel may have a part
    in, which have `slots`; spread: columns of a channel."""

    programs: Any
    each: Any
    slots: Any
    spread: Any


class Parts(NamedTuple):
    """Partial sums [programs, k, width]."""

    p: Any
    width: Any


class Gradients(NamedTuple):
    """What becomes of the sums of a backward; each where it is wanted, else None."""

    dweight: Any
    dbias: Any
    coefficients: Any = None


@functools.lru_cache(maxsize=1024)
def merging_options(partials: int) -> tuple[Merging, dict[str, int]]:
    """What a program merges at a time, and Triton's options."""
    block = next((n for n in ROOM if n >= partials), triton.next_power_of_2(partials))
    channels = max(1, min(BLOCK_CHANNELS, MOST_VALUES // block))
    warps = max(4, min(16, block * channels // 128))  # 4 values a thread, where 16 warps do
    return Merging(block, channels), {"num_warps": warps, "enable_fp_fusion": True}


@triton.jit
def partial_offsets(o_channel, m_channel, width, sizes, KINDS: tl.constexpr, MERGE: tl.constexpr):
    """(offsets, mask) [partials, channels] of the first of KINDS values; sizes: `Partials`; MERGE: `Merging`."""
    COLUMNS: tl.constexpr = MERGE.columns
    o_partial = tl.arange(0, MERGE.partials)
    m = (o_partial < sizes.programs * sizes.each)[:, None] & m_channel[None, :]
    if COLUMNS == 0:
        o = (o_partial * (KINDS * width))[:, None] + o_channel[None, :]
    else:
        o_first = o_channel * sizes.spread
        o_block = (o_first // COLUMNS)[None, :] + (o_partial % sizes.each)[:, None]
        m = m & (o_block * COLUMNS < (o_first + sizes.spread)[None, :])
        o_slot = o_channel[None, :] - (o_block * COLUMNS) // sizes.spread
        o = ((o_partial // sizes.each) * (KINDS * width))[:, None] + o_block * sizes.slots + o_slot
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


class Moving(NamedTuple):
    """How what is running moves; keep: see `Running`."""

    momentum: Any
    eps: Any
    keep: Any


@triton.jit
def load_running(norm, o_channel, m_channel):
    """(mean, var) [channels] in float64, as they are before a batch; 0 where there are none."""
    b_mean = load_vector(norm.running_mean, o_channel, m_channel, 0.0, tl.float64)
    return b_mean, load_vector(norm.running_var, o_channel, m_channel, 0.0, tl.float64)


@triton.jit
def finish_moments(
    moments, old, norm, o_channel, m_channel, channels, moving, MAY_BE_ONE: tl.constexpr
):  # fmt: skip
    """(mean, mean_low, invstd, bias) [channels], which are left in saved [4, C]; the running statistics move from their
    old values, (mean, var), and batches, where given, is one more. moments: (count, mean, M2, first) in float64, the
    mean relative to first. norm: `Vectors`; moving: `Moving`. With keep, a channel of which either would not be finite
    stays, and batches goes with the first one.
    MAY_BE_ONE: whether there may be one value only, or none, which has no variance: what is running stays.
    """
    ACC: tl.constexpr = norm.saved.dtype.element_ty
    p_saved = norm.saved
    b_n, b_offset, b_m2, b_first = moments
    b_old_mean, b_old_var = old
    b_exact = b_first + b_offset
    b_mean = b_exact.to(ACC)
    # What the two roundings took off (Knuth's two-sum, then the cast); nothing where the mean is not finite.
    b_back = b_exact - b_first
    b_low = (b_first - (b_exact - b_back)) + (b_offset - b_back) + (b_exact - b_mean.to(tl.float64))
    b_low = tl.where(tl.abs(b_mean) < float("inf"), b_low, 0.0).to(ACC)
    b_var = b_m2 / tl.maximum(b_n, 1.0)
    b_invstd = inverse_std(b_var.to(ACC), moving.eps, ACC)
    tl.store(p_saved + o_channel, b_mean, mask=m_channel)
    tl.store(p_saved + channels + o_channel, b_low, mask=m_channel)
    tl.store(p_saved + 2 * channels + o_channel, b_invstd, mask=m_channel)
    b_bias = load_vector(norm.bias, o_channel, m_channel, 0.0, ACC)
    tl.store(p_saved + 3 * channels + o_channel, b_bias, mask=m_channel)
    m_moves = m_channel
    if norm.running_mean is not None:
        b_momentum = tl.full(o_channel.shape, moving.momentum, tl.float64)
        b_new = b_old_mean * (1.0 - b_momentum) + b_exact * b_momentum
        b_new_mean = b_new.to(ACC).to(norm.running_mean.dtype.element_ty)
        b_new = b_old_var * (1.0 - b_momentum) + b_m2 / (b_n - 1.0) * b_momentum
        b_new_var = b_new.to(ACC).to(norm.running_var.dtype.element_ty)
        # As they are stored: what is not finite is no more 0 less itself.
        b_none = (b_new_mean.to(ACC) - b_new_mean.to(ACC)) + (b_new_var.to(ACC) - b_new_var.to(ACC))
        m_finite = b_none == 0.0
        m_moves = m_channel & (m_finite | (tl.full(o_channel.shape, moving.keep, tl.int32) == 0))
        m_stored = m_moves
        if MAY_BE_ONE:
            m_stored = m_moves & (b_n > 1.0)
        tl.store(norm.running_mean + o_channel, b_new_mean, mask=m_stored)
        tl.store(norm.running_var + o_channel, b_new_var, mask=m_stored)
    _count_batch(norm.batches, o_channel, m_moves)
    return b_mean, b_low, b_invstd, b_bias


@triton.jit
def load_moments(partial, o_channel, m_channel, sizes, MERGE: tl.constexpr):
    """(count, mean, M2) [partials, channels] in float64, for `merge`."""
    o, m = partial_offsets(o_channel, m_channel, partial.width, sizes, 3, MERGE)
    b_count = tl.load(partial.p + o, mask=m, other=0.0).to(tl.float64)
    b_mean = tl.load(partial.p + partial.width + o, mask=m, other=0.0).to(tl.float64)
    b_m2 = tl.load(partial.p + 2 * partial.width + o, mask=m, other=0.0).to(tl.float64)
    return b_count, b_mean, b_m2


@triton.jit
def load_sums(partial, o_channel, m_channel, sizes, MERGE: tl.constexpr):
    """sum(dz) and sum(dz * (x - mean)) [channels], in float64."""
    o, m = partial_offsets(o_channel, m_channel, partial.width, sizes, 2, MERGE)
    b_dz = tl.sum(tl.load(partial.p + o, mask=m, other=0.0).to(tl.float64), axis=0)
    b_dzx = tl.load(partial.p + partial.width + o, mask=m, other=0.0).to(tl.float64)
    return b_dz, tl.sum(b_dzx, axis=0)


@triton.jit(do_not_specialize=ANY_SIZE)
def bn_finalize_kernel(
    partial,
    x,
    norm,
    outer,
    inner,
    channels,
    spread,
    programs,
    each,
    slots,
    keep,
    momentum: "fp64",
    eps: "fp64",
    MERGE: tl.constexpr,
):
    """saved [4, C] <- mean, mean_low, invstd, bias; the running statistics move towards the batch's (var unbiased).

    batches, where given, is one more. keep: see `finish_moments`.

    The backward, which computes z again, is to have the bias of the forward, whatever has become of it since. The means
    in partial are relative to the pivots of x; without x they are the means themselves.
    """
    ACC: tl.constexpr = norm.saved.dtype.element_ty
    o_channel = tl.program_id(0) * MERGE.channels + tl.arange(0, MERGE.channels)
    m_channel = o_channel < channels
    # Several threads hold a channel, and one of them stores it: all have read before the merge, whose barriers come
    # between.
    old = load_running(norm, o_channel, m_channel)
    sizes = Partials(programs, each, slots, spread)
    b_count, b_mean, b_m2 = load_moments(partial, o_channel, m_channel, sizes, MERGE)
    b_n, b_mean, b_m2 = merge(b_count, b_mean, b_m2)

    if x is not None:
        o_first, rows = o_channel.to(tl.int64) * spread, Sizes(outer, inner, spread)
        b_pivot = load_pivot(Summed(x, None, None), o_first, m_channel, rows, ACC, tl.int64)
        b_first = b_pivot.to(tl.float64)
    else:
        b_first = tl.zeros(o_channel.shape, tl.float64)
    finish_moments(
        (b_n, b_mean, b_m2, b_first), old, norm, o_channel, m_channel, channels,
        Moving(momentum, eps, keep), MERGE.may_be_one,
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
    channels, rows, x = saved.shape[1], partial.rows, None
    spread = 1 if rows is None else rows.spread
    each, columns, slots = share(spread, partial.tile)
    outer = inner = None
    if rows is not None and partial.x is not None:
        x = View(partial.x, rows.strides[partial.which])
        outer, inner = rows.outer, rows.inner
    merging, options = merging_options(programs * each)
    norm = Vectors(None, bias, running.mean, running.var, running.batches, saved)
    p.start(
        bn_finalize_kernel,
        (-(-channels // merging.channels),),
        (
            Parts(partial.values, width),
            x,
            norm,
            outer,
            inner,
            channels,
            spread,
            programs,
            each,
            slots,
            int(running.keep),
            running.momentum,
            eps,
        ),
        {"MERGE": merging._replace(columns=columns, may_be_one=partial.may_be_one)},
        options,
    )


@triton.jit
def finish_sums(
    sums, b_invstd, p_weight, out, o_channel, m_channel, inverse_count, ACC: tl.constexpr
):  # fmt: skip
    """(slope, level) [channels] of dx = scale * dz + slope * (x - mean) + level, of the two sums in float64; dweight
    and dbias are written, of `Gradients`.
    """
    b_dz, b_dzx = sums
    if out.dweight is not None:
        b_dweight = (b_dzx * b_invstd).to(ACC).to(out.dweight.dtype.element_ty)
        tl.store(out.dweight + o_channel, b_dweight, mask=m_channel)
    if out.dbias is not None:
        tl.store(out.dbias + o_channel, b_dz.to(ACC).to(out.dbias.dtype.element_ty), mask=m_channel)
    b_scale = b_invstd * load_vector(p_weight, o_channel, m_channel, 1.0, ACC)
    b_share = b_scale * tl.full(o_channel.shape, inverse_count, tl.float64)
    b_slope = -(b_share * b_invstd) * (b_dzx * b_invstd)
    return b_slope.to(ACC), -(b_share * b_dz).to(ACC)


@triton.jit(do_not_specialize=ANY_SIZE)
def bn_grad_finalize_kernel(
    partial,
    norm,
    out,
    channels,
    spread,
    programs,
    each,
    slots,
    inverse_count: "fp64",
    ACC: tl.constexpr,
    MERGE: tl.constexpr,
):
    """`Gradients`: dweight, dbias [C], and the coefficients [2, C] of dx = scale * dz + slope * (x - mean) + level.

    Without saved nothing was normalised: invstd is 1.
    """
    o_channel = tl.program_id(0) * MERGE.channels + tl.arange(0, MERGE.channels)
    m_channel = o_channel < channels
    sizes = Partials(programs, each, slots, spread)
    b_dz, b_dzx = load_sums(partial, o_channel, m_channel, sizes, MERGE)

    if norm.saved is None:
        b_invstd = tl.full(o_channel.shape, 1.0, ACC)
    else:
        b_invstd = load_vector(norm.saved + 2 * channels, o_channel, m_channel, 0.0, ACC)
    b_slope, b_level = finish_sums(
        (b_dz, b_dzx), b_invstd, norm.weight, out, o_channel, m_channel, inverse_count, ACC
    )
    if out.coefficients is not None:
        tl.store(out.coefficients + o_channel, b_slope, mask=m_channel)
        tl.store(out.coefficients + channels + o_channel, b_level, mask=m_channel)


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
    merging, options = merging_options(programs * each)
    p.start(
        bn_grad_finalize_kernel,
        (-(-rows.channels // merging.channels),),
        (
            Parts(of.partial, width),
            Vectors(of.norm.weight, saved=of.norm.saved),
            Gradients(dweight, dbias, coefficients),
            rows.channels,
            rows.spread,
            programs,
            each,
            slots,
            1.0 if tile is None else 1.0 / rows.values,
        ),
        {"ACC": arithmetic(of.x.dtype, rows)["ACC"], "MERGE": merging._replace(columns=columns)},
        options,
    )

"""Moments of a channel as (count, mean, M2 = sum of squared deviations), and what is done with them.

A mean travels relative to a pivot (a value of the channel), so that it keeps its digits when mean / std is large;
the final mean is a pair mean + mean_low of one rounding each. Never E[x^2] - E[x]^2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .chip import INTERPRETED
from .tile import column_offsets, load_tile

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def fma(a, b, c):
    """a * b + c with one rounding, always: spelled out, so that two kernels cannot be contracted differently."""
    if _INTERPRETED:
        # The interpreter's own fma rounds the product: split by Dekker's method, that rounding is added back.
        SPLIT: tl.constexpr = 134217729.0 if a.dtype == tl.float64 else 4097.0
        b_product = a * b
        a_high = a * SPLIT - (a * SPLIT - a)
        b_high = b * SPLIT - (b * SPLIT - b)
        a_low, b_low = a - a_high, b - b_high
        b_lost = ((a_high * b_high - b_product) + a_high * b_low + a_low * b_high) + a_low * b_low
        z = (b_product + c) + tl.where(tl.abs(b_lost) < float("inf"), b_lost, 0.0)
    else:
        z = tl.fma(a, b, c)
    return z


@triton.jit
def product(a, b):
    """a * b with a rounding of its own, always: not contracted with the addition that it goes into.

    Where a sum goes over threads, each would contract its own product with the value that a shuffle brings, and threads
    that hold copies of the sum would not have the same bits. (A fused multiply-add with 0 is no product to a compiler,
    which has to think of -0.)
    """
    if _INTERPRETED:
        z = a * b
    else:
        z = tl.fma(a, b, tl.zeros_like(a))
    return z


@triton.jit
def add_compensated(b_sum, b_low, b_more):
    """(sum, low) <- (sum + more, low + what that rounded away), by Knuth's two-sum, while finite."""
    b_next = b_sum + b_more
    b_back = b_next - b_sum
    b_lost = (b_sum - (b_next - b_back)) + (b_more - b_back)
    return b_next, b_low + tl.where(tl.abs(b_next) < float("inf"), b_lost, 0.0)


@triton.jit
def sum_rows(b_value, b_low):
    """sum over axis 0 of value + low, as float64 [C]. For float64 in steps: a shorter chain rounds off less."""
    if b_value.dtype == tl.float64 and b_value.shape[0] >= 128:
        b_value = tl.sum(tl.reshape(b_value, (b_value.shape[0] // 8, 8, b_value.shape[1])), axis=1)
        b_low = tl.sum(tl.reshape(b_low, (b_low.shape[0] // 8, 8, b_low.shape[1])), axis=1)
    if b_value.dtype == tl.float64 and b_value.shape[0] >= 16:
        b_value = tl.sum(tl.reshape(b_value, (b_value.shape[0] // 8, 8, b_value.shape[1])), axis=1)
        b_low = tl.sum(tl.reshape(b_low, (b_low.shape[0] // 8, 8, b_low.shape[1])), axis=1)
    return tl.sum(b_value.to(tl.float64), axis=0) + tl.sum(b_low.to(tl.float64), axis=0)


class Summed(NamedTuple):
    """A tensor whose moments are taken: x, or with a residual x + residual, which is stored in total; `tile.View`s."""

    x: Any
    residual: Any
    total: Any


@triton.jit
def _value_at(of, o_outer, o_inner, o_column, m_column, spread, ACC: tl.constexpr):
    """x [BLOCK_CHANNELS] of one row; or x + residual, as it is stored."""
    o_x = o_outer * of.x.stride[0] + o_inner * of.x.stride[1]
    o_x += column_offsets(o_column, of.x.stride, spread)
    b_x = load_tile(of.x.p, o_x, m_column, ACC)
    if of.residual is not None:
        o_residual = o_outer * of.residual.stride[0] + o_inner * of.residual.stride[1]
        o_residual += column_offsets(o_column, of.residual.stride, spread)
        b_x += load_tile(of.residual.p, o_residual, m_column, ACC)
        b_x = b_x.to(of.total.p.dtype.element_ty).to(ACC)
    return b_x


@triton.jit
def load_pivot(of, o_column, m_column, rows, ACC: tl.constexpr, OFFSET: tl.constexpr):
    """A value near the channel's others: the median of its first, its middle and its last row, one of which may be far
    off. 0 where that is not finite (the rest of the channel should not all turn to NaN). of: `Summed`; o_column: the
    channel's first; rows: a `Walk`, or what tells outer, inner and spread as it does.
    """
    spread = rows.spread
    o_outer, o_inner = tl.full([], rows.outer - 1, OFFSET), tl.full([], rows.inner - 1, OFFSET)
    b_first = _value_at(of, o_outer * 0, o_inner * 0, o_column, m_column, spread, ACC)
    b_middle = _value_at(of, o_outer // 2, o_inner // 2, o_column, m_column, spread, ACC)
    b_last = _value_at(of, o_outer, o_inner, o_column, m_column, spread, ACC)
    b_least = tl.where(b_first < b_middle, b_first, b_middle)
    b_most = tl.where(b_first < b_middle, b_middle, b_first)
    b_pivot = tl.where(b_last < b_least, b_least, tl.where(b_last > b_most, b_most, b_last))
    return tl.where(tl.abs(b_pivot) < float("inf"), b_pivot, 0.0)


@triton.jit
def merge(b_count, b_mean, b_m2):
    """Merge over axis 0: (count, mean, M2) of [P, C] groups -> the same of [C], in float64.

    Chan, Golub and LeVeque 1983, all groups at once. The sums are in float64: there is one a program, and what a
    float32 tree rounds off would be seen in the last digit of a running variance.
    """
    b_n = tl.sum(b_count.to(tl.float64), axis=0)
    b_all = tl.sum(product(b_count, b_mean).to(tl.float64), axis=0) / tl.maximum(b_n, 1.0)
    b_delta = tl.where(b_count > 0, b_mean - b_all.to(b_mean.dtype)[None, :], 0.0)
    b_m2 = b_m2 + b_delta * (b_delta * b_count)
    return b_n, b_all, tl.sum(b_m2.to(tl.float64), axis=0)


@triton.jit
def of_slot(i_slot, o_column, m_column, spread, BLOCK_CHANNELS: tl.constexpr):
    """Which columns belong to the i-th of the channels that this block (of a flat walk) has a part of."""
    o_first = (tl.program_id(0).to(o_column.dtype) * BLOCK_CHANNELS) // spread
    return m_column & (o_column // spread == o_first + i_slot)


@triton.jit
def store_sums(p_partial, b_value, walk, slots, FLAT: tl.constexpr):
    """What a program has of a kind: a value a column; in a flat walk the sum of each slot of its block."""
    if FLAT:
        for i_slot in range(slots):
            m = of_slot(i_slot, walk.o_column, walk.m_column, walk.spread, b_value.shape[0])
            b_sum = tl.sum(tl.where(m, b_value, 0.0), axis=0)
            tl.store(
                p_partial + tl.program_id(0) * slots + i_slot, b_sum.to(p_partial.dtype.element_ty)
            )
    else:
        b_stored = b_value.to(p_partial.dtype.element_ty)
        tl.store(p_partial + walk.o_column, b_stored, mask=walk.m_column)


@triton.jit
def inverse_std(b_var, eps, ACC: tl.constexpr):
    """1 / sqrt(var + eps), each step correctly rounded."""
    b_var = b_var + tl.full(b_var.shape, eps, ACC)
    if ACC == tl.float64:
        b_invstd = 1.0 / tl.sqrt(b_var)
    else:
        b_invstd = tl.div_rn(tl.full(b_var.shape, 1.0, ACC), tl.sqrt_rn(b_var))
    return b_invstd


@triton.jit
def fold(b_mean, b_mean_low, b_scale, b_bias):
    """(high, low) of (x - mean - mean_low) * scale + bias = x * scale + high + low.

    high is -mean * scale, rounded, and low has what that took off: a fused multiply-add with high is as exact as the
    difference x - mean is, at any mean / std, and is one instruction less. -mean * scale must not overflow, which it
    does in a channel that is constant at 1e36 and more.
    """
    b_high = -b_mean * b_scale
    b_lost = fma(-b_mean_low, b_scale, fma(-b_mean, b_scale, -b_high))
    return b_high, tl.where(tl.abs(b_high) < float("inf"), b_lost, 0.0) + b_bias


@triton.jit
def normalize(b_x, b_scale, b_high, b_low):
    """x * scale + high + low, of [rows, columns] and [columns]; forward and backward must agree on its sign to the last
    bit.
    """
    b_zero = tl.zeros_like(b_x)
    return fma(b_x, b_scale[None, :] + b_zero, b_high[None, :] + b_zero) + b_low[None, :]

"""Moments of a channel as (count, mean, M2 = sum of squared deviations), and what is done with them.

A mean travels relative to a pivot (the channel's first value), so that it keeps its digits when mean / std is large;
the final mean is a pair mean + mean_low of one rounding each. Never E[x^2] - E[x]^2.
"""

import triton
import triton.language as tl

from .chip import INTERPRETED

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
def add_product(b_sum, b_low, a, b):
    """(sum, low) <- sum + low + a * b, low being what was rounded away (Ogita, Rump and Oishi 2005)."""
    b_product = a * b
    b_low += tl.where(tl.abs(b_product) < float("inf"), fma(a, b, -b_product), 0.0)
    return add_compensated(b_sum, b_low, b_product)


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


@triton.jit
def load_pivot(p_x, o_channel, m_channel, stride_channel, ACC: tl.constexpr):
    """The channel's first value, or 0 where that is not finite (the rest of the channel should not all turn to NaN)."""
    return finite_or_zero(
        tl.load(p_x + o_channel * stride_channel, mask=m_channel, other=0.0).to(ACC)
    )


@triton.jit
def finite_or_zero(b_value):
    """0 for what is not finite."""
    return tl.where(tl.abs(b_value) < float("inf"), b_value, 0.0)


@triton.jit
def merge(b_count, b_total, b_m2):
    """Merge over axis 0: (count, total = count * mean, M2) of [P, C] groups -> (count, mean, M2) of [C], float64.

    Chan, Golub and LeVeque 1983, all groups at once. The sums are in float64: there is one a program, and what a
    float32 tree rounds off would be seen in the last digit of a running variance.
    """
    b_n = tl.sum(b_count.to(tl.float64), axis=0)
    b_mean = tl.sum(b_total.to(tl.float64), axis=0) / tl.maximum(b_n, 1.0)
    b_delta = b_total / tl.maximum(b_count, 1.0) - b_mean.to(b_total.dtype)[None, :]
    b_delta = tl.where(b_count > 0, b_delta, 0.0)
    b_m2 = b_m2 + b_delta * (b_delta * b_count)
    return b_n, b_mean, tl.sum(b_m2.to(tl.float64), axis=0)


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
def center(b_x, b_mean, b_mean_low):
    """x - mean, for [rows, channels] values and [channels] means; exact where x is near the mean."""
    return (b_x - b_mean[None, :]) - b_mean_low[None, :]


@triton.jit
def center_remainder(b_x, b_mean, b_mean_low, b_centered):
    """What `center` rounded away (Knuth's two-sum; the second subtraction is too small to matter)."""
    b_first = b_x - b_mean[None, :]
    b_back = b_first - b_x
    b_lost = (b_x - (b_first - b_back)) - (b_mean[None, :] + b_back)
    return b_lost + ((b_first - b_centered) - b_mean_low[None, :])


@triton.jit
def normalize(b_centered, b_scale, b_bias):
    """(x - mean) * scale + bias; forward and backward must agree on its sign to the last bit."""
    b_zero = tl.zeros_like(b_centered)
    return fma(b_centered, b_scale[None, :] + b_zero, b_bias[None, :] + b_zero)

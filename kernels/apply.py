"""Second pass of the forward: y = act((x - mean) * invstd * weight + bias + residual).

x, residual, y [rows, columns]; mean, invstd, weight, bias [C]. A residual that has a BatchNorm of its own is
normalised as x is. Reads x (and the residual) once, writes y and, for a tail that will be differentiated, one bit an
element. Parallel over row programs and blocks of columns; no reduction. Arithmetic in float32 (float64 for float64),
rounded once. Tiles run in the reverse order of the statistics pass: what that pass read last is what the cache still
holds.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activation import Activation, activate, passes
from .bits import byte_tile, pack
from .launch import ALONE, APPLYING, BITS, DUAL_SHARE, choose_tile
from .layout import RowMap, mask_of
from .moments import fold, normalize
from .norm import NO_NORM, Branch, Norm, load_norm, vectors_of
from .plan import Planner
from .tile import (
    ANY_MULTIPLE,
    ANY_VALUE,
    Pair,
    Sizes,
    View,
    only_if,
    tile_offsets,
    tile_rows,
    walk_of,
    widen,
)


class Output(NamedTuple):
    """What the forward writes: y, and a tail's mask of it; each a `View`."""

    y: Any
    bits: Any


class Tail(NamedTuple):
    """Whether the residual is added, has its BatchNorm, and bits are written, if they are given at all: constants, or
    integers of a kernel that is one for all of these."""

    adds: Any
    normalizes: Any
    writes_bits: Any


@triton.jit
def apply_tiles(of, norms, out, walk, tail, TILE: tl.constexpr, ACTIVATION: tl.constexpr):
    """out <- of, the tiles of a program. of: the `Branch` of x, and of the residual; norms: the `Affine` of
    each, or None; out: `Output`; tail: `Tail`."""
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    norm = norms.x
    b_scale = norm.scale
    b_high, b_low = fold(norm.mean, norm.mean_low, norm.scale, norm.bias)
    if norms.residual is not None:
        other = norms.residual
        b_rscale = other.scale
        b_rhigh, b_rlow = fold(other.mean, other.mean_low, other.scale, other.bias)
    for i in tl.range(walk.first, walk.tiles, walk.programs, num_stages=TILE.second):
        i_tile = walk.tiles - 1 - i
        o_outer, o_inner, m_row = tile_rows(i_tile, walk, TILE)
        m = m_row[:, None] & walk.m_column[None, :]
        o_y = tile_offsets(o_outer, o_inner, walk.o_column, out.y.stride, walk.spread)
        o_x = tile_offsets(o_outer, o_inner, walk.o_column, of.x.stride, walk.spread, o_y)
        b_x = widen(tl.load(of.x.p + o_x, mask=m, other=0.0), ACC)
        b_z = normalize(b_x, b_scale, b_high, b_low)
        if of.residual.p is not None:
            o_residual = tile_offsets(
                o_outer, o_inner, walk.o_column, of.residual.stride, walk.spread, o_y
            )
            b_residual = widen(
                tl.load(of.residual.p + o_residual, mask=only_if(m, tail.adds), other=0.0), ACC
            )
            if tail.adds:
                if norms.residual is not None:
                    if tail.normalizes:
                        b_residual = normalize(b_residual, b_rscale, b_rhigh, b_rlow)
                b_z += b_residual
        b_y = activate(b_z, ACTIVATION)
        tl.store(out.y.p + o_y, b_y.to(out.y.p.dtype.element_ty), mask=m)
        if out.bits.p is not None:
            if tail.writes_bits:
                o_byte, m_byte = byte_tile(i_tile, walk, out.bits.stride, TILE)
                m_bit = passes(b_z, ACTIVATION)
                if not TILE.whole_bytes:
                    m_bit &= m
                b_byte = pack(m_bit, TILE.packs_channels)
                tl.store(out.bits.p + o_byte, b_byte, mask=m_byte)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_MULTIPLE)
def bn_apply_kernel(
    of,
    out,
    outer,
    inner,
    channels,
    spread,
    tiles_inner,
    tiles,
    programs,
    eps: "fp64",
    residual_eps: "fp64",
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out <- of; see `apply_tiles`."""
    ACC: tl.constexpr = tl.float64 if of.x.p.dtype.element_ty == tl.float64 else tl.float32
    sizes = Sizes(outer, inner, spread, tiles_inner, tiles, programs)
    walk = walk_of(sizes, channels, 1, TILE)
    norm = load_norm(of.x.norm, walk, eps, ACC)
    residual_norm = None
    if of.residual.norm.running_mean is not None or of.residual.norm.saved is not None:
        residual_norm = load_norm(of.residual.norm, walk, residual_eps, ACC)
    apply_tiles(of, Pair(norm, residual_norm), out, walk, Tail(True, True, True), TILE, ACTIVATION)


def launch_bn_apply(
    p: Planner,
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    y: Tensor,
    bits: Tensor | None,
    rows: RowMap,
    activation: tuple[str | None, float],
) -> None:
    """y (and bits) <- x; rows.strides are those of y, x and, where there is one, the residual."""
    if residual is None:
        kind, share = ALONE, 1
    else:
        kind, share = APPLYING, 1 if residual_norm is None else DUAL_SHARE
    tile = choose_tile(rows, x.element_size(), kind, p.chip, share)
    mask = mask_of(bits, rows)
    along = rows.columns if mask.packs_channels else rows.inner
    p.start(
        bn_apply_kernel,
        tile.grid,
        (
            Pair(
                Branch(x, rows.others[1], vectors_of(norm)),
                Branch(
                    residual,
                    rows.others[2] if residual is not None else None,
                    vectors_of(residual_norm or NO_NORM),
                ),
            ),
            Output(View(y, rows.strides[0]), View(bits, mask.stride)),
            rows.outer,
            rows.inner,
            rows.channels,
            rows.spread,
            tile.tiles_inner if rows.outer > 1 else None,
            tile.tiles,
            tile.programs,
            norm.eps,
            (residual_norm or NO_NORM).eps,
        ),
        {
            "TILE": tile.block(rows)._replace(
                packs_channels=mask.packs_channels, whole_bytes=along % BITS == 0
            ),
            "ACTIVATION": Activation(*activation),
        },
        tile.options,
    )  # fmt: skip

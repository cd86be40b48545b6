"""The index map of `layout.RowMap` on the device: which rows and columns a program's tile holds, and where.

What belongs together travels as one named tuple, into kernels and between device functions; what is not there is a
tuple of None. Triton takes the parts one by one, in their order. What stays an argument of a kernel's own, since Triton
(3.6 to 3.9) takes it otherwise in a tuple: integers that a kernel is not compiled for, as neither `do_not_specialize`
nor `do_not_specialize_on_alignment` reaches into one; and floats, which there are float32. Triton 3.6 asks no tuple
that has a None in it whether it is None (so a part is asked), and returns none from a device function.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .layout import VECTOR, GatherMap, RowMap

# Triton compiles a kernel anew for an integer that is 1, and for one that 16 divides. What it makes of these is the
# same, or no better: so they are not looked at, and a kernel is there for other batches and image sizes too.
ANY_VALUE = ["inner", "whole", "tiles", "tiles_inner", "programs", "width", "slots", "keep"]
# So of a whole direction: what a program walks, and which of a tail's tensors are there.
ANY_WHOLE = [
    *ANY_VALUE, "bits_outer", "bits_inner", "bits_piece",
    "adds", "normalizes", "writes_bits", "plain", "writes_residual",
]  # fmt: skip
# Of these 1 is worth a kernel, since divisions go.
ANY_MULTIPLE = ["outer", "spread"]
_VECTOR = tl.constexpr(VECTOR)


def arithmetic(dtype: torch.dtype, rows: RowMap | GatherMap) -> dict[str, tl.dtype]:
    """What a kernel is told of its arithmetic on such values, and of the offsets of such rows."""
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "OFFSET": tl.int64 if rows.needs_int64 else tl.int32,
    }


class View(NamedTuple):
    """A tensor: where it begins, and its strides; None where they are those of another."""

    p: Any
    stride: Any


class Pair(NamedTuple):
    """Of x, and of the residual."""

    x: Any
    residual: Any


class Sizes(NamedTuple):
    """Of the rows of a pass, and of its tiles; None where a pass has no use for it. spread: columns of a channel;
    tiles_inner: None where there is one outer row; width, slots: of the columns of a program (`own_columns`)."""

    outer: Any
    inner: Any
    spread: Any
    tiles_inner: Any = None
    tiles: Any = None
    programs: Any = None
    width: Any = None
    slots: Any = None


class Walk(NamedTuple):
    """The tiles first, first + programs, ... of a program, and its columns. `columns` counts those of all programs.

    own: (columns from one program to the next, columns in a row of a program), where TILE.parts is not 0.
    """

    outer: Any
    inner: Any
    channels: Any
    spread: Any
    columns: Any
    tiles_inner: Any
    tiles: Any
    first: Any
    programs: Any
    o_column: Any
    m_column: Any
    own: Any
    slots: Any
    width: Any


@triton.jit
def row_vectors(inner, ROW_VECTORS: tl.constexpr):
    """inner; with ROW_VECTORS the compiler learns that 16 divides it, so that rows side by side share a mask."""
    if ROW_VECTORS:
        inner = inner // _VECTOR * _VECTOR
    return inner


@triton.jit
def walk_of(sizes, channels, SECTOR: tl.constexpr, TILE: tl.constexpr):
    """The `Walk` of this program: its columns are on grid axis 0, its tiles on axis 1, or all of them where sizes has
    no programs. SECTOR: columns of 32 bytes, which the compiler learns that those of a program are multiples of."""
    tiles_inner, tiles = 1, 0
    if sizes.tiles_inner is not None:
        tiles_inner = sizes.tiles_inner
    if sizes.tiles is not None:
        tiles = sizes.tiles
    if sizes.programs is None:
        first = 0
        programs = 1
    else:
        first = tl.program_id(1)
        programs = sizes.programs
    if TILE.parts == 0:
        slots, width, apart, room = 0, 0, 0, 0
    else:
        slots, width = sizes.slots, sizes.width
        apart = slots * sizes.spread // SECTOR * SECTOR
        room = width // SECTOR * SECTOR
    columns = channels * sizes.spread
    o_column, m_column = tile_columns(columns, (apart, room), TILE.channels, TILE)
    return Walk(
        sizes.outer, row_vectors(sizes.inner, TILE.row_vectors), channels, sizes.spread, columns, tiles_inner, tiles,
        first, programs, o_column, m_column, (apart, room), slots, width,
    )  # fmt: skip


@triton.jit
def tile_rows(i_tile, walk, TILE: tl.constexpr, STEP: tl.constexpr = 1):
    """(o, i, mask) of the rows of tile `i_tile`, each [TILE.outer * TILE.inner]; of every STEP inner rows one."""
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    INNER: tl.constexpr = TILE.inner // STEP
    if TILE.one_outer:  # no division in the loop
        i_outer = tl.full([], 0, OFFSET)
        i_inner = i_outer + i_tile
    else:
        i_outer = (i_tile // walk.tiles_inner).to(OFFSET)
        i_inner = (i_tile % walk.tiles_inner).to(OFFSET)
    if STEP == 1:
        inner = walk.inner
    else:
        inner = (walk.inner + STEP - 1) // STEP
    o_row = tl.arange(0, TILE.outer * INNER)
    o_inner = i_inner * INNER + (o_row % INNER).to(OFFSET)
    o_outer = i_outer * TILE.outer + (o_row // INNER).to(OFFSET)
    m_row = (o_outer < walk.outer) & (o_inner < inner)
    return o_outer, o_inner, m_row


@triton.jit
def whole_tile(i_tile, walk, TILE: tl.constexpr):
    """(o, i) of the rows of the i-th of the tiles without a row that is not there."""
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    o_row = tl.arange(0, TILE.outer * TILE.inner)
    if TILE.one_outer:  # no division in the loop
        i_outer = i_tile * 0
        i_inner = i_tile
    else:
        tiles_inner = walk.inner // TILE.inner
        i_outer = i_tile // tiles_inner
        i_inner = i_tile % tiles_inner
    o_inner = i_inner.to(OFFSET) * TILE.inner + (o_row % TILE.inner).to(OFFSET)
    o_outer = i_outer.to(OFFSET) * TILE.outer + (o_row // TILE.inner).to(OFFSET)
    return o_outer, o_inner


@triton.jit
def partial_tile(i, walk, TILE: tl.constexpr):
    """(o, i, mask) of the rows of the i-th of the other tiles: the last of each outer block, then the last outer
    block.
    """
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    tiles_inner = walk.inner // TILE.inner
    tiles_outer = tl.cdiv(walk.outer, TILE.outer)
    last = tl.where(walk.inner % TILE.inner != 0, tiles_outer, 0)
    i_outer = tl.where(i < last, i, tiles_outer - 1)
    i_inner = tl.where(i < last, tiles_inner, i - last)
    o_row = tl.arange(0, TILE.outer * TILE.inner)
    o_inner = i_inner.to(OFFSET) * TILE.inner + (o_row % TILE.inner).to(OFFSET)
    o_outer = i_outer.to(OFFSET) * TILE.outer + (o_row // TILE.inner).to(OFFSET)
    return o_outer, o_inner, (o_outer < walk.outer) & (o_inner < walk.inner)


@triton.jit
def groups(b_x, GROUP: tl.constexpr, RUN: tl.constexpr):
    """[rows, ...] -> [GROUP, rows / GROUP, ...], or [rows / GROUP, GROUP, ...] where rows follow each other.

    Along GROUP what a thread holds: runs of RUN rows, at equal distances.
    """
    RUNS: tl.constexpr = GROUP // RUN
    OTHERS: tl.constexpr = b_x.shape[0] // GROUP
    if len(b_x.shape) == 1:
        b = tl.reshape(b_x, (RUNS, OTHERS, RUN))
        if RUN == 1:
            b = tl.reshape(b, (GROUP, OTHERS))
        else:
            b = tl.reshape(tl.permute(b, (1, 0, 2)), (OTHERS, GROUP))
    elif RUN == 1:
        b = tl.reshape(b_x, (GROUP, OTHERS, b_x.shape[1]))
    else:
        b = tl.reshape(b_x, (RUNS, OTHERS, RUN, b_x.shape[1]))
        b = tl.reshape(tl.permute(b, (1, 0, 2, 3)), (OTHERS, GROUP, b_x.shape[1]))
    return b


@triton.jit
def sum_groups(b_x, GROUP: tl.constexpr, RUN: tl.constexpr):
    """[rows, columns] -> [rows / GROUP, columns], by sums in a thread."""
    if GROUP == 1:
        b = b_x
    else:
        b = tl.sum(groups(b_x, GROUP, RUN), axis=0 if RUN == 1 else 1)
    return b


@triton.jit
def tile_columns(columns, own, BLOCK_CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """(f, mask) of the columns of this program, each [BLOCK_CHANNELS]; `own` as in `Walk`, of columns such as these."""
    OFFSET: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    o = tl.arange(0, BLOCK_CHANNELS).to(OFFSET)
    if TILE.parts == 0:
        o_column = tl.program_id(0).to(OFFSET) * BLOCK_CHANNELS + o
        m_column = o_column < columns
    else:
        o_column = tl.program_id(0).to(OFFSET) * own[0] + o
        m_column = o < own[1]
    return o_column, m_column


@triton.jit
def walk_stride(walk, row_stride):
    """The strides of a walk of whole channels: rows of all channels; or with a row_stride rows of a flat walk (outer)
    in pieces (inner)."""
    if row_stride is None:
        stride = (0, walk.channels, 1)
    else:
        stride = (row_stride, walk.own[1], 1)
    return stride


@triton.jit
def own_channels(walk, PARTS: tl.constexpr):
    """(c, mask) of the channels of this program: its columns, or `slots` of them."""
    if PARTS == 0:
        o_channel, m_channel = walk.o_column, walk.m_column
    else:
        o_slot = tl.arange(0, PARTS)
        o_channel = tl.program_id(0) * walk.slots + o_slot
        m_channel = o_slot < walk.slots
    return o_channel, m_channel


@triton.jit
def by_part(b_value, slots, width, PARTS: tl.constexpr):
    """[columns] -> [columns / PARTS, PARTS], then zeros: a program's `width` columns, of `slots` channels one after the
    other, of which each is PARTS / slots parts. So one kernel adds up many short channels, or few long ones.
    """
    ROOM: tl.constexpr = b_value.shape[0] // PARTS
    each = width // slots
    parts = PARTS // slots
    length = (each + parts - 1) // parts
    o, o_part = tl.arange(0, ROOM)[:, None], tl.arange(0, PARTS)[None, :]
    o_within = (o_part % parts) * length + o
    m = (o < length) & (o_within < each)
    o_column = tl.where(m, (o_part // parts) * each + o_within, 0)
    b = tl.gather(b_value, tl.reshape(o_column, (ROOM * PARTS,)), 0)
    return tl.where(m, tl.reshape(b, (ROOM, PARTS)), 0.0)


@triton.jit
def by_channel(b_part, slots, PARTS: tl.constexpr):
    """[PARTS] -> [PARTS, channels]: the parts of each channel, and zeros."""
    o_slot = tl.arange(0, PARTS) // (PARTS // slots)
    m = o_slot[:, None] == tl.arange(0, PARTS)[None, :]
    return tl.where(m, b_part[:, None], 0.0)


@triton.jit
def to_columns(b_value, slots, width, BLOCK_CHANNELS: tl.constexpr):
    """[PARTS] of a program's channels -> [columns]; those beyond get the last one's."""
    o = tl.arange(0, BLOCK_CHANNELS) // (width // slots)
    return tl.gather(b_value, tl.minimum(o, b_value.shape[0] - 1), 0)


@triton.jit
def only_if(m, flag):
    """m, or nothing without the flag, which is a constant or an integer of the launch."""
    return m & (tl.full(m.shape, flag, tl.int32) != 0)


@triton.jit
def column_offsets(o_column, stride, spread):
    """Offsets of columns, by the third stride, or the third and the fourth (channel, within): see `layout.Strides`."""
    if len(stride) == 3:
        o = o_column * stride[2]
    else:
        o = (o_column // spread) * stride[2] + (o_column % spread) * stride[3]
    return o


@triton.jit
def tile_offsets(o_outer, o_inner, o_column, stride, spread, o_first=None):
    """Offsets [rows, columns] of a tensor; without a stride of its own they are o_first, those of the first one."""
    if stride is None:
        o = o_first
    else:
        o_row = o_outer * stride[0] + o_inner * stride[1]
        o = o_row[:, None] + column_offsets(o_column, stride, spread)[None, :]
    return o


@triton.jit
def widen(b_value, ACC: tl.constexpr):
    """The values as ACC. A bfloat16 is the upper half of a float32: with that said in integers, the second of two that
    a load left in a register takes one instruction, and not two.
    """
    if b_value.dtype == tl.bfloat16 and ACC == tl.float32:
        b = (b_value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        b = b_value.to(ACC)
    return b


@triton.jit
def load_tile(p_tensor, o_value, m_value, ACC: tl.constexpr):
    """Values as ACC, 0 where masked; m_value is None where nothing is."""
    if m_value is None:
        b_value = tl.load(p_tensor + o_value)
    else:
        b_value = tl.load(p_tensor + o_value, mask=m_value, other=0.0)
    return b_value.to(ACC)


@triton.jit
def load_vector(p_vector, o_channel, m_channel, default, ACC: tl.constexpr):
    """A per-channel vector as ACC; `default` where there is no such tensor."""
    if p_vector is None:
        b_vector = tl.full(o_channel.shape, default, ACC)
    else:
        b_vector = tl.load(p_vector + o_channel, mask=m_channel, other=default).to(ACC)
    return b_vector

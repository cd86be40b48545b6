"""Strides as an index map: any layout that the kernels can walk is [outer, inner] rows of [channels].

Row (o, i) and channel c of a tensor stand at o * stride_outer + i * stride_inner + c * stride_channel. channels_last
is one outer row; contiguous [N, C, H, W] is N outer and H * W inner rows. Several tensors share one map when the same
dimensions can be merged in each of them.

A contiguous plane whose H * W no vector of values divides (14x14, 7x7) would be walked two bytes at a time, and a small
one would leave much of a tile empty. It is walked as [N] rows of [C * H * W] columns instead, as if they were channels:
what lies next to each other is read together, and column f belongs to channel f // (H * W).
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# (outer, inner, column), or (outer, inner, channel, within) where the columns of a channel do not follow each other.
Strides = tuple[int, ...]
VECTOR = 16  # what Triton knows an integer to be a multiple of
PLANE_ROWS = (
    64  # of a plane in a tile: one number for all planes, since each tile is a kernel of its own
)
# Rows of a flat walk: a tile has no fewer, and masked ones take time; little of it up to so many values, which are
# walked so whatever their rows, by the same kernels.
FEWEST_FLAT, FEW_VALUES = 8, 1 << 22
MOST_SPREAD = 8192  # columns of a channel: its blocks leave a partial sum each, and the finalising step holds all


@dataclass(frozen=True)
class RowMap:
    """outer * inner rows, each with `columns` values; `strides[k]` are those of tensor k; tensor 0 is the one that is
    written. spread: columns of a channel, 1 but in a flat walk."""

    outer: int
    inner: int
    channels: int
    strides: tuple[Strides, ...]
    needs_int64: bool
    spread: int = 1

    @functools.cached_property
    def others(self) -> tuple[Strides | None, ...]:
        """`strides`, None where they are the first's: what a kernel computes once."""
        return tuple(None if walk == self.strides[0] else walk for walk in self.strides)

    @property
    def columns(self) -> int:
        return self.channels * self.spread

    @property
    def values(self) -> int:
        """Of a channel."""
        return self.outer * self.inner * self.spread

    @property
    def row_vectors(self) -> bool:
        """Whether rows are read together, and never a vector that has one too many."""
        return not self.channels_fastest and self.inner % VECTOR == 0

    @property
    def channels_fastest(self) -> bool:
        """Whether neighbours in memory are columns of one row (channels_last, flat) or rows of one channel."""
        inner, column = self.strides[0][1:3]
        return column == 1 and not (inner == 1 and self.inner >= self.columns)


@functools.lru_cache(maxsize=4096)
def row_map(shape: tuple[int, ...], *strides: tuple[int, ...]) -> RowMap | None:
    """The map that all tensors of this shape and these strides share; None when there is none."""
    first = strides[0]
    dims = [d for d in range(len(shape)) if d != 1 and shape[d] != 1]
    dims.sort(key=lambda d: -first[d])
    sizes: list[int] = []
    steps: list[list[int]] = []
    for d in dims:
        step = [stride[d] for stride in strides]
        if sizes and all(
            above == below * shape[d] for above, below in zip(steps[-1], step, strict=True)
        ):
            sizes[-1] *= shape[d]
            steps[-1] = step
        else:
            sizes.append(shape[d])
            steps.append(step)
    if len(sizes) > 2:
        return None
    while len(sizes) < 2:
        # A dimension of one row: its stride is never multiplied by anything but 0.
        sizes.insert(0, 1)
        steps.insert(0, [0] * len(strides))
    channels = shape[1]
    spread = 1
    if _is_flat(sizes, steps, channels, first[1]):
        spread = sizes[1]
    last = [
        sum((size - 1) * step[k] for size, step in zip(sizes, steps, strict=True))
        + (channels - 1) * strides[k][1]
        for k in range(len(strides))
    ]
    needs_int64 = max(*last, sizes[0] * sizes[1] * channels) >= 2**31 - 2**20
    each = [(steps[0][k], steps[1][k], strides[k][1]) for k in range(len(strides))]
    if spread == 1:
        return RowMap(sizes[0], sizes[1], channels, tuple(each), needs_int64)
    walks = tuple(
        (0, row, 1) if (within, channel) == (1, spread) else (0, row, channel, within)
        for row, within, channel in each
    )
    return RowMap(1, sizes[0], channels, walks, needs_int64, spread)


def _is_flat(sizes: list[int], steps: list[list[int]], channels: int, channel_stride: int) -> bool:
    """Whether the tensor that is written has planes that follow each other and that a tile does not suit."""
    return (
        (sizes[0] >= FEWEST_FLAT or sizes[0] * sizes[1] * channels <= FEW_VALUES)
        and channels > 1
        and 1 < sizes[1] <= MOST_SPREAD
        and steps[1][0] == 1
        and channel_stride == sizes[1]
        and not suits_tile(sizes[1])
    )


def suits_tile(plane: int) -> bool:
    """Whether vectors divide a plane of so many values, and tiles pad it by at most an eighth."""
    return plane % VECTOR == 0 and -(-plane // PLANE_ROWS) * PLANE_ROWS <= plane * 9 // 8


def row_map_of(*tensors: Tensor) -> RowMap | None:
    """`row_map` of tensors that all have the first one's shape."""
    return row_map(tuple(tensors[0].shape), *(tensor.stride() for tensor in tensors))


# Bytes of a row's mask that stand together, and behind them those of the next row: of 64 columns, which is what a
# program has of 16-bit values. So the bytes that a warp moves, of four rows and more, lie in one sector.
MASK_PIECE = 8


def bits_layout(rows: RowMap) -> tuple[bool, int, Strides]:
    """(whether columns are packed, bytes in all, strides in bytes) of the mask of a tensor with these rows.

    Four strides: the bytes of a row stand in pieces of MASK_PIECE (see `Strides`; a piece is what a channel is there).
    """
    outer, inner, channels = rows.outer, rows.inner, rows.columns
    if packs_channels(rows):
        width = -(-channels // 8)
        step = inner if outer > 1 else 0  # never multiplied by anything but 0
        if width % MASK_PIECE == 0:
            # Sixteen divides what stands between two pieces, whatever the rows: else each is a kernel of its own.
            piece = -(-outer * inner * MASK_PIECE // VECTOR) * VECTOR
            return True, piece * (width // MASK_PIECE), (step * MASK_PIECE, MASK_PIECE, piece, 1)
        return True, outer * inner * width, (step * width, width, 1)
    width = -(-inner // 8)
    inner_stride, channel_stride = (channels, 1) if rows.channels_fastest else (1, width)
    return False, outer * width * channels, (width * channels, inner_stride, channel_stride)


class Mask(NamedTuple):
    """What a kernel is told of a mask's bytes."""

    stride: (
        Strides | None
    )  # None: nothing, since the bytes of a plane, and the planes, follow each other
    packs_channels: bool


def mask_of(bits: Tensor | None, rows: RowMap) -> Mask:
    """The mask of a tensor with these rows, where there is one."""
    packs, _, stride = bits_layout(rows)
    is_plane = not packs and stride[1] == 1
    return Mask(None if bits is None or is_plane else stride, packs)


def packs_channels(rows: RowMap) -> bool:
    """Where eight divides the channels (or nearly) no bit is wasted; otherwise the rows are packed."""
    # In this order: of symbolic sizes each question may be another graph.
    return rows.channels_fastest and (rows.columns >= 64 or rows.columns % 8 == 0)


@dataclass(frozen=True)
class GatherMap:
    """Rows that two tensors are walked by, with strides of their own: four dimensions, the outermost first."""

    sizes: tuple[int, int, int, int]
    strides: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
    needs_int64: bool

    @property
    def rows(self) -> int:
        return math.prod(self.sizes)


@functools.lru_cache(maxsize=4096)
def gather_map(
    sizes: tuple[int, ...],
    first: tuple[int, ...],
    second: tuple[int, ...],
    channels: tuple[int, int],
    channel_strides: tuple[int, int],
) -> GatherMap:
    """The map of rows [N, ...] of `sizes`, whose neighbours stand `first` and `second` apart in the two tensors."""
    merged: list[list[int]] = []
    for size, a, b in zip(sizes, first, second, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == a * size and merged[-1][2] == b * size:
            merged[-1] = [merged[-1][0] * size, a, b]
        else:
            merged.append([size, a, b])
    merged = [[1, 0, 0]] * (4 - len(merged)) + merged
    four = [tuple(column) for column in zip(*merged, strict=True)]
    last = [
        sum((size - 1) * step for size, step in zip(four[0], steps, strict=True)) + (c - 1) * stride
        for steps, c, stride in zip(four[1:], channels, channel_strides, strict=True)
    ]
    return GatherMap(four[0], (four[1], four[2]), max(*last, math.prod(sizes)) >= 2**31 - 2**20)

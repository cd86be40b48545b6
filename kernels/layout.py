"""Strides as an index map: any layout that the kernels can walk is [outer, inner] rows of [channels].

Row (o, i) and channel c of a tensor stand at o * stride_outer + i * stride_inner + c * stride_channel. channels_last
is one outer row; contiguous [N, C, H, W] is N outer and H * W inner rows. Several tensors share one map when the same
dimensions can be merged in each of them.
"""

import functools
import math
from dataclasses import dataclass

from torch import Tensor

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class RowMap:
    """rows = outer * inner of them, each with `channels` values; `strides[k]` = (outer, inner, channel) of tensor k;
    tensor 0 is the one that is written."""

    outer: int
    inner: int
    channels: int
    strides: tuple[Strides, ...]
    needs_int64: bool

    @property
    def rows(self) -> int:
        return self.outer * self.inner

    @property
    def channels_fastest(self) -> bool:
        """Whether neighbours in memory are channels of one row (channels_last) or rows of one channel."""
        _, inner, channel = self.strides[0]
        return channel == 1 and not (inner == 1 and self.inner >= self.channels)


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
    last = [
        sum((size - 1) * step[k] for size, step in zip(sizes, steps, strict=True))
        + (channels - 1) * strides[k][1]
        for k in range(len(strides))
    ]
    return RowMap(
        outer=sizes[0],
        inner=sizes[1],
        channels=channels,
        strides=tuple((steps[0][k], steps[1][k], strides[k][1]) for k in range(len(strides))),
        needs_int64=max(*last, sizes[0] * sizes[1] * channels) >= 2**31 - 2**20,
    )


def row_map_of(*tensors: Tensor) -> RowMap | None:
    """`row_map` of tensors that all have the first one's shape."""
    return row_map(tuple(tensors[0].shape), *(tensor.stride() for tensor in tensors))


def bits_layout(rows: RowMap) -> tuple[bool, int, Strides]:
    """(whether channels are packed, bytes in all, strides in bytes) of the mask of a tensor with these rows."""
    outer, inner, channels = rows.outer, rows.inner, rows.channels
    if packs_channels(rows):
        width = -(-channels // 8)
        return True, outer * inner * width, (inner * width, width, 1)
    width = -(-inner // 8)
    inner_stride, channel_stride = (channels, 1) if rows.channels_fastest else (1, width)
    return False, outer * width * channels, (width * channels, inner_stride, channel_stride)


def packs_channels(rows: RowMap) -> bool:
    """Where eight divides the channels (or nearly) no bit is wasted; otherwise the rows are packed."""
    return rows.channels_fastest and (rows.channels % 8 == 0 or rows.channels >= 64)


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

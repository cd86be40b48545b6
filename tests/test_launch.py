"""Launch arithmetic: no launch asks for more programs along an axis of the grid than CUDA has."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fusedres.kernels import launch
from fusedres.kernels.chip import Chip
from fusedres.kernels.layout import row_map

from .helpers import Case, run, without_plans

# CUDA C programming guide, technical specifications per compute capability: x, y and z of a grid.
AXES = (2**31 - 1, 65535, 65535)
# [2, 65536, 1024] float64 was a grid of (1, 65536); the channels of a transposed feature map are its pixels.
SHAPES = [
    (2, 65536, 1024), (2, 131072, 1024), (2, 1 << 20, 512), (4, 300000), (4, 5_000_000), (2, 2_000_003, 3),
    (1, 1 << 24, 2),
    (256, 64, 112, 112), (256, 2048, 7, 7), (1 << 20, 1, 64), (1 << 24, 3), (1 << 31, 1), (2, 1, 1, 1),
    (16, 4, 1001, 1001), (64, 6, 90, 91), (300_000, 3, 5, 7), (9, 70_000, 3, 3),
]  # fmt: skip


def dense(shape, channels_last=False):
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    strides = [0] * len(shape)
    for k, d in enumerate(order):
        strides[d] = math.prod(shape[e] for e in order[k + 1 :])
    return tuple(strides)


def chip(multiprocessors):
    return Chip(architecture=90, multiprocessors=multiprocessors, shared_memory=227 << 10)


def assert_fits(grid):
    assert all(1 <= size <= most for size, most in zip(grid, AXES, strict=False)), grid


@pytest.mark.once
@pytest.mark.parametrize("multiprocessors", [1, 132, 148, 100_000])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_passes_over_a_tensor(shape, channels_last, multiprocessors):
    rows = row_map(shape, dense(shape, channels_last))
    choose = launch.choose_tile.__wrapped__
    for size in (2, 4, 8):
        for share in (1, launch.DUAL_SHARE):
            for kind in (launch.STATISTICS, launch.REDUCING, launch.ALONE, launch.APPLYING):
                tile = choose(rows, size, kind, chip(multiprocessors), share)
                assert_fits(tile.grid)
                # All of it, by programs that all have something to do.
                assert tile.channel_blocks * tile.block_channels >= rows.columns
                assert tile.programs <= tile.tiles
                assert tile.grid == (tile.channel_blocks, tile.programs)
                if kind.stages > 1:  # what the finalising step holds at once
                    each = (
                        launch.partials_a_channel(rows.spread, tile.block_channels)
                        if tile.slots
                        else 1
                    )
                    assert tile.programs * each <= launch.MAX_PARTIALS


@pytest.mark.once
@pytest.mark.parametrize("images", [2, 3, 5, 8, 17])
@pytest.mark.parametrize("size", [2, 4])
def test_few_images_have_the_tiles_of_many(size, images):
    """Of planes, of planes that are walked flat, and of a pooled gradient: each tile is a kernel of its own."""
    pooled = (2048, 1, 0, 0)

    def tiles(n):
        maps = [row_map(shape, dense(shape)) for shape in ((n, 256, 56, 56), (n, 2048, 7, 7))]
        maps.append(row_map((n, 2048, 7, 7), dense((n, 2048, 7, 7), True), pooled))
        kinds = (launch.STATISTICS, launch.REDUCING, launch.APPLYING, launch.GRAD_APPLYING)
        chosen = [
            (rows, launch.choose_tile(rows, size, kind, chip(132)))
            for rows in maps[:1] + maps[2:]
            for kind in kinds
        ]
        return [(tile.block(rows), tile.options) for rows, tile in chosen], maps[1].spread

    assert tiles(images) == tiles(256)


@pytest.mark.once
def test_few_large_images_fill_tiles_of_their_own():
    rows = row_map((2, 64, 512, 512), dense((2, 64, 512, 512)))
    tile = launch.choose_tile(rows, 4, launch.STATISTICS, chip(132))
    assert (tile.block_outer, tile.block_inner) == (2, 512)


class Grids:
    """In the place of a planner: every grid that a launcher asks for; nothing is launched."""

    def __init__(self):
        self.chip, self.found = chip(132), []

    def empty(self, shape, dtype):
        return SimpleNamespace(shape=shape, dtype=dtype)

    def start(self, kernel, grid, *_):
        self.found.append(grid)


@pytest.mark.once
@pytest.mark.parametrize(
    ("channels_in", "channels_out"),
    [(1, 1), (64, 256), (2048, 2048), (1, 5_000_000), (16, 5_000_000), (5_000_000, 1), (5_000_000, 16), (7, 70_001)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 802_816, 1 << 30])
def test_products_and_final_steps(rows, channels_out, channels_in):
    from fusedres.kernels.finalize import (
        Partial,
        Running,
        launch_bn_finalize,
        launch_bn_grad_finalize,
    )
    from fusedres.kernels.grad import Operand
    from fusedres.kernels.projection import Side, launch_projection
    from fusedres.kernels.projection_grad_weight import launch_projection_grad_weight

    p = Grids()
    zeros = (0,) * 4
    gather = SimpleNamespace(
        sizes=(1, 1, 1, rows), strides=(zeros, zeros), rows=rows, needs_int64=True
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, y = (Side(SimpleNamespace(dtype=dtype), n, 1) for n in (channels_in, channels_out))
        launch_projection(p, x, y, None, (1, 1), None, gather, False, False, "ieee")
        launch_projection_grad_weight(p, y, x, gather, "ieee")
        tile = launch.choose_grad_weight(rows, channels_in, channels_out, dtype.itemsize, p.chip)
        assert math.prod(p.found[-1]) == tile.programs * tile.blocks_out * -(-channels_in // tile.block_in)  # fmt: skip
    shape = (rows, channels_out)
    walk, saved = row_map(shape, dense(shape, False)), SimpleNamespace(shape=(4, channels_out))
    tile = launch.choose_tile.__wrapped__(walk, 4, launch.REDUCING, chip(132))
    moments, sums = (SimpleNamespace(shape=(launch.MAX_PARTIALS, k, channels_out)) for k in (3, 2))
    launch_bn_finalize(p, Partial(moments), None, saved, Running(), 1e-5)
    of = Operand(SimpleNamespace(dtype=torch.float32), partial=sums)
    launch_bn_grad_finalize(p, of, None, None, None, walk, tile)
    assert len(p.found) == 8
    for grid in p.found:
        assert_fits(grid)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_small_second_axis_gives_the_same_bits(layout, device, monkeypatch):
    """Where the grid takes fewer programs, each has more tiles; no result depends on it."""
    case = Case(shape=(4, 6, 15, 15), layout=layout, device=device)
    from fusedres.kernels.apply import bn_apply_kernel
    from fusedres.kernels.plan import Planner

    narrow, found, start = 3, [], Planner.start

    def recorded(self, kernel, grid, *rest):
        if kernel is bn_apply_kernel:
            found.append(grid)
        start(self, kernel, grid, *rest)

    monkeypatch.setattr(Planner, "start", recorded)
    without_plans(monkeypatch)
    expected = run(case)
    without_plans(monkeypatch)
    launch.choose_tile.cache_clear()
    monkeypatch.setattr(launch, "MOST_PROGRAMS", narrow)
    try:
        actual = run(case)
    finally:
        launch.choose_tile.cache_clear()
    assert [grid[1] <= narrow for grid in found] == [False, True]
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

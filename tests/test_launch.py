"""Launch arithmetic: no launch asks for more programs along an axis of the grid than CUDA has."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fusedres.kernels import launch
from fusedres.kernels.layout import row_map

from .helpers import Case, run

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
    return SimpleNamespace(
        multiprocessors=multiprocessors, architecture=90, shared_memory=227 << 10
    )


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
            for kind in (launch.STATISTICS, launch.REDUCING, launch.APPLYING):
                tile = choose(rows, size, kind, chip(multiprocessors), share)
                assert_fits(tile.grid)
                # All of it, by programs that all have something to do.
                assert tile.channel_blocks * tile.block_channels >= rows.columns
                assert tile.programs <= tile.tiles
                assert tile.grid == (tile.channel_blocks, tile.programs)
                if kind is not launch.APPLYING:  # what the finalising step holds at once
                    each = (
                        launch.partials_a_channel(rows.spread, tile.block_channels)
                        if tile.slots
                        else 1
                    )
                    assert tile.programs * each <= launch.MAX_PARTIALS


@pytest.fixture
def grids(monkeypatch):
    """Every grid that a launcher asks for; nothing is launched."""
    from fusedres.kernels import finalize, projection, projection_grad_weight

    found = []
    for module in (finalize, projection, projection_grad_weight):
        monkeypatch.setattr(module, "start", lambda kernel, grid, *_: found.append(grid))
    return found


@pytest.mark.once
@pytest.mark.parametrize(
    ("channels_in", "channels_out"),
    [(1, 1), (64, 256), (2048, 2048), (1, 5_000_000), (16, 5_000_000), (5_000_000, 1), (5_000_000, 16), (7, 70_001)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 802_816, 1 << 30])
def test_products_and_final_steps(rows, channels_out, channels_in, grids):
    from fusedres.kernels.finalize import launch_bn_finalize, launch_bn_grad_finalize
    from fusedres.kernels.projection import launch_projection
    from fusedres.kernels.projection_grad_weight import launch_projection_grad_weight

    gather = SimpleNamespace(sizes=(1, 1, 1, rows), strides=((0,) * 4, (0,) * 4), rows=rows)
    for size in (2, 4, 8):
        arguments = (rows, channels_in, channels_out, size, chip(132))
        tile = launch.choose_product.__wrapped__(*arguments)
        launch_projection(
            None, None, None, None, None, gather, (1, 1), (1, 1), (channels_in, channels_out), tile,
            False, "ieee", None, None,
        )  # fmt: skip
        tile = launch.choose_grad_weight.__wrapped__(*arguments)
        partial = SimpleNamespace(shape=(tile.programs, channels_out, channels_in))
        launch_projection_grad_weight(None, None, partial, gather, (1, 1), tile, "ieee", None, None)
        assert math.prod(grids[-1]) == tile.programs * tile.blocks_out * -(-channels_in // tile.block_in)  # fmt: skip
    shape = (rows, channels_out)
    walk, saved = row_map(shape, dense(shape, False)), SimpleNamespace(shape=(4, channels_out))
    tile = launch.choose_tile.__wrapped__(walk, 4, launch.REDUCING, chip(132))
    moments, sums = (SimpleNamespace(shape=(launch.MAX_PARTIALS, k, channels_out)) for k in (3, 2))
    launch_bn_finalize(moments, *[None] * 2, saved, *[None] * 3, 0, None, 0.1, 1e-5)
    launch_bn_grad_finalize(sums, *[None] * 5, walk, tile, None)
    assert len(grids) == 8
    for grid in grids:
        assert_fits(grid)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_small_second_axis_gives_the_same_bits(layout, device, monkeypatch):
    """Where the grid takes fewer programs, each has more tiles; no result depends on it."""
    case = Case(shape=(4, 6, 15, 15), layout=layout, device=device)
    from fusedres.kernels import apply

    narrow, found, start = 3, [], apply.start

    def recorded(kernel, grid, *rest):
        found.append(grid)
        start(kernel, grid, *rest)

    monkeypatch.setattr(apply, "start", recorded)
    expected = run(case)
    launch.choose_tile.cache_clear()
    monkeypatch.setattr(launch, "MOST_PROGRAMS", narrow)
    try:
        actual = run(case)
    finally:
        launch.choose_tile.cache_clear()
    assert [grid[1] <= narrow for grid in found] == [False, True]
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

"""What the launcher chooses at a ResNet-50's shapes, batch 256, run as compiled code.

Images and channels are cut down, so that it is affordable; the tile, the warps and the stages stay those of batch 256
(which is asserted).
"""

from __future__ import annotations

import functools

import pytest
import torch

from fusedres.kernels.chip import Chip
from fusedres.kernels.launch import (
    ALONE,
    APPLYING,
    GRAD_APPLYING,
    REDUCING,
    STATISTICS,
    choose_tile,
)
from fusedres.kernels.layout import row_map

from .helpers import DTYPES, Case, over_budget, run

pytestmark = [pytest.mark.kernels, pytest.mark.machine]

# By the size of the image: images and channels that are enough for the tile. A walk over columns needs many rows, and a
# tile of planes has eight images of 16 channels, or 16 of four (float32).
ENOUGH = {
    "channels_last": {112: (1, 64), 56: (1, 128), 28: (1, 128), 14: (2, 256), 7: (4, 512)},
    "contiguous_format": {14: (128, 16), 7: (128, 16)},
}
PLANES = {"bfloat16": (8, 16), "float32": (16, 4)}
SHAPES = [
    pytest.param(64, 112, marks=pytest.mark.slow),  # half a minute each, in the interpreter
    (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7),
]  # fmt: skip
H200 = Chip(architecture=90, multiprocessors=132, shared_memory=227 << 10)


def dense(shape, layout):
    return torch.empty(shape, device="meta").contiguous(
        memory_format=getattr(torch, layout)
    ).stride()  # fmt: skip


@functools.cache
def choices(images, channels, size, layout, dtype):
    """The tile of each pass."""
    shape = (images, channels, size, size)
    rows = row_map(shape, dense(shape, layout))
    tiles = [
        choose_tile(rows, dtype.itemsize, kind, H200)
        for kind in (STATISTICS, REDUCING, ALONE, APPLYING, GRAD_APPLYING)
    ]
    return [
        (tile.block_outer, tile.block_inner, tile.block_channels, tile.warps, tile.stages, tile.group, tile.slots)
        for tile in tiles
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("channels", "size"), SHAPES, ids=lambda n: str(n))
def test_the_choices_of_batch_256(channels, size, dtype, layout, device):
    images, most = ENOUGH[layout].get(size, PLANES[dtype])
    shape = (images, min(channels, most), size, size)
    few = choices(*shape[:3], layout, DTYPES[dtype])
    assert few == choices(256, channels, size, layout, DTYPES[dtype])
    case = Case(
        shape=shape, dtype=DTYPES[dtype], device=device,
        layout="channels_last" if layout == "channels_last" else "contiguous",
    )  # fmt: skip
    assert over_budget(case, run(case)) == {}

"""A mask's bytes: what the plain path packs it unpacks, and the kernels read and write the same."""

from __future__ import annotations

import pytest
import torch

from fusedres.ops import masks

from .helpers import Case, lay_out, over_budget


@pytest.mark.once
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(3, 64, 7, 7), (1, 128, 5, 5), (3, 70, 7, 7), (7, 64, 3, 5)], ids=str
)
def test_of_an_odd_number_of_rows(shape, layout):
    """Its pieces stand a multiple of 16 bytes apart."""
    mask = lay_out(torch.rand(shape) > 0.5, layout)
    bits = masks.pack(mask)
    assert bits.numel() == masks.bytes_of(mask)
    assert torch.equal(masks.unpack(bits, torch.empty_like(mask)), mask)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 64, 7, 7), (1, 64, 7, 7), (3, 6, 16, 16)], ids=str)
def test_of_few_images(shape, layout, device):
    """Fewer than a tile has rows, or planes, and an odd number of them."""
    for dtype in (torch.bfloat16, torch.float32):
        assert over_budget(Case(shape=shape, dtype=dtype, layout=layout, device=device)) == {}

"""A mask of one bit an element in plain PyTorch: the bytes that `kernels.bits` writes, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import is_piecewise
from ..kernels.layout import MASK_PIECE, RowMap, bits_layout, row_map, row_map_of


def has_bits(activation: str | None, save: bool) -> bool:
    """Whether the backward is told act' by bits: its derivative takes two values."""
    return save and activation is not None and is_piecewise(activation)


def bytes_of(output: Tensor) -> Any:
    """How many bytes the mask of an output has, whose sizes may be symbols."""
    # Past the cache: while shapes are symbols they cannot be hashed.
    rows: Any = row_map.__wrapped__(tuple(output.shape), tuple(output.stride()))
    return bits_layout(rows)[1]


def empty_bits(output: Tensor, has_any: bool) -> Tensor:
    """Room for the mask of an output, or a tensor of nothing."""
    return output.new_empty((bytes_of(output) if has_any else 0,), dtype=torch.uint8)


def _rows_of(tensor: Tensor) -> RowMap:
    """The index map of a dense tensor, which always has one."""
    rows = row_map_of(tensor)
    if rows is None:
        raise RuntimeError(f"no index map for strides {tensor.stride()}; please report it")
    return rows


def _rows_view(tensor: Tensor, rows: RowMap) -> Tensor:
    """[outer, inner, columns] of a tensor that is laid out as the map's first."""
    return tensor.as_strided((rows.outer, rows.inner, rows.columns), rows.strides[0])


def pack(mask: Tensor) -> Tensor:
    """A boolean tensor, dense, into the bytes that `kernels.bits.pack` writes for that layout."""
    rows = _rows_of(mask)
    pack_channels, _, stride = bits_layout(rows)
    view = _rows_view(mask, rows).to(torch.uint8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    if pack_channels:
        view = torch.nn.functional.pad(view, (0, -rows.columns % 8))
        view = (view.unflatten(2, (-1, 8)) * weights).sum(3, dtype=torch.uint8)
        if len(stride) == 4:
            view = view.unflatten(2, (-1, MASK_PIECE)).permute(2, 0, 1, 3).flatten(1)
            view = torch.nn.functional.pad(view, (0, stride[2] - view.shape[1]))
        return view.flatten()
    view = torch.nn.functional.pad(view, (0, 0, 0, -rows.inner % 8))
    view = (view.unflatten(1, (-1, 8)) * weights[:, None]).sum(2, dtype=torch.uint8)
    return (view if stride[2] == 1 else view.transpose(1, 2)).flatten()


def unpack(bits: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `pack`: into a boolean tensor laid out as the output was."""
    rows = _rows_of(mask)
    pack_channels, _, stride = bits_layout(rows)
    positions = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if pack_channels:
        if len(stride) == 3:
            view = bits.view(rows.outer, rows.inner, -1)
        else:
            view = bits.view(-1, stride[2])[:, : rows.outer * rows.inner * MASK_PIECE]
            view = view.unflatten(1, (rows.outer, rows.inner, MASK_PIECE))
            view = view.permute(1, 2, 0, 3).flatten(2)
        view = view.unsqueeze(3) >> positions
        view = (view & 1).flatten(2)[:, :, : rows.columns]
    else:
        if stride[2] == 1:
            view = bits.view(rows.outer, -1, rows.columns)
        else:
            view = bits.view(rows.outer, rows.columns, -1).transpose(1, 2)
        view = ((view.unsqueeze(2) >> positions[:, None]) & 1).flatten(1, 2)[:, : rows.inner]
    _rows_view(mask, rows).copy_(view)
    return mask

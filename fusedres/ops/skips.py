"""A second gradient of an output, which came over a skip connection (module `fork`), on its way to the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.layout import RowMap, Strides, row_map_of
from .norm import Skip

if TYPE_CHECKING:
    from ..kernels.plan import Planner


def spread(skip: Skip, like: Tensor) -> Tensor:
    """The whole gradient, like `like` in shape, with zeros between the positions that it has."""
    gradient: Any = skip.gradient
    if skip.stride is None:
        return gradient
    return _spread_into(torch.zeros_like(like, dtype=gradient.dtype), gradient, skip.stride)


def _spread_into(full: Tensor, gradient: Tensor, stride: tuple[int, ...]) -> Tensor:
    full[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = gradient
    return full


def add(dy: Tensor, skip: Skip) -> Tensor:
    """dy and the other, in dy's dtype, as autograd adds two gradients of one tensor."""
    return dy if skip.gradient is None else dy + spread(skip, dy).to(dy.dtype)


def walked(p: Planner, skip: Skip, rows: RowMap, dx: Tensor, dz: Tensor | None) -> Any:
    """What the reducing pass needs of it; one that it cannot walk is copied into dx's layout first."""
    from ..kernels.grad_reduce import Skip as Walked

    if skip.gradient is None:
        return None
    if skip.stride is not None and (own := _walked_as(rows, dx, skip.gradient)) is not None:
        small = skip.gradient.shape
        return Walked(skip.gradient, own, (*dx.shape[2:], *skip.stride, *small[2:]), dz)
    full, stride = skip.gradient, skip.stride
    if stride is not None:
        visited, full = full, p.like(dx, full.dtype)
        p.do(lambda whole, part: _spread_into(whole.zero_(), part, stride), full, visited)
    mapped = row_map_of(dx, full)
    wanted = rows.outer, rows.inner, rows.spread, rows.needs_int64
    if mapped is None or wanted != (mapped.outer, mapped.inner, mapped.spread, mapped.needs_int64):
        return Walked(p.copy(full, dx), rows.strides[0], None, dz)
    return Walked(full, mapped.strides[1], None, dz)


def is_alike(skip: Any, rows: RowMap, again: bool) -> bool:
    """Whether one launch may have the second gradient (as `walked`), where there is one: it is walked as the others
    are, and what passes is told by a mask and not by z, computed `again`."""
    if skip is None:
        return True
    return skip.place is None and skip.stride == rows.strides[0] and not again


def _walked_as(rows: RowMap, dx: Tensor, small: Tensor) -> Strides | None:
    """The strides of a smaller image along the positions of a larger one, both dense in one layout; else None."""
    if dx.dim() != 4:
        return None
    images, channels, height, width = small.shape
    if rows.spread > 1:
        is_dense = dx.is_contiguous() and small.is_contiguous()
        # `visited` gives the position in the small image, and its channel with it.
        return (0, channels * height * width, 1) if is_dense else None
    formats = (
        (torch.channels_last, images * dx.shape[2] * dx.shape[3], (0, channels, 1)),
        (torch.contiguous_format, dx.shape[2] * dx.shape[3], (channels * height * width, 1, height * width)),
    )  # fmt: skip
    for layout, inner, strides in formats:
        is_dense = all(t.is_contiguous(memory_format=layout) for t in (dx, small))
        if is_dense and rows.inner == inner:
            return strides
    return None


def added(p: Planner, dy: Tensor, skip: Skip, layout: Tensor) -> Tensor:
    """In a plan: `add`, where no pass reads both."""
    gradient: Any = skip.gradient
    total, stride = p.like(layout, dy.dtype), skip.stride
    p.do(lambda out, a, b: out.copy_(add(a, Skip(b, stride))), total, dy, gradient)
    return total

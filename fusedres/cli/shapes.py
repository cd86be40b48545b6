"""A network's step in which nothing is computed: every operation answers with memory that nobody wrote.

Shapes, strides and dtypes are those of a real step (PyTorch's own meta kernels tell them), so the library's launchers
are called as they would be. Memory that is not written is not taken from the machine either: a ResNet-50's step at
batch 256 takes seconds, and the memory of its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

_CPU = DispatchKeySet(DispatchKey.CPU)
# They make tensors without a look at values.
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class ShapesOnly(TorchDispatchMode):
    """`with ShapesOnly():` operations on CPU tensors have results, but no values.

    Operators of fusedres run, and call their launchers: a driver has to be active that takes launches without doing
    them.
    """

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.namespace == "fusedres":
            with self:  # what it calls comes here too
                return function.redispatch(_CPU, *arguments, **keywords)
        name = function.overloadpacket.__name__
        if name in _EMPTY or function.is_view or torch.Tag.inplace_view in function.tags:
            return function(*arguments, **keywords)
        if name == "convolution":
            return _convolution(*arguments, **keywords)
        if name == "convolution_backward":
            return _convolution_backward(*arguments, **keywords)
        returned = _written(function, arguments, keywords)
        if all(value is not None for value in returned):
            return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)
        meta = [pytree.tree_map_only(Tensor, _on_meta, each) for each in (arguments, keywords)]
        if "device" in meta[1]:
            meta[1]["device"] = torch.device("meta")
        try:
            results = function(*meta[0], **meta[1])
        except NotImplementedError:  # no meta kernel: it is computed, of whatever is there
            return function(*arguments, **keywords)
        if isinstance(results, list | tuple) and len(returned) == len(results):
            return type(results)(
                _real(made) if old is None else old
                for made, old in zip(results, returned, strict=True)
            )
        return pytree.tree_map_only(Tensor, _real, results)


def _written(function: Any, arguments: tuple, keywords: dict) -> list[Tensor | None]:
    """For each result the argument that is returned (of an operation in place, or with `out`), or None."""
    schema = function._schema
    given = dict(zip((each.name for each in schema.arguments), arguments, strict=False)) | keywords
    places = {
        place: given.get(each.name)
        for each in schema.arguments
        if each.alias_info is not None and each.alias_info.is_write
        for place in each.alias_info.before_set
    }
    return [
        next((places[p] for p in each.alias_info.before_set if p in places), None)
        if each.alias_info is not None
        else None
        for each in schema.returns
    ]


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _real(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _layout(*tensors: Tensor) -> torch.memory_format:
    """What cuDNN writes: channels last where one of its operands is."""
    for layout in (torch.channels_last, torch.channels_last_3d):
        dim = 4 if layout is torch.channels_last else 5
        for tensor in tensors:
            if tensor.dim() != dim or tensor.is_contiguous():
                continue
            if tensor.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format


def _convolution(input, weight, bias, *rest) -> Tensor:
    result = torch.ops.aten.convolution.default(
        _on_meta(input), _on_meta(weight), None if bias is None else _on_meta(bias), *rest
    )
    return torch.empty(result.shape, dtype=result.dtype, memory_format=_layout(input, weight))


def _convolution_backward(dy, input, weight, bias_sizes, *rest) -> tuple[Tensor | None, ...]:
    needs = rest[-1]
    layout = _layout(dy, input, weight)
    dx, dweight = (
        torch.empty(like.shape, dtype=like.dtype, memory_format=layout) if need else None
        for like, need in zip((input, weight), needs, strict=False)
    )
    return dx, dweight, dy.new_empty(bias_sizes) if needs[2] else None

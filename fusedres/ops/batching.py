"""vmap rules of the operators: the mapped dimension joins the channels, since each channel is normalised by itself.

A mapped call is one call on [N, B * C, ...] with [B * C] vectors, so it costs what an ordinary call of that size costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .operator import written


def rule(
    op: Any, folds: Mapping[str, int], unfolds: Sequence[int | None]
) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of an operator; `folds`, `unfolds` as `operator.Operator` has them."""
    arguments = op._schema.arguments
    names = [a.name for a in arguments]
    defaults = tuple(a.default_value for a in arguments)
    writes = written(op)
    bits = names.index("bits") if "bits" in names else None

    def mapped(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        args = (*args, *defaults[len(args) :])
        dims = (*in_dims, *[None] * (len(args) - len(in_dims)))
        if bits is not None and dims[names.index("saved")] is None:
            # The forward was not mapped (only gradients are, as in a Jacobian), so the bits are not of a folded tensor.
            return _one_by_one(op, args, dims, size)
        folded = [
            fold(value, dim, size, folds[name]) if name in folds else value
            for name, value, dim in zip(names, args, dims, strict=True)
        ]
        buffers, moves = [args[k] for k in writes], bool(writes) and args[names.index("training")]
        copies = fold_buffers(op, buffers, [dims[k] for k in writes], size, moves)
        for k, copy in zip(writes, copies, strict=True):
            folded[k] = copy
        results = op(*folded)
        if moves:
            write_back(buffers, [dims[k] for k in writes], copies, size)
        if isinstance(results, Tensor):
            return unfold(results, size, unfolds[0])
        found = [unfold(t, size, p) for t, p in zip(results, unfolds, strict=True)]
        return tuple(t for t, _ in found), tuple(dim for _, dim in found)

    return mapped


def _one_by_one(op: Any, args: tuple, dims: tuple, size: int) -> tuple[Any, Any]:
    calls = [
        op(
            *(
                value.select(dim, k) if isinstance(dim, int) else value
                for value, dim in zip(args, dims, strict=True)
            )
        )
        for k in range(size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(each) for each in zip(*calls, strict=True)), (0,) * len(calls[0])


def fold(tensor: Tensor | None, dim: int | None, size: int, position: int) -> Tensor | None:
    """The mapped dimension, moved in front of the channels (at `position`) and merged with them."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(position)
        tensor = tensor.expand(*tensor.shape[:position], size, *tensor.shape[position + 1 :])
    else:
        tensor = tensor.movedim(dim, position)
    return tensor.flatten(position, position + 1)


def unfold(tensor: Tensor, size: int, position: int | None) -> tuple[Tensor, int | None]:
    """The inverse; None: a result that stays folded, as bits do, which the backward folds again."""
    # Or one that was not asked for.
    if position is None or (tensor.numel() == 0 and tensor.dim() == 1):
        return tensor, None
    return tensor.unflatten(position, (size, -1)), position


def fold_buffers(
    op: Any,
    buffers: Sequence[Tensor | None],
    dims: Sequence[int | None],
    size: int,
    training: bool,
) -> list[Tensor | None]:
    """Copies of the running statistics with the mapped dimension in them.

    Raises:
        RuntimeError: they would be updated and are not mapped.
    """
    if training and any(t is not None and d is None for t, d in zip(buffers, dims, strict=True)):
        name = op._schema.name.removeprefix("fusedres::")
        raise RuntimeError(
            f"{name}: under vmap the running statistics would be updated once for each mapped call; "
            "pass None for them, or map over them too"
        )
    folded = [fold(t, d, size, 0) for t, d in zip(buffers, dims, strict=True)]
    return [None if t is None else t.clone() for t in folded]


def write_back(
    buffers: Sequence[Tensor | None], dims: Sequence[int | None], folded: Sequence[Tensor | None], size: int
) -> None:  # fmt: skip
    """Put the updated copies where they came from."""
    for buffer, dim, updated in zip(buffers, dims, folded, strict=True):
        if buffer is not None and dim is not None and updated is not None:
            buffer.movedim(dim, 0).copy_(updated.unflatten(0, (size, -1)))

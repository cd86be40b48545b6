"""vmap rules of the operators: the mapped dimension joins the channels, since each channel is normalised by itself.

A mapped call is one call on [N, B * C, ...] with [B * C] vectors, so it costs what an ordinary call of that size costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import operators


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


def unfold(tensor: Tensor, size: int, position: int) -> tuple[Tensor, int | None]:
    if tensor.numel() == 0 and tensor.dim() == 1:  # an output that was not asked for
        return tensor, None
    return tensor.unflatten(position, (size, -1)), position


def fold_buffers(
    name: str,
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


def _batch_norm_act(info: Any, in_dims: tuple, *args: Any) -> tuple:
    input, residual, weight, bias, mean, var, training, momentum, eps, activation, save = args
    size = info.batch_size
    buffers = (mean, var)
    folded = fold_buffers("batch_norm_act", buffers, in_dims[4:6], size, training)
    output, saved, bits = operators.batch_norm_act(
        fold(input, in_dims[0], size, 1),
        fold(residual, in_dims[1], size, 1),
        fold(weight, in_dims[2], size, 0),
        fold(bias, in_dims[3], size, 0),
        *folded,
        training, momentum, eps, activation, save,
    )  # fmt: skip
    if training:
        write_back(buffers, in_dims[4:6], folded, size)
    output, output_dim = unfold(output, size, 1)
    saved, saved_dim = unfold(saved, size, 1)
    # The bits stay as they are: they belong to the folded tensor, which the backward folds again.
    return (output, saved, bits), (output_dim, saved_dim, None)


def _batch_norm_act_backward(info: Any, in_dims: tuple, *args: Any) -> tuple:
    dy, input, weight, saved, bits, *rest, residual = args
    size = info.batch_size
    if in_dims[3] is None:
        # The forward was not mapped (only gradients are, as in a Jacobian), so the bits are not of a folded tensor.
        calls = [
            operators.batch_norm_act_backward(
                *(
                    t if dim is None else t.select(dim, k)
                    for t, dim in zip(args, in_dims, strict=True)
                )
            )
            for k in range(size)
        ]
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0, 0, 0, 0)
    outputs = operators.batch_norm_act_backward(
        fold(dy, in_dims[0], size, 1),
        fold(input, in_dims[1], size, 1),
        fold(weight, in_dims[2], size, 0),
        fold(saved, in_dims[3], size, 1),
        bits,
        *rest,
        fold(residual, in_dims[-1], size, 1),
    )
    found = [unfold(t, size, p) for t, p in zip(outputs, (1, 1, 0, 0), strict=True)]
    return tuple(t for t, _ in found), tuple(dim for _, dim in found)


def _gradient_mask(info: Any, in_dims: tuple, *args: Any) -> tuple:
    input, weight, saved, bits, activation = args
    size = info.batch_size
    mask = operators.gradient_mask(
        fold(input, in_dims[0], size, 1),
        fold(weight, in_dims[1], size, 0),
        fold(saved, in_dims[2], size, 1),
        bits,
        activation,
    )
    return mask.unflatten(1, (size, -1)), 1


torch.library.register_vmap("fusedres::gradient_mask", _gradient_mask, lib=operators.LIBRARY)
torch.library.register_vmap("fusedres::batch_norm_act", _batch_norm_act, lib=operators.LIBRARY)
torch.library.register_vmap(
    "fusedres::batch_norm_act_backward", _batch_norm_act_backward, lib=operators.LIBRARY
)

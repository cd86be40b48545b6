"""What belongs together on its way from a module to a launch, as one value."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.dtypes import accumulate_dtype


def names(kind: Any, *fields: str | bool | None) -> Any:
    """A group with names of the schema in the place of values (`operator.Operator`)."""
    return kind(*fields)


class BatchNorm(NamedTuple):
    """One BatchNorm. The vectors are [C] or None; batches: its counter, where the finalising kernel is to count.

    keep: whether running statistics stay where they would not be finite (module `statistics`)."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float = 0.1
    eps: float = 1e-5
    batches: Tensor | None = None
    keep: bool = False


class Kept(NamedTuple):
    """What the backward of a BatchNorm reads: its input, the weight, saved [4, C] = (mean, mean_low, invstd, bias)."""

    input: Tensor
    weight: Tensor | None
    saved: Tensor


class Skip(NamedTuple):
    """A second gradient of an output, which came over a skip connection (module `fork`); stride: it holds every
    stride-th position only."""

    gradient: Tensor | None = None
    stride: tuple[int, ...] | None = None


class Needs(NamedTuple):
    """Which gradients a backward is asked for; that of the bias, and of the residual, in a dtype."""

    input: bool
    residual: bool
    weight: bool
    bias_dtype: torch.dtype | None
    residual_dtype: torch.dtype | None = None


def empty_saved(input: Tensor, is_kept: bool) -> Tensor:
    """Room for `saved`, or a tensor of nothing."""
    shape = (4, input.shape[1]) if is_kept else (0,)
    return input.new_empty(shape, dtype=accumulate_dtype(input.dtype))


class How(NamedTuple):
    """training: with the statistics of the batch; activation: a name, or None."""

    training: bool
    activation: str | None


def blend(running: Any, batch: Any, momentum: Tensor) -> None:
    """Move a running statistic towards the batch's by a momentum that stays on the device; `batch` in the dtype of the
    arithmetic."""
    with torch.no_grad():
        factor = (momentum.real if momentum.is_complex() else momentum).to(batch)
        # Not seen by autograd, as BatchNorm's own update is not: another call may have saved it.
        running.data.copy_(running.to(batch.dtype).lerp(batch, factor))

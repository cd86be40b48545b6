"""Running statistics that stay finite, around whatever moves them: what the finalising kernels do if they are told.

A batch with an infinite value, or a NaN, in a channel has no statistics there. With mixed precision such a batch is
part of training (`GradScaler` skips its step, and leaves the weights alone), but the running statistics have taken it
in by then, and a NaN never leaves them. Kept finite, a channel's mean and variance stay what they were wherever either
would not be finite, and `num_batches_tracked` goes with the first channel.

By channel, not by layer: a channel is normalised by itself, what is finite is the true statistic of a true batch, and
behind the layer where the overflow is, all channels are NaN. To ask all channels first takes one more launch and one
more wait in every layer of every step. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .norm import BatchNorm

T = TypeVar("T")


class Statistics(NamedTuple):
    """Of one BatchNorm: running mean and variance [C], and the counter [], or None."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None = None


def tracked(*norms: BatchNorm) -> list[Statistics]:
    """The running statistics of those BatchNorms that have some."""
    return [
        Statistics(n.running_mean, n.running_var)
        for n in norms
        if isinstance(n.running_mean, Tensor) and isinstance(n.running_var, Tensor)
    ]


def keep_finite(moved: Sequence[Statistics], run: Callable[[], T]) -> T:
    """`run()`, which moves these; a channel that would not be finite stays where it was."""
    before = [
        (m.mean.clone(), m.var.clone(), None if m.batches is None else m.batches.clone())
        for m in moved
    ]
    result = run()
    with torch.no_grad():
        for (mean, var, batches), (old_mean, old_var, old_batches) in zip(
            moved, before, strict=True
        ):
            moves = mean.isfinite() & var.isfinite()
            # As BatchNorm writes them: past the version counter, since its own backward has saved them.
            mean.data.copy_(torch.where(moves, mean, old_mean))
            var.data.copy_(torch.where(moves, var, old_var))
            if batches is not None and old_batches is not None:
                batches.data.copy_(torch.where(moves[0], batches, old_batches))
    return result

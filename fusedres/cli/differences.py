"""How far two models are apart: loss, gradients, running statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from .training import Trainee

NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class Difference:
    """Relative differences, |a - b| / |a| with the 2-norm; of gradients and statistics the largest over tensors."""

    loss: float
    gradients: float
    running_statistics: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def difference(original: Trainee, other: Trainee) -> Difference:
    """How far `other` is from `original` after the step that both have just made."""
    loss = original.losses[-1]
    return Difference(
        loss=abs(other.losses[-1] - loss) / abs(loss) if loss != other.losses[-1] else 0.0,
        gradients=_largest(original.gradients(), other.gradients()),
        running_statistics=_largest(original.running_statistics(), other.running_statistics()),
    )


def largest(differences: list[Difference]) -> Difference:
    """The largest of each kind; a NaN counts as the largest of all."""

    def top(values: list[float]) -> float:
        return math.nan if any(map(math.isnan, values)) else max(values)

    return Difference(*(top([getattr(d, f.name) for d in differences]) for f in fields(Difference)))


def _largest(originals: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """The largest relative difference over tensors of the same name.

    A tensor that is next to nothing beside the others (a convolution's bias before BatchNorm: its gradient is zero up
    to rounding) is held against NEGLIGIBLE of all of them together, not against its own rounding.
    """
    if originals.keys() != others.keys():
        odd = sorted(originals.keys() ^ others.keys())
        raise RuntimeError(f"only one of the two models has {', '.join(odd)}")
    if not originals:
        return 0.0
    norms = torch.stack([_norm(tensor) for tensor in originals.values()])
    apart = torch.stack([_norm(others[name] - tensor) for name, tensor in originals.items()])
    floor = NEGLIGIBLE * norms.norm() + torch.finfo(norms.dtype).tiny
    return (apart / norms.clamp_min(floor)).max().item()


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)

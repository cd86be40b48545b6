"""Whether two models train alike: the same steps with both, and how far they come apart.

One ulp in the input, given to the original, is the unit: what rounding makes of a network depends on the network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Two summations in float64 that differ in order; the original against itself one ulp away is the unit.
ALLOWED = 32.0
# A gradient that is nothing but rounding (of a bias in front of a BatchNorm) is not measured by itself, but by this
# share of the largest gradient: it would be the unit otherwise, and nothing would be seen.
_LEAST = 2.0**-10


def run(model: nn.Module, x: Tensor, steps: int = 1) -> dict[str, Tensor]:
    """Everything that training leaves behind: outputs, the input's gradient, gradients, parameters and buffers.

    Draws of a random generator (dropout) are the same at each call. The model itself is left as it is.
    """
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(steps):
            optimizer.zero_grad()
            # A product keeps the block's input from being a leaf that an in-place ReLU may not touch.
            outputs = [t for t in tree_leaves(model(x * 1)) if isinstance(t, Tensor)]
            torch.stack([_weighed(output) for output in outputs]).sum().backward()
            found |= {f"output {step} {k}": output.detach() for k, output in enumerate(outputs)}
            found |= {
                f"grad {n} {step}": p.grad
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            optimizer.step()
    if x.grad is not None:
        found["grad of the input"] = x.grad
    return {**found, **model.state_dict()}


def _weighed(output: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return (output * weight.view_as(output)).sum()


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference between two runs, each tensor relative to its largest value (a gradient's being at least a
    thousandth of the largest gradient's).

    Raises:
        ValueError: they are not runs of the same model.
    """
    if a.keys() != b.keys():
        raise ValueError(f"not the same tensors: {sorted(a.keys() ^ b.keys())}")
    largest = 0.0
    gradients = [_size(value) for name, value in a.items() if name.startswith("grad ")]
    least = _LEAST * max(gradients, default=0.0)
    for name, value in a.items():
        value, other = value.detach().double(), b[name].detach().double()
        if value.numel() == 0 or torch.equal(value, other):
            continue
        apart = torch.where(value.isnan() & other.isnan(), 0.0, (value - other).abs())
        size = _size(value)
        if name.startswith("grad "):
            size = max(size, least)
        found = float(apart.max()) / (size or 1.0)
        largest = max(largest, found) if found == found else float("inf")
    return largest


def _size(value: Tensor) -> float:
    finite = torch.where(value.isfinite(), value.detach(), 0.0)
    return float(finite.abs().max()) if value.numel() else 0.0


def excess(original: nn.Module, fused: nn.Module, x: Tensor, steps: int = 1) -> float:
    """How many times the fused model's difference is what one ulp in the input makes of the original; 0 when equal."""
    exact = run(original, x, steps)
    found = difference(exact, run(fused, x, steps))
    if found == 0:
        return 0.0
    noise = difference(exact, run(original, x * (1 + torch.finfo(x.dtype).eps), steps))
    return found / (noise + torch.finfo(x.dtype).eps)

"""The passes over memory of DESIGN's table, measured: a pass is one read or write of a tensor of the input's size."""

from __future__ import annotations

import pytest
import torch

from fusedres.benchmarks.floors import OPERATORS
from fusedres.functional import batch_norm_act

from .helpers import DTYPES, lay_out

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("row", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("bfloat16", (8, 16, 48, 48)), ("float32", (4, 16, 48, 48)), ("bfloat16", (32, 128, 14, 14))],
    ids=["bf16-C16", "fp32-C16", "bf16-C128"],
)
def test_passes(row, layout, dtype, shape):
    """Within 3 percent of the table, per-channel vectors and partial sums included."""
    from fusedres.benchmarks.meter import meter

    operator = OPERATORS[row]
    dtype = DTYPES[dtype]

    def draw():
        return lay_out(torch.randn(shape).to(dtype), layout).requires_grad_()

    x, r = draw(), draw() if operator.residual else None
    weight, bias = (torch.rand(shape[1]).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    leaves = [t for t in (x, r, weight, bias) if t is not None]
    with meter() as measured:
        y = batch_norm_act(
            x,
            mean,
            var,
            weight,
            bias,
            operator.training,
            residual=r,
            activation=operator.activation,
        )
    with meter() as measured_backward:
        torch.autograd.grad(y, leaves, lay_out(torch.randn(shape).to(dtype), layout))
    size = x.numel() * dtype.itemsize
    for mode, moved in (("forward", measured), ("backward", measured_backward)):
        passes = operator.passes(mode, dtype.itemsize)
        assert moved.bytes / size == pytest.approx(passes, rel=0.03), mode

"""The passes over memory of DESIGN's table, measured: a pass is one read or write of a tensor of the input's size."""

from __future__ import annotations

import pytest
import torch

from fusedres.functional import batch_norm_act

from .helpers import DTYPES, lay_out

pytestmark = pytest.mark.interpreter

# (residual, activation, training) -> passes forward, backward; a sixteenth of a pass is one bit an element of 16.
TABLE = {
    "BN+ReLU": ((False, "relu", True), 3, 5),
    "BN+add+ReLU": ((True, "relu", True), 4 + 1 / 16, 6 + 2 / 16),
    "BN": ((False, None, True), 3, 5),
    "BN+add": (
        (True, None, True),
        4,
        5,
    ),  # the residual's gradient is the output's: nothing to write
    "BN+ReLU, eval": ((False, "relu", False), 2, 5),
    "BN+add+ReLU, eval": ((True, "relu", False), 3 + 1 / 16, 5 + 2 / 16),
}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("bfloat16", (8, 16, 48, 48)), ("float32", (4, 16, 48, 48)), ("bfloat16", (32, 128, 14, 14))],
    ids=["bf16-C16", "fp32-C16", "bf16-C128"],
)
def test_passes(row, layout, dtype, shape):
    """Within 3 percent of the table, per-channel vectors and partial sums included."""
    from fusedres.benchmarks.meter import meter

    (residual, activation, training), forward, backward = TABLE[row]
    dtype = DTYPES[dtype]

    def draw():
        return lay_out(torch.randn(shape).to(dtype), layout).requires_grad_()

    x, r = draw(), draw() if residual else None
    weight, bias = (torch.rand(shape[1]).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    leaves = [t for t in (x, r, weight, bias) if t is not None]
    with meter() as measured:
        y = batch_norm_act(x, mean, var, weight, bias, training, residual=r, activation=activation)
    with meter() as measured_backward:
        torch.autograd.grad(y, leaves, lay_out(torch.randn(shape).to(dtype), layout))
    bit = 16 / (8 * dtype.itemsize)  # of a pass: half as much for a tensor twice as wide
    size = x.numel() * dtype.itemsize

    def scaled(passes):
        return int(passes) + (passes - int(passes)) * bit

    assert measured.bytes / size == pytest.approx(scaled(forward), rel=0.03)
    assert measured_backward.bytes / size == pytest.approx(scaled(backward), rel=0.03)

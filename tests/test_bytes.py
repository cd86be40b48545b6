"""The passes over memory of the table, measured: a pass is one read or write of a tensor of the input's size."""

from __future__ import annotations

import math

import pytest

from fusedres.benchmarks.floors import OPERATORS
from fusedres.benchmarks.traffic import Site, count

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("row", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("bfloat16", (8, 16, 48, 48)), ("float32", (4, 16, 48, 48)), ("bfloat16", (32, 128, 14, 14))],
    ids=["bf16-C16", "fp32-C16", "bf16-C128"],
)
def test_passes(row, layout, dtype, shape):
    """Within 3 percent of the table, per-channel vectors and partial sums included."""
    found = count(Site(row, shape, dtype, layout))
    element_size = 4 if dtype == "float32" else 2
    size = math.prod(shape) * element_size
    for mode in ("forward", "backward"):
        passes = OPERATORS[row].passes(mode, element_size)
        assert getattr(found, mode) / size == pytest.approx(passes, rel=0.03), mode

"""Numbers to words: medians with their spread, and whether two of them differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some measurements and the quartiles around it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; a single one is its own quartiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @property
    def width(self) -> float:
        return self.high - self.low

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def compare_seconds(original: Spread, fused: Spread) -> str:
    """Which is faster, if either is: a difference within the wider of the two spreads is none."""
    if min(original.count, fused.count) < 2:
        return "one timed step: no spread, no verdict"
    if abs(original.median - fused.median) <= max(original.width, fused.width):
        return "no difference (within the spread)"
    if fused.median < original.median:
        return f"fused is {original.median / fused.median:.2f}x as fast"
    return f"fused takes {fused.median / original.median:.2f}x as long"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"

"""Numbers to words: medians with their spread, whether two of them differ, and the table."""

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


def milliseconds(spread: Spread) -> str:
    low, middle, high = (f"{1e3 * t:.4g}" for t in (spread.low, spread.median, spread.high))
    return f"{middle} ms ({low} to {high})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)

"""What got slower (or larger) since an older file of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .record import Row, latest

TIME = "time_us"
# Exact figures, where a larger one is worse.
COUNTED = ("bytes", "kernels", "registers", "spills", "shared_bytes", "instructions", "barriers")
ROUNDING = 1e-6


@dataclass(frozen=True)
class Change:
    """One figure, then and now."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        before, after = self.old.median or 0.0, self.new.median or 0.0
        return after / before if before else float("inf")

    def __str__(self) -> str:
        row = self.new
        words = [
            row.level,
            row.kernel,
            row.who,
            row.mode,
            row.shape,
            row.dtype,
            row.layout,
            row.cache,
        ]
        named = ", ".join(word for word in words if word)
        return (
            f"{named}: {row.metric} {self.old.median:.6g} -> {row.median:.6g} ({self.ratio:.2f}x)"
        )


@dataclass(frozen=True)
class Comparison:
    """Of the figures that both files have: which got worse, which better, and how many are the same."""

    worse: list[Change]
    better: list[Change]
    same: int
    other_device: int
    lost: list[Row]

    def __str__(self) -> str:
        worse, better = len(self.worse), len(self.better)
        lines = [f"slower or larger: {worse}, better: {better}, no difference: {self.same}"]
        lines += [f"  {change}" for change in sorted(self.worse, key=lambda c: -c.ratio)]
        lines += [
            f"  {row.level}, {row.kernel}, {row.who}: had a number, now {row.note}"
            for row in self.lost
        ]
        if self.other_device:
            lines.append(f"not compared: {self.other_device} times from another device")
        if not self.worse and not self.better and not self.same:
            lines.append("the two have no figure in common")
        return "\n".join(lines)


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Figures with the same key; times only where the device is the same, and only beyond their spread."""
    before = {row.key: row for row in latest(old)}
    worse, better, lost = [], [], []
    same = other_device = 0
    for row in latest(new):
        then = before.get(row.key)
        if then is None or then.median is None or row.metric not in (TIME, *COUNTED):
            continue
        if row.median is None:
            if row.note:
                lost.append(row)
            continue
        if row.metric == TIME and then.device != row.device:
            other_device += 1
            continue
        noise = max(then.spread or 0.0, row.spread or 0.0) + ROUNDING * abs(then.median)
        change = Change(then, row)
        if row.median > then.median + noise:
            worse.append(change)
        elif row.median < then.median - noise:
            better.append(change)
        else:
            same += 1
    return Comparison(worse, better, same, other_device, lost)

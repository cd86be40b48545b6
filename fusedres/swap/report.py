"""What was fused, what was not, and why: rows of data, and the table a person reads."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

FUSED, FUSABLE, ALONE = "fused", "fusable", "left alone"
EXCLUDED, FALLBACK = "excluded", "own forward"
_COLUMNS = ("where", "n", "block", "pattern", "status", "reason")


@dataclass(frozen=True)
class Row:
    """One BatchNorm of the model.

    Args:
        where: the BatchNorm's name in the model, for example "layer1.0.bn3".
        block: the class of the module that owns it.
        pattern: "BN+ReLU", "BN+add", "BN+add+ReLU"; "BN" where nothing to fuse follows; "unknown" where the
            owner's forward cannot be traced.
        status: "fused"; "fusable" (in a dry run); "left alone"; "excluded" by filter_fn or config; "own forward"
            (fused, but something changed since, so that the block falls back).
        reason: why it is not fused; empty where it is.
    """

    where: str
    block: str
    pattern: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class FuseReport:
    """What `fuse_` did, or would do: `str()` is a table, grouped by like blocks.

    Args:
        rows: one for each BatchNorm, in the model's order.
        note: a line about the whole, for example that the backend is off.
    """

    rows: tuple[Row, ...]
    note: str = ""

    @property
    def n_fused(self) -> int:
        """The number of sites that run fused."""
        return self._count(FUSED)

    @property
    def n_fusable(self) -> int:
        """The number of sites that are fused or would be."""
        return self._count(FUSED) + self._count(FUSABLE)

    def _count(self, status: str) -> int:
        return sum(row.status == status for row in self.rows)

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.rows:
            table = self._grouped()
            widths = [max(map(len, column)) for column in zip(_COLUMNS, *table, strict=True)]
            for line in (_COLUMNS, tuple("-" * width for width in widths), *table):
                cells = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)]
                lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, one object a BatchNorm; also written to `path` when one is given."""
        text = json.dumps(
            {
                "n_fused": self.n_fused,
                "note": self.note,
                "rows": [asdict(row) for row in self.rows],
            },
            indent=2,
        )
        return _written(text, path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown; also written to `path` when one is given."""
        lines = [self._headline(), ""]
        if self.rows:
            for line in (_COLUMNS, ("---",) * len(_COLUMNS), *self._grouped()):
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |")
        return _written("\n".join(lines) + "\n", path)

    def _headline(self) -> str:
        if not self.rows:
            text = "fusedres: there is no BatchNorm in this model"
        else:
            counts = {
                status: self._count(status)
                for status in (FUSED, FUSABLE, FALLBACK, ALONE, EXCLUDED)
            }
            told = [f"{n} {status}" for status, n in counts.items() if n]
            text = f"fusedres: {len(self.rows)} BatchNorm: {', '.join(told)}"
        return f"{text} ({self.note})" if self.note else text

    def _grouped(self) -> list[tuple[str, ...]]:
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            local = row.where.rpartition(".")[2]
            # Numbered children (layers.0, layers.1) are alike; bn1 and bn2 are told apart.
            local = "" if local.isdigit() else local
            key = (local, _skeleton(row.where), row.block, row.pattern, row.status, row.reason)
            groups.setdefault(key, []).append(row.where)
        return [
            (_span(where), str(len(where)), block, pattern, status, reason)
            for (_, _, block, pattern, status, reason), where in groups.items()
        ]


def fallback_note(backend: str) -> str:
    """The note of a report made while the backend is off."""
    return "the backend is 'off': every module runs its own forward" if backend == "off" else ""


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _skeleton(where: str) -> str:
    owner, _, local = where.rpartition(".")
    return re.sub(r"\d+", "#", owner) + "." + re.sub(r"^\d+$", "#", local)


def _span(where: list[str]) -> str:
    """`layer1.0.bn1, layer2.1.bn1` -> `layer1-2.0-1.bn1`: from the least to the greatest of each number."""
    if len(where) == 1:
        return where[0]
    pieces = [re.split(r"(\d+)", name) for name in where]
    return "".join(map(_merge, zip(*pieces, strict=True)))


def _merge(values: tuple[str, ...]) -> str:
    if len(set(values)) == 1:
        return values[0]
    numbers = sorted({int(value) for value in values})
    return f"{numbers[0]}-{numbers[-1]}"

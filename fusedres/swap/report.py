"""What was fused, what was not, and why: rows of data, and the table a person reads."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

FUSED, FUSABLE, ALONE = "fused", "fusable", "left alone"
EXCLUDED, FALLBACK = "excluded", "own forward"
# The last one holds the reason against, or the note on what was done.
_COLUMNS = ("where", "n", "block", "pattern", "status", "reason")


@dataclass(frozen=True)
class Row:
    """One BatchNorm of the model.

    Args:
        where: the BatchNorm's name in the model, for example "layer1.0.bn3".
        block: the class of the module in whose forward it is fused; of its owner where it is not.
        pattern: "BN+ReLU", "BN+add", "BN+add+ReLU"; "BN+BN+add" and "BN+BN+add+ReLU" of the two BatchNorms of a block
            whose shortcut is projected; "BN" where nothing to fuse follows; "unknown" where the
            owner's forward cannot be traced.
        status: "fused"; "fusable" (in a dry run); "left alone"; "excluded" by filter_fn or config; "own forward"
            (fused, but something changed since, so that the block falls back).
        reason: why it is not fused; empty where it is.
        note: of a fused one, what else runs with it: how the 1x1 convolution of a shortcut is computed.
    """

    where: str
    block: str
    pattern: str
    status: str
    reason: str = ""
    note: str = ""


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
            key = (
                local,
                _skeleton(row.where),
                row.block,
                row.pattern,
                row.status,
                row.reason or row.note,
            )
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


def _span(names: list[str]) -> str:
    """Names that differ in their numbers, as one: `layer{1.0-2,2.0-3}.bn1`."""
    local = names[0].rpartition(".")[2]
    tail = f".{local}" if all(name.endswith(f".{local}") for name in names) else ""
    pieces = [re.split(r"(\d+)", name.removesuffix(tail)) for name in names]
    *texts, last = pieces[0][::2]
    return _tree(texts, [tuple(map(int, piece[1::2])) for piece in pieces]) + last + tail


def _tree(texts: list[str], numbers: list[tuple[int, ...]]) -> str:
    """The numbers with the texts between them, in braces where they are not one range at each place."""
    if not texts:
        return ""
    below: dict[int, list[tuple[int, ...]]] = {}
    for number, *rest in numbers:
        below.setdefault(number, []).append(tuple(rest))
    alike: dict[str, list[int]] = {}
    for number, found in below.items():
        alike.setdefault(_tree(texts[1:], found), []).append(number)
    options = [run + tail for tail, found in alike.items() for run in _runs(found)]
    options.sort(key=lambda option: int(option.partition("-")[0].partition(".")[0]))
    return texts[0] + (options[0] if len(options) == 1 else "{" + ",".join(options) + "}")


def _runs(numbers: list[int]) -> list[str]:
    """[0, 1, 2, 5] -> ["0-2", "5"]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]

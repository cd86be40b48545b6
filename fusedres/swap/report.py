"""What was fused, what was not, and why: rows of data, and the table a person reads."""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

FUSED, FUSABLE, ALONE = "fused", "fusable", "left alone"
EXCLUDED, FALLBACK = "excluded", "own forward"
# The last one holds the reason against, or the note on what was done.
_COLUMNS = ("where", "n", "block", "pattern", "status", "reason")
_ESTIMATE = "saves"


@dataclass(frozen=True)
class Row:
    """One BatchNorm of the model.

    Args:
        where: the BatchNorm's name in the model, for example "layer1.0.bn3".
        block: the class of the module in whose forward it is fused; of its owner where it is not.
        pattern: "BN+ReLU", "BN+add", "BN+add+ReLU", with the activation that it is; "BN+BN+add" and "BN+BN+add+ReLU" of
            the two BatchNorms of a block whose shortcut is projected; "BN" of one that runs by itself; "unknown" where
            the owner's forward cannot be traced.
        status: "fused"; "fusable" (in a dry run); "left alone"; "excluded" by filter_fn or config; "own forward"
            (fused, but something changed since, so that the block falls back).
        reason: why it is not fused; empty where it is.
        note: of a fused one, what else runs with it (how the 1x1 convolution of a shortcut is computed), or why nothing
            does.
        moves: bytes that the site moves unfused in a training step, where an input shape was given. Of a site with two
            BatchNorms each has a half.
        saves: bytes of these that the fused site does not move.
    """

    where: str
    block: str
    pattern: str
    status: str
    reason: str = ""
    note: str = ""
    moves: int | None = None
    saves: int | None = None


@dataclass(frozen=True)
class FuseReport:
    """What `fuse_` did, or would do: `str()` is a table, grouped by like blocks.

    Args:
        rows: one for each BatchNorm, in the model's order.
        note: a line about the whole, for example that the backend is off.
        input_shape: the input that the bytes are estimated for; None where none was given.
    """

    rows: tuple[Row, ...]
    note: str = ""
    input_shape: tuple[int, ...] | None = None

    @property
    def n_fused(self) -> int:
        """The number of sites that run fused."""
        return self._count(FUSED)

    @property
    def n_fusable(self) -> int:
        """The number of sites that are fused or would be."""
        return self._count(FUSED) + self._count(FUSABLE)

    @property
    def bytes_saved(self) -> int | None:
        """Bytes that the fused sites do not move in a training step; None where no input shape was given."""
        return self._sum("saves")

    @property
    def bytes_moved(self) -> int | None:
        """Bytes that all BatchNorms, with what follows them, move unfused; None where no input shape was given."""
        return self._sum("moves")

    def _sum(self, field: str) -> int | None:
        if self.input_shape is None:
            return None
        return sum(getattr(row, field) or 0 for row in self.rows)

    def _count(self, status: str) -> int:
        return sum(row.status == status for row in self.rows)

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.rows:
            table = self._grouped()
            columns = self._columns()
            widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
            for line in (columns, tuple("-" * width for width in widths), *table):
                cells = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)]
                lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, one object a BatchNorm; also written to `path` when one is given."""
        text = json.dumps(
            {
                "n_fused": self.n_fused,
                "note": self.note,
                "input_shape": self.input_shape,
                "bytes_moved": self.bytes_moved,
                "bytes_saved": self.bytes_saved,
                "rows": [asdict(row) for row in self.rows],
            },
            indent=2,
        )
        return _written(text, path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown; also written to `path` when one is given."""
        lines = [self._headline(), ""]
        if self.rows:
            columns = self._columns()
            for line in (columns, ("---",) * len(columns), *self._grouped()):
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |")
        return _written("\n".join(lines) + "\n", path)

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        lines = [f"<p>{html.escape(self._headline())}</p>"]
        if self.rows:
            for tag, table in (("th", [self._columns()]), ("td", self._grouped())):
                for line in table:
                    cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
                    lines.append(f"<tr>{cells}</tr>")
            lines[1:] = ["<table>", *lines[1:], "</table>"]
        return "\n".join(lines)

    def _columns(self) -> tuple[str, ...]:
        if self.input_shape is None:
            return _COLUMNS
        return (*_COLUMNS[:-1], _ESTIMATE, _COLUMNS[-1])

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
            if self.input_shape is not None:
                saved, moved = _size(self.bytes_saved or 0), _size(self.bytes_moved or 0)
                text += f"; with an input of {list(self.input_shape)} a training step moves {saved} less of {moved}"
        return f"{text} ({self.note})" if self.note else text

    def _grouped(self) -> list[tuple[str, ...]]:
        groups: dict[tuple[str, ...], list[Row]] = {}
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
            groups.setdefault(key, []).append(row)
        table = []
        for (_, _, block, pattern, status, reason), rows in groups.items():
            saves = [_size(sum(row.saves or 0 for row in rows))] if self.input_shape else []
            where = _span([row.where for row in rows])
            table.append((where, str(len(rows)), block, pattern, status, *saves, reason))
        return table


def fallback_note(backend: str) -> str:
    """The note of a report made while the backend is off."""
    return "the backend is 'off': every module runs its own forward" if backend == "off" else ""


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _size(count: float) -> str:
    """Bytes as a person reads them: 26.9 GB, 310 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


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

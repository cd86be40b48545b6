"""What was fused, what was not, and why: rows of data, and the table a person reads."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from ..tables import paragraph, table

FUSED, FUSABLE, ALONE = "fused", "fusable", "left alone"
EXCLUDED, FALLBACK = "excluded", "own forward"
# The last one holds the reason against, or the note on what was done.
_COLUMNS = ("where", "n", "block", "pattern", "status", "reason")
_ESTIMATE = "saves"
# Names of a group that are told; of more, only the first and the last.
_MOST_NAMED = 6


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
        note: what else runs with it (how the 1x1 convolution of a shortcut is computed), or why nothing does; of one
            that is left alone, what runs fused in its block all the same.
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
    """What `fuse_` did, or would do: `str()` is a table, with one line for all BatchNorms that are alike.

    Where they are many, it names the first and the last of them; all names are in `rows`.

    Args:
        rows: one for each BatchNorm, in the model's order.
        note: a line about the whole, for example that the backend is off.
        input_shape: the input that the bytes are estimated for; None where none was given.
        n_sums: the number of additions that run as one with their activation beside the BatchNorms, or would: where
            something stands between them (squeeze-and-excitation), or the BatchNorm is left alone.
    """

    rows: tuple[Row, ...]
    note: str = ""
    input_shape: tuple[int, ...] | None = None
    n_sums: int = 0

    @property
    def n_fused(self) -> int:
        """The number of BatchNorms that run fused."""
        return self._count(FUSED)

    @property
    def n_fusable(self) -> int:
        """The number of BatchNorms that are fused or would be."""
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
        """As wide as the terminal at most; reasons have numbers, and stand below the table."""
        lines = [paragraph(self._headline())]
        if self.rows:
            columns = self._columns()
            reasons: dict[str, int] = {}
            rows = [_in_text((*columns[:-1], "why"))]
            for *cells, reason in self._grouped():
                number = str(reasons.setdefault(reason, len(reasons) + 1)) if reason else ""
                rows.append(_in_text((*cells, number)))
            if not reasons:
                rows = [(*row[:-2], row[-1]) for row in rows]
            lines.append(table(rows))
            lines += [paragraph(reason, f"{number}: ") for reason, number in reasons.items()]
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, one object a BatchNorm; also written to `path` when one is given."""
        text = json.dumps(
            {
                "n_fused": self.n_fused,
                "n_sums": self.n_sums,
                "note": self.note,
                "input_shape": self.input_shape,
                "bytes_moved": self.bytes_moved,
                "bytes_saved": self.bytes_saved,
                "rows": [asdict(row) for row in self.rows],
            },
            indent=2,
        )
        return written(text, path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown; also written to `path` when one is given."""
        lines = [self._headline(), ""]
        if self.rows:
            columns = self._columns()
            for line in (columns, ("---",) * len(columns), *self._grouped()):
                lines.append(f"| {' | '.join(map(_escaped, line))} |")
        return written("\n".join(lines) + "\n", path)

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        lines = [f"<p>{html.escape(self._headline())}</p>"]
        if self.rows:
            for tag, group in (("th", [self._columns()]), ("td", self._grouped())):
                for line in group:
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
            if self.n_sums:
                text += f"; and {self.n_sums} add with its activation"
            if self.input_shape is not None:
                saved, moved = _size(self.bytes_saved or 0), _size(self.bytes_moved or 0)
                text += f"; with an input of {list(self.input_shape)} a training step moves {saved} less of {moved}"
        return f"{text} ({_one_line(self.note)})" if self.note else text

    def _grouped(self) -> list[tuple[str, ...]]:
        """One line for the BatchNorms that differ in nothing but their place, where the first of them stands."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            local = row.where.rpartition(".")[2]
            # Numbered children (layers.0, layers.1) are alike; bn1 and bn2 are told apart.
            local = "" if local.isdigit() else local
            reason = "; ".join(filter(None, (row.reason, row.note)))
            key = (local, row.block, row.pattern, row.status, reason)
            groups.setdefault(key, []).append(row)
        lines = []
        for (_, block, pattern, status, reason), rows in groups.items():
            where = _told(dict.fromkeys(row.where for row in rows))
            size = _size(sum(row.saves or 0 for row in rows))
            saves = [] if self.input_shape is None else [size]
            line = (where, str(len(rows)), block, pattern, status, *saves, reason)
            lines.append(tuple(map(_one_line, line)))
        return lines


def fallback_note(backend: str) -> str:
    """The note of a report made while the backend is off."""
    return "the backend is 'off': every module runs its own forward" if backend == "off" else ""


def written(text: str, path: str | Path | None) -> str:
    """The text, which is also in a file where there is a path."""
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


def _told(names: Collection[str]) -> str:
    """All of a few names; of many the first and the last. In quotes where a name holds signs of the list's own."""
    shown = [name if re.fullmatch(r"[\w.-]+", name) else repr(name) for name in names]
    return ", ".join(shown) if len(shown) <= _MOST_NAMED else f"{shown[0]} ... {shown[-1]}"


def _one_line(text: str) -> str:
    """What does not print is written as in a string of Python's."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _in_text(line: tuple[str, ...]) -> tuple[str, ...]:
    """The names last: they are the longest."""
    where, *others = line
    return (*others, where)


def _escaped(cell: str) -> str:
    """What Markdown would read as the end of a cell, an escape or a tag."""
    return re.sub(r"[\\|<]", r"\\\g<0>", cell)

"""One row a number, and the files that rows are kept in: a CSV and a JSON of the same rows, which are appended to."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from .timing import Timing

JSON_FILE, CSV_FILE = "results.json", "results.csv"


class RecordError(Exception):
    """A file of results that cannot be read or written; the message names it."""


@dataclass(frozen=True)
class Row:
    """What was measured, of what, where and when.

    Attributes:
        level: operator, block, model, bytes, network, code, executed or host.
        kernel: the operator, block, model or Triton kernel.
        provider: who ran it (eager, compile, fusedres ...).
        metric: what the number is, unit included (`time_us`, `bytes`, `registers`).
        mode: forward, backward, step (forward, backward, optimizer), call; or "".
        shape: readable and exact, as in N256-C64-H56-W56.
        dtype, layout: of the activations.
        cache: cold or hot; "" where it does not apply.
        graph: whether a CUDA graph was replayed.
        median, p20, p80: of the metric; None where there is no number, and then `note` says why.
        minimum, p10: likewise, of times.
        spread: the run-to-run spread, in the unit of the metric: a smaller difference is none.
        bytes: what a fused implementation must read and write for it; None where it is not defined.
        note: why there is no number, or what is to be known about it.
        device, versions, date: where, with what and when (ISO 8601, UTC).
    """

    level: str
    kernel: str
    provider: str
    metric: str
    mode: str = ""
    shape: str = ""
    dtype: str = ""
    layout: str = ""
    cache: str = ""
    graph: bool = False
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    minimum: float | None = None
    p10: float | None = None
    spread: float | None = None
    bytes: int | None = None
    note: str = ""
    device: str = ""
    versions: str = ""
    date: str = ""

    @property
    def subject(self) -> tuple:
        """What the number is of, whoever made it: rows of one subject are compared side by side."""
        names = ("level", "kernel", "metric", "mode", "shape", "dtype", "layout", "cache")
        return tuple(getattr(self, name) for name in names)

    @property
    def key(self) -> tuple:
        """What has to be the same for two rows to be an old and a new measurement of one thing."""
        return (*self.subject, self.provider, self.graph)

    def timed(self, timing: Timing | Exception) -> Row:
        """This row with a timing in it, in microseconds, or with the reason why there is none."""
        if isinstance(timing, Exception):
            return replace(self, note=f"failed: {first_line(timing)}")
        microseconds = {name: 1e6 * getattr(timing, name) for name in _NUMBERS}
        return replace(self, **microseconds)

    @property
    def who(self) -> str:
        return f"{self.provider} + CUDA graph" if self.graph else self.provider


_FIELDS = [f.name for f in fields(Row)]
_NUMBERS = ("median", "p20", "p80", "minimum", "p10", "spread")


def first_line(error: Exception) -> str:
    """The error in a line: its type, and what it says first."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text.strip()[:200]}" if text else type(error).__name__


def read(path: Path) -> list[Row]:
    """The rows of a results.json.

    Raises:
        RecordError: no such file, or not a file of results.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"there is no {path}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, list):
        raise RecordError(f"{path} is not a list of rows, as `bench` writes it")
    rows = []
    for number, entry in enumerate(document):
        try:
            row = Row(**entry)
        except TypeError as error:
            raise RecordError(f"{path}, row {number}: {error}") from error
        for name in _NUMBERS:
            value = getattr(row, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise RecordError(f"{path}, row {number}: {name} is {value!r}, not a number")
        rows.append(row)
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each key the row that was appended last, in the order in which the keys first came."""
    return list({row.key: row for row in rows}.values())


@dataclass
class Book:
    """The files of one folder; each list of rows that is added is on disk before the next is measured."""

    folder: Path
    stamp: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, stamp: dict[str, str]) -> Book:
        """Go on with the files that the folder has, or start them; `stamp` is device, versions and date.

        Raises:
            RecordError: the folder cannot be made, or what it holds is not a file of results.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"{str(folder)!r} cannot be a folder: {error.strerror}") from error
        path = folder / JSON_FILE
        return cls(folder, stamp, read(path) if path.exists() else [])

    def add(self, rows: Iterable[Row]) -> None:
        """Stamp the rows and write them."""
        new = [Row(**(asdict(row) | self.stamp)) for row in rows]
        self.rows += new
        _write_json(self.folder / JSON_FILE, self.rows)
        _append_csv(self.folder / CSV_FILE, new, self.rows)

    @property
    def latest(self) -> list[Row]:
        return latest(self.rows)


def _write_json(path: Path, rows: Sequence[Row]) -> None:
    """A line a row; replaced whole, so that a reader never sees half of it."""
    lines = ",\n".join(json.dumps(_finite(asdict(row))) for row in rows)
    partial = path.with_suffix(".json.partial")
    partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(partial, path)


def _finite(entry: dict) -> dict:
    """JSON has no NaN and no infinity."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()
    }


def _append_csv(path: Path, new: Sequence[Row], rows: Sequence[Row]) -> None:
    """Append the new rows; write all of them where there is no file, or one with the columns of another version."""
    head = path.read_text(encoding="utf-8").partition("\n")[0] if path.exists() else ""
    fresh = head.strip().split(",") != _FIELDS
    with path.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerows(asdict(row) for row in (rows if fresh else new))

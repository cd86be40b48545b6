"""Tables as text, as wide as the terminal at most: laid out by rich where it is installed.

Without it the last column, which should be the one with the long cells, is wrapped beside the others. Where the words
of a table do not fit beside each other, each row becomes lines of its own, a cell in each. There is no colour and no
mark of a terminal in any of them, so a pipe and a file get what a person sees.
"""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

NARROWEST = 40
# What a last column, of names, must have at least; longer ones are broken.
_COLUMN = 24
_GAP = 2
# What rich draws a table with: nothing but the line of dashes below the head.
_RULE = "    \n    \n -  \n    \n    \n    \n    \n    \n"


def terminal_width() -> int:
    """Columns of the terminal, or what COLUMNS says; 80 where there is none."""
    return max(shutil.get_terminal_size((80, 24)).columns, NARROWEST)


def table(rows: Sequence[Sequence[str]], head: bool = True, width: int | None = None) -> str:
    """Rows of cells under each other; the first of them is the head, where there is one.

    Args:
        width: of the widest line; the terminal's by default.
    """
    width = terminal_width() if width is None else width
    try:
        import rich.table
    except ModuleNotFoundError:
        if _needed(rows, len) > width:
            return _records(rows, head, width)
        return _plain(rows, head, width)
    if _needed(rows, _longest_word) > width:
        return _records(rows, head, width)
    return _rich(rich, rows, head, width)


def _needed(rows: Sequence[Sequence[str]], least: Callable[[str], int]) -> int:
    """The narrowest that a table may be: `least` says how narrow a cell, but for the last column, which wraps."""
    *columns, last = zip(*rows, strict=True)
    return sum(max(map(least, column)) + _GAP for column in columns) + min(
        max(map(_longest_word, last)), _COLUMN
    )


def _longest_word(cell: str) -> int:
    return max(map(len, cell.split()), default=0)


def _records(rows: Sequence[Sequence[str]], head: bool, width: int) -> str:
    """A row under the other, each cell in a line that begins with its column's head."""
    heads = [f"{name}{' ' * _GAP}" for name in rows[0]] if head else [""] * len(rows[0])
    margin = max(map(len, heads))
    return "\n\n".join(
        "\n".join(
            paragraph(cell, name.ljust(margin), width)
            for name, cell in zip(heads, row, strict=True)
            if cell
        )
        for row in rows[head:]
    )


def _rich(rich: Any, rows: Sequence[Sequence[str]], head: bool, width: int) -> str:
    import rich.box
    import rich.console
    import rich.text

    # As text: rich would read "[...]" in a plain string as markup.
    cells = [[rich.text.Text(cell, overflow="fold") for cell in row] for row in rows]
    rule = rich.box.Box(_RULE, ascii=True)
    made = rich.table.Table(box=rule, show_header=head, show_edge=False, padding=(0, 1, 0, 0))
    for number, first in enumerate(cells[0]):
        made.add_column(first if head else f"{number}", overflow="fold")
    for row in cells[head:]:
        made.add_row(*row)
    page = io.StringIO()
    rich.console.Console(
        file=page, width=width, color_system=None, legacy_windows=False, force_jupyter=False
    ).print(made)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip("\n").split("\n"))


def _plain(rows: Sequence[Sequence[str]], head: bool, width: int) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    before = sum(each + _GAP for each in widths[:-1])
    lines = [(" " * _GAP).join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if head:
        last = max(1, min(widths[-1], width - before))
        lines.insert(1, (" " * _GAP).join("-" * each for each in (*widths[:-1], last)))
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=" " * before, break_on_hyphens=False)
        for line in lines
    )


def paragraph(text: str, first: str = "", width: int | None = None) -> str:
    """A text in lines no wider than the terminal; `first` stands before it, and the other lines under the text."""
    width = terminal_width() if width is None else width
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
    )

"""Tables of text that is not ours: shown as it is, and whole.

Invariant: no cell is read as markup, no control character reaches the terminal, nothing is cut.
"""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_WIDE = 4096
_LEAST_PROSE = 30
"""Columns that prose needs beside others; on narrower terminals it stands below them."""


class PlainTable:
    """A table whose cells are plain text."""

    def __init__(self, *headers: str, has_box: bool = True) -> None:
        self._table = Table() if has_box else Table(box=None)
        for header in headers:
            self._table.add_column(Text(header), overflow="fold")

    def add_row(self, *cells: str) -> None:
        """One cell for each header."""
        self._table.add_row(*(Text(visible(cell)) for cell in cells))

    def show(self) -> None:
        """Print it: folded to the width of a terminal, a row a line elsewhere."""
        console = Console()
        (console if console.is_terminal else Console(width=_WIDE)).print(self._table)


class ProseTable:
    """Rows of short words that end in prose: only the prose is folded, and elsewhere than on a terminal nothing is."""

    def __init__(self, *headers: str) -> None:
        self._rows: list[tuple[str, ...]] = [headers]

    def add_row(self, *cells: str) -> None:
        """One cell for each header; the last is the prose."""
        self._rows.append(tuple(map(visible, cells)))

    def show(self) -> None:
        """Print it: folded to the width of a terminal, a row a line elsewhere."""
        console = Console()
        widths = [max(map(cell_len, column)) for column in list(zip(*self._rows, strict=True))[:-1]]
        if not console.is_terminal:
            for row in self._rows:
                print("  ".join([*map(_padded, row[:-1], widths), row[-1]]).rstrip())
        elif console.width < sum(widths) + 3 * len(widths) + 4 + _LEAST_PROSE:
            for row in self._rows[1:]:
                console.print(Text("  ".join(row[:-1])))
                console.print(Padding(Text(row[-1]), (0, 0, 0, 2)))
        else:
            table = Table()
            for header in self._rows[0][:-1]:
                table.add_column(Text(header), no_wrap=True)
            table.add_column(Text(self._rows[0][-1]), overflow="fold")
            for row in self._rows[1:]:
                table.add_row(*map(Text, row))
            console.print(table)


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - cell_len(cell))


def visible(text: str) -> str:
    """Text with what is not printable, such as terminal escapes and lone surrogates, written out."""
    return re.sub(r".", lambda found: _written(found[0]), text, flags=re.DOTALL)


def _written(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()

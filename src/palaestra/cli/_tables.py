"""Tables of text that is not ours: shown as it is, and whole.

Invariant: no cell is read as markup, no control character reaches the terminal, nothing is cut.
"""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 4096


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


def visible(text: str) -> str:
    """Text with what is not printable, such as terminal escapes and lone surrogates, written out."""
    return re.sub(r".", lambda found: _written(found[0]), text, flags=re.DOTALL)


def _written(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()

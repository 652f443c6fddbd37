"""What a person sees while something runs: bars with rates on a terminal, plain lines elsewhere.

Invariant: progress never changes what is computed; a task that is left, even by an exception, takes its bar away.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_PLAIN_INTERVAL_S = 15.0


class Bar(Protocol):
    """Progress of one task."""

    def advance(self, count: int = 1) -> None:
        """Say that `count` more units are done."""

    def move_to(self, count: float, note: str = "") -> None:
        """Say that `count` units are done in all, with a word about how it goes."""


class Display(Protocol):
    """Where progress and results are shown."""

    def say(self, line: str) -> None:
        """Show a line that stays."""

    def bar(self, name: str, total: float | None) -> AbstractContextManager[Bar]:
        """A bar for as long as the context is entered; `total` None where the end is unknown."""


class TerminalDisplay:
    """Bars at the bottom of a terminal; where the output is no terminal, a plain line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._num_bars = 0

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False)

    @contextmanager
    def bar(self, name: str, total: float | None) -> Iterator[Bar]:
        """A live bar on a terminal, else lines at most every fifteen seconds."""
        if not self.console.is_terminal:
            bar = _PlainBar(self, name, total)
            yield bar
            bar.close()
            return
        if self._num_bars == 0:
            self._progress.start()
        self._num_bars += 1
        task = self._progress.add_task(name, total=total, rate="", note="")
        try:
            yield _LiveBar(self._progress, task)
        finally:
            self._progress.remove_task(task)
            self._num_bars -= 1
            if self._num_bars == 0:
                self._progress.stop()


class SilentDisplay:
    """Shows nothing."""

    def say(self, line: str) -> None:
        """Drop the line."""

    @contextmanager
    def bar(self, name: str, total: float | None) -> Iterator[Bar]:
        """A bar that nobody sees."""
        yield _SilentBar()


class _SilentBar:
    def advance(self, count: int = 1) -> None:
        pass

    def move_to(self, count: float, note: str = "") -> None:
        pass


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._started_s = time.monotonic()
        self._done = 0.0
        self._note = ""

    def advance(self, count: int = 1) -> None:
        self.move_to(self._done + count)

    def move_to(self, count: float, note: str = "") -> None:
        self._done = count
        rate = count / max(time.monotonic() - self._started_s, 1e-3)
        self._note = note or self._note
        self._progress.update(self._task, completed=count, rate=f"{rate:.1f}/s", note=self._note)


class _PlainBar:
    def __init__(self, display: TerminalDisplay, name: str, total: float | None) -> None:
        self._display = display
        self._name = name
        self._total = total
        self._started_s = self._said_s = time.monotonic()
        self._done = 0.0
        self._note = ""

    def advance(self, count: int = 1) -> None:
        self.move_to(self._done + count)

    def move_to(self, count: float, note: str = "") -> None:
        self._done = count
        self._note = note or self._note
        now_s = time.monotonic()
        if now_s - self._said_s >= _PLAIN_INTERVAL_S:
            self._said_s = now_s
            self._line(now_s)

    def close(self) -> None:
        self._line(time.monotonic())

    def _line(self, now_s: float) -> None:
        elapsed_s = now_s - self._started_s
        total = f"/{self._total:g}" if self._total is not None else ""
        rate = self._done / max(elapsed_s, 1e-3)
        self._display.say(
            f"{self._name}: {self._done:g}{total} in {elapsed_s:.0f} s ({rate:.1f}/s) {self._note}".rstrip()
        )

"""The rows of an examination as they come in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from palaestra.trainer.doctor._check import Check, Finding
from palaestra.trainer.doctor._guard import guarded
from palaestra.trainer.progress import Bar


class Sheet:
    """Runs checks, keeps their rows, moves the bar."""

    def __init__(self, bar: Bar) -> None:
        self.rows: dict[str, Check] = {}
        self._bar = bar

    async def row(self, name: str, deadline_s: float, measure: Callable[[], Awaitable[Finding]]) -> bool:
        """Run one check by its deadline; whether it found something, however bad, instead of breaking."""
        check, is_measured = await guarded(name, deadline_s, measure)
        self.rows[name] = check
        self._bar.move_to(len(self.rows), f"{name}: {check.verdict}")
        return is_measured

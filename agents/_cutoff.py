"""A cutoff: calls several episodes off at once, at a deadline or because enough of them ended, and says why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Cutoff:
    """Shared by the episodes of a group. Belongs to one event loop; `close` it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why it was cut; None while it is not."""
        self._calls: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def start(self, timeout_s: float, reason: str) -> None:
        """Cut after `timeout_s`, counted from the first call."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self.cut, reason)

    def cut(self, reason: str) -> None:
        """Call everything off; only the first reason counts."""
        if self.reason is None:
            self.reason = reason
            for call_off in tuple(self._calls):
                call_off()

    @contextmanager
    def calling(self, call_off: Callable[[], None]) -> Iterator[None]:
        """Inside, `call_off` is called once it is cut; at once where it was before."""
        self._calls.append(call_off)
        try:
            if self.reason is not None:
                call_off()
            yield
        finally:
            self._calls.remove(call_off)

    def close(self) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()

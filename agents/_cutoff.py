"""A cutoff: ends several episodes at once, by a deadline or because enough of them ended, and says why.

Invariant: an episode that is cut keeps the turns it had and gets the outcome `cancelled`; a task that is cancelled from
outside stays cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Cutoff:
    """Shared by the episodes of a group. Belongs to one event loop; `close` it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why it was cut; None while it is not."""
        self._scopes: set[asyncio.Timeout] = set()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, timeout_s: float, reason: str) -> None:
        """Cut after `timeout_s`, counted from the first call."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self.cut, reason)

    def cut(self, reason: str) -> None:
        """End whatever runs in `scope`; only the first reason counts."""
        if self.reason is not None:
            return
        self.reason = reason
        now_s = asyncio.get_running_loop().time()
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(now_s)

    @asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        """What is cut raises `CutError` out of this, at its next wait."""
        when_s = asyncio.get_running_loop().time() if self.reason is not None else None
        try:
            async with asyncio.timeout_at(when_s) as scope:
                self._scopes.add(scope)
                try:
                    yield
                finally:
                    self._scopes.discard(scope)
        except TimeoutError:
            if self.reason is None or not scope.expired():
                raise
            raise CutError(self.reason) from None

    def close(self) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()


class CutError(Exception):
    """An episode was cut; the text says why."""

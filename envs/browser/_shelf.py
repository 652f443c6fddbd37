"""Leased tabs that one episode after the other uses: MiniWoB's stage is set up anew for each, in milliseconds.

Allowed because the stage is the package's own text and agents only click, type and select in it; the tests prove
that nothing of an episode is left in the next. Invariants: a tab is used by one episode at a time; one that
broke or is worn out ends with its lease and is replaced; at most `max_tabs` are leased; a lease's lifetime is
that of one episode.
"""

from __future__ import annotations

import asyncio

from palaestra.errors import SandboxError
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Tab


class TabShelf:
    """The tabs of all environments that share resources; owns the pool."""

    def __init__(self, pool: BrowserPool, config: BrowserConfig) -> None:
        self.pool = pool
        self._config = config
        self._free = asyncio.Semaphore(config.max_tabs)
        self._idle: list[Tab] = []
        self._num_episodes: dict[Tab, int] = {}
        self._is_closed = False

    @property
    def num_used(self) -> int:
        """Tabs that an episode has now."""
        return len(self._num_episodes) - len(self._idle)

    async def take(self) -> Tab:
        """A tab whose stage must be set up; raises `SandboxError` when none comes free in time."""
        limit_s = self._config.lease_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._free.acquire()
        except TimeoutError as error:
            raise SandboxError(f"no browser tab came free within {limit_s:g} s") from error
        try:
            return await self._choose()
        except BaseException:
            self._free.release()
            raise

    async def give_back(self, tab: Tab) -> None:
        """Take the tab of an ended episode back."""
        try:
            if self._is_closed or tab.is_broken or self._num_episodes.get(tab, 0) >= self._config.episodes_per_lease:
                await self._end(tab)
            else:
                self._idle.append(tab)
        finally:
            self._free.release()

    async def aclose(self) -> None:
        """Close the pool with all its tabs; idempotent. A tab given back later only ends its lease."""
        self._is_closed = True
        self._idle.clear()
        self._num_episodes.clear()
        await self.pool.aclose()

    async def _choose(self) -> Tab:
        while self._idle:
            tab = self._idle.pop()
            if not tab.is_broken:
                self.pool.renew(tab)
                self._num_episodes[tab] += 1
                return tab
            await self._end(tab)
        tab = await self.pool.acquire()
        self._num_episodes[tab] = 1
        return tab

    async def _end(self, tab: Tab) -> None:
        self._num_episodes.pop(tab, None)
        await self.pool.release(tab)

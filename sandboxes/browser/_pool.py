"""Fresh tabs of one site, one lease each, behind one Chromium that is replaced when it dies or is worn.

Invariants: a lease gets a browser context that nobody used before, and it is closed with the lease; a lease is on
the host's list, and ends when its lifetime is over whether or not its owner ends it; when the browser dies its
leases fail with `TabError` by `browser`, and the next lease starts another browser, a bounded number of times;
after `aclose`, and after the death of this process, no browser process is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from palaestra.errors import PalaestraError, SandboxError
from palaestra.sandboxes._cgroups import MemoryCgroups
from palaestra.sandboxes.browser._chores import Chores
from palaestra.sandboxes.browser._chromium import Chromium
from palaestra.sandboxes.browser._config import SHARE_OF_ALL, BrowserConfig
from palaestra.sandboxes.browser._errors import TabError
from palaestra.sandboxes.browser._lease import TabLease
from palaestra.sandboxes.browser._processes import memory_mb
from palaestra.sandboxes.browser._site import Site
from palaestra.sandboxes.browser._tab import Tab
from palaestra.sandboxes.browser._watch import MemoryWatch

_log = logging.getLogger(__name__)

_MAX_OPENING = 4
_LOOK_S = 0.25
_LEASES_PER_LOOK = 10


class BrowserPool:
    """Tabs of one site. Belongs to the event loop it was started on."""

    def __init__(self, site: Site, config: BrowserConfig, cgroups: MemoryCgroups | None, label: str) -> None:
        self._site = site
        self._config = config
        self._cgroups = cgroups
        self._label = label
        self._free = asyncio.Semaphore(config.max_tabs)
        self._ready: deque[Tab] = deque()
        self._waiters: deque[asyncio.Future[Tab]] = deque()
        self._leased: dict[Tab, TabLease] = {}
        self._num_opening = 0
        self._num_ended = 0
        self._refills = True
        self._openers, self._enders, self._watchers = Chores(), Chores(), Chores()
        self._browsers: set[Chromium] = set()
        self._current: Chromium | None = None
        self._is_bloated = False
        self._starting = asyncio.Lock()
        self._deaths: deque[tuple[float, str]] = deque()
        self._is_closed = False

    @classmethod
    async def start(cls, site: Site, config: BrowserConfig | None = None, *, label: str = "") -> BrowserPool:
        """Start the browser; `label` names it on the host's list.

        Raises `ConfigError` when there is none or it cannot be isolated as configured, `SandboxError` when it does
        not start.
        """
        label = label or Path(sys.argv[0]).name
        pool = cls(site, config or BrowserConfig(), await MemoryCgroups.open(), label)
        try:
            await pool._browser()
        except BaseException:
            await pool.aclose()
            raise
        pool._fill()
        return pool

    @property
    def limits_memory(self) -> bool:
        """Whether the kernel holds the browser to `memory_mb`."""
        return self._current is not None and self._current.limits_memory

    @property
    def pid(self) -> int:
        """The outermost process of the browser that serves new leases, or of the last one that did."""
        assert self._current is not None, "one was there since the start"
        return self._current.pid

    @property
    def pids(self) -> list[int]:
        """The same for every browser that still runs."""
        return sorted(browser.pid for browser in self._browsers if browser.is_alive)

    @property
    def num_leased(self) -> int:
        """Leases that have not ended."""
        return len(self._leased)

    async def num_contexts(self) -> int:
        """Open contexts by the browsers' own count: leased tabs and those kept ready."""
        return sum([await browser.num_contexts() for browser in list(self._browsers) if browser.is_alive])

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Tab]:
        """A fresh tab that shows the site's start document, closed at the end of the block.

        Raises `SandboxError` when no tab comes free in time or no browser can be had.
        """
        tab = await self.acquire()
        try:
            yield tab
        finally:
            await self.release(tab)

    async def acquire(self) -> Tab:
        """As `lease`, for those who cannot use a block; give it back with `release`."""
        try:
            async with asyncio.timeout(self._config.lease_timeout_s):
                await self._free.acquire()
        except TimeoutError as error:
            raise SandboxError(f"no browser tab came free within {self._config.lease_timeout_s:g} s") from error
        try:
            tab = await self._take()
        except BaseException:
            self._free.release()
            raise
        try:
            self._leased[tab] = TabLease(tab, self._label, self._config.lifetime_s, self._expire)
        except BaseException:
            self._enders.spawn(self._close(tab))
            self._free.release()
            raise
        self._fill()
        return tab

    async def release(self, tab: Tab) -> None:
        """End a lease: its tab is closed, also when the caller is cancelled. A second time does nothing."""
        if tab in self._leased:
            await asyncio.shield(self._enders.spawn(self._end(tab, self._leased.pop(tab))))

    def renew(self, tab: Tab) -> None:
        """Begin the lease's lifetime anew; a lease that has ended stays ended."""
        if tab in self._leased:
            self._leased[tab].renew()

    async def aclose(self) -> None:
        """Close the browser and all its processes; idempotent."""
        self._is_closed = True
        self._openers.cancel()
        self._watchers.cancel()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(SandboxError("the browser pool was closed"))
        await self._openers.join()
        await self._watchers.join()
        self._ready.clear()
        for browser in list(self._browsers):
            self._enders.spawn(self._bury(browser))
        await self._enders.join()
        cgroups, self._cgroups = self._cgroups, None
        async with contextlib.AsyncExitStack() as stack:
            if cgroups is not None:
                stack.push_async_callback(cgroups.aclose)
            for lease in self._leased.values():  # their tabs went with the browsers; a late `release` is welcome
                stack.callback(lease.end)

    async def _take(self) -> Tab:
        if self._is_closed:
            raise SandboxError("the browser pool is closed")
        while self._ready:
            tab = self._ready.popleft()
            if not tab.is_broken:
                return tab
            self._enders.spawn(self._close(tab))
        waiter: asyncio.Future[Tab] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._refills = True
        self._fill()
        limit_s = self._config.launch_timeout_s + self._config.load_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await waiter
        except BaseException as error:
            self._forget(waiter)
            if isinstance(error, TimeoutError):
                raise SandboxError(f"no browser tab opened within {limit_s:g} s") from error
            raise

    def _forget(self, waiter: asyncio.Future[Tab]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._hand(waiter.result())  # it came just too late: the next one's

    def _fill(self) -> None:
        """Open as many tabs as are waited for or should be ready; each opener belongs to the pool, not to a lease."""
        is_up = self._current is not None and self._current.is_alive
        spare = self._config.num_ready - len(self._ready) if is_up and self._refills else 0
        missing = len(self._waiters) + max(0, spare) - self._num_opening
        for _ in range(0 if self._is_closed else min(missing, _MAX_OPENING - self._num_opening)):
            self._num_opening += 1
            self._openers.spawn(self._open_one())

    async def _open_one(self) -> None:
        try:
            tab = await self._open()
        except Exception as error:  # whatever it is, it is for the lease that waits
            self._num_opening -= 1
            self._refills = False  # until somebody asks again
            if not self._waiters:
                raise
            self._hand(error)
        except asyncio.CancelledError:
            self._num_opening -= 1
            raise
        else:
            self._num_opening -= 1
            self._hand(tab)
        self._fill()

    async def _open(self) -> Tab:
        browser = await self._browser()
        try:
            return await self._open_in(browser)
        except SandboxError:
            if browser.is_alive:
                raise
        return await self._open_in(await self._browser())

    async def _open_in(self, browser: Chromium) -> Tab:
        try:
            return await Tab.open(browser, self._site, self._config)
        except BaseException:
            self._end_if_drained(browser)  # another may have taken over meanwhile
            raise

    def _hand(self, result: Tab | Exception) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if waiter.done():  # given up meanwhile
                continue
            if isinstance(result, Tab):
                waiter.set_result(result)
            else:
                waiter.set_exception(result)
            return
        if not isinstance(result, Tab):
            return
        if len(self._ready) < self._config.num_ready and result.chromium is self._current:
            self._ready.append(result)
        else:
            self._enders.spawn(self._close(result))

    async def _browser(self) -> Chromium:
        """The browser for new tabs, started if there is none or the one at hand is worn."""
        async with self._starting:
            old = self._current
            is_worn = self._is_bloated or (old is not None and old.num_opened >= self._config.leases_per_browser)
            if old is not None and old.is_alive and not is_worn:
                return old
            self._refuse_too_many_deaths()
            try:
                new = await Chromium.start(self._config, self._cgroups, self._label)
            except SandboxError as error:
                self._deaths.append((time.monotonic(), str(error)))
                raise
            new.on_death = self._on_death
            self._browsers.add(new)
            self._watchers.spawn(self._watch(new))
            self._current, self._is_bloated = new, False
            for tab in self._ready:
                self._enders.spawn(self._close(tab))
            self._ready.clear()
            if old is not None:
                self._end_if_drained(old)
            return new

    def _refuse_too_many_deaths(self) -> None:
        start = time.monotonic() - self._config.restart_window_s
        while self._deaths and self._deaths[0][0] < start:
            self._deaths.popleft()
        if len(self._deaths) > self._config.max_restarts:
            times = f"{len(self._deaths)} times within {self._config.restart_window_s:g} s"
            raise SandboxError(f"the browser failed {times}, lastly: {self._deaths[-1][1]}")

    def _on_death(self, browser: Chromium) -> None:
        self._deaths.append((time.monotonic(), str(browser.failure)))
        self._enders.spawn(self._bury(browser))

    async def _bury(self, browser: Chromium) -> None:
        await browser.aclose()
        self._browsers.discard(browser)

    async def _watch(self, browser: Chromium) -> None:
        """Look after a browser while it lives."""
        watch = MemoryWatch(browser, self._config.memory_mb / SHARE_OF_ALL)
        renewed_s = time.monotonic()
        while browser.is_alive:
            if time.monotonic() - renewed_s > self._config.lifetime_s / 2:
                renewed_s = time.monotonic()
                try:
                    browser.renew()
                except PalaestraError as error:  # the list cannot be kept just now: tried again, and the watch goes on
                    _log.warning("%s", error)
            tabs = [tab for tab in self._leased if tab.chromium is browser and tab.failure is None]
            culprit = await watch.look(tabs)
            if culprit is not None:
                self._end_early(*culprit)
            if watch.is_worn and browser is self._current:
                self._is_bloated = True
            await asyncio.sleep(_LOOK_S)

    def _expire(self, tab: Tab) -> None:
        what = f"the lease is over after {self._config.lifetime_s:g} s"
        self._end_early(tab, TabError(what, "browser", "lifetime"))

    def _end_early(self, tab: Tab, failure: TabError) -> None:
        if tab in self._leased:
            tab.fail(failure)
            self._enders.spawn(self._end(tab, self._leased.pop(tab)))

    async def _end(self, tab: Tab, lease: TabLease) -> None:
        try:
            await self._close(tab)
            self._num_ended += 1
            if self._num_ended % _LEASES_PER_LOOK == 0 and tab.chromium is self._current and tab.chromium.is_alive:
                used_mb = await asyncio.to_thread(memory_mb, tab.chromium.pid)
                self._is_bloated = tab.chromium is self._current and used_mb > self._config.max_pss_mb
        finally:
            self._free.release()
            lease.end()

    async def _close(self, tab: Tab) -> None:
        await tab.close()
        self._end_if_drained(tab.chromium)

    def _end_if_drained(self, browser: Chromium) -> None:
        if browser is not self._current and browser.num_tabs == 0 and browser.is_alive:
            self._enders.spawn(self._bury(browser))

"""One Chromium, many tabs, one lease at a time for each.

Invariants: a tab is leased to one episode at a time; a tab that broke is closed and replaced; when the
browser dies every lease fails with `SandboxError` and `is_alive` turns false; after `aclose`, and after the
death of this process, no browser process is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from pathlib import Path

from playwright.async_api import Browser, Playwright, async_playwright
from playwright.async_api import Error as PlaywrightError

from palaestra.config import Config
from palaestra.errors import SandboxError
from palaestra.sandboxes.browser._launch import Isolation, Launcher, find_chromium, flags_for, write_launcher
from palaestra.sandboxes.browser._tab import Site, Tab


class BrowserConfig(Config):
    """What one browser may use."""

    max_tabs: int = 16
    """Tabs open at once, above 0; further leases wait. One costs about 100 MB."""
    leases_per_tab: int = 500
    """Episodes after which a tab is closed and replaced, above 0."""
    launch_timeout_s: float = 30.0
    """Start of the browser, in seconds."""
    load_timeout_s: float = 20.0
    """Opening of one tab, in seconds."""
    lease_timeout_s: float = 60.0
    """Waiting for a free tab, in seconds."""
    call_timeout_s: float = 10.0
    """One call into a page, in seconds; then the page counts as hung."""


class BrowserPool:
    """Tabs of one site. Belongs to the event loop it was started on."""

    def __init__(
        self,
        site: Site,
        config: BrowserConfig,
        browser: Browser,
        launcher: Launcher,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._site = site
        self._config = config
        self._browser = browser
        self._stack = stack
        self._free = asyncio.Semaphore(config.max_tabs)
        self._idle: list[Tab] = []
        self._leased: set[Tab] = set()
        self.isolation: Isolation = launcher.isolation
        self.pid = launcher.read_pid()
        # A file descriptor of the process, since by the time of the kill its number may be another's.
        stack.callback(_kill, os.pidfd_open(self.pid))

    @classmethod
    async def start(
        cls, site: Site, config: BrowserConfig | None = None, *, isolation: Isolation | None = None
    ) -> BrowserPool:
        """Start the browser. Raises `ConfigError` when there is none, `SandboxError` when it does not start."""
        config = config or BrowserConfig()
        chromium = find_chromium()
        async with contextlib.AsyncExitStack() as stack:
            # Gone once the browser runs, so that not even a SIGKILL of this process leaves it behind.
            with tempfile.TemporaryDirectory(prefix="palaestra-browser-") as directory:
                launcher = await asyncio.to_thread(write_launcher, Path(directory), chromium, isolation)
                try:
                    async with asyncio.timeout(config.launch_timeout_s):
                        playwright = await async_playwright().start()
                        stack.push_async_callback(_stop, playwright)
                        browser = await _launch(playwright, launcher, chromium)
                except (PlaywrightError, TimeoutError) as error:
                    reason = (str(error) or f"not ready within {config.launch_timeout_s:g} s").splitlines()[0]
                    raise SandboxError(f"{chromium} did not start: {reason}") from error
                pool = cls(site, config, browser, launcher, stack)
            pool._stack = stack.pop_all()
        return pool

    @property
    def is_alive(self) -> bool:
        """False once the browser died; the pool is of no use then, close it and start another."""
        return self._browser.is_connected()

    async def acquire(self) -> Tab:
        """A tab that shows the site's start document, maybe one used before; give it back with `release`.

        Raises `SandboxError` when the browser is dead, or no tab comes free in time.
        """
        try:
            async with asyncio.timeout(self._config.lease_timeout_s):
                await self._free.acquire()
        except TimeoutError as error:
            raise SandboxError(f"no browser tab came free within {self._config.lease_timeout_s:g} s") from error
        try:
            tab = self._idle.pop() if self._idle else await self._open()
        except BaseException:
            self._free.release()
            raise
        tab.num_leases += 1
        self._leased.add(tab)
        return tab

    async def release(self, tab: Tab) -> None:
        """Take a tab back. It is closed if it broke or is worn out; its next user must not trust its state."""
        if tab not in self._leased:
            return
        self._leased.remove(tab)
        try:
            if tab.is_broken or tab.num_leases >= self._config.leases_per_tab or not self.is_alive:
                await tab.close()
            else:
                self._idle.append(tab)
        finally:
            self._free.release()

    async def aclose(self) -> None:
        """Close the browser and all its processes; idempotent."""
        self._idle.clear()
        with contextlib.suppress(PlaywrightError, TimeoutError):
            async with asyncio.timeout(5.0):
                await self._browser.close()
        await self._stack.aclose()

    async def _open(self) -> Tab:
        return await Tab.open(
            self._browser,
            self._site,
            call_timeout_s=self._config.call_timeout_s,
            load_timeout_s=self._config.load_timeout_s,
        )


async def _launch(playwright: Playwright, launcher: Launcher, chromium: Path) -> Browser:
    return await playwright.chromium.launch(
        executable_path=launcher.script,
        args=list(flags_for(chromium)),
        # Ctrl-C is this process's to handle; the browser ends with it.
        handle_sigint=False,
        handle_sigterm=False,
        handle_sighup=False,
    )


async def _stop(playwright: Playwright) -> None:
    with contextlib.suppress(PlaywrightError, TimeoutError):
        async with asyncio.timeout(5.0):
            await playwright.stop()


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    os.close(process)

"""One running browser with the driver that talks to it.

Invariants: when either process dies every page is told at once; after `aclose` both processes are gone, with
their temporary folders and their cgroup; a page's end is put down to the page, the limits or the host.
Does not tell apart: who sent a page's process a signal, where there is no memory cgroup. Such an end counts as
the host's. The kernel takes the largest process when memory runs out, and that page counts as the cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Playwright, async_playwright
from playwright.async_api import Error as PlaywrightError

from palaestra.errors import SandboxError
from palaestra.sandboxes._cgroups import MemoryCgroups, Slot
from palaestra.sandboxes.browser._config import BrowserConfig
from palaestra.sandboxes.browser._errors import TabError
from palaestra.sandboxes.browser._launch import Isolation, Launcher, find_chromium, flags_for, write_launcher
from palaestra.sandboxes.browser._processes import Process, parent_of

_log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 2.0
_POLL_S = 0.02
_PROFILE = "--user-data-dir="

Fail = Callable[[TabError], None]


class Chromium:
    """A browser; make it with `start`. Belongs to the event loop it was started on."""

    def __init__(self, browser: Browser, isolation: Isolation, slot: Slot | None, memory_mb: int) -> None:
        self.browser = browser
        self.isolation: Isolation = isolation
        self.limits_memory = slot is not None
        self.num_opened = 0
        """Tabs opened so far."""
        self.num_tabs = 0
        """Tabs open or being opened."""
        self.failure: TabError | None = None
        """Why the browser is of no use any more."""
        self.on_death: Callable[[Chromium], None] = lambda _: None
        self._slot = slot
        self._memory_mb = memory_mb
        self._oom_kills = 0
        self._pages: dict[str, Fail] = {}
        self._is_closing = False
        self._closing = asyncio.Lock()
        self._is_closed = False
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    async def start(
        cls, config: BrowserConfig, cgroups: MemoryCgroups | None, isolation: Isolation | None = None
    ) -> Chromium:
        """Start one. Raises `ConfigError` when there is none to start, `SandboxError` when it does not start."""
        path = find_chromium()
        async with contextlib.AsyncExitStack() as stack:
            slot = _take_slot(cgroups, config.memory_mb)
            if cgroups is not None and slot is not None:
                stack.push_async_callback(_give_back, cgroups, slot)
            try:
                async with asyncio.timeout(config.launch_timeout_s):
                    playwright = await async_playwright().start()
                    stack.push_async_callback(_stop, playwright)
                    browser, launcher, pid = await _launch(playwright, path, config, isolation, slot)
            except (PlaywrightError, TimeoutError, OSError, ValueError) as error:
                reason = (str(error) or f"not ready within {config.launch_timeout_s:g} s").splitlines()[0]
                raise SandboxError(f"{path} did not start: {reason}") from error
            self = cls(browser, launcher.isolation, slot, config.memory_mb)
            try:
                await self._take_over(pid, stack)
            except (PlaywrightError, TimeoutError, OSError) as error:
                raise SandboxError(f"{path} died while it started: {error}") from error
            self._stack = stack.pop_all()
        return self

    async def _take_over(self, pid: int, stack: contextlib.AsyncExitStack) -> None:
        # Unwound last to first: the browser closes, then dies if it did not, then its driver likewise.
        parent = parent_of(pid)
        if parent_of(parent) != os.getpid():
            raise OSError("its driver is gone")
        driver = Process(parent, lambda: self.die("the browser's driver died"))
        self._process = driver  # until there is a better one
        stack.callback(driver.close)
        stack.callback(_remove_profile(pid, self.isolation))
        self._process = Process(pid, self._browser_died)
        self.pid = pid
        stack.callback(self._process.close)
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            self._session = await self.browser.new_browser_cdp_session()
            self._session.on("Target.targetCrashed", self._page_crashed)
            await self._session.send("Target.setDiscoverTargets", {"discover": True})

    @property
    def is_alive(self) -> bool:
        """Whether it can open another tab."""
        return self.failure is None and not self._is_closing

    def watch(self, target_id: str, fail: Fail) -> None:
        """Call `fail` when this page or the browser dies."""
        self._pages[target_id] = fail

    def unwatch(self, target_id: str) -> None:
        """Forget a page that is about to be closed."""
        self._pages.pop(target_id, None)

    async def num_contexts(self) -> int:
        """Browser contexts that the browser itself knows, its default one not counted."""
        reply = await self._ask("Target.getBrowserContexts")
        return len(reply["browserContextIds"])

    async def answers(self) -> bool:
        """Whether the browser's own process is there and answers."""
        try:
            await self._ask("Target.getBrowserContexts")
        except SandboxError:
            return False
        return True

    async def _ask(self, method: str) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await self._session.send(method)
        except (PlaywrightError, TimeoutError) as error:
            raise SandboxError(f"the browser did not answer {method}: {error}") from error

    def die(self, reason: str) -> None:
        """Kill the browser and tell every page why."""
        self._process.kill()
        if self.failure is not None or self._is_closing:
            return
        _log.warning("browser %d: %s", self._process.pid, reason)
        self.failure = TabError(reason, "browser", "died")
        pages, self._pages = self._pages, {}
        for fail in pages.values():
            fail(self.failure)
        self.on_death(self)

    async def aclose(self) -> None:
        """End all its processes; idempotent, and never raises for a browser that is already gone."""
        self._is_closing = True
        async with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            if self.failure is None:
                with contextlib.suppress(PlaywrightError, TimeoutError):
                    async with asyncio.timeout(_STOP_TIMEOUT_S):
                        await self.browser.close()
            await self._stack.aclose()

    def _browser_died(self) -> None:
        memory = f"out of its {self._memory_mb} MB of memory" if self._count_oom_kills() else "no reason known"
        self.die(f"the browser process died: {memory}")

    def _page_crashed(self, event: dict[str, Any]) -> None:
        fail = self._pages.get(event["targetId"])
        if fail is not None:
            fail(self._judge(str(event.get("status")), event.get("errorCode")))

    def _judge(self, status: str, code: object) -> TabError:
        if self._count_oom_kills():
            self._oom_kills -= 1
            return TabError(f"the page ran out of the browser's {self._memory_mb} MB of memory", "page", "oom")
        if status == "oom":
            return TabError("the page ran out of memory", "page", "oom")
        if status == "killed":
            return TabError(f"the page's process was killed from outside by signal {code}", "browser", "killed")
        return TabError(f"the page crashed ({status}, code {code}): out of its heap, or a fault", "page", "crash")

    def _count_oom_kills(self) -> int:
        if self._slot is not None:
            self._oom_kills += self._slot.count_oom_kills()
        return self._oom_kills


async def _launch(
    playwright: Playwright, path: Path, config: BrowserConfig, isolation: Isolation | None, slot: Slot | None
) -> tuple[Browser, Launcher, int]:
    # The folder is gone once the browser runs, so that not even a SIGKILL of this process leaves it behind.
    with tempfile.TemporaryDirectory(prefix="palaestra-browser-") as directory:
        cgroup = slot.folder if slot is not None else None
        launcher = await asyncio.to_thread(write_launcher, Path(directory), path, isolation, cgroup)
        try:
            browser = await playwright.chromium.launch(
                executable_path=launcher.script,
                artifacts_dir=directory,
                args=list(flags_for(path, config.heap_mb)),
                # Ctrl-C is this process's to handle; the browser ends with it.
                handle_sigint=False,
                handle_sigterm=False,
                handle_sighup=False,
            )
            return browser, launcher, launcher.read_pid()
        except BaseException:
            with contextlib.suppress(OSError, ValueError):  # it had not come so far, or is gone
                os.kill(launcher.read_pid(), signal.SIGKILL)
            raise


def _take_slot(cgroups: MemoryCgroups | None, memory_mb: int) -> Slot | None:
    if cgroups is None:
        return None
    try:
        return cgroups.take(memory_mb)
    except OSError as error:
        _log.warning("the browser's memory is not limited: %s", error)
        return None


async def _give_back(cgroups: MemoryCgroups, slot: Slot) -> None:
    procs = slot.folder / "cgroup.procs"
    with contextlib.suppress(TimeoutError, OSError):  # then the folder's guard waits for its processes
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            while procs.read_text():  # noqa: ASYNC110  # the kernel tells nobody
                await asyncio.sleep(_POLL_S)
        cgroups.give_back(slot)


def _remove_profile(pid: int, isolation: Isolation) -> Callable[[], None]:
    """Remove the profile's folder on the host: at once when the cage has one of its own, else at the end."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    folders = [Path(word.removeprefix(_PROFILE)) for word in words if word.startswith(_PROFILE)]

    def remove() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    if isolation == "bwrap":
        remove()
    return remove


async def _stop(playwright: Playwright) -> None:
    with contextlib.suppress(PlaywrightError, TimeoutError):
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await playwright.stop()

"""One running browser with the driver that talks to it.

Invariants: it is on the host's list from its start to its end; when either process dies every page is told at
once; after `aclose` both processes are gone, with their folder, their record and their cgroups; a page's end is
put down to the page, the limits or the host. The rule for memory: when the kernel takes a page's process, that
page is the cause; when it takes the browser's own or the driver, nobody knows whose doing it was, and it is ours.
Does not tell apart: who sent a page's process a signal, where there is no memory cgroup. Such an end counts as
the host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Playwright
from playwright.async_api import Error as PlaywrightError

from palaestra.errors import SandboxError
from palaestra.sandboxes._cgroups import MemoryCgroups, Slot
from palaestra.sandboxes._folders import make_folder
from palaestra.sandboxes._records import Record, process_handle
from palaestra.sandboxes.browser._config import BrowserConfig
from palaestra.sandboxes.browser._driver import start_driver
from palaestra.sandboxes.browser._errors import TabError
from palaestra.sandboxes.browser._launch import Launcher, find_chromium, flags_for, write_launcher
from palaestra.sandboxes.browser._processes import Process, family_of, parent_of

_log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 2.0
_POLL_S = 0.02
_numbers = itertools.count()

Fail = Callable[[TabError], None]


@dataclass(frozen=True, slots=True)
class _Slots:
    """The cgroups of the browser's family and of its driver; None where the host has none to give."""

    family: Slot | None
    driver: Slot | None


class Chromium:
    """A browser; make it with `start`. Belongs to the event loop it was started on."""

    def __init__(self, browser: Browser, config: BrowserConfig, slots: _Slots) -> None:
        self.id = f"browser-{os.getpid()}-{next(_numbers)}"
        self.browser = browser
        self.limits_memory = slots.family is not None
        self.num_opened = 0
        """Tabs opened so far."""
        self.num_tabs = 0
        """Tabs open or being opened."""
        self.failure: TabError | None = None
        """Why the browser is of no use any more."""
        self.on_death: Callable[[Chromium], None] = lambda _: None
        self._slots = slots
        self._config = config
        self._oom_kills = 0
        self._pages: dict[str, Fail] = {}
        self._is_closing = False
        self._closing = asyncio.Lock()
        self._is_closed = False
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    async def start(cls, config: BrowserConfig, cgroups: MemoryCgroups | None, label: str = "") -> Chromium:
        """Start one. Raises `ConfigError` when there is none to start, `SandboxError` when it does not start."""
        path = find_chromium()
        async with contextlib.AsyncExitStack() as stack:
            folder = make_folder("browser")
            stack.push_async_callback(_remove, folder)
            slots = _Slots(_take_slot(cgroups, config.memory_mb, stack), _take_slot(cgroups, config.driver_mb, stack))
            try:
                async with asyncio.timeout(config.launch_timeout_s):
                    playwright = await start_driver(stack, config.launch_timeout_s)
                    browser, pid = await _launch(playwright, path, folder, config, slots.family)
                    if config.isolation == "bwrap":  # its profile is in the cage: a SIGKILL now leaves nothing
                        await _remove(folder)
            except (PlaywrightError, TimeoutError, OSError, ValueError) as error:
                reason = (str(error) or f"not ready within {config.launch_timeout_s:g} s").splitlines()[0]
                raise SandboxError(f"{path} did not start: {reason}") from error
            self = cls(browser, config, slots)
            try:
                await self._take_over(pid, label, stack)
            except (PlaywrightError, TimeoutError, OSError) as error:
                raise SandboxError(f"{path} died while it started: {error}") from error
            self._stack = stack.pop_all()
        return self

    async def _take_over(self, pid: int, label: str, stack: contextlib.AsyncExitStack) -> None:
        # Unwound last to first: the browser closes, then dies if it did not, then its driver likewise.
        parent = parent_of(pid)
        if parent_of(parent) != os.getpid():
            raise OSError("its driver is gone")
        self._record = Record.write(
            lease_id=self.id,
            backend="browser",
            label=label,
            handle=process_handle(pid),
            lifetime_s=self._config.lifetime_s,
        )
        stack.callback(self._record.remove)
        driver = Process(parent, self._driver_died)
        self._process = driver  # until there is a better one
        stack.callback(driver.close)
        if self._slots.driver is not None:
            self._slots.driver.enter(parent)
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

    def family(self) -> list[int]:
        """Its processes; may block for a moment."""
        if self._slots.family is None:
            return family_of(self.pid)
        try:
            return [int(pid) for pid in (self._slots.family.folder / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def renew(self) -> None:
        """Say that somebody still looks after it: a browser nobody renews within `lifetime_s` may be reaped."""
        self._record.renew()

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
        with contextlib.ExitStack() as told:  # all of them, whatever one does
            told.callback(self.on_death, self)
            for fail in pages.values():
                told.callback(fail, self.failure)

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
        memory = f"out of its {self._config.memory_mb} MB of memory" if self._count_oom_kills() else "no reason known"
        self.die(f"the browser process died: {memory}")

    def _driver_died(self) -> None:
        slot = self._slots.driver
        memory = slot is not None and slot.whose_memory() == "box"
        self.die(
            "the browser's driver died" + (f": out of its {self._config.driver_mb} MB of memory" if memory else "")
        )

    def _page_crashed(self, event: dict[str, Any]) -> None:
        fail = self._pages.get(event["targetId"])
        if fail is not None:
            fail(self._judge(str(event.get("status")), event.get("errorCode")))

    def _judge(self, status: str, code: object) -> TabError:
        if self._count_oom_kills():
            self._oom_kills -= 1
            return TabError(f"the page ran out of the browser's {self._config.memory_mb} MB of memory", "page", "oom")
        if status == "oom":
            return TabError("the page ran out of memory", "page", "oom")
        if status == "killed":
            return TabError(f"the page's process was killed from outside by signal {code}", "browser", "killed")
        return TabError(f"the page crashed ({status}, code {code}): out of its heap, or a fault", "page", "crash")

    def _count_oom_kills(self) -> int:
        """Kills that nobody was told of yet, at the limit of the browser's own memory."""
        if self._slots.family is not None:
            short = self._slots.family.shortage()
            self._oom_kills += short.oom_kills if short.at_limit else 0
        return self._oom_kills


async def _launch(
    playwright: Playwright, path: Path, folder: Path, config: BrowserConfig, slot: Slot | None
) -> tuple[Browser, int]:
    cgroup = slot.folder if slot is not None else None
    launcher = await asyncio.to_thread(write_launcher, folder, path, config.isolation, cgroup)
    try:
        browser = await playwright.chromium.launch(
            executable_path=launcher.script,
            artifacts_dir=folder,
            args=list(flags_for(path, config.heap_mb, config.frames_on_request)),
            # Ctrl-C is this process's to handle; the browser ends with it.
            handle_sigint=False,
            handle_sigterm=False,
            handle_sighup=False,
        )
        return browser, launcher.read_pid()
    except BaseException:
        _kill(launcher)
        raise


def _kill(launcher: Launcher) -> None:
    with contextlib.suppress(OSError, ValueError):  # it had not come so far, or is gone
        os.kill(launcher.read_pid(), signal.SIGKILL)


def _take_slot(cgroups: MemoryCgroups | None, memory_mb: int, stack: contextlib.AsyncExitStack) -> Slot | None:
    """Raises `SandboxError` when a host that has memory cgroups gives none: no browser runs without its limit."""
    if cgroups is None:
        return None
    try:
        slot = cgroups.take(memory_mb)
    except OSError as error:
        raise SandboxError(f"cannot limit the browser's memory to {memory_mb} MB: {error}") from error
    stack.push_async_callback(_give_back, cgroups, slot)
    return slot


async def _remove(folder: Path) -> None:
    with contextlib.suppress(TimeoutError):  # then it is for the reaper
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            while not await asyncio.to_thread(_is_removed, folder):  # noqa: ASYNC110  # a dying process may write
                await asyncio.sleep(_POLL_S)


def _is_removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


async def _give_back(cgroups: MemoryCgroups, slot: Slot) -> None:
    procs = slot.folder / "cgroup.procs"
    with contextlib.suppress(TimeoutError, OSError):  # then the folder's guard waits for its processes
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            while procs.read_text():  # noqa: ASYNC110  # the kernel tells nobody
                await asyncio.sleep(_POLL_S)
        cgroups.give_back(slot)

"""One page of the pool in a browser context of its own, driven over the DevTools protocol.

Invariants: every wait has a deadline; a call that failed, hung or was cancelled breaks the tab; the page
reaches only what its site serves; a failure says whose doing it was, the page's or the browser's, by the state
that they are found in and never by a message, which a page can write.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from playwright.async_api import BrowserContext, CDPSession, Page
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import TimeoutError as PlaywrightTimeoutError

from palaestra.errors import SandboxError, TaskError
from palaestra.sandboxes.browser._chores import Chores
from palaestra.sandboxes.browser._chromium import Chromium
from palaestra.sandboxes.browser._config import BrowserConfig
from palaestra.sandboxes.browser._errors import TabError
from palaestra.sandboxes.browser._guard import GUARD
from palaestra.sandboxes.browser._site import Site

_REASON_TIMEOUT_S = 1.0
_MARGIN_S = 1.0
_SAMPLE_TIMEOUT_S = 0.5

ValueT = TypeVar("ValueT")


class Tab:
    """A page that shows its site's start document. Opened, leased and closed by the pool."""

    def __init__(
        self,
        chromium: Chromium,
        site: Site,
        context: BrowserContext,
        page: Page,
        session: CDPSession,
        config: BrowserConfig,
        site_errors: list[TaskError],
    ) -> None:
        self.page = page
        self.failure: TabError | None = None
        """Set once the page or the browser died, or the lease was ended."""
        self.chromium = chromium
        self._site = site
        self._context = context
        self._session = session
        self._config = config
        self._site_errors = site_errors
        self._has_crashed = False
        self._target_id = ""
        self._num_unanswered = 0
        self._is_spoilt = False
        self._is_closed = False
        self._has_failed = asyncio.Event()
        self._deadlines: set[asyncio.Timeout] = set()
        self._chores = Chores()
        context.on("page", self._on_page)
        page.on("crash", self._on_crash)

    @classmethod
    async def open(cls, chromium: Chromium, site: Site, config: BrowserConfig) -> Tab:
        """A new context with the start document loaded; raises `SandboxError` when it does not load.

        Raises `TaskError` when the site's own function fails on the document. A caller that is cancelled meanwhile
        must end the browser: what was asked of it comes into being anyway.
        """
        chromium.num_opened += 1
        chromium.num_tabs += 1
        site_errors: list[TaskError] = []
        context: BrowserContext | None = None
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(_leave, chromium)
            try:
                async with asyncio.timeout(config.load_timeout_s + _MARGIN_S):
                    context = await chromium.browser.new_context(
                        service_workers="block", accept_downloads=False, locale="en-US", timezone_id="UTC"
                    )
                    stack.push_async_callback(_close, chromium, context, config.close_timeout_s)
                    await context.add_init_script(GUARD)
                    await site.attach(context, site_errors)
                    page = await context.new_page()
                    session = await context.new_cdp_session(page)
                    tab = cls(chromium, site, context, page, session, config, site_errors)
                    await tab._begin(stack)
            except (PlaywrightError, TimeoutError) as error:
                if context is None and isinstance(error, TimeoutError):  # nothing that could be closed instead
                    chromium.die(f"a tab did not open within {config.load_timeout_s:g} s")
                for site_error in site_errors:
                    raise site_error from error
                reason = chromium.failure or _line(error)
                raise SandboxError(f"the browser did not load {site.start_url}: {reason}") from error
            stack.pop_all()
        return tab

    async def _begin(self, stack: contextlib.AsyncExitStack) -> None:
        reply = await self._session.send("Target.getTargetInfo")
        self._target_id = reply["targetInfo"]["targetId"]
        self.chromium.watch(self._target_id, self.fail)
        stack.callback(self.chromium.unwatch, self._target_id)
        await self.page.goto(self._site.start_url, timeout=1000 * self._config.load_timeout_s)
        await self._session.send("Accessibility.enable")
        await self._session.send("Performance.enable")

    @property
    def is_broken(self) -> bool:
        """Whether the page may be in any state: a call into it has no answer, or something happened to it."""
        return self._num_unanswered > 0 or self._is_spoilt or self.failure is not None

    def spoil(self) -> None:
        """Say that nothing may rely on the page's state any more."""
        self._is_spoilt = True

    async def call(self, function: str, *arguments: object) -> Any:
        """Call a JavaScript function of the page by its dotted name, with JSON arguments and JSON result.

        Raises `TaskError` when the page's code throws, `TabError` when the page or the browser does not answer.
        """
        expression = f"{function}({', '.join(json.dumps(argument) for argument in arguments)})"
        limit_s = self._config.call_timeout_s
        parameters = {"expression": expression, "returnByValue": True, "timeout": 1000 * limit_s}
        began_s = asyncio.get_running_loop().time()
        try:
            reply = await self.run(
                function, lambda: self._session.send("Runtime.evaluate", parameters), limit_s + _MARGIN_S
            )
        except PlaywrightError as error:
            self.spoil()
            if asyncio.get_running_loop().time() - began_s >= limit_s:  # Chromium ended it
                raise TabError(f"the page did not answer {function} in {limit_s:g} s", "page", "timeout") from error
            raise TabError(f"the page did not answer {function}: {_line(error)}", "page", "crash") from error
        if "exceptionDetails" in reply:
            self.spoil()
            raise TaskError(f"the page threw in {expression}: {_exception(reply['exceptionDetails'])}")
        return reply["result"].get("value")

    async def run(self, what: str, start: Callable[[], Awaitable[ValueT]], timeout_s: float | None = None) -> ValueT:
        """Await a Playwright call on this page within `call_timeout_s`: `tab.run("click", lambda: page.click("a"))`.

        Raises `TabError` when the page or the browser failed; other errors of Playwright's pass through.
        """
        if self.failure is not None:
            raise self.failure
        if self._is_closed:
            raise SandboxError(f"{what} was asked of a tab whose lease has ended")
        limit_s = self._config.call_timeout_s if timeout_s is None else timeout_s
        self._num_unanswered += 1  # until the answer is there: a cancelled call leaves it so
        try:
            async with asyncio.timeout(limit_s) as deadline:
                self._deadlines.add(deadline)
                try:
                    value = await start()
                finally:
                    self._deadlines.discard(deadline)
        except TimeoutError as error:
            raise await self._why_late(what, limit_s) from error
        except PlaywrightError as error:
            failure = await self._why_gone(error)
            if failure is not None:
                raise failure from error
            self._num_unanswered -= 1
            raise
        self._num_unanswered -= 1
        return value

    async def goto(self, url: str) -> None:
        """Show another document of the site; raises `ValueError` when the site has no such origin.

        The way for addresses that an agent gives: Playwright's own `goto` also opens Chromium's internal pages.
        Raises `TabError` by the page when it does not load in time, or when there is nothing at the address.
        """
        if not self._site.allows(url):
            raise ValueError(f"{url!r} is of no origin of this site")
        limit_s = self._config.load_timeout_s
        self._site_errors.clear()
        try:
            await self.run(f"goto {url}", lambda: self._load(url, limit_s), limit_s + 2 * _MARGIN_S)
        except PlaywrightTimeoutError as error:
            self.spoil()
            raise TabError(f"{url} did not load within {limit_s:g} s", "page", "timeout") from error
        except PlaywrightError as error:
            for site_error in self._site_errors:
                raise site_error from error
            raise TabError(f"the site has nothing to show at {url}: {_line(error)}", "page", "address") from error

    async def _load(self, url: str, limit_s: float) -> None:
        try:
            await self.page.goto(url, timeout=1000 * limit_s)
        except PlaywrightTimeoutError:
            raise
        except PlaywrightError:
            # Chromium is about to show a page of its own, which would cut off the next navigation.
            with contextlib.suppress(PlaywrightError):
                await self.page.wait_for_url("chrome-error://**", wait_until="commit", timeout=1000 * _MARGIN_S)
            raise

    async def processor_s(self) -> float | None:
        """Processor time that the page's process has used, in seconds; None when the page does not answer at once."""
        try:
            async with asyncio.timeout(_SAMPLE_TIMEOUT_S):
                reply = await self._session.send("Performance.getMetrics")
        except (PlaywrightError, TimeoutError):
            return None
        return next((float(metric["value"]) for metric in reply["metrics"] if metric["name"] == "ProcessTime"), None)

    async def close(self) -> None:
        """Close the page with its context, or kill the browser; never raises for a page that is already gone."""
        if self._is_closed:
            return
        self._is_closed = True
        self.chromium.unwatch(self._target_id)
        try:
            await _close(self.chromium, self._context, self._config.close_timeout_s)
            self._chores.cancel()
            await self._chores.join()
        finally:
            _leave(self.chromium)

    def fail(self, failure: TabError) -> None:
        """Let the calls under way and all later ones raise `failure`, unless the tab failed before."""
        if self.failure is None:
            self.failure = failure
        self._has_failed.set()
        for deadline in self._deadlines:  # a dead page never answers: do not wait for it
            if not deadline.expired():
                deadline.reschedule(0.0)

    async def _why_late(self, what: str, limit_s: float) -> TabError:
        if self.failure is None and not await self.chromium.answers():
            self.chromium.die(f"the browser did not answer, nor a page {what}")
        late = TabError(f"the page did not answer {what} within {limit_s:g} s", "page", "timeout")
        return self.failure or self.chromium.failure or late

    async def _why_gone(self, error: PlaywrightError) -> TabError | None:
        """None when the page is still there: then the error is about the call alone."""
        is_up = await self.chromium.answers()  # a round trip: whatever happened before the error is known after it
        if is_up and self.failure is None and not self._has_crashed and not self.page.is_closed():
            return None
        if not is_up or self._has_crashed:
            with contextlib.suppress(TimeoutError):  # the reason comes by another way, soon
                async with asyncio.timeout(_REASON_TIMEOUT_S):
                    await self._has_failed.wait()
        if self.failure is None and not is_up:
            self.chromium.die(f"the browser did not answer: {_line(error)}")
        if self.failure is None and self._has_crashed:
            self.failure = TabError("the page crashed", "page", "crash")
        return self.failure or self.chromium.failure or TabError("the page was closed", "page", "closed")

    def _on_crash(self, _: Page) -> None:
        self._has_crashed = True

    def _on_page(self, page: Page) -> None:
        self.spoil()
        if len(self._context.pages) > self._config.max_pages:
            self._chores.spawn(_close_page(page, self._config.close_timeout_s))


async def _close_page(page: Page, timeout_s: float) -> None:
    with contextlib.suppress(PlaywrightError, TimeoutError):  # it goes with its context
        async with asyncio.timeout(timeout_s):
            await page.close()


async def _close(chromium: Chromium, context: BrowserContext, timeout_s: float) -> None:
    if chromium.failure is not None:
        return
    try:
        async with asyncio.timeout(timeout_s):
            await context.close()
    except TimeoutError:
        chromium.die(f"a tab did not close within {timeout_s:g} s")
    except PlaywrightError:
        if not await chromium.answers():  # else it was gone already
            chromium.die("the browser did not answer when a tab was closed")


def _leave(chromium: Chromium) -> None:
    chromium.num_tabs -= 1


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _exception(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description", details.get("text", "?"))).splitlines()[0]

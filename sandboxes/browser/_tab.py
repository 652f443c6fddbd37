"""One page of the pool in a browser context of its own, driven over the DevTools protocol.

Invariants: every wait has a deadline; a call that failed, hung or was cancelled breaks the tab, and a broken
tab is never leased again; the page reaches only what its site serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from playwright.async_api import Browser, BrowserContext, CDPSession, Page, Route
from playwright.async_api import Error as PlaywrightError

from palaestra.errors import SandboxError, TaskError

_CLOSE_TIMEOUT_S = 5.0

# The document gets an opaque origin: no cookies, no storage, no popups, no modal dialogs, no way out.
_HEADERS = {
    "Content-Security-Policy": "sandbox allow-scripts allow-forms; connect-src 'none'; frame-src 'none'; "
    "worker-src 'none'; form-action 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class Resource:
    """What a site answers to one path."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Site:
    """A set of files served to the browser from memory; nothing else can be loaded.

    `start_path` is the document that every tab shows, `serve` maps a path without query to its resource.
    """

    origin: str
    start_path: str
    serve: Callable[[str], Resource | None]


class Tab:
    """A page that shows its site's start document. Made, leased and closed by the pool."""

    def __init__(self, context: BrowserContext, page: Page, session: CDPSession, call_timeout_s: float) -> None:
        self._context = context
        self._session = session
        self._call_timeout_s = call_timeout_s
        self.page = page
        self.num_leases = 0
        self._is_calling = False
        self._is_spoilt = False
        self._is_crashed = False
        self._deadline: asyncio.Timeout | None = None
        page.on("crash", lambda _: self._crash())
        context.on("page", lambda _: self.spoil())  # nothing we serve can open a page

    @classmethod
    async def open(cls, browser: Browser, site: Site, *, call_timeout_s: float, load_timeout_s: float) -> Tab:
        """A new context with the start document loaded; raises `SandboxError` when it does not load."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(load_timeout_s):
                    context = await browser.new_context(
                        service_workers="block", accept_downloads=False, locale="en-US", timezone_id="UTC"
                    )
                    stack.push_async_callback(_close, context)
                    await context.route("**/*", lambda route: _answer(route, site))
                    await context.route_web_socket("**/*", lambda socket: socket.close())
                    page = await context.new_page()
                    session = await context.new_cdp_session(page)
                    await page.goto(site.origin + site.start_path)
                    await session.send("Accessibility.enable")
            except (PlaywrightError, TimeoutError) as error:
                raise SandboxError(
                    f"the browser did not load {site.origin}{site.start_path}: {_line(error)}"
                ) from error
            stack.pop_all()
        return cls(context, page, session, call_timeout_s)

    @property
    def is_broken(self) -> bool:
        """Whether the page may be in any state: a call into it has no answer, or something happened to it."""
        return self._is_calling or self._is_spoilt

    def spoil(self) -> None:
        """Say that the page must not be used again after this lease."""
        self._is_spoilt = True

    async def call(self, function: str, *arguments: object) -> Any:
        """Call a JavaScript function of the page by its dotted name, with JSON arguments and JSON result.

        Raises `TaskError` when the page's code throws, `SandboxError` when the page or the browser does not answer.
        """
        expression = f"{function}({', '.join(json.dumps(argument) for argument in arguments)})"
        if self._is_crashed:
            raise SandboxError("the page crashed")
        parameters = {"expression": expression, "returnByValue": True, "timeout": 1000 * self._call_timeout_s}
        self._is_calling = True  # until the answer is there: a cancelled call leaves it so
        try:
            async with asyncio.timeout(self._call_timeout_s + 1.0) as self._deadline:
                reply = await self._session.send("Runtime.evaluate", parameters)
        except TimeoutError as error:
            if self._is_crashed:
                raise SandboxError(f"the page crashed during {function}") from error
            raise SandboxError(f"the page did not answer {function} within {self._call_timeout_s:g} s") from error
        except PlaywrightError as error:
            raise SandboxError(f"the page died during {function}: {_line(error)}") from error
        finally:
            self._deadline = None
        if "exceptionDetails" in reply:
            raise TaskError(f"the page threw in {expression}: {_exception(reply['exceptionDetails'])}")
        self._is_calling = False
        return reply["result"].get("value")

    async def close(self) -> None:
        """Close the page with its context; never raises for a page that is already gone."""
        self.spoil()
        await _close(self._context)

    def _crash(self) -> None:
        self._is_spoilt = self._is_crashed = True
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(0.0)  # a crashed page never answers: do not wait for it


async def _answer(route: Route, site: Site) -> None:
    url = route.request.url
    path = url.removeprefix(site.origin).partition("?")[0].partition("#")[0]
    resource = site.serve(path) if url.startswith(site.origin + "/") else None
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            if resource is None:
                await route.abort("blockedbyclient")
            else:
                headers = {**_HEADERS, "Content-Type": resource.content_type}
                await route.fulfill(body=resource.body, headers=headers)
    except (PlaywrightError, TimeoutError):
        pass  # the page went away before its answer came


async def _close(context: BrowserContext) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await context.close()
    except (PlaywrightError, TimeoutError):
        pass  # gone with its browser, or hung: then the pool ends the browser


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _exception(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description", details.get("text", "?"))).splitlines()[0]

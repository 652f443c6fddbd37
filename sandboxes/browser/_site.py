"""What pages may load: files of named origins, answered from memory, and nothing else.

Invariants: a request is answered only by an origin of the site; every answer carries the site's content policy;
a `serve` that raises fails that one request, and the tab that asked is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from playwright.async_api import BrowserContext, Route, WebSocketRoute
from playwright.async_api import Error as PlaywrightError

from palaestra.errors import ConfigError, TaskError

_log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5.0

STRICT_POLICY: Final = (
    "sandbox allow-scripts allow-forms; connect-src 'none'; frame-src 'none'; "
    "worker-src 'none'; form-action 'none'; object-src 'none'"
)
"""The document gets an opaque origin: no cookies, no storage, no popups, no modal dialogs, no way out."""


@dataclass(frozen=True, slots=True)
class Resource:
    """What a site answers to one path."""

    body: bytes
    content_type: str


Serve = Callable[[str], Resource | None]
"""Maps a path without query to its resource; None means that the request fails."""


@dataclass(frozen=True, slots=True)
class Site:
    """Files served to the browser from memory, by origin (`http://name`); nothing else can be loaded.

    `start_url` is the document that every tab shows first. `policy` is the Content-Security-Policy of every
    answer; a looser one frees the page within the browser, it opens no way to the network.
    """

    start_url: str
    origins: Mapping[str, Serve]
    policy: str = STRICT_POLICY

    def __post_init__(self) -> None:
        if not self.allows(self.start_url):
            raise ConfigError(f"start_url {self.start_url!r} is of no origin of the site: {', '.join(self.origins)}")

    def allows(self, url: str) -> bool:
        """Whether `url` is of one of the site's origins."""
        return _origin(url) in self.origins

    def find(self, url: str) -> Resource | None:
        """The answer to a request for `url`, None when it is refused."""
        serve = self.origins.get(_origin(url))
        return serve(urlsplit(url).path or "/") if serve is not None else None

    async def attach(self, context: BrowserContext, errors: list[TaskError]) -> None:
        """Let this site, and nothing else, answer the context's requests; `errors` gets what `serve` raised last."""
        await context.route("**/*", lambda route: self._answer(route, errors))
        await context.route_web_socket("**/*", _refuse)

    async def _answer(self, route: Route, errors: list[TaskError]) -> None:
        url = route.request.url
        try:
            resource = self.find(url)
        except Exception as error:  # whatever it is, it is for whoever waits for the document
            errors[:] = [TaskError(f"the site's function for {_origin(url)} raised {error!r} on {urlsplit(url).path}")]
            errors[0].__cause__ = error
            _log.error("%s", errors[0], exc_info=error)
            resource = None
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                if resource is None:
                    await route.abort("blockedbyclient")
                else:
                    headers = {"Content-Type": resource.content_type, "Referrer-Policy": "no-referrer"}
                    if self.policy:
                        headers["Content-Security-Policy"] = self.policy
                    await route.fulfill(body=resource.body, headers=headers)
        except (PlaywrightError, TimeoutError):
            pass  # the page went away before its answer came


async def _refuse(socket: WebSocketRoute) -> None:
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await socket.close()
    except (PlaywrightError, TimeoutError):
        pass  # its page went away


def _origin(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}"

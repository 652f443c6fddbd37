"""Sites and looks from outside that the browser's tests share."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from playwright.async_api import Browser, async_playwright

from palaestra.errors import ConfigError
from palaestra.sandboxes.browser import (
    STRICT_POLICY,
    BrowserPool,
    Resource,
    Site,
    Tab,
    TabError,
    find_chromium,
    why_no_cage,
)
from palaestra.sandboxes.browser._processes import family_of
from tests.conftest import require
from tests.sandboxes.hostview import eventually

HTML = "text/html; charset=utf-8"
PAGE = b"<!DOCTYPE html><body>hello<script>function twice(x) { return 2 * x }</script></body>"
NO_POLICY = ""
_why_no_cage = cache(why_no_cage)


def require_chromium() -> None:
    """Skip, or fail, when there is no Chromium or no cage for it."""
    try:
        chromium = find_chromium()
    except ConfigError as error:
        require("chromium", str(error))
    else:
        require("bwrap", _why_no_cage(chromium))


def site_of(body: bytes = PAGE, policy: str = STRICT_POLICY, origin: str = "http://site.invalid") -> Site:
    """A site with one page."""
    return Site(origin + "/", {origin: {"/": Resource(body, HTML)}.get}, policy)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def renderers_of(pool: BrowserPool) -> list[int]:
    """Processes that run pages."""
    return [pid for pid in family_of(pool.pid) if b"--type=renderer" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextlib.asynccontextmanager
async def bystander(pool: BrowserPool, limit_s: float = 15.0) -> AsyncIterator[None]:
    """What happens inside takes bounded time and leaves a sibling's state and the next lease as they should be."""
    started_s, num_contexts = time.monotonic(), await pool.num_contexts()
    async with pool.lease() as sibling:
        await sibling.call("eval", "window.kept = 'mine'")
        yield
        assert time.monotonic() - started_s < limit_s
        assert await sibling.call("eval", "window.kept + twice(1)") == "mine2"
    async with asyncio.timeout(5.0), pool.lease() as fresh:
        assert await fresh.call("eval", "typeof kept + twice(2)") == "undefined4"
    assert await pool.num_contexts() == num_contexts


@contextlib.asynccontextmanager
async def unguarded(*flags: str) -> AsyncIterator[Browser]:
    """A browser of this machine without any cage, flag or filter of ours: what works here is held back by them."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", *flags])
        yield browser
        await browser.close()


async def failure_of(tab: Tab, code: str) -> TabError:
    """How a tab fails when it runs `code`."""
    with pytest.raises(TabError) as caught:
        await tab.call("eval", code)
    return caught.value


Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class WebServer:
    """An http server on `localhost`, which browsers trust, with an answer for each path; notes what it was asked."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    async def __aenter__(self) -> WebServer:
        self._server = await asyncio.start_server(self._answer, "localhost", 0, family=socket.AF_INET)
        self.url = f"http://localhost:{self._server.sockets[0].getsockname()[1]}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            self.asked.append(path)
            status, headers, body = self._answers.get(path, (404, {}, b""))
            lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
            lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
            writer.write("\r\n".join(lines).encode() + body)
            await writer.drain()
        writer.close()


class Listener(asyncio.DatagramProtocol):
    """A server on loopback that answers nobody and notes who came, by TCP or UDP."""

    def __init__(self) -> None:
        self.hits: list[str] = []

    @property
    def ways(self) -> set[str]:
        """The attempts that came through: the last part of a request's path, or `udp`."""
        return {hit.split()[1].strip("/?") if " " in hit else hit for hit in self.hits}

    async def hears(self, ways: set[str]) -> bool:
        """Whether all of these attempts come through in the end."""
        return await eventually(lambda: ways <= self.ways)

    async def __aenter__(self) -> Listener:
        self._server = await asyncio.start_server(self._note, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", self.port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._udp.close()
        self._server.close()
        await self._server.wait_closed()

    async def _note(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits.append((await reader.readline()).decode(errors="replace").strip())
        writer.close()

    def datagram_received(self, data: bytes, addr: object) -> None:
        """A datagram, such as WebRTC sends to find its address."""
        self.hits.append("udp")

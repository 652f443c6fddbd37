"""A client's way to a sandbox server: one request, its answer as frames, every one with a deadline.

Invariants: nothing is sent twice, because what got no answer may have run; whatever keeps an answer from coming
(refused, reset, silent, status 500, nonsense) is a `SandboxError` that names the server and the remedy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

import httpx

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._frames import (
    CLIENT_HEADER,
    TOKEN_VARIABLE,
    FrameError,
    FrameReader,
    Header,
    check_token,
    pack,
)
from palaestra.sandboxes._protocol import Stream

GRACE_S = 40.0
"""What a call may take beyond the work that it asks for: a box's own grace, the network, a busy server."""

_CONNECT_S = 10.0
_SILENT_S = 30.0  # a server at work says so every few seconds
_KEEP_S = 15.0  # sooner than the server and the usual proxies, whose closing would look like a lost answer
_MAX_CALLS = 256
_MAX_CREATING = 64
_PIECE = 1 << 20
_SLOWEST = 1 << 20  # bytes a second that a link must carry
_STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")

OnPiece = Callable[[Stream, bytes], None]


class Connection:
    """Calls to one server as one client."""

    def __init__(self, url: str, token: str, client_id: str) -> None:
        self.url = _checked(url)
        headers = {CLIENT_HEADER: client_id, "Accept-Encoding": "identity"}
        if token:
            check_token(token)
            headers["Authorization"] = f"Bearer {token}"
        # a transport of our own, so that no HTTP_PROXY stands between; certificates of the environment still count
        transport = httpx.AsyncHTTPTransport(
            verify=self.url.startswith("https:"),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEP_S),
        )
        self._http = httpx.AsyncClient(
            transport=transport, headers=headers, timeout=httpx.Timeout(_SILENT_S, connect=_CONNECT_S, pool=None)
        )
        self._places = asyncio.Semaphore(_MAX_CALLS)
        # apart, or creations that wait for a box to be closed would take every place to close one
        self._creating = asyncio.Semaphore(_MAX_CREATING)

    async def call(
        self,
        op: str,
        header: Header | None = None,
        blob: bytes = b"",
        *,
        work_s: float = 0.0,
        on_piece: OnPiece | None = None,
    ) -> tuple[Header, bytes]:
        """The last frame of the answer, which may tell an error: see `raise_error`.

        Raises `SandboxError` when there is no answer, and `ConfigError` when the server refuses this client.
        """
        most_s = work_s + GRACE_S + len(blob) / _SLOWEST
        body = pack(header or {}, blob)
        places = self._creating if op == "create" else self._places
        asked_s = time.monotonic()
        try:
            async with asyncio.timeout(most_s) as scope, places:
                waited_s = time.monotonic() - asked_s
                answer, output = await self._exchange(op, body, on_piece)
                if isinstance(answer.get("queue_s"), float):  # what it waited for over there
                    answer["queue_s"] += waited_s
                return answer, output
        except TimeoutError as error:
            if not scope.expired():
                raise  # of `on_piece`
            self._lost(op, f"no answer within {most_s:g} s", error)
        except httpx.HTTPError as error:
            self._lost(op, f"{type(error).__name__}: {error}", error)

    async def aclose(self) -> None:
        """Close every connection; idempotent."""
        await self._http.aclose()

    async def _exchange(self, op: str, body: bytes, on_piece: OnPiece | None) -> tuple[Header, bytes]:
        headers = {"Content-Length": str(len(body))}
        content = body if len(body) <= _PIECE else _pieces(body)
        last: tuple[Header, bytes] | None = None
        frames = FrameReader()
        async with self._http.stream("POST", f"{self.url}/v1/{op}", content=content, headers=headers) as response:
            if response.status_code != 200:
                await self._refused(op, response)
            async for piece in response.aiter_raw():
                for header, blob in self._frames(op, frames, piece):
                    if "stream" in header:
                        if on_piece is not None:
                            on_piece(_STREAMS[bool(header["stream"])], blob)
                    elif "alive" not in header:
                        last = header, blob
        if last is None:
            self._lost(op, "the answer broke off")
        return last

    def _frames(self, op: str, frames: FrameReader, piece: bytes) -> list[tuple[Header, bytes]]:
        try:
            return list(frames.feed(piece))
        except FrameError as error:
            self._lost(op, f"it answers what no Palaestra sandbox server does ({error})", error)

    async def _refused(self, op: str, response: httpx.Response) -> NoReturn:
        text = " ".join((await response.aread())[:500].decode(errors="replace").split())
        if response.status_code in (401, 403):
            raise ConfigError(
                f"the sandbox server at {self.url} refuses this client ({text}): set {TOKEN_VARIABLE} to the token "
                "that the server was started with"
            )
        self._lost(op, f"status {response.status_code} {text}")

    def _lost(self, op: str, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise SandboxError(
            f"no answer to {op} from the sandbox server at {self.url}: {reason}; see whether it runs there "
            "(`palaestra sandbox serve`) and is reached from here"
        ) from cause


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(view), _PIECE):
        yield bytes(view[start : start + _PIECE])


def _checked(url: str) -> str:
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no address of a sandbox server: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is no address of a sandbox server: write http://host:port or https://host")
    return url.rstrip("/")

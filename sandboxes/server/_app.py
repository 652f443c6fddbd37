"""The ASGI application: who may ask, what, and for which box. Needs the extra `tools`.

Invariant: nothing of a request's body is read before its sender has shown the token; every request belongs to one
client, by the random name that it sends, and reaches only boxes of that client.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from palaestra.errors import ConfigError
from palaestra.sandboxes._frames import CLIENT_HEADER, HOLD_S, MAX_HEADER, PROTOCOL, FrameError, FrameReader, Header
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._protocol import SandboxBackend
from palaestra.sandboxes._wire import MAX_BODY
from palaestra.sandboxes.server._answer import Answer, Emit
from palaestra.sandboxes.server._leases import Held, Leases
from palaestra.sandboxes.server._operations import BOX_OPERATIONS, field

_BODY_S = 180.0
_MAX_REQUEST = MAX_BODY + MAX_HEADER + 8
_CLIENT = re.compile(r"[0-9a-f]{32}")
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?")


def create_app(backend: SandboxBackend, *, token: str, lease_s: float, queue_s: float) -> FastAPI:
    """The application over a back end, which it closes at shutdown; without a token only for loopback."""
    leases = Leases(lease_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with leases:
                yield
        finally:
            await backend.aclose()

    app = FastAPI(title="Sandboxes", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    desk = _Desk(backend, leases, queue_s)

    @app.post("/v1/{op}", response_model=None)
    async def call(op: str, request: Request) -> Response:
        refusal = _refusal(request, token)
        if refusal is not None:
            return refusal
        if not desk.knows(op):
            return _plain(404, f"no operation {op!r}")
        try:
            async with asyncio.timeout(_BODY_S):
                header, body = await _read_frame(request)
        except (FrameError, TimeoutError, ClientDisconnect) as error:
            return _plain(413 if isinstance(error, FrameError) else 408, str(error) or "the request did not arrive")
        return desk.answer(op, request.headers[CLIENT_HEADER], header, body)

    return app


class _Desk:
    """Finds who works on a request."""

    def __init__(self, backend: SandboxBackend, leases: Leases, queue_s: float) -> None:
        self._backend = backend
        self._leases = leases
        self._queue_s = queue_s
        self._operations: dict[str, Callable[[str, Header, list[Held]], Awaitable[Header]]] = {
            "capabilities": self._capabilities,
            "close": self._close,
            "create": self._create,
            "goodbye": self._goodbye,
            "heartbeat": self._heartbeat,
            "hello": self._hello,
            "hold": self._hold,
        }

    def knows(self, op: str) -> bool:
        """Whether there is such an operation."""
        return op in BOX_OPERATIONS or op in self._operations

    def answer(self, op: str, client: str, request: Header, body: bytes) -> Answer:
        """The answer to a request, whose box ends when the client does not wait for it."""
        touched: list[Held] = []
        was_in_doubt = self._leases.heard(client)

        async def work(emit: Emit) -> tuple[Header, bytes]:
            if op in BOX_OPERATIONS:
                held = self._leases.get(client, field(request, "box", str))
                touched.append(held)
                return await BOX_OPERATIONS[op](held.box, request, body, emit)
            return await self._operations[op](client, request, touched), b""

        def lost() -> None:
            for held in touched:
                self._leases.drop(held)
            if was_in_doubt:  # the request had been on its way when its client ended
                self._leases.let_go(client)

        return Answer(op, work, lost)

    async def _hello(self, *_: object) -> Header:
        return {
            "protocol": PROTOCOL,
            "backend": self._backend.name,
            "lease_s": self._leases.lease_s,
            "queue_s": self._queue_s,
        }

    async def _capabilities(self, *_: object) -> Header:
        return {"capabilities": sorted(await self._backend.capabilities())}

    async def _create(self, client: str, request: Header, touched: list[Held]) -> Header:
        try:
            spec = SandboxSpec.model_validate(field(request, "spec", dict))
        except ValidationError as error:
            raise ConfigError(f"the sandbox server does not understand the spec: {error}") from error
        box = await self._backend.create(spec)
        held = self._leases.add(client, box)
        touched.append(held)
        return {"box": held.key, "queue_s": getattr(box, "queue_s", 0.0)}

    async def _heartbeat(self, client: str, request: Header, _: list[Held]) -> Header:
        self._leases.renew(client, [key for key in field(request, "boxes", list) if isinstance(key, str)])
        return {}

    async def _hold(self, client: str, *_: object) -> Header:
        with self._leases.hold(client):
            await asyncio.sleep(HOLD_S)
        return {}

    async def _close(self, client: str, request: Header, _: list[Held]) -> Header:
        await self._leases.close(client, field(request, "box", str))
        return {}

    async def _goodbye(self, client: str, *_: object) -> Header:
        await self._leases.close_client(client)
        return {}


def _refusal(request: Request, token: str) -> Response | None:
    if token:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return _plain(401, "no valid token")
    elif not _LOOPBACK.fullmatch(request.headers.get("host", "").lower()):
        # a web page on this machine can reach loopback under a name of its own
        return _plain(403, "without a token only as localhost")
    if not _CLIENT.fullmatch(request.headers.get(CLIENT_HEADER, "")):
        return _plain(400, f"no {CLIENT_HEADER}")  # nor can a web page set a header of its own
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > _MAX_REQUEST:
        return _plain(413, f"more than {_MAX_REQUEST} bytes")
    return None


async def _read_frame(request: Request) -> tuple[Header, bytes]:
    reader = FrameReader(MAX_BODY)
    frames: list[tuple[Header, bytes]] = []
    async for piece in request.stream():
        frames += reader.feed(piece)
        if len(frames) > 1:
            break
    if len(frames) != 1 or not reader.is_between_frames:
        raise FrameError("a request is one frame")
    return frames[0]


def _plain(status: int, text: str) -> Response:
    return PlainTextResponse(text, status, {"Connection": "close"})  # its body may not have been read

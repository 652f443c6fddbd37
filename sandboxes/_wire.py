"""The host's end of a box's channel: one framed request and one answer at a time, every one with a deadline.

Invariant: bytes that come out of a box are never trusted. A frame that is not exactly what may come now is a
`BadFrameError`, and nothing that follows it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from palaestra.sandboxes._egress import BadFrameError, Egress

MAX_BODY = 64 << 20
_FRAME = struct.Struct("!II")
_MAX_HEADER = 1 << 16


class BoxIO(Protocol):
    """Bytes to and from the server in a box."""

    async def read_exactly(self, count: int) -> bytes:
        """Exactly `count` bytes; raises `EOFError` when the box has ended."""

    def write(self, data: bytes) -> None:
        """Queue bytes; raises `EOFError` when the box has ended."""


class NotBegunError(Exception):
    """The box ended before it began what was asked: nothing of it has run."""


class Wire:
    """Requests and their answers. `allow` is the list of destinations that executions may reach."""

    def __init__(self, io: BoxIO, allow: Sequence[str] = ()) -> None:
        self._io = io
        self._allow = allow
        self._num_requests = 0

    async def receive_first(self) -> dict[str, Any]:
        """The server's first frame; raises `EOFError` or `BadFrameError`."""
        return (await self._receive())[0]

    async def call(
        self, request: dict[str, Any], body: bytes, on_output: Callable[[bool, bytes], None] | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """The answer to one request, and its body; `on_output` gets (is_stderr, piece) before it.

        Raises `NotBegunError` when the box ended before it took the request up, `EOFError` when it ended later,
        and `BadFrameError` when it sent what no honest server sends.
        """
        self._num_requests += 1
        number = self._num_requests
        async with contextlib.AsyncExitStack() as stack:
            egress: Egress | None = None
            if self._allow and request["op"] in ("exec", "python"):
                egress = Egress(self._allow, self._send)
                stack.push_async_callback(egress.aclose)
            try:
                self._send({**request, "id": number, "stream": on_output is not None}, body)
                header, blob = await self._receive()
            except EOFError as error:
                raise NotBegunError from error
            if header.get("id") == number and header.get("began") is True:
                header, blob = await self._receive()
            while header.get("id") == number and ("stream" in header or "net" in header):
                if "net" in header:
                    if egress is None:
                        raise BadFrameError
                    egress.take(header, blob)
                elif on_output is None or header["stream"] not in (0, 1):
                    raise BadFrameError
                else:
                    on_output(bool(header["stream"]), blob)
                header, blob = await self._receive()
            if header.get("id") != number:
                raise BadFrameError
            return header, blob

    def _send(self, header: dict[str, Any], body: bytes) -> None:
        text = json.dumps(header).encode()
        self._io.write(b"".join((_FRAME.pack(len(text), len(body)), text, body)))

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        header_size, body_size = _FRAME.unpack(await self._io.read_exactly(_FRAME.size))
        if header_size > _MAX_HEADER or body_size > MAX_BODY:
            raise BadFrameError
        text = await self._io.read_exactly(header_size)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadFrameError from error
        if not isinstance(header, dict):
            raise BadFrameError
        return header, await self._io.read_exactly(body_size)


class StreamIO:
    """`BoxIO` over a socket or a process's pipes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def read_exactly(self, count: int) -> bytes:
        """See `BoxIO.read_exactly`."""
        try:
            return await self.reader.readexactly(count)
        except (asyncio.IncompleteReadError, OSError) as error:  # of any kind: the way to a remote daemon can fail too
            raise EOFError("the sandbox ended") from error

    def write(self, data: bytes) -> None:
        """See `BoxIO.write`."""
        if self._writer.is_closing():
            raise EOFError("the sandbox ended")
        self._writer.write(data)

    def close(self) -> None:
        """Close at once, without sending what is queued."""
        self._writer.transport.abort()

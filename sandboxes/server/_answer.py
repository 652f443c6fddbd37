"""An answer in frames: output as it comes, a sign of life while nothing does, and one last frame.

Invariant: the work ends when the client hangs up or stops reading; `lost` is called for every answer that was not
handed over whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from palaestra.sandboxes._frames import Header, error_header, pack

_ALIVE_S = 5.0
_SEND_S = 60.0
_PIECE = 1 << 20

_log = logging.getLogger(__name__)

Emit = Callable[[Header, bytes], None]
Work = Callable[[Emit], Awaitable[tuple[Header, bytes]]]


class Answer(Response):
    """Runs `work`, whose frames and errors are the body."""

    media_type = "application/octet-stream"

    def __init__(self, op: str, work: Work, lost: Callable[[], None]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._op = op
        self._work = work
        self._lost = lost
        self._pending: list[bytes] = []
        self._changed = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see ASGI."""
        gone = asyncio.create_task(_wait_until_gone(receive), name="client of a sandbox call")
        work = asyncio.create_task(self._last_frame(), name=f"sandbox call {self._op}")
        for task in (gone, work):
            task.add_done_callback(lambda _: self._changed.set())
        is_whole = False
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            is_whole = await self._stream(send, work, gone)
        except TimeoutError:
            _log.warning("a client stopped reading the answer to %s", self._op)
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.wait([gone, work])
            if not is_whole:
                self._lost()

    async def _stream(self, send: Send, work: asyncio.Task[bytes], gone: asyncio.Task[None]) -> bool:
        while not gone.done():
            if not self._changed.is_set():
                try:
                    async with asyncio.timeout(_ALIVE_S):
                        await self._changed.wait()
                except TimeoutError:
                    self._pending.append(pack({"alive": True}))
            self._changed.clear()
            is_over = work.done()
            body = b"".join(self._pending)
            self._pending.clear()
            if is_over:
                body += work.result()
            await _send(send, body, is_over)
            if is_over:
                return not gone.done()
        return False

    async def _last_frame(self) -> bytes:
        try:
            header, blob = await self._work(self._emit)
        except Exception as error:  # of any registered back end: its client must hear of it
            header, blob = error_header(error, self._op), b""
            if header["error"] == "sandbox":
                _log.warning("%s: %s", self._op, header["text"])
        return pack(header, blob)

    def _emit(self, header: Header, blob: bytes) -> None:
        self._pending.append(pack(header, blob))
        self._changed.set()


async def _send(send: Send, body: bytes, is_last: bool) -> None:
    view = memoryview(body)
    for start in range(0, max(1, len(view)), _PIECE):
        more = not is_last or start + _PIECE < len(view)
        async with asyncio.timeout(_SEND_S):
            await send({"type": "http.response.body", "body": bytes(view[start : start + _PIECE]), "more_body": more})


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

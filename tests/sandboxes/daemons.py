"""Stand-ins for a container daemon: one that answers badly, and a way to the real one that can be cut.

Neither ever touches the real daemon but to pass bytes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from palaestra.sandboxes import _containers

VARIABLES = {"docker": "DOCKER_HOST", "podman": "CONTAINER_HOST"}
FAULTS = ("500", "409", "garbage", "close", "hang")
STAGES = ("everything", "images", "create", "attach", "start")
_BODIES = {
    "_ping": b"OK",
    "version": json.dumps({"ApiVersion": "1.41", "Version": "20.10"}).encode(),
    "images": b"{}",
    "containers/json": b"[]",
    "create": b'{"Id": "abc", "Warnings": []}',
}


@contextmanager
def served_at(name: str, path: Path) -> Iterator[None]:
    """Let the back end look for its daemon at this socket."""
    variable = VARIABLES[name]
    before = os.environ.get(variable)
    os.environ[variable] = f"unix://{path}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@asynccontextmanager
async def bad_daemon(fault: str, stage: str) -> AsyncIterator[Path]:
    """A daemon that is honest up to a stage of making a container, and from there on shows the fault."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode()
            await _reply(reader, writer, head, fault, stage)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    with tempfile.TemporaryDirectory(prefix="palaestra-daemon-") as folder:
        path = Path(folder, "socket")
        async with await asyncio.start_unix_server(answer, path):
            yield path


async def _reply(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str, fault: str, stage: str
) -> None:
    path = target.partition("?")[0]
    found = [key for key in _BODIES if path.endswith(key) or f"/{key}/" in path]
    is_attach, is_start = path.endswith("/attach"), path.endswith("/start")
    is_bad = (
        stage == "everything"
        or (stage == "images" and "images" in path)
        or (stage == "create" and path.endswith("create"))
        or (stage == "attach" and is_attach)
        or (stage == "start" and is_start)
    )
    if is_bad:
        await _fail(reader, writer, fault)
    elif path.endswith("/events"):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.read()  # until the other end gives up
    elif is_attach:
        writer.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        await reader.read()  # until the other end gives up
    elif "/containers/" in path and not found:  # remove
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    else:
        body = _BODIES[found[0]] if found else b"{}"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body))
    await writer.drain()


async def _fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str) -> None:
    if fault in ("500", "409"):
        body = json.dumps({"message": "told by\na bad daemon"}).encode()
        head = f"HTTP/1.1 {fault} Bad\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
    elif fault == "garbage":
        writer.write(os.urandom(300))
        await writer.drain()
    elif fault == "hang":
        await reader.read()  # until the other end gives up


class Line:
    """A way to the real daemon of this machine, which can be cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._is_open = asyncio.Event()
        self._is_open.set()

    def cut(self) -> None:
        """End every connection, both ways, and take no more: to both sides the other one was killed."""
        self._is_cut = True
        self._is_open.set()
        for writer in list(self._writers):
            writer.transport.abort()

    def hang(self) -> None:
        """Carry nothing more, and end nothing: to both sides the other one has fallen silent."""
        self._is_open.clear()

    async def carry(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes both ways until one end closes."""
        if self._is_cut:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_unix_connection(target)
        pair = {writer, far_writer}
        self._writers |= pair
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer))
                group.create_task(self._pass(far_reader, writer))
        finally:
            self._writers -= pair
            for one in pair:
                one.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self._is_open.wait()
                writer.write(data)
                await writer.drain()
            await self._is_open.wait()
            writer.write_eof()


@asynccontextmanager
async def line_to_daemon(name: str) -> AsyncIterator[Line]:
    """A line to the daemon of the docker or podman back end."""
    urls = _containers.docker_urls() if name == "docker" else _containers.podman_urls()
    target = urls[0].removeprefix("unix://")
    with tempfile.TemporaryDirectory(prefix="palaestra-line-") as folder:
        line = Line(Path(folder, "socket"))
        server = await asyncio.start_unix_server(lambda *ends: line.carry(target, *ends), line.path)
        try:
            yield line
        finally:
            line.cut()
            server.close()

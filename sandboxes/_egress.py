"""The allow-list of a box: an HTTP proxy on the host's side, reached only over the box's own channel.

Covers: other hosts and ports than the listed, names that resolve to addresses which are not public (the host
itself, its networks, cloud metadata), a second look-up that answers otherwise (the checked address is the one
connected to). Does not cover: what a listed server passes on, other names behind one address (domain fronting),
protocols that do not take an HTTP proxy: those reach nothing.
Invariant: bytes of a box are never trusted; whatever they are costs at most `WINDOW` bytes and a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from palaestra.sandboxes._relay import WINDOW

_MAX_HEAD = 1 << 14
_MAX_CONNECTIONS = 64
_CHUNK = 1 << 15
_HEAD_S = 30.0
_CONNECT_S = 20.0

Send = Callable[[dict[str, Any], bytes], None]


class BadFrameError(Exception):
    """A box sent what no honest server sends."""


class Egress:
    """The connections of one execution. Every one ends with `aclose`."""

    def __init__(self, allow: Sequence[str], send: Send) -> None:
        self._allow = frozenset(allow)
        self._send = send
        self._links: dict[int, _Link] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def take(self, header: dict[str, Any], body: bytes) -> None:
        """A frame of a connection; raises `BadFrameError` when it cannot be one."""
        number, do = header.get("net"), header.get("do")
        if not isinstance(number, int):
            raise BadFrameError
        link = self._links.get(number)
        if do == "open":
            if link is not None or len(self._links) >= _MAX_CONNECTIONS:
                raise BadFrameError
            link = self._links[number] = _Link(number, self._send)
            if len(self._tasks) >= 2 * _MAX_CONNECTIONS:  # many were closed, and still are on their way out
                self._close(link)
                return
            task = self._tasks[number] = asyncio.create_task(self._serve(link), name=f"egress {number}")
            task.add_done_callback(lambda _: self._tasks.pop(number))
        elif link is None:
            return  # closed here, before the box knew
        elif do == "data":
            link.feed(body)
        elif do == "ack":
            link.acknowledge(header.get("count"))
        else:
            self._links.pop(number)
            link.end()
            if not link.is_open:  # nobody waits for what it looks up or connects to
                self._tasks[number].cancel()

    async def aclose(self) -> None:
        """Close every connection and wait until it is."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _serve(self, link: _Link) -> None:
        try:
            async with asyncio.timeout(_HEAD_S):
                head = await link.read_head()
            host, port, first = _parse(head)
            address = await self._resolve(host, port)
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_connection(address, port)
        except _RefusedError as refused:
            await self._refuse(link, refused.status, str(refused))
            return
        except UnicodeError:
            await self._refuse(link, "400 Bad Request", "a name that no name server could know")
            return
        except (TimeoutError, OSError, EOFError) as error:
            await self._refuse(link, "502 Bad Gateway", str(error) or type(error).__name__)
            return
        link.is_open = True
        try:
            if first:
                writer.write(first)
            else:
                await link.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump_in(reader, link))
                group.create_task(_pump_out(link, writer))
        except* (OSError, EOFError):
            pass  # either end went away
        finally:
            writer.transport.abort()
            self._close(link)

    async def _resolve(self, host: str, port: int) -> str:
        """The address to connect to; raises `_RefusedError` unless the list has the destination."""
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        suffixes = {f"*.{host.split('.', count)[count]}:{port}" for count in range(1, host.count(".") + 1)}
        if name not in self._allow and not suffixes & self._allow:
            raise _RefusedError("403 Forbidden", f"{name} is not in this sandbox's allow-list")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if _is_address(host) or all(ipaddress.ip_address(address).is_global for address in addresses):
            return addresses[0]
        raise _RefusedError("403 Forbidden", f"{host} is no public address; list the address itself to allow it")

    async def _refuse(self, link: _Link, status: str, reason: str) -> None:
        text = f"palaestra: {reason}\n".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\nConnection: close"
        with contextlib.suppress(EOFError):
            await link.send(head.encode() + b"\r\n\r\n" + text)
        self._close(link)

    def _close(self, link: _Link) -> None:
        if self._links.pop(link.number, None) is not None:
            with contextlib.suppress(EOFError):
                self._send({"net": link.number, "do": "close"}, b"")


class _RefusedError(Exception):
    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Link:
    """One connection of the box, as a pair of bounded byte streams."""

    def __init__(self, number: int, send: Send) -> None:
        self.number = number
        self._send = send
        self._data = bytearray()
        self._has_ended = False
        self._num_unacknowledged = 0
        self._changed = asyncio.Event()
        self.is_open = False
        """Whether it is connected to its destination."""

    def feed(self, body: bytes) -> None:
        if len(self._data) + len(body) > WINDOW + _CHUNK:
            raise BadFrameError
        self._data += body
        self._changed.set()

    def acknowledge(self, count: object) -> None:
        if not isinstance(count, int) or not 0 <= count <= self._num_unacknowledged:
            raise BadFrameError
        self._num_unacknowledged -= count
        self._changed.set()

    def end(self) -> None:
        self._has_ended = True
        self._changed.set()

    async def read_head(self) -> bytes:
        """The request up to and including its empty line."""
        while (end := self._data.find(b"\r\n\r\n")) < 0:
            if len(self._data) > _MAX_HEAD:
                raise _RefusedError("431 Request Header Fields Too Large", "the request's head is too long")
            await self._wait()
        return self._take(end + 4)

    async def read(self) -> bytes:
        """Some bytes; raises `EOFError` when the box has closed the connection."""
        while not self._data:
            await self._wait()
        return self._take(_CHUNK)

    async def send(self, data: bytes) -> None:
        """Bytes to the box, once it has taken the ones before."""
        while self._num_unacknowledged > WINDOW - _CHUNK:
            await self._wait()
        self._num_unacknowledged += len(data)
        self._send({"net": self.number, "do": "data"}, data)

    def _take(self, count: int) -> bytes:
        data = bytes(self._data[:count])
        del self._data[:count]
        self._send({"net": self.number, "do": "ack", "count": len(data)}, b"")
        return data

    async def _wait(self) -> None:
        if self._has_ended:
            raise EOFError
        self._changed.clear()
        await self._changed.wait()


async def _pump_in(reader: asyncio.StreamReader, link: _Link) -> None:
    while data := await reader.read(_CHUNK):
        await link.send(data)
    raise EOFError


async def _pump_out(link: _Link, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(await link.read())
        await writer.drain()


def _parse(head: bytes) -> tuple[str, int, bytes]:
    """Host, port, and what to send first: nothing for CONNECT, else the request in its plain form."""
    line, _, rest = head.partition(b"\r\n")
    try:
        method, target, version = line.decode("ascii").split(" ")
        url = urlsplit(f"//{target}" if method == "CONNECT" else target)
        host, port = (url.hostname or "").rstrip("."), url.port
    except ValueError as error:
        raise _RefusedError("400 Bad Request", "not a request to a proxy") from error
    if not host or (method == "CONNECT" and port is None) or (method != "CONNECT" and url.scheme != "http"):
        raise _RefusedError("400 Bad Request", "not a request to a proxy")
    if method == "CONNECT":
        return host, port or 443, b""
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    lines = [each for each in rest.split(b"\r\n") if not each.lower().startswith((b"proxy-", b"connection:"))]
    lines.insert(len(lines) - 2, b"Connection: close")
    return host, port or 80, f"{method} {path} {version}\r\n".encode() + b"\r\n".join(lines)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

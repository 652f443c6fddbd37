"""The end of the allow-list proxy that is inside a box: carries bytes, decides nothing.

Standard library only; runs inside, in the server. Connections to a port of the box's own loopback are carried
to the host over the box's channel, where `_egress` decides. Invariant: neither end sends more than `WINDOW` bytes
of a connection that the other has not taken, so that a slow reader holds nobody's memory.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING, Any

from palaestra.sandboxes._channel import Channel

if TYPE_CHECKING:
    from palaestra.sandboxes._execution import Execution

WINDOW = 1 << 18
_MAX_CONNECTIONS = 64
_CHUNK = 1 << 15


class _Connection:
    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        """Never used again, unlike the descriptor: the host may still speak of one that has closed."""
        self.sock = sock
        self.fd = sock.fileno()
        self.to_agent = bytearray()
        self.num_unacknowledged = 0
        self.is_closing = False
        """The host has closed it: it goes when everything is written."""

    @property
    def is_closed(self) -> bool:
        """Whether its socket is closed."""
        return self.sock.fileno() < 0


class Relay:
    """Listens in the box and speaks with the host while an execution runs."""

    def __init__(self, channel: Channel, port: int) -> None:
        self._channel = channel
        self._listener = socket.create_server(("127.0.0.1", port), backlog=_MAX_CONNECTIONS)
        self._listener.setblocking(False)
        self._connections: dict[int, _Connection] = {}
        self._execution: Execution | None = None
        self._number = 0
        self._num_opened = 0
        url = f"http://127.0.0.1:{port}"
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        self.environment = {**dict.fromkeys(names, url), "no_proxy": "127.0.0.1,localhost"}

    def begin(self, execution: Execution, number: int) -> None:
        """Serve the connections of one execution, the request with this number."""
        self._execution, self._number = execution, number
        execution.others[self._channel.read_fd] = self._on_frame
        execution.others[self._listener.fileno()] = self._on_connection
        execution.poll.register(self._listener, select.POLLIN)

    def end(self) -> None:
        """Close every connection; the host closes its ends when it has the answer."""
        for connection in self._connections.values():
            connection.sock.close()
        self._connections.clear()
        self._execution = None
        while True:  # what came too late
            try:
                self._listener.accept()[0].close()
            except OSError:
                return

    def _on_connection(self, fd: int, event: int) -> None:
        assert self._execution is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._connections) >= _MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        self._num_opened += 1
        connection = self._connections[self._num_opened] = _Connection(self._num_opened, sock)
        self._execution.others[connection.fd] = lambda _, event: self._on_event(connection, event)
        self._send(connection, "open")
        self._watch(connection)

    def _on_event(self, connection: _Connection, event: int) -> None:
        try:
            if event & select.POLLOUT:
                self._flush(connection)
            has_gone = event & (select.POLLHUP | select.POLLERR)
            if connection.is_closed:
                return
            if has_gone and connection.num_unacknowledged >= WINDOW:  # told unasked, and there is no room for the rest
                self._close(connection)
            elif has_gone or event & select.POLLIN:
                chunk = os.read(connection.fd, _CHUNK)
                if not chunk:
                    self._close(connection)
                    return
                connection.num_unacknowledged += len(chunk)
                self._send(connection, "data", chunk)
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
        self._watch(connection)

    def _on_frame(self, fd: int, event: int) -> None:
        header = self._channel.receive()
        body = self._channel.read()
        connection = self._connections.get(header.get("net", 0))
        if connection is None:
            return  # closed meanwhile
        if header["do"] == "ack":
            connection.num_unacknowledged -= header["count"]
        elif header["do"] == "data":
            connection.to_agent += body
        else:
            connection.is_closing = True
        try:
            self._flush(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
        self._watch(connection)

    def _flush(self, connection: _Connection) -> None:
        while connection.to_agent:
            num_written = os.write(connection.fd, connection.to_agent[:_CHUNK])
            del connection.to_agent[:num_written]
            self._send(connection, "ack", count=num_written)
        if connection.is_closing:
            self._close(connection)

    def _watch(self, connection: _Connection) -> None:
        if connection.is_closed or self._execution is None:
            return
        events = select.POLLIN if connection.num_unacknowledged < WINDOW else 0
        self._execution.poll.register(connection.fd, events | (select.POLLOUT if connection.to_agent else 0))

    def _close(self, connection: _Connection) -> None:
        assert self._execution is not None
        if self._connections.pop(connection.number, None) is None:
            return
        self._execution.poll.unregister(connection.fd)
        del self._execution.others[connection.fd]
        connection.sock.close()
        self._send(connection, "close")

    def _send(self, connection: _Connection, do: str, body: bytes = b"", **more: Any) -> None:
        self._channel.send({"id": self._number, "net": connection.number, "do": do, **more}, body)

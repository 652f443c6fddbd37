"""Framed requests and answers over two file descriptors, from inside a box.

Standard library only; runs inside. Invariant: when the host's end closes, or the box's lifetime is over, this
process ends at once, and with it, as it is pid 1, the box.
"""

from __future__ import annotations

import json
import math
import os
import select
import struct
import time
from typing import Any

FRAME = struct.Struct("!II")
_MAX_BODY = 1 << 27
_CHUNK = 1 << 20
_NO_WAIT = 0
_LONGEST_WAIT_MS = 60_000  # `poll` takes no more than a number of 32 bits


class Channel:
    """One end of the connection to the host. The body of a frame is read by whoever needs it, with `read`."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self._write_fd = write_fd
        self._unread = 0
        self.deadline = math.inf
        """When the box's lifetime is over, on the monotonic clock."""

    def receive(self) -> dict[str, Any]:
        """The header of the next frame, whenever it comes; what was not read of the last frame is skipped."""
        while self._unread:
            self.read(min(self._unread, _CHUNK))
        self._wait()
        header_size, body_size = FRAME.unpack(self._exactly(FRAME.size))
        if header_size + body_size > _MAX_BODY:
            os._exit(1)
        header: dict[str, Any] = json.loads(self._exactly(header_size))
        self._unread = body_size
        return header

    @property
    def unread(self) -> int:
        """Bytes of the frame's body that nobody has read yet."""
        return self._unread

    def read(self, count: int | None = None) -> bytes:
        """The next `count` bytes of the frame's body, or the rest of it."""
        count = self._unread if count is None else min(count, self._unread)
        self._unread -= count
        return self._exactly(count)

    def copy_to(self, fd: int) -> None:
        """Write the rest of the frame's body to a file, without holding it."""
        while self._unread:
            view = memoryview(self.read(_CHUNK))
            while view:
                view = view[os.write(fd, view) :]

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Write one frame."""
        text = json.dumps(header).encode()
        self._write(b"".join((FRAME.pack(len(text), len(body)), text, body)))

    def is_waiting(self) -> bool:
        """Whether the host has sent something that was not read yet."""
        return bool(self._unread or select.select([self.read_fd], [], [], 0)[0])

    def _wait(self) -> None:
        if self.deadline == math.inf:
            return
        poll = select.poll()
        poll.register(self.read_fd, select.POLLIN)
        while not poll.poll(milliseconds_until(self.deadline)):
            if time.monotonic() >= self.deadline:
                os._exit(0)

    def send_file(self, header: dict[str, Any], fd: int, count: int) -> None:
        """Write one frame whose body is the next `count` bytes of a file, without holding them.

        Where the file does not give them the frame cannot be kept: then this process ends, by no fault of the agent's.
        """
        text = json.dumps(header).encode()
        self._write(FRAME.pack(len(text), count) + text)
        while count:
            chunk = _piece(fd, count)
            self._write(chunk)
            count -= len(chunk)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except OSError:
            os._exit(0)

    def _exactly(self, count: int) -> bytes:
        chunks = []
        while count:
            chunk = _piece(self.read_fd, count)
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)


def _piece(fd: int, count: int) -> bytes:
    """Some of the next `count` bytes, at least one; this process ends where there are none."""
    try:
        chunk = os.read(fd, min(count, _CHUNK))
    except OSError:
        chunk = b""
    if not chunk:
        os._exit(0)
    return chunk


def milliseconds_until(moment: float) -> int:
    """How long to poll for a moment on the monotonic clock, at most; look at the clock again afterwards."""
    return min(_LONGEST_WAIT_MS, max(_NO_WAIT, math.ceil(1000 * (moment - time.monotonic()))))

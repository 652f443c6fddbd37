"""What travels between a sandbox server and its clients: frames of a JSON header and raw bytes, in HTTP bodies.

Invariants: bytes never travel as JSON text; a frame larger than its reader allows is refused before it is kept; an
error keeps its kind, so that the agent's doing, a bad argument and a broken machine stay apart across the wire.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._protocol import Ended, ExecResult
from palaestra.sandboxes._wire import MAX_BODY

PROTOCOL = 2
"""Raised with every change that the other side must know of."""
HOLD_S = 3600.0
"""A client's hold on its boxes is one call that lasts so long, and is then made again."""
MAX_HEADER = 8 << 20
MAX_BLOB = 2 * MAX_BODY
"""An archive is larger than the files that it may hold."""
CLIENT_HEADER = "X-Palaestra-Client"
TOKEN_VARIABLE = "PALAESTRA_SANDBOX_TOKEN"

_SIZES = struct.Struct("!II")
_FILE_OPS = frozenset({"read", "write", "put", "get", "snapshot", "restore"})

Header = dict[str, Any]


def check_token(token: str) -> None:
    """Raise `ConfigError`, which does not tell it, for a token that no header can carry or that is soon guessed."""
    if len(token) < 16 or not token.isascii() or not token.isprintable() or token != token.strip():
        raise ConfigError(
            f"{TOKEN_VARIABLE} must be at least 16 printable ASCII characters, without spaces or a line end around them"
        )


class FrameError(ValueError):
    """The bytes are no frames of this protocol, or too many."""


def pack(header: Mapping[str, Any], blob: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(header).encode()
    return b"".join((_SIZES.pack(len(text), len(blob)), text, blob))


class FrameReader:
    """Frames out of bytes that come in pieces."""

    def __init__(self, max_blob: int = MAX_BLOB) -> None:
        self._max_blob = max_blob
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[Header, bytes]]:
        """The frames that are whole with this piece; raises `FrameError`."""
        self._bytes += piece
        while len(self._bytes) >= _SIZES.size:
            header_size, blob_size = _SIZES.unpack_from(self._bytes)
            if header_size > MAX_HEADER or blob_size > self._max_blob:
                raise FrameError(f"a frame of {header_size} and {blob_size} bytes is more than is taken")
            split = _SIZES.size + header_size
            if len(self._bytes) < split + blob_size:
                return
            header, blob = bytes(self._bytes[_SIZES.size : split]), bytes(self._bytes[split : split + blob_size])
            del self._bytes[: split + blob_size]
            yield _parse(header), blob

    @property
    def is_between_frames(self) -> bool:
        """Whether nothing is left over."""
        return not self._bytes


def _parse(text: bytes) -> Header:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError("a frame's header is no JSON") from error
    if not isinstance(header, dict):
        raise FrameError("a frame's header is no table")
    return header


def result_frame(result: ExecResult) -> tuple[Header, bytes]:
    """Header and bytes of what an execution left."""
    header = {
        "ended": result.ended.value,
        "exit_code": result.exit_code,
        "signal": result.signal,
        "stdout_bytes": len(result.stdout),
        "stdout_total": result.stdout_total,
        "stderr_total": result.stderr_total,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "num_survivors": result.num_survivors,
        "queue_s": result.queue_s,
    }
    return header, result.stdout + result.stderr


def result_of(header: Header, blob: bytes) -> ExecResult:
    """The inverse of `result_frame`; raises `KeyError`, `TypeError` or `ValueError` for what it never makes."""
    split = int(header["stdout_bytes"])
    exit_code, signal = header["exit_code"], header["signal"]
    if not 0 <= split <= len(blob):
        raise ValueError(f"{split} of {len(blob)} bytes")
    return ExecResult(
        ended=Ended(header["ended"]),
        exit_code=None if exit_code is None else int(exit_code),
        signal=None if signal is None else int(signal),
        stdout=blob[:split],
        stderr=blob[split:],
        stdout_total=int(header["stdout_total"]),
        stderr_total=int(header["stderr_total"]),
        wall_s=float(header["wall_s"]),
        cpu_s=float(header["cpu_s"]),
        num_survivors=int(header["num_survivors"]),
        queue_s=float(header["queue_s"]),
    )


def error_header(error: Exception, op: str) -> Header:
    """An error as a header; one that no operation should raise arrives as a `SandboxError`."""
    if isinstance(error, OSError) and error.errno and isinstance(error.filename, str) and op in _FILE_OPS:
        return {"error": "os", "errno": error.errno, "text": error.strerror, "filename": error.filename}
    if isinstance(error, ConfigError):
        return {"error": "config", "text": str(error)}
    if isinstance(error, SandboxError):
        return {"error": "sandbox", "text": str(error)}
    if isinstance(error, ValueError):
        return {"error": "value", "text": str(error)}
    return {"error": "sandbox", "text": f"the sandbox server failed at {op}: {type(error).__name__}: {error}"}


def raise_error(header: Header) -> NoReturn:
    """The inverse of `error_header`."""
    kind, text = header["error"], str(header.get("text"))
    if kind == "os":
        raise OSError(int(header["errno"]), text, str(header["filename"]))
    if kind == "config":
        raise ConfigError(text)
    if kind == "value":
        raise ValueError(text)
    raise SandboxError(text)

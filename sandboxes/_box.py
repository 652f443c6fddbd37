"""The host's end of a box: one framed request and one answer at a time, every one with a deadline.

Invariant: bytes that come out of a box are never trusted. An answer that is not exactly what was asked for,
or a box that ends while the agent's code runs, is reported as the agent's doing and the box is destroyed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from palaestra.errors import SandboxError
from palaestra.sandboxes._protocol import Ended, ExecResult, Limits

_FRAME = struct.Struct("!II")
_MAX_HEADER = 1 << 16
_MAX_FILE = 64 << 20
_GRACE_S = 15.0  # beyond what the server was given: the machine may be busy
_INODES = 16384


class BoxIO(Protocol):
    """Bytes to and from the server in a box."""

    async def read_exactly(self, count: int) -> bytes:
        """Exactly `count` bytes; raises `EOFError` when the box has ended."""

    def write(self, data: bytes) -> None:
        """Queue bytes; raises `EOFError` when the box has ended."""


class BoxHost(Protocol):
    """What holds a box on the host."""

    def kill(self) -> None:
        """End everything in the box now, without waiting."""

    async def release(self) -> None:
        """Wait until nothing of the box is left and remove its traces. Called once, after `kill`."""

    def count_oom_kills(self) -> int:
        """Processes of the box that ran out of memory since the last call, where the host can tell."""


class _BadFrameError(Exception):
    pass


def server_config(limits: Limits, *, memory_per_process: bool, nproc: bool) -> dict[str, Any]:
    """The configuration of the in-box server."""
    return {
        **limits.model_dump(),
        "inodes": _INODES,
        "memory_per_process": memory_per_process,
        "nproc": nproc,
    }


class Box:
    """A `Sandbox` behind a byte channel; the same for every back end."""

    def __init__(self, box_id: str, io: BoxIO, host: BoxHost, limits: Limits) -> None:
        self.id = box_id
        self._io = io
        self._host = host
        self._limits = limits
        self._lock = asyncio.Lock()
        self._num_requests = 0
        self._ended = ""
        self._released: asyncio.Future[None] | None = None
        self.on_closed: Callable[[Box], object] = lambda _: None

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait for the server's first frame; raises `SandboxError` when the box could not be set up."""
        try:
            async with asyncio.timeout(timeout_s):
                header, _ = await self._receive()
        except (EOFError, TimeoutError, _BadFrameError) as error:
            raise SandboxError(f"sandbox {self.id} did not start within {timeout_s:g} s: {error}") from error
        if header.get("ready") is not True:
            raise SandboxError(f"sandbox {self.id} could not be set up: {header.get('fatal')}")

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        wall_s: float | None = None,
    ) -> ExecResult:
        """See `Sandbox.exec`. A program that is not there ends with code 127, as in a shell."""
        if not argv:
            raise ValueError("argv is empty")
        request = {"op": "exec", "argv": list(argv), "cwd": _path(cwd), "env": dict(env or {})}
        return await self._execute(request, stdin, wall_s)

    async def run_python(self, code: str, *, stdin: bytes = b"", wall_s: float | None = None) -> ExecResult:
        """See `Sandbox.run_python`. `/workspace` is last on `sys.path`; `random` starts from a fixed seed."""
        source = code.encode("utf-8", errors="surrogatepass")
        return await self._execute({"op": "python", "code_bytes": len(source)}, source + stdin, wall_s)

    async def read_file(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """See `Sandbox.read_file`. A symbolic link is refused, and so is a file larger than `max_bytes`."""
        if not 0 <= max_bytes <= _MAX_FILE:
            raise ValueError(f"max_bytes must be within 0..{_MAX_FILE}, not {max_bytes}")
        _, body = await self._transfer({"op": "read", "path": _path(path), "max_bytes": max_bytes}, b"")
        return body

    async def write_file(self, path: str, data: bytes) -> None:
        """See `Sandbox.write_file`."""
        if len(data) > _MAX_FILE:
            raise ValueError(f"{len(data)} bytes are more than the {_MAX_FILE} that one write takes")
        await self._transfer({"op": "write", "path": _path(path)}, data)

    async def aclose(self) -> None:
        """See `Sandbox.aclose`."""
        self._end("closed")
        if self._released is None:
            self._released = asyncio.ensure_future(self._release())
        await asyncio.shield(self._released)  # a cancelled caller must not leave a box half closed

    async def __aenter__(self) -> Box:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _release(self) -> None:
        try:
            await self._host.release()
        finally:
            self.on_closed(self)

    async def _execute(self, request: dict[str, Any], body: bytes, wall_s: float | None) -> ExecResult:
        if len(body) > _MAX_FILE:
            raise ValueError(f"{len(body)} bytes of input are more than the {_MAX_FILE} that one execution takes")
        wall_s = self._limits.wall_s if wall_s is None else min(wall_s, self._limits.wall_s)
        began = asyncio.get_running_loop().time()
        try:
            header, output = await self._call({**request, "wall_s": wall_s}, body, wall_s)
            return self._result(header, output)
        except (EOFError, _BadFrameError):
            self._end("destroyed by the agent's code")
            was_oom = self._host.count_oom_kills() > 0
        return ExecResult(
            ended=Ended.OOM if was_oom else Ended.SANDBOX_KILLED,
            exit_code=None,
            signal=None,
            stdout=b"",
            stderr=b"",
            stdout_total=0,
            stderr_total=0,
            wall_s=asyncio.get_running_loop().time() - began,
        )

    async def _transfer(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            header, blob = await self._call(request, body, _GRACE_S)
        except (EOFError, _BadFrameError) as error:
            self._end("it died")
            raise SandboxError(f"sandbox {self.id} died during {request['op']} {request['path']!r}") from error
        if "errno" in header:
            raise OSError(int(header["errno"]), str(header.get("error")), request["path"])
        return header, blob

    async def _call(self, request: dict[str, Any], body: bytes, work_s: float) -> tuple[dict[str, Any], bytes]:
        async with self._lock:
            if self._ended:
                raise SandboxError(f"sandbox {self.id} is unusable: {self._ended}")
            self._num_requests += 1
            number = self._num_requests
            try:
                async with asyncio.timeout(work_s + _GRACE_S):
                    self._send({**request, "id": number}, body)
                    header, blob = await self._receive()
            except TimeoutError as error:
                self._end("it stopped answering")
                raise SandboxError(f"sandbox {self.id} did not answer within {work_s + _GRACE_S:g} s") from error
            except asyncio.CancelledError:
                self._end("a request was cancelled")  # its answer would be taken for the next one's
                raise
            if header.get("id") != number:
                raise _BadFrameError
            return header, blob

    def _send(self, header: dict[str, Any], body: bytes) -> None:
        text = json.dumps(header).encode()
        self._io.write(b"".join((_FRAME.pack(len(text), len(body)), text, body)))

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        header_size, body_size = _FRAME.unpack(await self._io.read_exactly(_FRAME.size))
        if header_size > _MAX_HEADER or body_size > _MAX_FILE:
            raise _BadFrameError
        try:
            header = json.loads(await self._io.read_exactly(header_size))
        except ValueError as error:
            raise _BadFrameError from error
        if not isinstance(header, dict):
            raise _BadFrameError
        return header, await self._io.read_exactly(body_size)

    def _result(self, header: dict[str, Any], output: bytes) -> ExecResult:
        if "errno" in header:
            # the server itself could not fork or make a pipe: the machine or the agent's leftovers, not a result
            self._end(f"its server failed: {header.get('error')}")
            raise SandboxError(f"sandbox {self.id}: {header.get('error')}")
        try:
            status, split = int(header["status"]), int(header["stdout_bytes"])
            oom_kills = int(header["oom_kills"]) + (self._host.count_oom_kills() if status else 0)
            if not 0 <= split <= len(output) or split > int(header["stdout_total"]):
                raise _BadFrameError
            ended = _ended(str(header["stopped"]), status, float(header["cpu_s"]), oom_kills, self._limits)
            return ExecResult(
                ended=ended,
                exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                stdout=output[:split],
                stderr=output[split:],
                stdout_total=int(header["stdout_total"]),
                stderr_total=int(header["stderr_total"]),
                wall_s=float(header["wall_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _BadFrameError from error

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = reason
            self._host.kill()


def _ended(stopped: str, status: int, cpu_s: float, oom_kills: int, limits: Limits) -> Ended:
    if stopped:
        return Ended.WALL_TIMEOUT if stopped == "wall" else Ended.OUTPUT_LIMIT
    if status and oom_kills:
        return Ended.OOM
    if not os.WIFSIGNALED(status):
        return Ended.EXIT
    # The signal alone could be the agent's own. The kernel's limit counts whole ticks and the usage does not, so on
    # a busy machine the usage is smaller; the hard limit, with SIGKILL, is a second above the soft one.
    least_s: dict[int, float] = {signal.SIGXCPU: 0.5 * limits.cpu_s, signal.SIGKILL: limits.cpu_s}
    by_limit = cpu_s >= least_s.get(os.WTERMSIG(status), math.inf)
    return Ended.CPU_TIMEOUT if by_limit else Ended.SIGNAL


def _path(path: str) -> str:
    if "\0" in path or not path:
        raise ValueError(f"not a file path: {path!r}")
    return path

"""One box on a server, for its client.

Invariant: a box whose answer was lost or not waited for is unusable from then on: what it did meanwhile is not known,
and the server ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from palaestra.errors import SandboxError
from palaestra.sandboxes._archives import pack_files, unpack_files
from palaestra.sandboxes._frames import Header, raise_error, result_of
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._protocol import (
    MAX_TREE_BYTES,
    MAX_TREE_FILES,
    ExecResult,
    OnOutput,
    Snapshot,
    Usage,
)
from palaestra.sandboxes._remote_http import Connection
from palaestra.sandboxes._wire import MAX_BODY

_CLOSE_S = 30.0
_TREE_S = 75.0


class RemoteSandbox:
    """A `Sandbox` on a server; `queue_s` is the time that its creation waited for its turn there."""

    def __init__(
        self, connection: Connection, key: str, spec: SandboxSpec, *, queue_s: float, max_queue_s: float
    ) -> None:
        self.id = f"remote-{key[:12]}"  # the rest of the key is nobody else's business
        self.key = key
        self.handle = f"server {connection.url}"
        self.queue_s = queue_s
        self.on_closed: Callable[[RemoteSandbox], object] = lambda _: None
        self._connection = connection
        self._limits = spec.limits
        self._max_queue_s = max_queue_s
        self._lock = asyncio.Lock()
        self._ended = ""
        self._is_gone = False
        self._closing: asyncio.Future[None] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it is unusable."""
        return bool(self._ended)

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        wall_s: float | None = None,
        on_output: OnOutput | None = None,
    ) -> ExecResult:
        """See `Sandbox.exec`."""
        request = {"argv": list(argv), "cwd": cwd, "env": dict(env or {})}
        return await self._execute("exec", request, stdin, wall_s, on_output)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", wall_s: float | None = None, on_output: OnOutput | None = None
    ) -> ExecResult:
        """See `Sandbox.run_python`."""
        source = code.encode("utf-8", errors="surrogatepass")
        return await self._execute("python", {"code_bytes": len(source)}, source + stdin, wall_s, on_output)

    async def read_file(self, path: str, *, offset: int = 0, max_bytes: int = 1 << 20) -> bytes:
        """See `Sandbox.read_file`."""
        return (await self._call("read", {"path": path, "offset": offset, "max_bytes": max_bytes}))[1]

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `Sandbox.write_file`."""
        await self._call("write", {"path": path, "mode": mode}, data)

    async def put_tree(self, files: Mapping[str, bytes] | bytes, path: str = "/workspace") -> None:
        """See `Sandbox.put_tree`."""
        archive = files if isinstance(files, bytes) else pack_files(files)
        await self._call("put", {"path": path}, archive, work_s=_TREE_S)

    async def get_tree(
        self, path: str = "/workspace", *, max_bytes: int = MAX_TREE_BYTES, max_files: int = MAX_TREE_FILES
    ) -> dict[str, bytes]:
        """See `Sandbox.get_tree`."""
        request = {"path": path, "max_bytes": max_bytes, "max_files": max_files}
        return unpack_files((await self._call("get", request, work_s=_TREE_S))[1], path, max_bytes)

    async def snapshot(self) -> Snapshot:
        """See `Sandbox.snapshot`."""
        return Snapshot((await self._call("snapshot", {}, work_s=_TREE_S))[1])

    async def restore(self, snapshot: Snapshot) -> None:
        """See `Sandbox.restore`."""
        await self._call("restore", {}, snapshot.archive, work_s=_TREE_S)

    async def stats(self) -> Usage:
        """See `Sandbox.stats`."""
        header, _ = await self._call("stats", {})
        try:
            return Usage(**header["usage"])
        except (KeyError, TypeError) as error:
            raise self._nonsense("stats") from error

    async def renew(self) -> None:
        """See `Sandbox.renew`."""
        await self._call("renew", {})

    async def aclose(self) -> None:
        """See `Sandbox.aclose`.

        Raises `SandboxError` when the server does not answer; it then ends the box with the lease.
        """
        self._end("closed")
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    def forget(self) -> None:
        """Take note that the server was told to close it with all others."""
        self._end("closed")
        self._is_gone = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _close(self) -> None:
        try:
            if not self._is_gone:
                header, _ = await self._connection.call("close", {"box": self.key}, work_s=_CLOSE_S)
                if "error" in header:
                    raise_error(header)
        finally:
            self.on_closed(self)

    async def _execute(
        self, op: str, request: Header, body: bytes, wall_s: float | None, on_output: OnOutput | None
    ) -> ExecResult:
        work_s = self._limits.wall_s if wall_s is None else min(wall_s, self._limits.wall_s)
        request |= {"wall_s": wall_s, "stream": on_output is not None}
        header, output = await self._call(op, request, body, work_s=work_s + self._max_queue_s, on_output=on_output)
        try:
            return result_of(header, output)
        except (KeyError, TypeError, ValueError) as error:
            raise self._nonsense(op) from error

    async def _call(
        self, op: str, request: Header, body: bytes = b"", *, work_s: float = 0.0, on_output: OnOutput | None = None
    ) -> tuple[Header, bytes]:
        """One request at a time, as on this host; an error of the server's is raised as what it was."""
        if len(body) > MAX_BODY:
            raise ValueError(f"{len(body)} bytes are more than the {MAX_BODY} that one call takes")
        async with self._lock:
            if self._ended:
                raise SandboxError(f"sandbox {self.id} is unusable: {self._ended}")
            try:
                header, blob = await self._connection.call(
                    op, {"box": self.key, **request}, body, work_s=work_s, on_piece=on_output
                )
            except SandboxError:
                self._end(f"its server gave no answer to {op}")
                raise
            except BaseException:  # cancelled, or `on_output` raised
                self._end("a request was cancelled")
                raise
        if "error" in header:
            raise_error(header)
        return header, blob

    def _nonsense(self, op: str) -> SandboxError:
        self._end("its server answered nonsense")
        return SandboxError(f"the sandbox server at {self._connection.url} answered nonsense to {op}")

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason

"""A box behind a byte channel: what is asked of it, and whose fault it is when it ends.

Invariants: a box that ends while the agent's code runs is the agent's doing unless the host can tell that it was
not; one that ends before or between executions never is, unless its own memory ran out. Either way it is destroyed
and never used again, and what the agent ended stays its doing.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from palaestra.errors import SandboxError
from palaestra.sandboxes._archives import pack_files, unpack_files
from palaestra.sandboxes._egress import BadFrameError
from palaestra.sandboxes._host import HOST_MEMORY, BoxHost, Death, WhoseMemory, ended, not_by_agent
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._protocol import (
    MAX_TREE_BYTES,
    MAX_TREE_FILES,
    Ended,
    ExecResult,
    OnOutput,
    Snapshot,
    Usage,
)
from palaestra.sandboxes._wire import MAX_BODY, BoxIO, NotBegunError, Wire

_GRACE_S = 15.0  # beyond what the server was given: the machine may be busy
_TREE_S = 60.0
_DESTROYED = "destroyed by the agent's code"


class Box:
    """A `Sandbox` behind a byte channel; the same for every back end on this host."""

    def __init__(self, box_id: str, io: BoxIO, host: BoxHost, spec: SandboxSpec) -> None:
        self.id = box_id
        self.handle = host.handle
        self._wire = Wire(io, spec.allow)
        self._host = host
        self._limits = spec.limits
        self._lock = asyncio.Lock()
        self._ended = ""
        self._outcome: Ended | None = None
        """How the agent's code ended the box, when it did."""
        self._lease_began_s = asyncio.get_running_loop().time()
        self._released: asyncio.Future[None] | None = None
        self.on_closed: Callable[[Box], object] = lambda _: None

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait for the server's first frame; raises `SandboxError` when the box could not be set up."""
        try:
            async with asyncio.timeout(timeout_s):
                header = await self._wire.receive_first()
        except (EOFError, TimeoutError, BadFrameError) as error:
            raise SandboxError(f"sandbox {self.id} did not start within {timeout_s:g} s: {error}") from error
        if header.get("ready") is not True:
            raise SandboxError(f"sandbox {self.id} could not be set up: {header.get('fatal')}")
        await self.renew()  # its limits hold from here on, so it may fork what will run the agent's code

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
        """See `Sandbox.exec`. A program that is not there ends with code 127, as in a shell."""
        if not argv:
            raise ValueError("argv is empty")
        request = {"op": "exec", "argv": list(argv), "cwd": _path(cwd), "env": dict(env or {})}
        return await self._execute(request, stdin, wall_s, on_output)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", wall_s: float | None = None, on_output: OnOutput | None = None
    ) -> ExecResult:
        """See `Sandbox.run_python`. `/workspace` is last on `sys.path`; `random` starts from a fixed seed."""
        source = code.encode("utf-8", errors="surrogatepass")
        return await self._execute({"op": "python", "code_bytes": len(source)}, source + stdin, wall_s, on_output)

    async def read_file(self, path: str, *, offset: int = 0, max_bytes: int = 1 << 20) -> bytes:
        """See `Sandbox.read_file`. A symbolic link is refused, and so are more than `max_bytes`."""
        if not 0 <= max_bytes <= MAX_BODY:
            raise ValueError(f"max_bytes must be within 0..{MAX_BODY}, not {max_bytes}")
        if offset < 0:
            raise ValueError(f"offset must not be negative, as {offset} is")
        request = {"op": "read", "path": _path(path), "offset": offset, "max_bytes": max_bytes}
        return (await self._transfer(request, b""))[1]

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `Sandbox.write_file`."""
        if len(data) > MAX_BODY:
            raise ValueError(f"{len(data)} bytes are more than the {MAX_BODY} that one write takes")
        await self._transfer({"op": "write", "path": _path(path), "mode": mode}, data)

    async def put_tree(self, files: Mapping[str, bytes] | bytes, path: str = "/workspace") -> None:
        """See `Sandbox.put_tree`."""
        archive = files if isinstance(files, bytes) else pack_files(files)
        await self._unpack(archive, _path(path))

    async def get_tree(
        self, path: str = "/workspace", *, max_bytes: int = MAX_TREE_BYTES, max_files: int = MAX_TREE_FILES
    ) -> dict[str, bytes]:
        """See `Sandbox.get_tree`."""
        archive = await self._pack(_path(path), max_bytes=max_bytes, max_files=max_files, only_files=True)
        return unpack_files(archive, path, max_bytes)

    async def snapshot(self) -> Snapshot:
        """See `Sandbox.snapshot`."""
        archive = await self._pack(None, max_bytes=MAX_TREE_BYTES, max_files=MAX_TREE_FILES, only_files=False)
        return Snapshot(archive)

    async def restore(self, snapshot: Snapshot) -> None:
        """See `Sandbox.restore`."""
        await self._unpack(snapshot.archive, None)

    async def stats(self) -> Usage:
        """See `Sandbox.stats`."""
        header, _ = await self._transfer({"op": "stats", "path": ""}, b"")
        now, peak = self._host.memory()
        try:
            return Usage(
                cpu_s=float(header["cpu_s"]),
                num_execs=int(header["num_execs"]),
                workspace_bytes=int(header["workspace_bytes"]),
                num_files=int(header["num_files"]),
                memory_bytes=now if now is not None else header.get("memory_bytes"),
                memory_peak_bytes=peak if peak is not None else header.get("memory_peak_bytes"),
                age_s=float(header["age_s"]),
                lifetime_left_s=float(header["lifetime_left_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            self._end("it answered nonsense")
            raise SandboxError(f"sandbox {self.id} answered nonsense to stats") from error

    async def renew(self) -> None:
        """See `Sandbox.renew`."""
        await self._transfer({"op": "renew", "path": ""}, b"")
        self._lease_began_s = asyncio.get_running_loop().time()

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

    async def _execute(
        self, request: dict[str, Any], body: bytes, wall_s: float | None, on_output: OnOutput | None
    ) -> ExecResult:
        if len(body) > MAX_BODY:
            raise ValueError(f"{len(body)} bytes of input are more than the {MAX_BODY} that one execution takes")
        wall_s = self._limits.wall_s if wall_s is None else min(wall_s, self._limits.wall_s)
        began_s = asyncio.get_running_loop().time()
        on_piece = None
        if on_output is not None:
            on_piece = lambda is_stderr, piece: on_output("stderr" if is_stderr else "stdout", piece)  # noqa: E731
        try:
            header, output = await self._call({**request, "wall_s": wall_s}, body, wall_s, on_piece)
            return self._result(header, output)
        except BadFrameError:
            self._end("the agent's code tampered with its answers", Ended.SANDBOX_KILLED)
        except EOFError:
            self._raise_if_unusable()  # closed by another task meanwhile
            death = await self._host.death()
            self._raise_if_ours(death)
            self._end(_DESTROYED, Ended.OOM if death.is_oom else Ended.SANDBOX_KILLED)
        except _DestroyedError:
            pass
        assert self._outcome is not None
        return ExecResult(
            ended=self._outcome,
            exit_code=None,
            signal=None,
            stdout=b"",
            stderr=b"",
            stdout_total=0,
            stderr_total=0,
            wall_s=asyncio.get_running_loop().time() - began_s,
        )

    def _raise_if_ours(self, death: Death) -> None:
        """Raise `SandboxError` when nothing inside a box could have ended it."""
        is_over = f"its lifetime of {self._limits.lifetime_s:g} s was over"
        reason = is_over if self._is_over() else not_by_agent(death)
        if reason:
            self._end(reason)
            raise SandboxError(f"sandbox {self.id} ended: {reason}")

    def _raise_if_unusable(self) -> None:
        if self._outcome is not None:
            raise _DestroyedError
        if self._ended:
            raise SandboxError(f"sandbox {self.id} is unusable: {self._ended}")

    def _is_over(self) -> bool:
        return asyncio.get_running_loop().time() - self._lease_began_s >= self._limits.lifetime_s

    async def _pack(self, path: str | None, *, max_bytes: int, max_files: int, only_files: bool) -> bytes:
        if not 0 <= max_bytes <= MAX_TREE_BYTES or not 0 <= max_files <= MAX_TREE_FILES:
            raise ValueError(f"at most {MAX_TREE_BYTES} bytes and {MAX_TREE_FILES} files, not {max_bytes, max_files}")
        pieces: list[bytes] = []
        limits = {"max_bytes": max_bytes + 2048 * (max_files + 5), "max_files": max_files, "only_files": only_files}
        request = {"op": "pack", "path": path, "wall_s": _TREE_S, **limits}
        num_bytes = 0

        def take(is_stderr: bool, piece: bytes) -> None:
            nonlocal num_bytes
            num_bytes += len(piece)
            if num_bytes > limits["max_bytes"] + (1 << 20):  # the server itself stops there, if it is ours
                raise BadFrameError
            if not is_stderr:
                pieces.append(piece)

        await self._transfer(request, b"", take)
        return b"".join(pieces)

    async def _unpack(self, archive: bytes, path: str | None) -> None:
        if len(archive) > MAX_BODY:
            raise ValueError(f"{len(archive)} bytes are more than the {MAX_BODY} that one archive may have")
        limits = {"max_bytes": MAX_TREE_BYTES, "max_files": 3 * MAX_TREE_FILES}
        await self._transfer({"op": "unpack", "path": path, "wall_s": _TREE_S, **limits}, archive)

    async def _transfer(
        self, request: dict[str, Any], body: bytes, on_piece: Callable[[bool, bytes], None] | None = None
    ) -> tuple[dict[str, Any], bytes]:
        what = request["path"] or "snapshot"
        try:
            header, blob = await self._call(request, body, request.get("wall_s", 0.0), on_piece)
        except _DestroyedError as error:
            if request["op"] in ("stats", "renew"):
                raise SandboxError(f"sandbox {self.id} is unusable: {self._ended}") from error
            code = errno.ENOMEM if self._outcome is Ended.OOM else errno.EIO
            raise OSError(code, f"the sandbox was {self._ended}", what) from error
        except (EOFError, BadFrameError) as error:
            self._end("it died")
            raise SandboxError(f"sandbox {self.id} died during {request['op']} {what!r}") from error
        ran_out = self._host.whose_memory()
        if "errno" in header:
            code, reason = int(header["errno"]), str(header.get("error"))
            if code == errno.EIO and ran_out:  # which the box itself may not see
                if ran_out == "host":
                    self._end(HOST_MEMORY)
                    raise SandboxError(f"sandbox {self.id}: {HOST_MEMORY}")
                code, reason = errno.ENOMEM, "out of memory"
            raise OSError(code, reason, what)
        return header, blob

    async def _call(
        self,
        request: dict[str, Any],
        body: bytes,
        work_s: float,
        on_piece: Callable[[bool, bytes], None] | None = None,
    ) -> tuple[dict[str, Any], bytes]:
        async with self._lock:
            self._raise_if_unusable()
            try:
                async with asyncio.timeout(work_s + _GRACE_S) as scope:
                    return await self._wire.call(request, body, on_piece)
            except (EOFError, BadFrameError):
                raise  # the caller knows what it means
            except NotBegunError as error:
                await self._explain_idle_death(str(request["op"]), error)
            except BaseException as error:
                if isinstance(error, TimeoutError) and scope.expired():
                    self._end("it stopped answering")
                    raise SandboxError(f"sandbox {self.id} did not answer within {work_s + _GRACE_S:g} s") from error
                self._end("a request was given up")  # its answer would be taken for the next one's
                raise

    async def _explain_idle_death(self, op: str, error: NotBegunError) -> NoReturn:
        """Raise for a box that ended before it took a request up."""
        self._raise_if_unusable()
        if not self._is_over() and (await self._host.death()).is_oom:
            # what the agent left there was too much for the little that the server needs
            self._end(_DESTROYED, Ended.OOM)
            raise _DestroyedError from error
        reason = "its lifetime was over" if self._is_over() else "it died while it was idle"
        self._end(reason)
        raise SandboxError(f"sandbox {self.id} did not begin {op}: {reason}") from error

    def _result(self, header: dict[str, Any], output: bytes) -> ExecResult:
        if "errno" in header:
            # the server itself could not fork or make a pipe: the machine or the agent's leftovers, not a result
            self._end(f"its server failed: {header.get('error')}")
            raise SandboxError(f"sandbox {self.id}: {header.get('error')}")
        try:
            seen = self._host.whose_memory()  # asked each time, so that none is taken for a later one
            status, split = int(header["status"]), int(header["stdout_bytes"])
            out_total, err_total = int(header["stdout_total"]), int(header["stderr_total"])
            ran_out = self._whose_memory(header, seen) if status else ""
            if not 0 <= split <= len(output) or split > out_total or len(output) - split > err_total:
                raise BadFrameError
            return ExecResult(
                ended=ended(str(header["stopped"]), status, is_oom=ran_out == "box"),
                exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                stdout=output[:split],
                stderr=output[split:],
                stdout_total=out_total,
                stderr_total=err_total,
                wall_s=float(header["wall_s"]),
                cpu_s=float(header["cpu_s"]),
                num_survivors=int(header["survivors"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadFrameError from error

    def _whose_memory(self, header: dict[str, Any], seen: WhoseMemory) -> WhoseMemory:
        """By what the host saw or the box itself; raises `SandboxError` when it was the host's."""
        if not seen and int(header["oom_kills"]):
            seen = "box" if int(header["at_limit"]) else "host"
        if seen == "host":
            self._end(HOST_MEMORY)
            raise SandboxError(f"sandbox {self.id}: {HOST_MEMORY}")
        return seen

    def _end(self, reason: str, outcome: Ended | None = None) -> None:
        if not self._ended:
            self._ended, self._outcome = reason, outcome
            self._host.kill()


class _DestroyedError(Exception):
    """The agent's code has ended the box, at some time before."""


def _path(path: str) -> str:
    if "\0" in path or not path:
        raise ValueError(f"not a file path: {path!r}")
    return path

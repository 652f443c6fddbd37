"""The one way Palaestra starts a Python process of its own and talks to it.

A worker is a child that answers numbered calls over a socket pair. Invariants: every call has a deadline;
a worker that dies fails all its pending calls with its last log lines; no worker outlives its parent
(the kernel kills it, and the closed socket ends it); Ctrl-C reaches the parent alone.
The kernel's kill follows the *thread* that called `start`: start workers on a thread that outlives them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import importlib
import itertools
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from palaestra.errors import PalaestraError, WorkerError

_HEADER = struct.Struct("!Qq")  # length of the body, number of the call
_READY = -1  # the number under which a worker reports its start
_OK, _ERROR = "ok", "error"
_PR_SET_PDEATHSIG = 1
_EXIT_GRACE_S = 1.0
_LOG_LINES = 8
_LOG_TAIL_BYTES = 16_384
_STACK_POLLS, _STACK_POLL_S = 40, 0.05


class Reply(Protocol):
    """How a service answers one call, now or later, exactly once."""

    def send(self, value: object) -> None:
        """Answer with a picklable value."""

    def fail(self, error: BaseException) -> None:
        """Answer with an error; a `PalaestraError` arrives as itself, others as `WorkerError`."""


class Service(Protocol):
    """What runs in the child. All three are called from the child's main thread."""

    def handle(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        """Take one call; answer through `reply` now or during a later `work`."""

    def work(self) -> bool:
        """Do one slice of background work; False when there is nothing to do until the next call."""

    def close(self) -> None:
        """Release what the service holds."""


class WorkerProcess:
    """Parent's end of a worker. Belongs to the event loop it was started on."""

    def __init__(self, name: str, log_path: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process
        self._numbers = itertools.count()
        self._ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending: dict[int, asyncio.Future[Any]] = {_READY: self._ready}
        self._writer: asyncio.StreamWriter
        self._supervisor: asyncio.Task[None]
        self._exit_grace_s = _EXIT_GRACE_S
        self._is_dead = False

    @classmethod
    async def start(
        cls,
        target: str,
        config: object,
        *,
        name: str,
        log_path: Path,
        start_timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> WorkerProcess:
        """Start a child that runs the service `target(config)`; `target` reads `package.module:function`.

        `log_path` receives what the child prints. Returns when the service is built. Raises the service's
        own `PalaestraError`, or `WorkerError` when it fails otherwise or takes longer than `start_timeout_s`.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                worker = cls(name, log_path, await _spawn(target, theirs, log_path, env))
            reader, worker._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()  # a child that did start reads the end of its socket and leaves
            raise
        worker._supervisor = asyncio.create_task(worker._supervise(reader), name=f"{name} supervisor")
        try:
            _write(worker._writer, _READY, config)
            async with asyncio.timeout(start_timeout_s):
                await worker._ready
        except TimeoutError as error:
            await worker.aclose(timeout_s=0)
            raise WorkerError(f"{name} did not start within {start_timeout_s:g} s; see {log_path}") from error
        except BaseException:
            await worker.aclose(timeout_s=_EXIT_GRACE_S)
            raise
        return worker

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the child has not been seen to end."""
        return not self._is_dead and self._process.returncode is None

    async def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """Call `method` in the child. Raises the child's error, or `WorkerError` on death or deadline."""
        if self._is_dead:
            raise self._death()
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            _write(self._writer, number, (method, args))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise WorkerError(f"{self.name} did not answer {method!r} within {timeout_s:g} s") from error
        finally:
            self._pending.pop(number, None)

    def notify(self, method: str, *args: object) -> None:
        """Call `method` in the child and drop its answer; does nothing when the child is gone."""
        if not self._is_dead:
            _write(self._writer, next(self._numbers), (method, args))

    async def watch(self) -> NoReturn:
        """Wait for the child's end, which nobody asked for, and raise `WorkerError` with its last log lines."""
        await asyncio.shield(self._supervisor)
        raise self._death()

    async def stacks(self) -> str:
        """Where each thread of the child is, as it prints that into its log; a sentence where it does not answer."""
        if not self.is_alive:
            return f"{self.name} is not running"
        try:
            size = self.log_path.stat().st_size
            os.kill(self.pid, signal.SIGUSR1)
            for _ in range(_STACK_POLLS):
                await asyncio.sleep(_STACK_POLL_S)
                text = _read_from(self.log_path, size)
                if "most recent call first" in text:
                    return text
        except OSError as error:  # its log was removed, or it ended just now
            return f"the stacks of {self.name} cannot be read: {error}"
        return f"{self.name} did not print its stacks within {_STACK_POLLS * _STACK_POLL_S:g} s"

    async def aclose(self, *, timeout_s: float = 5.0) -> None:
        """Close the socket, let the child leave, kill its whole session if it does not. Idempotent."""
        self._exit_grace_s = timeout_s
        self._writer.close()
        if not self._supervisor.done():
            await self._supervisor

    async def __aenter__(self) -> WorkerProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        # Both ends are watched: a forked grandchild can hold the socket open after the child died, and a
        # child can close its socket and hang in its exit handlers. Whichever ends first, the other must follow.
        receiving = asyncio.create_task(self._receive(reader), name=f"{self.name} receiver")
        exiting = asyncio.create_task(self._process.wait(), name=f"{self.name} exit")
        try:
            await asyncio.wait({receiving, exiting}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({receiving, exiting}, timeout=self._exit_grace_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._writer.close()
            receiving.cancel()
            await asyncio.wait({receiving, exiting})
            self._fail_pending()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length, number = _HEADER.unpack(await reader.readexactly(_HEADER.size))
                future = self._pending.get(number)
                body = await reader.readexactly(length)
                if future is not None and not future.done():  # else the caller left before this answer
                    self._settle(future, body)

    def _settle(self, future: asyncio.Future[Any], body: bytes) -> None:
        try:
            status, value = pickle.loads(body)
        except Exception as error:  # unpickling runs code of any class; the caller must not wait for its deadline
            reason = f"{self.name} sent an answer that cannot be unpickled: {type(error).__name__}: {error}"
            future.set_exception(WorkerError(reason))
            return
        if status == _OK:
            future.set_result(value)
        else:
            future.set_exception(value)

    def _fail_pending(self) -> None:
        self._is_dead = True
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._death())
        if not self._ready.cancelled():
            self._ready.exception()  # mark as seen: after start-up nobody awaits it

    def _death(self) -> WorkerError:
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return WorkerError(f"{self.name} {how}; see {self.log_path}: {_tail(self.log_path)}")


async def _spawn(
    target: str, theirs: socket.socket, log_path: Path, env: Mapping[str, str] | None
) -> asyncio.subprocess.Process:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "palaestra.processes", str(theirs.fileno()), target),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **(env or {})},
        )


def _write(writer: asyncio.StreamWriter, number: int, value: object) -> None:
    body = pickle.dumps(value, protocol=5)
    writer.write(_HEADER.pack(len(body), number) + body)


def _read_from(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(_LOG_TAIL_BYTES).decode(errors="replace")


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError as error:
        return str(error)
    return " | ".join(line.strip() for line in lines if line.strip())


class _Channel:
    """Child's end of the socket: blocking writes, reads that wait only when told to."""

    def __init__(self, sock: socket.socket) -> None:
        sock.set_inheritable(False)
        self._sock = sock
        self._poll = select.poll()  # select.select refuses descriptors above 1023, which a busy parent passes
        self._poll.register(sock, select.POLLIN)

    def has_input(self) -> bool:
        return bool(self._poll.poll(0))

    def read(self) -> tuple[int, Any]:
        length, number = _HEADER.unpack(self._exactly(_HEADER.size))
        return number, pickle.loads(self._exactly(length))

    def write(self, number: int, status: str, value: object) -> None:
        body = pickle.dumps((status, value), protocol=5)
        self._sock.sendall(_HEADER.pack(len(body), number) + body)

    def _exactly(self, count: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < count:
            chunk = self._sock.recv(min(count - len(chunks), 1 << 20))
            if not chunk:
                raise EOFError
            chunks += chunk
        return bytes(chunks)


class _Reply:
    def __init__(self, channel: _Channel, number: int) -> None:
        self._channel = channel
        self._number = number

    def send(self, value: object) -> None:
        self._channel.write(self._number, _OK, value)

    def fail(self, error: BaseException) -> None:
        self._channel.write(self._number, _ERROR, _portable(error))


def _portable(error: BaseException) -> PalaestraError:
    if isinstance(error, PalaestraError):
        return error
    with contextlib.suppress(OSError):  # a log that cannot be written must not hide what happened
        traceback.print_exception(error)
    return WorkerError(f"{type(error).__name__}: {error}")


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # answers also while native code computes
    channel = _Channel(socket.socket(fileno=int(sys.argv[1])))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent left
        service = _build(sys.argv[2], channel)
        if service is not None:
            try:
                _serve(service, channel)
            finally:
                service.close()


def _build(target: str, channel: _Channel) -> Service | None:
    module, _, function = target.partition(":")
    _, config = channel.read()
    try:
        service: Service = getattr(importlib.import_module(module), function)(config)
    except Exception as error:  # the parent must learn of any start-up error, whatever its kind
        channel.write(_READY, _ERROR, _portable(error))
        return None
    channel.write(_READY, _OK, None)
    return service


def _serve(service: Service, channel: _Channel) -> None:
    is_busy = False
    while True:
        while channel.has_input() or not is_busy:
            number, (method, args) = channel.read()
            reply = _Reply(channel, number)
            try:
                service.handle(method, args, reply)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # the caller must learn of any error, and the worker goes on
                reply.fail(error)
            is_busy = True
        is_busy = service.work()


def _run() -> None:
    """Run the child and end it without exit handlers: libraries hang in theirs, and nobody waits for them."""
    code = 1
    try:
        _main()
        code = 0
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _run()

"""The jail back end: one bubblewrap jail with a warm zygote in it, and a namespace-isolated fork for each box.

Covers: host files (the root is an immutable tree of our own), host processes, network, other boxes, memory
(cgroup, else per process), processes, disk, and the kernel calls of `_seccomp`.
Does not cover: bugs in the kernel; CPU time shared between boxes; file locks on the shared read-only tree as a
covert channel; the path of that tree, which `/proc/self/mountinfo` shows; without memory cgroups, memory that no
process's address space shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

from palaestra.errors import SandboxError
from palaestra.sandboxes._box import Box
from palaestra.sandboxes._bwrap import ForkedBox, ZygoteProcess, discard, find_bwrap, readable
from palaestra.sandboxes._cgroups import MemoryCgroups, Slot
from palaestra.sandboxes._host import HOST_MEMORY, Death, WhoseMemory, server_config
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._records import process_handle
from palaestra.sandboxes._rootfs import ensure_rootfs
from palaestra.sandboxes._wire import StreamIO

_READY_S = 20.0
_CLOSE_S = 10.0
_DEATH_S = 2.0


class JailBackend:
    """Makes jails. Belongs to the event loop it is used on; see `SandboxBackend`."""

    name = "jail"

    def __init__(self) -> None:
        self._zygote: ZygoteProcess | None = None
        self._cgroups: MemoryCgroups | None = None
        self._knows_cgroups = False
        self._lock = asyncio.Lock()
        self._boxes: set[Box] = set()
        self._closed = False

    async def create(self, spec: SandboxSpec) -> Box:
        """See `SandboxBackend.create`; raises `ConfigError` when this machine cannot make jails."""
        zygote = await self._running_zygote()
        config = server_config(spec, memory_per_process=self._cgroups is None, nproc=True)
        box_id = f"jail-{os.getpid()}-{os.urandom(4).hex()}"  # another back end of this process makes boxes too
        ours, theirs = socket.socketpair()
        with theirs:
            io = StreamIO(*await asyncio.open_connection(sock=ours))  # closes the socket when it is cancelled
            try:
                forked = await zygote.fork_box(theirs, config)
            except BaseException:
                io.close()  # a box that was forked all the same ends with its socket
                raise
        # no await since the fork, and from here on the box closes what it holds, whatever happens
        try:
            host = _JailHost(zygote, forked, io, self._cgroups)
        except OSError as error:
            io.close()
            discard(forked.pidfd)
            raise SandboxError(f"sandbox {box_id} ended before it began: {error}") from error
        box = Box(box_id, io, host, spec)
        self._boxes.add(box)
        box.on_closed = self._boxes.discard
        try:
            host.enter_cgroup(spec.limits.memory_mb)
            await box.wait_ready(_READY_S)
            if self._closed:
                raise SandboxError("the jail back end is closed")
        except OSError as error:
            await box.aclose()
            raise SandboxError(f"cannot limit the memory of sandbox {box_id}: {error}") from error
        except BaseException:
            await box.aclose()
            raise
        return box

    async def circumstances(self) -> tuple[str, ...]:
        """What decides which capabilities there are: with the same, they are not proved again."""
        zygote = await self._running_zygote()
        return self.name, zygote.rootfs.digest, "cgroups" if self._cgroups is not None else ""

    async def aclose(self) -> None:
        """See `SandboxBackend.aclose`."""
        self._closed = True
        try:
            async with asyncio.TaskGroup() as group:
                for box in list(self._boxes):
                    group.create_task(box.aclose())
        finally:
            async with self._lock:
                try:
                    await self._end_zygote()
                finally:
                    if self._cgroups is not None:
                        await self._cgroups.aclose()
                        self._cgroups = None

    async def __aenter__(self) -> JailBackend:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _running_zygote(self) -> ZygoteProcess:
        async with self._lock:
            if self._closed:
                raise SandboxError("the jail back end is closed")
            if self._zygote is not None and self._zygote.is_dead:
                await self._end_zygote()
            find_bwrap()
            if not self._knows_cgroups:  # a creation that is cancelled here must not make the next do without
                self._cgroups = await MemoryCgroups.open()
                self._knows_cgroups = True
            if self._zygote is None:
                rootfs = await asyncio.to_thread(ensure_rootfs)
                self._zygote = ZygoteProcess(rootfs)
            await self._zygote.wait_ready()  # one whose wait is cancelled serves the next
            return self._zygote

    async def _end_zygote(self) -> None:
        if self._zygote is not None:
            try:
                await self._zygote.aclose()
            except SandboxError:
                self._zygote = None  # the error is told once, and another can be started
                raise
            self._zygote = None


class _JailHost:
    """The host's hold on one box: the pidfd of its pid 1, its socket and its memory cgroup."""

    def __init__(self, zygote: ZygoteProcess, forked: ForkedBox, io: StreamIO, cgroups: MemoryCgroups | None) -> None:
        self.handle = process_handle(pid_of(forked.pidfd))
        self._zygote = zygote
        self._pidfd = forked.pidfd
        self._status = forked.status
        self._io = io
        self._cgroups = cgroups
        self._slot: Slot | None = None

    def enter_cgroup(self, memory_mb: int) -> None:
        """Put the box under the memory limit; raises `OSError`. Without cgroups the server limits each process."""
        if self._cgroups is not None:
            self._slot = self._cgroups.take(memory_mb)
            self._slot.enter(pid_of(self._pidfd))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def release(self) -> None:
        self._io.close()
        try:
            # pid 1 is reported dead only after every process of its namespace is
            async with asyncio.timeout(_CLOSE_S):
                await readable(self._pidfd)
        except TimeoutError as error:
            raise SandboxError(f"a sandbox did not end within {_CLOSE_S:g} s of SIGKILL") from error
        finally:
            os.close(self._pidfd)
        if self._slot is not None and self._cgroups is not None:
            self._cgroups.give_back(self._slot)

    def whose_memory(self) -> WhoseMemory:
        return self._slot.whose_memory() if self._slot is not None else ""

    async def death(self) -> Death:
        await asyncio.wait([self._status], timeout=_DEATH_S)
        status = self._status.result() if self._status.done() and not self._status.cancelled() else None
        ran_out = self.whose_memory()
        by_host = "its zygote ended" if self._zygote.is_dead else HOST_MEMORY if ran_out == "host" else ""
        return Death(status, ran_out == "box", by_host)

    def memory(self) -> tuple[int | None, int | None]:
        return self._slot.memory() if self._slot is not None else (None, None)


def pid_of(pidfd: int) -> int:
    """The process id behind a pidfd; raises `OSError`."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise OSError("the kernel does not tell a pidfd's pid")

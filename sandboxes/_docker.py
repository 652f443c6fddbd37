"""The container back ends: a hardened container for each box, its main process our server on the attached stdin.

Docker and Podman, whose API is the same. Invariant: a container lives as long as the host's connection to its
stdin, so one whose owner was killed goes by itself.

Covers: host files, processes and network, memory, processes and disk of the container, output floods (no
log is kept). The server is pid 1 itself, not below an init: it reaps, and pid 1 is out of the agent's reach.
Does not cover: bugs in the kernel or in the engine; CPU time shared between boxes; locks on files of the image, where
the engine's storage gives all containers the same files; a daemon behind TLS; a shortage of the host's own memory that
takes a container's first process: the engine tells both kinds of shortage alike; the paths of the engine's storage,
which `/proc/self/mountinfo` shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import docker

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import _containers
from palaestra.sandboxes._box import Box
from palaestra.sandboxes._containers import FAILURES, Obituaries
from palaestra.sandboxes._host import Death, WhoseMemory
from palaestra.sandboxes._limits import SandboxSpec

_log = logging.getLogger(__name__)

_READY_S = 30.0
_DEATH_S = 3.0
_KILLED = 128 + 9


class DockerBackend:
    """Makes containers. Belongs to the event loop it is used on; see `SandboxBackend`."""

    name = "docker"
    _remedy = 'start one, set DOCKER_HOST, join the docker group, or use sandbox = "jail"'
    _urls: Callable[[], list[str]] = staticmethod(_containers.docker_urls)
    _takes_tmpfs_options = True

    def __init__(self) -> None:
        self._client: docker.APIClient | None = None
        self._obituaries: Obituaries | None = None
        self._deaths: dict[str, asyncio.Future[Death]] = {}
        self._image = ""
        self._lock = asyncio.Lock()
        self._boxes: set[Box] = set()
        self._undoing: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._closed = False

    async def create(self, spec: SandboxSpec) -> Box:
        """See `SandboxBackend.create`; raises `ConfigError` when there is no usable daemon."""
        client = await self._connected()
        box_id = f"palaestra-{os.getpid()}-{os.urandom(3).hex()}-{next(self._numbers)}"
        config = _containers.describe(client, self._image, box_id, spec, takes_tmpfs_options=self._takes_tmpfs_options)
        death = self._deaths[box_id] = asyncio.get_running_loop().create_future()
        # a future, not a task: the end of the loop cancels tasks, and the thread goes on all the same
        launch = asyncio.get_running_loop().run_in_executor(None, _containers.launch, client, config)
        try:
            sock = await asyncio.shield(launch)
            io = _AttachedIO(*await asyncio.open_connection(sock=sock))
        except BaseException as error:
            self._deaths.pop(box_id, None)
            undoing = asyncio.create_task(_undo(launch, client, box_id), name=f"undo {box_id}")
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            await asyncio.shield(undoing)  # goes on when this wait is cancelled too
            if isinstance(error, FAILURES):
                raise SandboxError(f"{self.name} did not start a container: {_containers.one_line(error)}") from error
            raise
        host = _ContainerHost(self.name, client, box_id, io, death, lambda: self._forget_shortage(box_id))
        box = Box(box_id, io, host, spec)
        self._boxes.add(box)
        box.on_closed = self._forget
        try:
            await box.wait_ready(_READY_S)
            if self._closed:
                raise SandboxError(f"the {self.name} back end is closed")
        except BaseException:
            await box.aclose()
            raise
        return box

    async def circumstances(self) -> tuple[str, ...]:
        """What decides which capabilities there are: with the same, they are not proved again."""
        client = await self._connected()
        try:
            info = await asyncio.to_thread(client.info)
        except FAILURES as error:
            raise SandboxError(f"the {self.name} daemon does not serve: {_containers.one_line(error)}") from error
        engine = (str(info.get(key)) for key in ("ID", "SecurityOptions", "CgroupDriver", "CgroupVersion"))
        return self.name, str(client.base_url), self._image, *engine

    async def aclose(self) -> None:
        """See `SandboxBackend.aclose`."""
        self._closed = True
        try:
            async with asyncio.TaskGroup() as group:
                for box in list(self._boxes):
                    group.create_task(box.aclose())
            if self._undoing:
                await asyncio.wait(self._undoing)
        finally:
            if self._obituaries is not None:
                obituaries, self._obituaries = self._obituaries, None
                await asyncio.to_thread(obituaries.close)
            if self._client is not None:
                self._client.close()
                self._client = None

    async def __aenter__(self) -> DockerBackend:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _forget_shortage(self, box_id: str) -> None:
        if self._obituaries is not None:
            self._obituaries.forget_shortage(box_id)

    def _forget(self, box: Box) -> None:
        self._boxes.discard(box)
        self._deaths.pop(box.id, None)

    async def _connected(self) -> docker.APIClient:
        async with self._lock:
            if self._closed:
                raise SandboxError(f"the {self.name} back end is closed")
            if self._client is None:
                self._client = await self._connect()
            return self._client

    async def _connect(self) -> docker.APIClient:
        try:
            client = await asyncio.to_thread(_containers.connect, self._urls())
        except ConfigError as error:
            raise ConfigError(f"no {self.name} daemon answers ({error}); {self._remedy}") from error
        try:
            self._image = await asyncio.to_thread(_containers.ensure_image, client)
            await asyncio.to_thread(_containers.sweep, client)
            loop = asyncio.get_running_loop()

            def told(*death: Any) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended without us
                    loop.call_soon_threadsafe(self._on_death, *death)

            self._obituaries = await asyncio.to_thread(Obituaries, client, told)
        except FAILURES as error:
            client.close()
            raise SandboxError(f"the {self.name} daemon does not serve: {_containers.one_line(error)}") from error
        except BaseException:
            client.close()
            raise
        return client

    def _on_death(self, name: str, code: int, was_oom: bool) -> None:
        death = self._deaths.pop(name, None)
        if death is not None and not death.done():
            death.set_result(Death(9 if code == _KILLED else code << 8, was_oom))


class PodmanBackend(DockerBackend):
    """Makes Podman containers, where its API answers; see `DockerBackend`."""

    name = "podman"
    _remedy = "run `systemctl start podman.socket` or `podman system service --time=0`, or set CONTAINER_HOST"
    _urls = staticmethod(_containers.podman_urls)
    _takes_tmpfs_options = False


class _AttachedIO:
    """`BoxIO` over the attach stream, whose output comes in chunks with an eight-byte header."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()

    async def read_exactly(self, count: int) -> bytes:
        try:
            while len(self._buffer) < count:
                header = await self._reader.readexactly(8)
                self._buffer += await self._reader.readexactly(int.from_bytes(header[4:]))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise EOFError("the container ended") from error
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def write(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise EOFError("the container ended")
        self._writer.write(data)

    def close(self) -> None:
        self._writer.transport.abort()


class _ContainerHost:
    """The host's hold on one container."""

    def __init__(
        self,
        engine: str,
        client: docker.APIClient,
        name: str,
        io: _AttachedIO,
        death: asyncio.Future[Death],
        forget_shortage: Callable[[], object],
    ) -> None:
        self.handle = f"container {engine}"
        self._client = client
        self._name = name
        self._io = io
        self._death = death
        self._forget = forget_shortage

    def kill(self) -> None:
        self._io.close()  # the server ends when its stdin does, and the daemon removes the container

    async def release(self) -> None:
        await asyncio.to_thread(_containers.remove, self._client, self._name)

    def whose_memory(self) -> WhoseMemory:
        self._forget()
        return ""  # the server reads the container's own counters

    async def death(self) -> Death:
        await asyncio.wait([self._death], timeout=_DEATH_S)
        if self._death.done():
            return self._death.result()
        return Death(by_host="its daemon does not tell how")

    def memory(self) -> tuple[int | None, int | None]:
        return None, None  # the server reads the container's own


async def _undo(launch: asyncio.Future[socket.socket], client: docker.APIClient, name: str) -> None:
    """Leave nothing of a launch that failed or that nobody waits for any more."""
    await asyncio.wait([launch])
    if launch.exception() is None:
        launch.result().close()
    try:
        await asyncio.to_thread(_containers.remove, client, name)
    except (SandboxError, *FAILURES) as error:  # what went wrong before is the caller's to hear
        _log.warning("%s", error)

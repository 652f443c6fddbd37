"""The Docker back end: a hardened container for each box, its main process our server on the attached stdin.

No image is pulled: `palaestra/base:<digest>` is imported from the same tree that the jail uses. Invariant: a
container lives as long as the host's connection to its stdin, so one whose owner was killed goes by itself.

Covers: host files, processes and network, memory, processes and disk of the container, output floods (no
Docker log is kept). The server is pid 1 itself, not below an init: it reaps, and pid 1 is out of the agent's reach.
Does not cover: bugs in the kernel or in Docker; CPU time shared between boxes; a daemon behind TLS.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Ulimit
from requests.exceptions import RequestException

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._box import Box, server_config
from palaestra.sandboxes._protocol import Limits, SandboxSpec
from palaestra.sandboxes._rootfs import PYTHON, Rootfs, ensure_rootfs

_log = logging.getLogger(__name__)

_REPOSITORY = "palaestra/base"
_OWNER_LABEL = "palaestra.owner"
_API_TIMEOUT_S = 60
_READY_S = 30.0
_REMOVE_S = 20.0
_USER = "1000:1000"
_FAILURES = (DockerException, RequestException, OSError)


class DockerBackend:
    """Makes containers. Belongs to the event loop it is used on; see `SandboxBackend`."""

    name = "docker"

    def __init__(self) -> None:
        self._client: docker.APIClient | None = None
        self._image = ""
        self._lock = asyncio.Lock()
        self._boxes: set[Box] = set()
        self._undoing: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._closed = False

    async def create(self, spec: SandboxSpec) -> Box:
        """See `SandboxBackend.create`; raises `ConfigError` when there is no usable Docker daemon."""
        client = await self._connected()
        box_id = f"palaestra-{os.getpid()}-{os.urandom(3).hex()}-{next(self._numbers)}"
        config = _container(client, self._image, box_id, spec.limits)
        # a future, not a task: the end of the loop cancels tasks, and the thread goes on all the same
        launch = asyncio.get_running_loop().run_in_executor(None, _launch, client, config)
        try:
            sock = await asyncio.shield(launch)
            io = _AttachedIO(*await asyncio.open_connection(sock=sock))
        except BaseException as error:
            undoing = asyncio.create_task(_undo(launch, client, box_id), name=f"undo {box_id}")
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            await asyncio.shield(undoing)  # goes on when this wait is cancelled too
            if isinstance(error, _FAILURES):
                raise SandboxError(f"Docker did not start a container: {error}") from error
            raise
        box = Box(box_id, io, _ContainerHost(client, box_id, io), spec.limits)
        self._boxes.add(box)
        box.on_closed = self._boxes.discard
        try:
            await box.wait_ready(_READY_S)
            if self._closed:
                raise SandboxError("the docker back end is closed")
        except BaseException:
            await box.aclose()
            raise
        return box

    async def aclose(self) -> None:
        """See `SandboxBackend.aclose`."""
        self._closed = True
        async with asyncio.TaskGroup() as group:
            for box in list(self._boxes):
                group.create_task(box.aclose())
        if self._undoing:
            await asyncio.wait(self._undoing)
        if self._client is not None:
            self._client.close()
            self._client = None

    async def __aenter__(self) -> DockerBackend:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _connected(self) -> docker.APIClient:
        async with self._lock:
            if self._closed:
                raise SandboxError("the docker back end is closed")
            if self._client is None:
                client = await asyncio.to_thread(_connect)
                self._image = await asyncio.to_thread(_ensure_image, client)
                await asyncio.to_thread(_sweep, client)
                self._client = client
            return self._client


class _AttachedIO:
    """`BoxIO` over Docker's attach stream, whose output comes in chunks with an eight-byte header."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()

    async def read_exactly(self, count: int) -> bytes:
        try:
            while len(self._buffer) < count:
                header = await self._reader.readexactly(8)
                self._buffer += await self._reader.readexactly(int.from_bytes(header[4:]))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
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

    def __init__(self, client: docker.APIClient, name: str, io: _AttachedIO) -> None:
        self._client = client
        self._name = name
        self._io = io

    def kill(self) -> None:
        self._io.close()  # the server ends when its stdin does, and the daemon removes the container

    async def release(self) -> None:
        await asyncio.to_thread(_remove, self._client, self._name)

    def count_oom_kills(self) -> int:
        return 0  # the server reads the container's own counter


def _connect() -> docker.APIClient:
    try:
        _try_socket(os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")
        client = docker.APIClient(**docker.utils.kwargs_from_env(), timeout=_API_TIMEOUT_S)
        client.ping()
    except _FAILURES as error:
        raise ConfigError(
            f"no Docker daemon answers ({error}); start one, set DOCKER_HOST, join the docker group, "
            'or use sandbox = "jail"'
        ) from error
    return client


def _try_socket(url: str) -> None:
    """Raise the plain `OSError` of a unix socket that is not there, which the docker package would wrap and leak."""
    if url.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_API_TIMEOUT_S)
            sock.connect("/" + url.removeprefix("unix://").lstrip("/"))


def _ensure_image(client: docker.APIClient) -> str:
    rootfs = ensure_rootfs()
    image = f"{_REPOSITORY}:{rootfs.digest}"
    try:
        client.inspect_image(image)
    except ImageNotFound:
        _import_image(client, rootfs)
    return image


def _import_image(client: docker.APIClient, rootfs: Rootfs) -> None:
    def as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        if entry.name == "./tmp":
            entry.mode = 0o1777  # Docker gives a tmpfs the mode of the folder below it
        return entry

    with tempfile.NamedTemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(rootfs.path, arcname=".", filter=as_root)
        file.flush()
        try:
            client.import_image_from_file(file.name, repository=_REPOSITORY, tag=rootfs.digest)
        except _FAILURES as error:
            raise SandboxError(f"Docker did not import the sandbox image: {error}") from error


def _container(client: docker.APIClient, image: str, name: str, limits: Limits) -> dict[str, Any]:
    config = server_config(limits, memory_per_process=False, nproc=False)
    tmpfs = f"rw,exec,nosuid,nodev,size={limits.workspace_mb}m,nr_inodes={config['inodes']}"
    memory = limits.memory_mb << 20
    return {
        "name": name,
        "image": image,
        "command": [PYTHON, "-s", "-P", "-S", "-m", "palaestra.sandboxes._exec_server", json.dumps(config)],
        "user": _USER,
        "hostname": "sandbox",
        "working_dir": "/workspace",
        "environment": {"PYTHONPATH": "/palaestra", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
        "stdin_open": True,  # without detach this also sets StdinOnce
        "labels": {_OWNER_LABEL: _owner(os.getpid())},
        "host_config": client.create_host_config(
            auto_remove=True,
            read_only=True,
            network_mode="none",
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            log_config=LogConfig(type="none"),
            pids_limit=limits.processes + 1,  # the server counts too
            mem_limit=memory,
            memswap_limit=memory,
            shm_size=limits.workspace_mb << 20,
            ulimits=[Ulimit(name="core", soft=0, hard=0)],
            tmpfs={"/workspace": f"{tmpfs},mode=0755,uid=1000,gid=1000", "/tmp": f"{tmpfs},mode=1777"},
        ),
    }


def _launch(client: docker.APIClient, config: dict[str, Any]) -> socket.socket:
    """Create, attach and start a container; our end of its stdin and stdout."""
    client.create_container(**config)
    params = {"stdin": 1, "stdout": 1, "stderr": 0, "stream": 1}
    attached = client.attach_socket(config["name"], params=params)
    # the response owns the connection; without its descriptor it closes cleanly and leaves ours open
    sock = socket.socket(fileno=attached._sock.detach())
    attached._response.close()
    try:
        client.start(config["name"])
    except BaseException:
        sock.close()
        raise
    return sock


async def _undo(launch: asyncio.Future[socket.socket], client: docker.APIClient, name: str) -> None:
    """Leave nothing of a launch that failed or that nobody waits for any more."""
    await asyncio.wait([launch])
    if launch.exception() is None:
        launch.result().close()
    try:
        await asyncio.to_thread(_remove, client, name)
    except (SandboxError, *_FAILURES) as error:  # what went wrong before is the caller's to hear
        _log.warning("%s", error)


def _remove(client: docker.APIClient, name: str) -> None:
    """Remove a container and wait until it is gone; it may be going already, or never have been."""
    deadline = time.monotonic() + _REMOVE_S
    while time.monotonic() < deadline:
        try:
            client.remove_container(name, force=True, v=True)
        except NotFound:
            # the name goes before the container does
            if not client.containers(all=True, quiet=True, filters={"name": f"^/{name}$"}):
                return
            time.sleep(0.01)
        except APIError as error:
            if error.status_code != 409:  # 409: its automatic removal is under way
                raise SandboxError(f"Docker does not remove container {name}: {error}") from error
            time.sleep(0.01)
        except _FAILURES as error:
            raise SandboxError(f"Docker does not remove container {name}: {error}") from error
    raise SandboxError(f"container {name} is still there after {_REMOVE_S:g} s")


def _sweep(client: docker.APIClient) -> None:
    """Remove containers of dead owners: one killed between create and start leaves an unstarted container."""
    for container in client.containers(all=True, filters={"label": _OWNER_LABEL}):
        owner = container["Labels"][_OWNER_LABEL]
        boot_id, pid, _ = owner.split(":")
        if boot_id == _boot_id() and _owner(int(pid)) != owner:
            _remove(client, container["Id"])


def _owner(pid: int) -> str:
    """Boot, pid and start time of a process: pids alone come again."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = "dead"
    return f"{_boot_id()}:{pid}:{start}"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

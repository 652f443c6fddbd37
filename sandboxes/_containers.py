"""Containers by the Docker API: connect, import the image, make, watch, remove. All of it blocks.

No image is pulled: `palaestra/base:<digest>` is imported from the same tree that the jail uses.
Invariant: what is made has the owner's label from the start, so that a sweep finds it whatever happened.
"""

from __future__ import annotations

import json
import os
import socket
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Ulimit
from requests.exceptions import RequestException

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._host import server_config
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._owner import is_dead, this_owner
from palaestra.sandboxes._rootfs import PYTHON, Rootfs, ensure_rootfs

OWNER_LABEL = "palaestra.owner"
BORN_LABEL = "palaestra.born"
FAILURES = (DockerException, RequestException, OSError)
_REPOSITORY = "palaestra/base"
_API_TIMEOUT_S = 60
_REMOVE_S = 20.0
_CLOSED = "rw,noexec,nosuid,nodev,size=1m,mode=0555"
"""A place that hides another, and into which the agent's user cannot write."""
_KEEP_S = 3 * 86400.0
_USER = "1000:1000"
_SERVER_FILES = 1024
_USER_PROCESSES = 1 << 15  # of the one user of all containers; `pids_limit` is what holds each


def docker_urls() -> list[str]:
    """Where a Docker daemon may answer, best first."""
    return [os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"]


def podman_urls() -> list[str]:
    """Where Podman's API may answer, best first."""
    named = os.environ.get("CONTAINER_HOST")
    if named:
        return [named]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folders = [*([runtime] if runtime else []), "/run"]
    return [f"unix://{folder}/podman/podman.sock" for folder in folders]


def connect(urls: list[str]) -> docker.APIClient:
    """A client of the first daemon that answers; raises `ConfigError` with every reason when none does."""
    reasons = []
    for url in urls:
        try:
            _try_socket(url)
            client = docker.APIClient(base_url=url, timeout=_API_TIMEOUT_S)
            client.ping()
        except FAILURES as error:
            reasons.append(f"{url}: {one_line(error)}")
        else:
            return client
    raise ConfigError("; ".join(reasons))


def one_line(error: BaseException) -> str:
    """What went wrong; a daemon's own words may have more lines than one."""
    return " ".join(str(error).split())


def _try_socket(url: str) -> None:
    """Raise the plain `OSError` of a unix socket that is not there, which the docker package would wrap and leak."""
    if url.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_API_TIMEOUT_S)
            sock.connect("/" + url.removeprefix("unix://").lstrip("/"))


def ensure_image(client: docker.APIClient) -> str:
    """The name of the image made of this machine's userland; ones made days ago that no container uses are removed."""
    rootfs = ensure_rootfs()
    image = f"{_REPOSITORY}:{rootfs.digest}"
    try:
        client.inspect_image(image)
    except ImageNotFound:
        _import_image(client, rootfs, image)
        _remove_old_images(client, image)
    return image


def _remove_old_images(client: docker.APIClient, image: str) -> None:
    for other in client.images(name=_REPOSITORY):
        if time.time() - other["Created"] < _KEEP_S:  # another version of this library may be at work beside us
            continue
        for tag in other.get("RepoTags") or ():
            # Podman puts a registry in front
            is_current = tag == image or tag.endswith(f"/{image}")
            if not is_current and not client.containers(all=True, quiet=True, filters={"ancestor": tag}):
                client.remove_image(tag, noprune=False)


def _import_image(client: docker.APIClient, rootfs: Rootfs, image: str) -> None:
    def as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        # an engine gives a tmpfs the mode of the folder below it
        entry.mode = {"./tmp": 0o1777, "./workspace": 0o777}.get(entry.name, entry.mode)
        return entry

    with tempfile.NamedTemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(rootfs.path, arcname=".", filter=as_root)
        file.flush()
        try:
            client.import_image_from_file(file.name, repository=image)  # Podman does not look at a tag of its own
        except FAILURES as error:
            raise SandboxError(f"the sandbox image could not be imported: {one_line(error)}") from error


def describe(
    client: docker.APIClient, image: str, name: str, spec: SandboxSpec, *, takes_tmpfs_options: bool
) -> dict[str, Any]:
    """The arguments of `create_container` for a box; Podman takes a size and a mode of a tmpfs, and no more."""
    limits = spec.limits
    config = server_config(spec, memory_per_process=False, nproc=False)
    tmpfs = f"rw,exec,nosuid,nodev,size={limits.workspace_mb}m"
    places = {"/workspace": f"{tmpfs},mode=0777"}
    if takes_tmpfs_options:
        tmpfs += f",nr_inodes={config['inodes']}"
        places = {"/workspace": f"{tmpfs},mode=0755,uid=1000,gid=1000"}
    else:  # where Podman would put one of its own without a size; the second leads to /tmp
        places |= {"/run": _CLOSED, "/var/tmp": f"{tmpfs},mode=1777"}
    memory = limits.memory_mb << 20
    open_files = max(limits.open_files, _SERVER_FILES)
    return {
        "name": name,
        "image": image,
        "command": [PYTHON, "-s", "-P", "-S", "-m", "palaestra.sandboxes._exec_server", json.dumps(config)],
        "user": _USER,
        "hostname": "sandbox",
        "working_dir": "/workspace",
        "environment": {"PYTHONPATH": "/palaestra", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
        "stdin_open": True,  # without detach this also sets StdinOnce
        "labels": {OWNER_LABEL: this_owner(), BORN_LABEL: f"{time.time():.3f}"},
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
            # the last two since Podman's own defaults may be more than its host lets it give
            ulimits=[
                Ulimit(name="core", soft=1, hard=1),
                Ulimit(name="nofile", soft=open_files, hard=open_files),
                Ulimit(name="nproc", soft=_USER_PROCESSES, hard=_USER_PROCESSES),
            ],
            tmpfs={
                **places,
                "/tmp": f"{tmpfs},mode=1777",
                "/dev/mqueue": _CLOSED,  # queues would outlive their processes
                "/dev/shm": f"{tmpfs.replace('rw,exec', 'rw,noexec')},mode=1777",  # an engine's own counts no inodes
            },
        ),
    }


def launch(client: docker.APIClient, config: dict[str, Any]) -> socket.socket:
    """Create, attach and start a container; our end of its stdin and stdout."""
    try:
        client.create_container(**config)
    except ImageNotFound:  # somebody has cleared the engine's images meanwhile
        ensure_image(client)
        client.create_container(**config)
    attached = _attach(client, config["name"])
    # the response owns the connection; without its descriptor it closes cleanly and leaves ours open
    sock = socket.socket(fileno=attached._sock.detach())
    attached._response.close()
    try:
        client.start(config["name"])
    except BaseException:
        sock.close()
        raise
    return sock


def _attach(client: docker.APIClient, name: str) -> Any:
    # not `client.attach_socket`, which waits for ever for a daemon that does not answer
    params = {"stdin": 1, "stdout": 1, "stderr": 0, "stream": 1}
    headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
    url = client._url("/containers/{0}/attach", name)
    return client._get_raw_response_socket(client._post(url, params=params, headers=headers, stream=True))


def remove(client: docker.APIClient, name: str) -> None:
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
            # its automatic removal is under way; Podman has no code for that
            if error.status_code != 409 and "container state improper" not in str(error):
                raise SandboxError(f"container {name} could not be removed: {one_line(error)}") from error
            time.sleep(0.01)
        except FAILURES as error:
            raise SandboxError(f"container {name} could not be removed: {one_line(error)}") from error
    raise SandboxError(f"container {name} is still there after {_REMOVE_S:g} s")


def sweep(client: docker.APIClient) -> list[str]:
    """Remove containers of dead owners and return their names: one killed between create and start leaves one."""
    removed = []
    for container in client.containers(all=True, filters={"label": OWNER_LABEL}):
        if is_dead(container["Labels"][OWNER_LABEL]):
            remove(client, container["Id"])
            removed.append(container["Names"][0].lstrip("/"))
    return removed


class Obituaries:
    """Listens to the daemon for how this process's containers end, in a thread of its own."""

    def __init__(self, client: docker.APIClient, told: Callable[[str, int, bool], None]) -> None:
        """`told` is called in the thread with name, exit code, and whether memory ran out in it."""
        filters = {"label": f"{OWNER_LABEL}={this_owner()}", "event": ["die", "oom"], "type": "container"}
        self._stream = client.events(filters=filters, decode=True)
        self._told = told
        self._out_of_memory: set[str] = set()
        self._thread = threading.Thread(target=self._listen, name="container obituaries", daemon=True)
        self._thread.start()

    def forget_shortage(self, name: str) -> None:
        """A container has answered since its memory ran out: that is not what it will end of."""
        self._out_of_memory.discard(name)

    def close(self) -> None:
        """Stop listening."""
        self._stream.close()
        self._thread.join(_API_TIMEOUT_S)

    def _listen(self) -> None:
        try:
            for event in self._stream:
                attributes = event["Actor"]["Attributes"]
                name = attributes["name"]
                if event["Action"] == "oom":
                    self._out_of_memory.add(name)
                    continue
                code = int(attributes.get("exitCode") or attributes.get("containerExitCode") or 0)
                was_oom = name in self._out_of_memory
                self._out_of_memory.discard(name)
                self._told(name, code, was_oom)
        except (*FAILURES, ValueError, AttributeError):
            return  # closed by us, or the daemon went away; then nobody is told any more

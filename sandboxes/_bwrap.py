"""The host's side of the zygote: starts it in bubblewrap and asks it for boxes.

Invariant: bubblewrap never runs as root, since a root-started jail can be undone by one remount; and a box that
nobody waits for any more is killed on arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._rootfs import PYTHON, Rootfs

JAIL_UID = 60_411
"""Host user of every jail when Palaestra runs as root; no account has it."""

_START_S = 30.0
_FORK_S = 20.0
_END_S = 10.0
_OR_DOCKER = ', or use sandbox = "docker"'
_REMEDY = (
    "unprivileged user namespaces must be on (sysctl user.max_user_namespaces above 0, "
    "kernel.apparmor_restrict_unprivileged_userns=0, in Docker --security-opt seccomp=unconfined)" + _OR_DOCKER
)
_OPTIONS = (
    "--unshare-all --unshare-user --cap-drop ALL --die-with-parent --new-session --as-pid-1 --clearenv "
    "--uid 1000 --gid 1000 --hostname sandbox --ro-bind ROOT / --proc /proc --dev /dev --remount-ro /dev "
    "--chdir / --setenv PYTHONPATH /palaestra --setenv PYTHONHASHSEED 0 --setenv LANG C.UTF-8"
)


class ForkedBox(NamedTuple):
    """A new box: the pidfd of its pid 1, and its wait status once it has ended."""

    pidfd: int
    status: asyncio.Future[int]


def find_bwrap() -> str:
    """Where bubblewrap is; raises `ConfigError` when it is not installed."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ConfigError(f"bubblewrap is not installed; install the package 'bubblewrap'{_OR_DOCKER}")
    return bwrap


class ZygoteProcess:
    """The bubblewrap process and its control socket; answers are matched to requests by number."""

    def __init__(self, rootfs: Rootfs) -> None:
        """Start bubblewrap; raises `ConfigError` when it is not installed. `aclose` ends it, ready or not."""
        bwrap = find_bwrap()
        self.rootfs = rootfs
        self._hold = rootfs.hold()
        self.is_dead = False
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[ForkedBox]] = {}
        self._living: dict[int, asyncio.Future[int]] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing: asyncio.Task[str] | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        user = JAIL_UID if os.geteuid() == 0 else None
        with theirs:
            try:
                # not asyncio's, which kills the first process alone when it is cancelled: see `_close`
                self._process = subprocess.Popen(
                    _command(bwrap, rootfs.path, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    env={},
                    start_new_session=True,
                    user=user,
                    group=user,
                    extra_groups=None if user is None else [],
                )
            except BaseException:
                self._control.close()
                os.close(self._hold)
                raise
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control, self._on_message)

    async def wait_ready(self) -> None:
        """Wait until it can make boxes; raises `ConfigError` with the remedy when this machine cannot."""
        try:
            async with asyncio.timeout(_START_S):
                await asyncio.shield(self._ready)
        except (SandboxError, TimeoutError) as error:
            reason = await self.aclose() or str(error) or f"no answer within {_START_S:g} s"
            raise ConfigError(f"bubblewrap cannot make a jail here: {reason}; {_REMEDY}") from error

    async def fork_box(self, box_socket: socket.socket, config: dict[str, Any]) -> ForkedBox:
        """A new box, whose pid 1 talks over `box_socket`; raises `SandboxError`."""
        number = next(self._numbers)
        future: asyncio.Future[ForkedBox] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        request = json.dumps({"id": number, "config": config}).encode()
        try:
            socket.send_fds(self._control, [request], [box_socket.fileno()])
            async with asyncio.timeout(_FORK_S):
                return await future
        except BaseException as error:
            if future.done() and not future.cancelled() and future.exception() is None:
                discard(future.result().pidfd)  # it came, but the wait for it was given up in the same turn of the loop
            if isinstance(error, OSError):  # TimeoutError is one
                reason = str(error) or f"no answer within {_FORK_S:g} s"
                raise SandboxError(f"the jail zygote did not make a box: {reason}") from error
            raise
        finally:
            self._pending.pop(number, None)

    async def aclose(self) -> str:
        """End the zygote and with it every box; what bubblewrap printed on its error stream. Idempotent.

        Raises `SandboxError` when something of it is still there after a while.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="close the jail zygote")
        return await asyncio.shield(self._closing)  # a cancelled caller must not leave it half closed

    async def _close(self) -> str:
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        self._fail("the jail back end was closed")
        # Its whole group: the second process of a bubblewrap that is still starting waits for the first for ever.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            try:
                async with asyncio.timeout(_END_S):
                    said = await _read_to_end(stderr.fileno())
            except TimeoutError as error:
                raise SandboxError(f"the jail zygote did not end within {_END_S:g} s of SIGKILL") from error
        self._process.wait()  # it held the stream, so it has ended
        os.close(self._hold)
        return said.decode(errors="replace").strip()

    def _on_message(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 1 << 16, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            asyncio.get_running_loop().remove_reader(self._control)
            self._fail("the jail zygote ended")
            return
        message = json.loads(data)
        if "ready" in message:
            self._ready.set_result(None)
            return
        if "ended" in message:
            status = self._living.pop(message["ended"], None)
            if status is not None and not status.done():
                status.set_result(message["status"])
            return
        future = self._pending.get(message["id"])
        if future is None or future.done():
            for pidfd in fds:
                discard(pidfd)
        elif "error" in message:
            future.set_exception(SandboxError(f"the kernel refused a sandbox: {message['error']}; {_REMEDY}"))
        elif not fds:
            future.set_exception(SandboxError("no file descriptor is free for a sandbox: raise `ulimit -n`"))
        else:
            # the number may be that of a box before it whose end was not told yet
            status = self._living[message["pid"]] = asyncio.get_running_loop().create_future()
            future.set_result(ForkedBox(fds[0], status))

    def _fail(self, reason: str) -> None:
        self.is_dead = True
        if not self._ready.done():
            self._ready.set_exception(SandboxError(reason))
        self._ready.exception()  # mark as seen: after the start nobody awaits it
        for future in self._pending.values():
            if not future.done():
                future.set_exception(SandboxError(reason))
        for status in self._living.values():
            status.cancel()


async def readable(fd: int) -> None:
    """Wait until there is something to read: for a pidfd, until its process has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def _read_to_end(fd: int) -> bytes:
    data = bytearray()
    while True:
        await readable(fd)
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return bytes(data)
        data += chunk


def discard(pidfd: int) -> None:
    """Kill the process of a pidfd and close it."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def _command(bwrap: str, root: Path, control_fd: int) -> list[str]:
    options = [str(root) if word == "ROOT" else word for word in _OPTIONS.split()]
    return [bwrap, *options, PYTHON, "-s", "-P", "-S", "-m", "palaestra.sandboxes._zygote", str(control_fd)]

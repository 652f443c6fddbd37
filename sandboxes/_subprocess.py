"""The back end without isolation: the same server as an ordinary process, in a temporary folder.

For code that you wrote yourself, and as the counterpart of every isolation test. Invariant: nobody gets it who
did not ask for it by `allow_unsafe=True`. Does not cover anything: the code runs as this user, sees this
machine's files, processes and network, and can kill or fool what reports its results.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from palaestra.errors import SandboxError
from palaestra.sandboxes._box import Box
from palaestra.sandboxes._bwrap import readable
from palaestra.sandboxes._folders import make_folder, remove_folder
from palaestra.sandboxes._host import Death, WhoseMemory, server_config
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._rootfs import ensure_rootfs
from palaestra.sandboxes._wire import StreamIO

_READY_S = 30.0
_CLOSE_S = 10.0


class SubprocessBackend:
    """Runs code as plain processes of this user. Belongs to the event loop it is used on."""

    name = "subprocess"

    def __init__(self) -> None:
        self._boxes: set[Box] = set()
        self._closed = False

    async def create(self, spec: SandboxSpec) -> Box:
        """See `SandboxBackend.create`."""
        if self._closed:
            raise SandboxError("the subprocess back end is closed")
        box_id = f"subprocess-{os.getpid()}-{os.urandom(4).hex()}"
        folder = _make_folder()  # not in a thread, which would make it all the same when this is cancelled
        try:
            io, process = await _start(folder, spec)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        box = Box(box_id, io, _ProcessHost(process, io, folder), spec)
        self._boxes.add(box)
        box.on_closed = self._boxes.discard
        try:
            await box.wait_ready(_READY_S)
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

    async def __aenter__(self) -> SubprocessBackend:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _ProcessHost:
    """The host's hold on one server process and its folder."""

    def __init__(self, process: subprocess.Popen[bytes], io: StreamIO, folder: Path) -> None:
        self.handle = f"folder {folder}"
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._io = io
        self._folder = folder

    def kill(self) -> None:
        self._io.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def release(self) -> None:
        try:
            async with asyncio.timeout(_CLOSE_S):
                await readable(self._pidfd)
        except TimeoutError as error:
            raise SandboxError(f"a sandbox did not end within {_CLOSE_S:g} s of SIGKILL") from error
        finally:
            os.close(self._pidfd)
            self._process.wait()
            await asyncio.to_thread(remove_folder, self._folder)

    def whose_memory(self) -> WhoseMemory:
        return ""

    async def death(self) -> Death:
        return Death()  # its code could have killed it

    def memory(self) -> tuple[int | None, int | None]:
        return None, None


def _make_folder() -> Path:
    folder = make_folder("unsafe")
    try:
        (folder / "workspace").mkdir()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


async def _start(folder: Path, spec: SandboxSpec) -> tuple[StreamIO, subprocess.Popen[bytes]]:
    config = server_config(spec, memory_per_process=True, nproc=False)
    config |= {"unsafe": True, "places": [str(folder / "workspace")]}
    command = [sys.executable, "-s", "-P", "-S", "-m", "palaestra.sandboxes._exec_server", json.dumps(config)]
    rootfs = await asyncio.to_thread(ensure_rootfs)  # for the server's files alone
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = _spawn(command, theirs, folder / "workspace", rootfs.path / "palaestra")
        except BaseException:
            ours.close()
            raise
    try:
        return StreamIO(*await asyncio.open_connection(sock=ours)), process
    except BaseException:
        ours.close()
        process.kill()
        process.wait()
        raise


def _spawn(command: list[str], sock: socket.socket, cwd: Path, module_path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=sock.fileno(),
        stdout=sock.fileno(),
        stderr=subprocess.DEVNULL,
        cwd=cwd,
        env={"PYTHONPATH": str(module_path), "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
        start_new_session=True,
    )

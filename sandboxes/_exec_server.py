"""The program inside every box: runs what the host asks for, one request at a time, as pid 1 of the box.

Standard library only, the same file for every back end. Invariants: nothing that an execution started is
alive when its answer is sent; when the host goes away, or the box's lifetime is over, the box ends at once, the
former also in the middle of an execution.

Covers: forged answers (the server is not dumpable, so `/proc/1/fd` and ptrace are closed to the agent's
uid), SIGKILL and SIGSTOP of the server (pid 1 takes neither from its own namespace), stdout that floods,
a child that keeps stdout open, setsid daemons, FIFOs and devices as files.
Does not cover: the agent slowing its own box down; any of this where it is not pid 1 (`unsafe` in its
configuration), as for the back end without isolation.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from palaestra.sandboxes import _trees
from palaestra.sandboxes._channel import Channel
from palaestra.sandboxes._execution import (
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    Child,
    Execution,
    check,
    libc,
    set_debuggable,
    start,
)
from palaestra.sandboxes._relay import Relay
from palaestra.sandboxes._spare import Spare
from palaestra.sandboxes._warm_python import ENVIRONMENT, preload, settle

SECCOMP_PATH = "/palaestra/seccomp.bpf"
WORKSPACE = "/workspace"
_PR_SET_CHILD_SUBREAPER = 36
_WHOLE = 1 << 20  # bytes that are read at once


class Server:
    """Answers requests. `config` has the limits, in the units of `Limits`, and what `server_config` adds."""

    def __init__(self, channel: Channel, config: dict[str, Any]) -> None:
        self._channel = channel
        self._config = config
        self._workspace = str(config["places"][0])
        self._proc_device = os.stat("/proc").st_dev
        self._environment = dict(ENVIRONMENT)
        self._relay = Relay(channel, config["proxy_port"]) if config["proxy_port"] else None
        if self._relay is not None:
            self._environment.update(self._relay.environment)
        if config["unsafe"]:
            self._environment.update(HOME=self._workspace)
        self._began = time.monotonic()
        self._used_s = 0.0
        self._num_execs = 0
        self._spare: Spare | None = None
        self._is_for_python = False
        settle(self._environment)
        # the kernel keeps from a first process what comes from inside and has no handler: Python has one for this
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._renew({})

    def serve(self) -> NoReturn:
        """Announce readiness, then answer until the host goes away."""
        handlers: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], bytes] | None]] = {
            "exec": self._exec,
            "python": self._python,
            "read": self._read,
            "write": self._write,
            "pack": self._pack,
            "unpack": self._unpack,
            "stats": self._stats,
            "renew": self._renew,
        }
        self._channel.send({"ready": True})
        while True:
            # what ran last will most likely run next; and nothing before the host has set the limits around us
            if self._spare is None and self._is_for_python and not self._channel.is_waiting():
                with contextlib.suppress(OSError):  # tried again when it is needed
                    self._prepare()
            header = self._channel.receive()
            if "op" not in header:
                continue  # for a connection of an execution that has ended meanwhile
            try:
                answer = handlers[header["op"]](header)
            except UnicodeError:
                answer = {"errno": errno.EINVAL, "error": "the path is no text"}, b""
            except RecursionError:
                answer = {"errno": errno.ENAMETOOLONG, "error": "the path is too deep"}, b""
            except OSError as error:
                answer = {"errno": error.errno or errno.EIO, "error": error.strerror or str(error)}, b""
            if answer is not None:
                self._channel.send({"id": header["id"], **answer[0]}, answer[1])

    def _renew(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        self._channel.deadline = time.monotonic() + self._config["lifetime_s"]
        self._is_for_python = self._num_execs == 0 and bool(header)
        return {}, b""

    def _exec(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        def enter() -> NoReturn:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and programs do not expect that
                signal.signal(number, signal.SIG_DFL)
            argv = header["argv"]
            try:
                os.execvpe(argv[0], argv, {**self._environment, **header["env"]})
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                os.write(2, f"{argv[0]}: {reason}\n".encode(errors="replace"))
                os._exit(127 if isinstance(error, FileNotFoundError) else 126)

        self._drop_spare()
        self._is_for_python = False
        return self._run(lambda: self._start(enter, self._locate(header["cwd"])), header)

    def _start(self, enter: Callable[[], NoReturn], cwd: str) -> Child:
        stdin_fd = self._stdin()
        try:
            return start(self._config, enter, (stdin_fd,), cwd)
        finally:
            os.close(stdin_fd)

    def _python(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if self._spare is None:
            self._prepare()
        self._is_for_python = True
        spare, self._spare = self._spare, None
        assert spare is not None
        return self._run(lambda: spare.begin(self._channel, header["code_bytes"]), header)

    def _prepare(self) -> None:
        self._spare = Spare(self._config, self._workspace)

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.kill()
            self._spare = None

    def _run(self, begin: Callable[[], Child], header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        stream = self._streamer(header["id"]) if header.get("stream") else None
        execution = Execution(self._config, self._channel.read_fd, stream)
        if self._relay is not None:
            self._relay.begin(execution, header["id"])
        self._channel.send({"id": header["id"], "began": True})
        try:
            answer = execution.watch(begin(), header["wall_s"])
        finally:
            if self._relay is not None:
                self._relay.end()
        self._num_execs += 1
        self._used_s += answer["cpu_s"]
        return answer, execution.out.kept() + execution.err.kept()

    def _streamer(self, number: int) -> Callable[[bool, bytes], None]:
        return lambda is_stderr, chunk: self._channel.send({"id": number, "stream": int(is_stderr)}, chunk)

    def _stdin(self) -> int:
        """A descriptor with the rest of the request's body."""
        if not self._channel.unread:
            return os.open("/dev/null", os.O_RDONLY)
        fd = os.memfd_create("stdin")
        self._channel.copy_to(fd)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def _read(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes] | None:
        """Answers by itself when the file may be larger than what is left of the box's memory."""
        fd = self._open_regular(header["path"], os.O_RDONLY)
        try:
            size = max(0, os.fstat(fd).st_size - header["offset"])
            if size > header["max_bytes"]:
                raise OSError(errno.EFBIG, f"{size} bytes are there, more than {header['max_bytes']}")
            os.lseek(fd, header["offset"], os.SEEK_SET)
            if size <= _WHOLE:  # what the kernel makes up, as in /sys, is not as long as it says
                with open(fd, "rb", closefd=False) as file:
                    return {}, file.read(min(_WHOLE, header["max_bytes"]))
            self._channel.send_file({"id": header["id"]}, fd, size)
            return None
        finally:
            os.close(fd)

    def _write(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        parent = os.path.dirname(self._locate(header["path"]))
        if parent:
            os.makedirs(parent, exist_ok=True)
        fd = self._open_regular(header["path"], os.O_WRONLY | os.O_CREAT)
        try:
            os.ftruncate(fd, 0)
            self._channel.copy_to(fd)
            os.fchmod(fd, header["mode"] & 0o777)
        finally:
            os.close(fd)
        return {}, b""

    def _pack(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Stream the members of a folder, or of all writable places, as a tar archive."""
        places = (
            self._config["places"]
            if header["path"] is None
            else [os.path.join(self._workspace, self._locate(header["path"]))]
        )
        stream = self._streamer(header["id"])
        execution = Execution(
            self._tree_limits(header), self._channel.read_fd, stream, cap=1 << 12, most=header["max_bytes"]
        )
        return self._transfer(execution, lambda: _trees.pack(places, header), header)

    def _unpack(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Put the members of a tar archive below a folder, or the places of a snapshot back."""
        places = (
            self._config["places"]
            if header["path"] is None
            else [os.path.join(self._workspace, self._locate(header["path"]))]
        )
        execution = Execution(self._tree_limits(header), self._channel.read_fd)
        return self._transfer(execution, lambda: _trees.unpack(places, header), header)

    def _tree_limits(self, header: dict[str, Any]) -> dict[str, Any]:
        """It is our work, so that what the agent may compute does not bound it."""
        return {**self._config, "cpu_s": header["wall_s"]}

    def _transfer(
        self, execution: Execution, work: Callable[[], None], header: dict[str, Any]
    ) -> tuple[dict[str, Any], bytes]:
        """Do file work in a child with the agent's limits; what went wrong as an `OSError`."""
        self._drop_spare()
        child = self._start(lambda: _trees.report(work), self._workspace)
        answer = execution.watch(child, header["wall_s"])
        if answer["stopped"] == "output":
            raise OSError(errno.EFBIG, f"more than {header['max_bytes']} bytes")
        if answer["stopped"] in ("wall", "cpu"):
            raise OSError(errno.ETIMEDOUT, f"not done within {header['wall_s']:g} s")
        if answer["status"]:
            _trees.raise_reported(execution.err.kept(), answer["oom_kills"])
        return {}, b""

    def _stats(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        now = time.monotonic()
        disk = os.statvfs(self._workspace)
        is_own = not self._config["unsafe"]  # else the file system is the host's
        return {
            "cpu_s": self._used_s,
            "num_execs": self._num_execs,
            "workspace_bytes": (disk.f_blocks - disk.f_bfree) * disk.f_frsize if is_own else 0,
            "num_files": disk.f_files - disk.f_ffree - 1 if is_own else 0,
            "age_s": now - self._began,
            "lifetime_left_s": self._channel.deadline - now,
            **(_memory() if is_own else {}),
        }, b""

    def _open_regular(self, path: str, flags: int) -> int:
        # non-blocking, so that a FIFO cannot hold the server; not truncated before it is known to be a file
        path = self._locate(path)
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_dev != self._proc_device:
            return fd
        os.close(fd)
        code = errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.EACCES
        raise OSError(code, os.strerror(code) if code == errno.EISDIR else "not a regular file")

    def _locate(self, path: str) -> str:
        """Where a path of a box is: the same, but for a back end that has no root of its own."""
        if self._workspace == WORKSPACE or not (path + "/").startswith(WORKSPACE + "/"):
            return path
        return self._workspace + path.removeprefix(WORKSPACE)


def _memory() -> dict[str, int]:
    """Memory of this container's cgroup, where the box can see it."""
    folders = (
        ("/sys/fs/cgroup", "memory.current", "memory.peak"),
        (
            "/sys/fs/cgroup/memory",
            "memory.usage_in_bytes",
            "memory.max_usage_in_bytes",
        ),
    )
    found = {}
    for folder, now, peak in folders:
        for key, name in (("memory_bytes", now), ("memory_peak_bytes", peak)):
            try:
                with open(f"{folder}/{name}") as file:
                    found[key] = int(file.read())
            except (OSError, ValueError):
                continue
    return found


def harden() -> None:
    """Give up what the server does not need; inherited by everything that it starts."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if os.path.exists(SECCOMP_PATH):
        with open(SECCOMP_PATH, "rb") as file:
            program = file.read()
        buffer = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
        check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(fprog), 0, 0), "seccomp")
    set_debuggable(False)


def main() -> None:
    """Serve over stdin and stdout, as a container's main process. The configuration is the first argument."""
    config = json.loads(sys.argv[1])
    if os.getpid() != 1 and not config["unsafe"]:
        sys.exit("the exec server must be pid 1 of its own namespace: it kills everything that it can see")
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    preload()
    if config["unsafe"]:
        check(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    else:
        harden()
    Server(channel, config).serve()


if __name__ == "__main__":
    main()

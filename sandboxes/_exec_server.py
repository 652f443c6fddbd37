"""The program inside every box: runs what the host asks for, one request at a time, as pid 1 of the box.

Standard library only, the same file for every back end. Invariants: nothing that an execution started is
alive when its answer is sent; when the host goes away the box ends at once, also in the middle of an execution.

Covers: forged answers (the server is not dumpable, so `/proc/1/fd` and ptrace are closed to the agent's
uid), SIGKILL and SIGSTOP of the server (pid 1 takes neither from its own namespace), stdout that floods,
a child that keeps stdout open, setsid daemons, FIFOs and devices as files.
Does not cover: the agent slowing its own box down.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import resource
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from palaestra.sandboxes._warm_python import ENVIRONMENT, preload, run_source

FRAME = struct.Struct("!II")
SECCOMP_PATH = "/palaestra/seccomp.bpf"
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
_MAX_BODY = 1 << 27
_KILL_AT = 8  # output beyond this multiple of the cap ends the execution
_OOM_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise `OSError` when a libc call answered -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


class Channel:
    """Framed requests and answers over two file descriptors; the process ends when the host's end closes."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self._write_fd = write_fd

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next frame."""
        header_size, body_size = FRAME.unpack(self._exactly(FRAME.size))
        if header_size + body_size > _MAX_BODY:
            os._exit(1)
        return json.loads(self._exactly(header_size)), self._exactly(body_size)

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Write one frame."""
        text = json.dumps(header).encode()
        view = memoryview(FRAME.pack(len(text), len(body)) + text + body)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except OSError:
            os._exit(0)

    def _exactly(self, count: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < count:
            try:
                chunk = os.read(self.read_fd, min(count - len(chunks), 1 << 20))
            except OSError:
                chunk = b""
            if not chunk:
                os._exit(0)
            chunks += chunk
        return bytes(chunks)


class Capture:
    """Keeps the first and the last half of `cap` bytes of a stream, and counts them all."""

    def __init__(self, cap: int) -> None:
        self.total = 0
        self._head_size = cap // 2
        self._tail_size = cap - cap // 2
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, chunk: bytes) -> None:
        """Append a chunk, forgetting what is neither head nor tail."""
        self.total += len(chunk)
        room = self._head_size - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:] if room > 0 else chunk
        if len(self._tail) > 4 * self._tail_size:
            del self._tail[: -self._tail_size]

    def kept(self) -> bytes:
        """Head and tail; everything when the total is within the cap."""
        return bytes(self._head + self._tail[-self._tail_size :])


class Server:
    """Answers requests. `config` has the limits, in the units of `Limits`, and `memory_per_process`."""

    def __init__(self, channel: Channel, config: dict[str, Any]) -> None:
        self._channel = channel
        self._config = config
        self._cap = int(config["output_kb"]) * 1024
        self._proc_device = os.stat("/proc").st_dev

    def serve(self) -> NoReturn:
        """Announce readiness, then answer until the host goes away."""
        handlers = {"exec": self._exec, "python": self._python, "read": self._read, "write": self._write}
        self._channel.send({"ready": True})
        while True:
            header, body = self._channel.receive()
            try:
                answer, blob = handlers[header["op"]](header, body)
            except UnicodeError:
                answer, blob = {"errno": errno.EINVAL, "error": "the path is no text"}, b""
            except OSError as error:
                answer, blob = {"errno": error.errno or errno.EIO, "error": error.strerror or str(error)}, b""
            self._channel.send({"id": header["id"], **answer}, blob)

    def _exec(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        def enter() -> NoReturn:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            argv = header["argv"]
            try:
                os.execvpe(argv[0], argv, {**ENVIRONMENT, **header["env"]})
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                os.write(2, f"{argv[0]}: {reason}\n".encode(errors="replace"))
                os._exit(127 if isinstance(error, FileNotFoundError) else 126)

        return self._run(enter, body, header["cwd"], header["wall_s"])

    def _python(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        size = header["code_bytes"]
        code, stdin = body[:size], body[size:]
        return self._run(lambda: run_source(code.decode(errors="surrogatepass")), stdin, "/workspace", header["wall_s"])

    def _run(
        self, enter: Callable[[], NoReturn], stdin: bytes, cwd: str, wall_s: float
    ) -> tuple[dict[str, Any], bytes]:
        out_r, out_w = os.pipe()
        err_r, err_w = os.pipe()
        began = time.monotonic()
        oom_kills = _count_oom_kills()
        pid = os.fork()
        if pid == 0:
            try:
                self._enter_child(stdin, out_w, err_w, cwd)
                enter()
            finally:  # a child never runs the server's code
                os._exit(125)
        os.close(out_w)
        os.close(err_w)
        streams = {out_r: Capture(self._cap), err_r: Capture(self._cap)}
        stopped = self._watch(pid, streams, began + wall_s)
        status, cpu_s = _end_everything(pid)
        for fd, capture in streams.items():
            _drain(fd, capture)
            os.close(fd)
        out, err = streams[out_r], streams[err_r]
        answer = {
            "stopped": stopped,
            "status": status,
            "cpu_s": cpu_s,
            "oom_kills": _count_oom_kills() - oom_kills,
            "wall_s": time.monotonic() - began,
            "stdout_total": out.total,
            "stderr_total": err.total,
            "stdout_bytes": len(out.kept()),
        }
        return answer, out.kept() + err.kept()

    def _watch(self, pid: int, streams: dict[int, Capture], deadline: float) -> str:
        """Collect output until the process ends; "" then, else why it must be stopped."""
        pidfd = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._channel.read_fd, select.POLLRDHUP)
        for fd in streams:
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        try:
            while True:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return "wall"
                for fd, _ in poll.poll(math.ceil(left_s * 1000)):
                    if fd == self._channel.read_fd:
                        os._exit(0)  # the host is gone: pid 1 ends, and the kernel ends the rest
                    if fd == pidfd:
                        return ""
                    capture = streams[fd]
                    if not _read_into(fd, capture):
                        poll.unregister(fd)
                    if capture.total > _KILL_AT * self._cap:
                        return "output"
        finally:
            os.close(pidfd)

    def _enter_child(self, stdin: bytes, out_w: int, err_w: int, cwd: str) -> None:
        """Turn a fresh fork into the agent's process: own session, own descriptors, limits."""
        try:
            os.setsid()
            stdin_fd = os.memfd_create("stdin") if stdin else os.open("/dev/null", os.O_RDONLY)
            view = memoryview(stdin)
            while view:
                view = view[os.write(stdin_fd, view) :]
            if stdin:
                os.lseek(stdin_fd, 0, os.SEEK_SET)
            for fd, number in ((stdin_fd, 0), (out_w, 1), (err_w, 2)):
                os.dup2(fd, number)
            os.closerange(3, 1 << 20)
            check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # the kernel takes the agent's processes before the server
            self._limit_child()
            os.chdir(cwd)
        except OSError as error:
            os.write(2, f"{error.strerror}: {cwd}\n".encode(errors="replace"))
            os._exit(126)

    def _limit_child(self) -> None:
        config = self._config
        cpu_s = math.ceil(config["cpu_s"])
        file_bytes = config["file_mb"] << 20
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        resource.setrlimit(resource.RLIMIT_NOFILE, (config["open_files"],) * 2)
        if config["nproc"]:
            # the server counts too
            resource.setrlimit(resource.RLIMIT_NPROC, (config["processes"] + 1,) * 2)
        if config["memory_per_process"]:
            resource.setrlimit(resource.RLIMIT_AS, (config["memory_mb"] << 20,) * 2)

    def _read(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        fd = self._open_regular(header["path"], os.O_RDONLY)
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            if size > header["max_bytes"]:
                raise OSError(errno.EFBIG, f"file has {size} bytes, more than {header['max_bytes']}")
            return {}, file.read(header["max_bytes"])

    def _write(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        parent = os.path.dirname(header["path"])
        if parent:
            os.makedirs(parent, exist_ok=True)
        fd = self._open_regular(header["path"], os.O_WRONLY | os.O_CREAT)
        with open(fd, "wb", buffering=0) as file:
            file.truncate(0)
            view = memoryview(body)
            while view:
                view = view[file.write(view) or 0 :]
        return {}, b""

    def _open_regular(self, path: str, flags: int) -> int:
        # non-blocking, so that a FIFO cannot hold the server; not truncated before it is known to be a file
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_dev != self._proc_device:
            return fd
        os.close(fd)
        code = errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.EACCES
        raise OSError(code, os.strerror(code) if code == errno.EISDIR else "not a regular file")


def _end_everything(pid: int) -> tuple[int, float]:
    """Kill and reap every process of the box but this one; wait status and CPU seconds of `pid`."""
    ended, status, usage = os.wait4(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):  # when nothing else is alive
        os.kill(-1, signal.SIGKILL)
    if not ended:
        _, status, usage = os.wait4(pid, 0)
    cpu_s = usage.ru_utime + usage.ru_stime
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return status, cpu_s


def _read_into(fd: int, capture: Capture) -> bool:
    try:
        chunk = os.read(fd, 1 << 16)
    except BlockingIOError:
        return True
    capture.add(chunk)
    return bool(chunk)


def _drain(fd: int, capture: Capture) -> None:
    # every writer is dead, so this ends at once
    while _read_into(fd, capture) and select.select([fd], [], [], 0)[0]:
        pass


def _count_oom_kills() -> int:
    """OOM kills of this container's memory cgroup; 0 where the box cannot see it."""
    for path in _OOM_FILES:
        try:
            with open(path) as file:
                counts = dict(line.split() for line in file)
            return int(counts.get("oom_kill", 0))
        except OSError:
            continue
    return 0


def harden() -> None:
    """Give up what the server does not need; inherited by everything that it starts."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if os.path.exists(SECCOMP_PATH):
        with open(SECCOMP_PATH, "rb") as file:
            program = file.read()
        buffer = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
        check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(fprog), 0, 0), "seccomp")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def main() -> None:
    """Serve over stdin and stdout, as a container's main process. The configuration is the first argument."""
    if os.getpid() != 1:
        sys.exit("the exec server must be pid 1 of its own namespace: it kills everything that it can see")
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    preload()
    harden()
    Server(channel, json.loads(sys.argv[1])).serve()


if __name__ == "__main__":
    main()

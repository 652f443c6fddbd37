"""One execution inside a box: a child with limits, watched until it ends or must be ended.

Standard library only; runs inside. Invariants: every process that the execution started is dead and reaped when
`run` returns; its CPU time is that of all its processes; orphans are reaped while it runs, so that they do not
use up the box's process limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from palaestra.sandboxes._channel import milliseconds_until

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
_KILL_AT = 8  # output beyond this multiple of the cap ends the execution
_LEAST_WAIT_S = 0.02
_PENDING_SIGNALS = 256
_EVER = 1 << 30
_MARGIN = 1 << 20  # the kernel charges memory in batches
_MEMORY_FOLDERS = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_CHILDREN = f"/proc/self/task/{os.getpid()}/children"

_death_fd = -1

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise `OSError` when a libc call answered -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


class Capture:
    """Keeps the first and the last half of `cap` bytes of a stream, and counts them all."""

    def __init__(self, cap: int) -> None:
        self.total = 0
        self.cap = cap
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


class Child(NamedTuple):
    """A process that runs the agent's code or is about to, and the ends of its output."""

    pid: int
    out_fd: int
    err_fd: int


def start(limits: dict[str, Any], enter: Callable[[], NoReturn], fds: tuple[int, ...], cwd: str) -> Child:
    """Fork a child with these limits, with `fds` as 0 and from 3 on, and let it `enter`."""
    out_r, out_w = os.pipe()
    err_r, err_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become(limits, (fds[0], out_w, err_w, *fds[1:]), cwd)
            enter()
        finally:  # a child never runs the server's code
            os._exit(125)
    os.close(out_w)
    os.close(err_w)
    return Child(pid, out_r, err_r)


class Execution:
    """What to watch while one child runs. `on_output` gets (is_stderr, chunk); `others` are more descriptors."""

    def __init__(
        self,
        limits: dict[str, Any],
        host_fd: int,
        on_output: Callable[[bool, bytes], None] | None = None,
        *,
        cap: int | None = None,
        most: float | None = None,
    ) -> None:
        self._limits = limits
        self._host_fd = host_fd
        self._on_output = on_output
        cap = int(limits["output_kb"]) * 1024 if cap is None else cap
        self._most = _KILL_AT * cap if most is None else most
        self.out, self.err = Capture(cap), Capture(cap)
        self.poll = select.poll()
        self.others: dict[int, Callable[[int, int], None]] = {}

    def watch(self, child: Child, wall_s: float) -> dict[str, Any]:
        """See a child to its end, or end it; how it ended, as the answer's header."""
        began = time.monotonic()
        used_s, before = _cpu_of_children(), shortage()
        streams = {child.out_fd: self.out, child.err_fd: self.err}
        stopped = self._watch(child.pid, streams, began + wall_s, used_s + self._limits["cpu_s"])
        status, num_survivors = _end_everything(child.pid)
        for fd in streams:
            self._drain(fd, streams[fd])
            os.close(fd)
        short = shortage().since(before)
        return {
            "stopped": stopped or ("disk" if status and self._is_disk_full(status) else ""),
            "status": status,
            "cpu_s": _cpu_of_children() - used_s,
            "survivors": num_survivors,
            "oom_kills": short.oom_kills,
            "at_limit": short.at_limit,
            "wall_s": time.monotonic() - began,
            "stdout_total": self.out.total,
            "stderr_total": self.err.total,
            "stdout_bytes": len(self.out.kept()),
        }

    def _watch(self, pid: int, streams: dict[int, Capture], deadline: float, most_cpu_s: float) -> str:
        """Collect output until the process ends; "" then, else why it must be stopped."""
        pidfd = os.pidfd_open(pid)
        self.poll.register(pidfd, select.POLLIN)
        self.poll.register(self._host_fd, select.POLLRDHUP | (select.POLLIN if self._host_fd in self.others else 0))
        for fd in streams:
            os.set_blocking(fd, False)
            self.poll.register(fd, select.POLLIN)
        deaths = child_deaths()
        self.poll.register(deaths, select.POLLIN)
        num_cpus = len(os.sched_getaffinity(0))
        next_count = time.monotonic() + self._limits["cpu_s"] / num_cpus  # not before can it be used up
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    return "wall"
                if now >= next_count:
                    left_s = most_cpu_s - _cpu_of_children() - _cpu_of_living()
                    if left_s <= 0:
                        return "cpu"
                    next_count = now + max(_LEAST_WAIT_S, left_s / num_cpus)
                for fd, event in self.poll.poll(milliseconds_until(min(deadline, next_count))):
                    if fd == pidfd:
                        return ""
                    if fd == deaths:
                        os.read(deaths, 1 << 12)
                        _reap_orphans(pid)
                    elif fd in streams:
                        self._read(fd, streams[fd])
                        if streams[fd].total > self._most:
                            return "output"
                    elif fd == self._host_fd and event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR):
                        os._exit(0)  # the host is gone: pid 1 ends, and the kernel ends the rest
                    elif fd in self.others:
                        self.others[fd](fd, event)
        finally:
            os.close(pidfd)

    def _read(self, fd: int, capture: Capture) -> bool:
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        if not chunk:
            with contextlib.suppress(KeyError):
                self.poll.unregister(fd)
            return False
        if self._on_output is not None and capture.total < self._most:
            self._on_output(capture is self.err, chunk)
        capture.add(chunk)
        return True

    def _drain(self, fd: int, capture: Capture) -> None:
        # every writer is dead, so this ends at once
        while self._read(fd, capture) and select.select([fd], [], [], 0)[0]:
            pass

    def _is_disk_full(self, status: int) -> bool:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ:
            return True
        places = [os.statvfs(place) for place in self._limits["places"]]
        return any(not place.f_bavail or not place.f_favail for place in places)


def become(limits: dict[str, Any], fds: tuple[int, ...], cwd: str) -> None:
    """Turn a fresh fork into the agent's process: own session, these descriptors from 0 on, limits."""
    try:
        os.setsid()
        forget_child_deaths()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.closerange(len(fds), 1 << 20)
        set_debuggable(True)
        _write("/proc/self/oom_score_adj", b"1000")  # the kernel takes the agent's processes before the server
        limit_process(limits)
        os.chdir(cwd)
    except OSError as error:
        os.write(2, f"{error.strerror}: {cwd}\n".encode(errors="replace"))
        os._exit(126)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def set_debuggable(can_be: bool) -> None:
    """Let processes of the same user, itself first of all, look into this one, or not."""
    check(libc.prctl(PR_SET_DUMPABLE, int(can_be), 0, 0, 0), "dumpable")


def child_deaths() -> int:
    """A descriptor that becomes readable when a child ends; made on first use."""
    global _death_fd
    if _death_fd < 0:
        _death_fd, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    return _death_fd


def forget_child_deaths() -> None:
    """In a fresh fork: let the deaths of its own children be nobody's business, or its own descriptor's."""
    global _death_fd
    if _death_fd >= 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _death_fd = -1


def limit_process(limits: dict[str, Any]) -> None:
    """Put this process and what it starts under the limits that the kernel keeps for each process."""
    file_bytes = limits["file_mb"] << 20
    # not 0, with which a program that the host's core_pattern names would be started all the same
    _lower(resource.RLIMIT_CORE, 1)
    _lower(resource.RLIMIT_SIGPENDING, _PENDING_SIGNALS)  # all boxes of a user share what the kernel has of them
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    _lower(resource.RLIMIT_NOFILE, limits["open_files"])
    if limits["nproc"]:
        _lower(resource.RLIMIT_NPROC, limits["processes"] + 1)  # the server counts too
    if limits["memory_per_process"]:
        _lower(resource.RLIMIT_AS, limits["memory_mb"] << 20)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (most, most))


def _end_everything(pid: int) -> tuple[int, int]:
    """Kill and reap every other process of the box; wait status of `pid` and how many others were alive."""
    status = -1
    num_killed = 0
    is_killing = False
    while True:
        try:
            ended, how = os.waitpid(-1, 0 if is_killing and os.getpid() == 1 else os.WNOHANG)
        except ChildProcessError:
            return status, num_killed
        if ended == pid:
            status = how
        elif ended:
            num_killed += is_killing
        else:
            _kill_all()
            is_killing = True


def _kill_all() -> None:
    if os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError):  # when nothing else is alive
            os.kill(-1, signal.SIGKILL)
        return
    # not alone in a namespace: what is orphaned comes to us, as the subreaper, and is killed in its turn
    with open(_CHILDREN) as file:
        for child in file.read().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    time.sleep(0.001)


def _reap_orphans(pid: int) -> None:
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == pid:
            return
        os.waitpid(ended.si_pid, 0)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _cpu_of_living() -> float:
    """CPU seconds of all living descendants, and of the children that they have waited for."""
    ticks = 0
    for pid in _descendants():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        ticks += sum(map(int, fields[11:15]))
    return ticks / _CLOCK_TICKS


def _descendants() -> list[str]:
    if os.getpid() == 1:
        return [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    found: list[str] = []
    waiting = [str(os.getpid())]
    while waiting:
        parent = waiting.pop()
        try:
            with open(f"/proc/{parent}/task/{parent}/children") as file:
                children = file.read().split()
        except OSError:
            continue
        found += children
        waiting += children
    return found


class Shortage(NamedTuple):
    """How often memory ran short so far."""

    oom_kills: int
    """Processes of the box that the kernel killed for memory, its own or the host's."""
    at_limit: int
    """How often the box's own limit was met; with cgroups of version 1, a number that only says whether it ever was."""

    def since(self, before: Shortage) -> Shortage:
        """What is new, where that can be told."""
        at_limit = self.at_limit if self.at_limit == _EVER else self.at_limit - before.at_limit
        return Shortage(self.oom_kills - before.oom_kills, at_limit)


def shortage() -> Shortage:
    """Of this container's memory cgroup; zeros where the box cannot see it."""
    for folder in _MEMORY_FOLDERS:
        with contextlib.suppress(OSError):
            return read_shortage(folder)
    return Shortage(0, 0)


def read_shortage(folder: str) -> Shortage:
    """Of a memory cgroup of version 2 or 1; raises `OSError` where there is none."""
    try:
        counts = _counts_in(f"{folder}/memory.events")
        return Shortage(counts.get("oom_kill", 0), counts.get("max", 0))
    except FileNotFoundError:
        counts = _counts_in(f"{folder}/memory.oom_control")
    # not `failcnt`, which not every kernel keeps (6.18 does not)
    most, limit = (_number_in(f"{folder}/memory.{name}_in_bytes") for name in ("max_usage", "limit"))
    return Shortage(counts.get("oom_kill", 0), _EVER if most >= limit - _MARGIN else 0)


def _counts_in(path: str) -> dict[str, int]:
    with open(path) as file:
        return {name: int(count) for name, count in map(str.split, file)}


def _number_in(path: str) -> int:
    with open(path) as file:
        return int(file.read())

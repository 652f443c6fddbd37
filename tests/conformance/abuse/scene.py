"""What an attempt is, and what it has at hand.

Invariants: an attempt never decides by what the box claims alone when the host can look; nothing that it plants
on the host is anything but its own; what it runs on the back end without isolation harms nothing there.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palaestra.sandboxes import Capability, ExecResult, Limits, Sandbox, SandboxBackend, SandboxSpec
from palaestra.sandboxes._protocol import OnOutput
from tests.sandboxes.hostview import marker

CLOSE_S = 2.0
PLACES = ("/workspace", "/tmp", "/dev/shm")
REFUSED = frozenset({"EPERM", "EACCES", "ENOSYS", "EAFNOSUPPORT", "EROFS"})
DONE = "DONE"

KIT = """
import ctypes, errno, fcntl, json, os, platform, signal, socket, struct, sys, threading, time
told = json.loads(sys.stdin.read() or "{}")
said = {}
libc = ctypes.CDLL(None, use_errno=True)
column = ("x86_64", "aarch64").index(platform.machine())
def attempt(name, action):
    try:
        action()
    except OSError as error:
        said[name] = errno.errorcode.get(error.errno, type(error).__name__)
    else:
        said[name] = "DONE"
def call(numbers, *arguments):
    number = numbers if isinstance(numbers, int) else numbers[column]
    arguments = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result
"""
_SAY = "\nprint(json.dumps(said), flush=True)\n"


class Scene:
    """One attempt's surroundings: the box to attack, another that must go on, a folder of the host to look at."""

    def __init__(
        self,
        backend: SandboxBackend,
        capabilities: frozenset[Capability],
        box: Sandbox,
        folder: Path,
        holder_pid: int | None = None,
    ) -> None:
        self.backend = backend
        self.capabilities = capabilities
        self.box = box
        self.folder = folder
        """A folder of the host that everybody may write to; what is in it is the attempt's own."""
        self.marker = marker()
        """The name of a sleeper, and a word that is nowhere else."""
        self.holder_pid = holder_pid or os.getpid()
        """The process that holds the boxes: this one, or a server."""
        self._boxes = [box]

    @property
    def is_unsafe(self) -> bool:
        """Whether this is the positive control, where the attempt must succeed."""
        return self.backend.name == "subprocess"

    async def make(self, **limits: Any) -> Sandbox:
        """One more box."""
        box = await self.backend.create(SandboxSpec(limits=Limits(**limits)))
        self._boxes.append(box)
        return box

    async def run(
        self,
        code: str,
        *,
        box: Sandbox | None = None,
        wall_s: float | None = None,
        on_output: OnOutput | None = None,
        **told: Any,
    ) -> ExecResult:
        """Run a payload with the kit before it; what it is told arrives as `told`."""
        stdin = json.dumps(told).encode()
        return await (box or self.box).run_python(KIT + code, stdin=stdin, wall_s=wall_s, on_output=on_output)

    async def ask(self, code: str, *, box: Sandbox | None = None, wall_s: float | None = None, **told: Any) -> Any:
        """What a payload put into `said`; it must have come to its end."""
        result = await self.run(code + _SAY, box=box, wall_s=wall_s, **told)
        assert result.is_ok, result
        return json.loads(result.stdout.splitlines()[-1])

    def ask_plainly(self, code: str, **told: Any) -> Any:
        """The same payload as a plain process of this machine, below no server of ours, in the scene's folder."""
        command = [sys.executable, "-I", "-c", KIT + code + _SAY]
        given = json.dumps(told).encode()
        done = subprocess.run(command, input=given, capture_output=True, cwd=self.folder, timeout=60, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    async def aclose(self) -> None:
        """Close every box, each within the bound, whatever is in it."""
        slowest_s = 0.0
        for box in self._boxes:
            began_s = time.monotonic()
            await box.aclose()
            slowest_s = max(slowest_s, time.monotonic() - began_s)
        assert slowest_s < CLOSE_S, f"a close took {slowest_s:.2f} s"


Attack = Callable[[Scene], Awaitable[bool]]
Control = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True)
class Attempt:
    """A numbered attempt on something that a box promises. `attack` tells whether it was contained."""

    number: int
    name: str
    capability: Capability | None
    """Which capability promises to contain it; None for what every back end must."""
    attack: Attack
    control: Control | None
    """Shows that it can succeed; None where the attack itself must do so without isolation."""
    backends: tuple[str, ...]
    """Names of the back ends that have what it attacks; all when empty."""

    def __str__(self) -> str:
        return f"{self.number:02}-{self.name}"


ATTEMPTS: dict[int, Attempt] = {}


def attempt(
    number: int,
    name: str,
    capability: Capability | None = None,
    *,
    control: Control | None = None,
    backends: tuple[str, ...] = (),
) -> Callable[[Attack], Attack]:
    """Put an attempt on the list."""

    def enlist(attack: Attack) -> Attack:
        assert number not in ATTEMPTS
        ATTEMPTS[number] = Attempt(number, name, capability, attack, control, backends)
        return attack

    return enlist


@contextmanager
def sleeper(seconds: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host that nothing in a box may touch."""
    with subprocess.Popen(["sleep", seconds]) as process:
        try:
            yield process
        finally:
            process.kill()


def peak_memory(pid: int) -> int:
    """The most memory that a process had at once since `reset_peak_memory`, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not tell VmHWM")


def reset_peak_memory(pid: int) -> int:
    """Begin to measure the peak anew, and what it is now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_memory(pid)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process with all its threads has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bytes_to_disk(pid: int) -> int:
    """What a process has made the kernel write to a disk so far."""
    return int(Path(f"/proc/{pid}/io").read_text().partition("\nwrite_bytes:")[2].split()[0])


async def raises_os_error(action: Awaitable[object], within_s: float, *words: str) -> bool:
    """Whether something is refused like a file operation, in time, and with these words."""
    try:
        async with asyncio.timeout(within_s):
            await action
    except TimeoutError:
        return False  # it is an OSError too
    except OSError as error:
        return all(word in str(error) for word in words)
    return False

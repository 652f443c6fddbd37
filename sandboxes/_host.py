"""What holds a box on the host, and what the host can tell of its end: whose doing it was.

Invariant: whatever code in a box can bring about by itself is the agent's; everything else is ours.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._protocol import Ended

PROXY_PORT = 3128
_INODES = 16384
_PLACES = ("/workspace", "/tmp", "/dev/shm")
_STOPPED = {
    "wall": Ended.WALL_TIMEOUT,
    "cpu": Ended.CPU_TIMEOUT,
    "disk": Ended.DISK,
    "output": Ended.OUTPUT_LIMIT,
}

WhoseMemory: TypeAlias = Literal["", "box", "host"]
"""Whose limit was met when the kernel killed for memory; empty when it did not."""
HOST_MEMORY = "the host ran out of memory"


class Death(NamedTuple):
    """How a box's first process ended, as far as the host knows."""

    status: int | None = None
    """Its wait status."""
    is_oom: bool = False
    """Whether the kernel killed in it because it used more than its own memory."""
    by_host: str = ""
    """What on the host ended it, where that is known."""


class BoxHost(Protocol):
    """What holds a box on the host."""

    handle: str
    """How a reaper in another process gets hold of it: see `Lease.handle`."""

    def kill(self) -> None:
        """End everything in the box now, without waiting."""

    async def release(self) -> None:
        """Wait until nothing of the box is left and remove its traces. Called once, after `kill`."""

    def whose_memory(self) -> WhoseMemory:
        """Whose memory ran out so that the kernel killed in the box, since the last call, where the host can tell."""

    async def death(self) -> Death:
        """Why the box ended by itself; waits a little for the host to know."""

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes of memory that the box uses and the most that it did, where the host can tell."""


def not_by_agent(death: Death) -> str:
    """What ended a box, when nothing inside could have; empty when the agent's code may have."""
    if death.by_host or death.is_oom or death.status is None:
        return death.by_host
    if os.WIFEXITED(death.status) and os.WEXITSTATUS(death.status) == 0:
        return "its connection to this process was lost"  # the one reason for which a server ends well
    if os.WIFSIGNALED(death.status) and os.WTERMSIG(death.status) == signal.SIGKILL:
        return "it was killed from outside"  # no signal from inside its namespace kills a first process
    return ""


def ended(stopped: str, status: int, *, is_oom: bool) -> Ended:
    """How an execution ended, by what its server says stopped it and its wait status."""
    if stopped in ("wall", "cpu", "output"):
        return _STOPPED[stopped]
    if status and is_oom:
        return Ended.OOM
    if stopped:
        return _STOPPED[stopped]
    return Ended.SIGNAL if os.WIFSIGNALED(status) else Ended.EXIT


def server_config(spec: SandboxSpec, *, memory_per_process: bool, nproc: bool) -> dict[str, Any]:
    """The configuration of the in-box server."""
    return {
        **spec.limits.model_dump(),
        "inodes": _INODES,
        "memory_per_process": memory_per_process,
        "nproc": nproc,
        "proxy_port": PROXY_PORT if spec.allow else 0,
        "places": _PLACES,
        "unsafe": False,
    }

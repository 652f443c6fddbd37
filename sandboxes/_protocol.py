"""What every sandbox back end offers, and the vocabulary of how an execution ended.

Invariant: what the agent's code did is a value (`ExecResult`, `ended` says how); what *we* failed to do
is an exception (`SandboxError`). Nothing of a sandbox survives its `aclose()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pydantic import Field

from palaestra.config import Config


class Ended(StrEnum):
    """How an execution ended; every member is the agent's doing."""

    EXIT = "exit"
    SIGNAL = "signal"
    WALL_TIMEOUT = "wall_timeout"
    CPU_TIMEOUT = "cpu_timeout"
    OOM = "oom"
    OUTPUT_LIMIT = "output_limit"
    SANDBOX_KILLED = "sandbox_killed_by_agent"


class Limits(Config):
    """What one execution and one sandbox may use."""

    wall_s: float = Field(default=10.0, gt=0)
    """Wall clock of one execution with all its processes, in seconds."""
    cpu_s: float = Field(default=10.0, gt=0)
    """CPU time of one process, in seconds."""
    memory_mb: int = Field(default=512, gt=0)
    """Memory of the sandbox in MiB where the back end can limit it as a whole, else of each process."""
    processes: int = Field(default=64, gt=0)
    """Processes and threads alive at once in the sandbox."""
    workspace_mb: int = Field(default=64, gt=0)
    """Size of the writable /workspace in MiB."""
    file_mb: int = Field(default=64, gt=0)
    """Largest file a process may write, in MiB."""
    open_files: int = Field(default=512, gt=0)
    """File descriptors of one process."""
    output_kb: int = Field(default=64, gt=0)
    """Standard output, and standard error, kept of one execution, in KiB: the head and the tail."""


class SandboxSpec(Config):
    """What to create: the same spec gives the same userland on every back end."""

    limits: Limits = Limits()
    """Limits that hold for the life of the sandbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """What an execution left. Output beyond the limit is cut in the middle and counted in `*_total` bytes."""

    ended: Ended
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    stdout_total: int
    stderr_total: int
    wall_s: float

    @property
    def is_ok(self) -> bool:
        """The process ran to its end and exited with 0."""
        return self.ended is Ended.EXIT and self.exit_code == 0


class Sandbox(Protocol):
    """One isolated box, for one episode. Use as an async context manager, or call `aclose`."""

    id: str

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        wall_s: float | None = None,
    ) -> ExecResult:
        """Run a program without a shell; `wall_s` may only tighten the spec's limit."""

    async def run_python(self, code: str, *, stdin: bytes = b"", wall_s: float | None = None) -> ExecResult:
        """Run Python source in a fresh process forked from a warm interpreter; cwd is /workspace."""

    async def read_file(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """A regular file's bytes; raises `OSError` like `open`, and for anything that is not a regular file."""

    async def write_file(self, path: str, data: bytes) -> None:
        """Create or replace a file, making its parents; raises `OSError` like `open`."""

    async def aclose(self) -> None:
        """Kill everything inside and remove every trace on the host; idempotent."""


class SandboxBackend(Protocol):
    """Makes sandboxes of one kind. One per event loop; closing it closes what it made."""

    name: str

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A fresh sandbox, never used before; raises `SandboxError` when the host cannot give one."""

    async def aclose(self) -> None:
        """Close every sandbox still open and release the back end; idempotent."""

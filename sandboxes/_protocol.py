"""What every sandbox back end offers, and the vocabulary of how an execution ended.

Invariant: what the agent's code did is a value (`ExecResult`, `ended` says how); what *we* failed to do
is an exception (`SandboxError`). Nothing of a sandbox survives its `aclose()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol, Self, TypeAlias

from palaestra.sandboxes._limits import Capability, SandboxSpec

Stream: TypeAlias = Literal["stdout", "stderr"]
OnOutput: TypeAlias = Callable[[Stream, bytes], None]
"""Called with each piece of output as it comes, before any of it is cut."""

MAX_TREE_BYTES = 64 << 20
MAX_TREE_FILES = 10_000


class Ended(StrEnum):
    """How an execution ended; every member is the agent's doing."""

    EXIT = "exit"
    SIGNAL = "signal"
    WALL_TIMEOUT = "wall_timeout"
    CPU_TIMEOUT = "cpu_timeout"
    OOM = "oom"
    DISK = "disk"
    OUTPUT_LIMIT = "output_limit"
    SANDBOX_KILLED = "sandbox_killed_by_agent"


@dataclass(frozen=True, slots=True)
class Cut:
    """Output that was not kept: `num_bytes` of it, from byte `at` on."""

    at: int
    num_bytes: int

    def __str__(self) -> str:
        return f"[{self.num_bytes:,} bytes cut from byte {self.at:,} on]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """What an execution left. Output beyond the limit is cut in the middle; `cut` says where and how much."""

    ended: Ended
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    stdout_total: int
    stderr_total: int
    wall_s: float
    cpu_s: float = 0.0
    """CPU time of all its processes, in seconds."""
    num_survivors: int = 0
    """Processes that were still alive when it ended, and were killed."""
    queue_s: float = 0.0
    """Time it waited for its turn on this machine, in seconds; no limit counts it."""

    @property
    def is_ok(self) -> bool:
        """The process ran to its end and exited with 0."""
        return self.ended is Ended.EXIT and self.exit_code == 0

    def cut(self, stream: Stream) -> Cut | None:
        """What is missing of a stream; None when it is whole."""
        kept, total = (self.stdout, self.stdout_total) if stream == "stdout" else (self.stderr, self.stderr_total)
        # the server keeps the first and the last half of the limit
        return Cut(len(kept) // 2, total - len(kept)) if total > len(kept) else None

    def text(self, stream: Stream) -> str:
        """A stream as text: bytes that are not UTF-8 as `\\xNN`, and a line of its own where something was cut."""
        kept = self.stdout if stream == "stdout" else self.stderr
        cut = self.cut(stream)
        if cut is None:
            return kept.decode(errors="backslashreplace")
        head, tail = kept[: cut.at], kept[cut.at :]
        return f"{head.decode(errors='backslashreplace')}\n{cut}\n{tail.decode(errors='backslashreplace')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a sandbox uses at this moment, and has used."""

    cpu_s: float
    """CPU time of all executions so far, in seconds."""
    num_execs: int
    workspace_bytes: int
    """Bytes in /workspace."""
    num_files: int
    """Files and folders in /workspace."""
    memory_bytes: int | None
    """Memory of the whole sandbox now; None where this host does not tell."""
    memory_peak_bytes: int | None
    """The most it was; None where this host does not tell."""
    age_s: float
    lifetime_left_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of /workspace, /tmp and /dev/shm between two executions: the whole state of a sandbox then."""

    archive: bytes


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
        on_output: OnOutput | None = None,
    ) -> ExecResult:
        """Run a program without a shell; `wall_s` may only tighten the spec's limit.

        `on_output` gets the output while the program runs. Raises `SandboxError` when the box itself fails.
        """

    async def run_python(
        self, code: str, *, stdin: bytes = b"", wall_s: float | None = None, on_output: OnOutput | None = None
    ) -> ExecResult:
        """Run Python source in a fresh process forked from a warm interpreter; cwd is /workspace."""

    async def read_file(self, path: str, *, offset: int = 0, max_bytes: int = 1 << 20) -> bytes:
        """A regular file's bytes from `offset` on.

        Raises `OSError` like `open`, for anything that is not a regular file, and when more than `max_bytes` follow.
        """

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Create or replace a file, making its parents; raises `OSError` like `open`."""

    async def put_tree(self, files: Mapping[str, bytes] | bytes, path: str = "/workspace") -> None:
        """Put files, by their path below `path`, or the members of a tar archive, into the box.

        A member that would leave `path`, is a device, or makes the archive larger than `MAX_TREE_BYTES` or
        `MAX_TREE_FILES` is refused by name with an `OSError`; setuid bits are dropped.
        """

    async def get_tree(
        self, path: str = "/workspace", *, max_bytes: int = MAX_TREE_BYTES, max_files: int = MAX_TREE_FILES
    ) -> dict[str, bytes]:
        """The regular files below a folder by their path in it; raises `OSError` when there are more than allowed."""

    async def snapshot(self) -> Snapshot:
        """The state between executions; no process survives one, so the files are all of it. See `restore`."""

    async def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this or another box; raises `OSError` when it does not fit here."""

    async def stats(self) -> Usage:
        """What it uses."""

    async def renew(self) -> None:
        """Begin its lifetime anew."""

    async def aclose(self) -> None:
        """Kill everything inside and remove every trace on the host; idempotent."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...


class SandboxBackend(Protocol):
    """Makes sandboxes of one kind. One per event loop; closing it closes what it made."""

    name: str

    async def capabilities(self) -> frozenset[Capability]:
        """What it contains and offers on this machine, proved by a probe the first time."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A fresh sandbox, never used before.

        Raises `SandboxError` when the host cannot give one now, `ConfigError` when it never can, as when
        `spec.needs` what this back end does not have.
        """

    async def aclose(self) -> None:
        """Close every sandbox still open and release the back end; idempotent."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

"""What a sandbox may use and what it must contain: the configuration of every back end.

Invariant: a spec that loads does not contradict itself; what a back end cannot give of it is refused by name
when a sandbox is made, never left out in silence.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from palaestra.config import Config


class Capability(StrEnum):
    """What a back end contains or offers on this machine; each is proved by a probe, never assumed."""

    HOST_FILES = "host_files"
    """The host's files are out of reach, and the box's own userland cannot be changed."""
    HOST_PROCESSES = "host_processes"
    """No process of the host or of another box can be seen, signalled or traced."""
    NETWORK = "network"
    """Nothing outside the box is reached: no host address, no abstract socket, no name server."""
    ALLOW_LIST = "allow_list"
    """The destinations of `SandboxSpec.allow` and no others are reached, by a proxy of ours."""
    KERNEL = "kernel"
    """No privileges, no new namespaces or mounts, and a filter on system calls."""
    HONEST_ANSWERS = "honest_answers"
    """Code in the box cannot forge, stop or kill what reports its results."""
    NO_LEFTOVERS = "no_leftovers"
    """No process outlives its execution, and nothing the end of its owner, however violent."""
    MEMORY = "memory"
    """`memory_mb` holds for the whole box, its files in memory included; without it, for each process."""
    PROCESSES = "processes"
    """`processes` holds: a fork bomb stays in its box."""
    DISK = "disk"
    """`workspace_mb` holds for each writable place."""
    INODES = "inodes"
    """The number of files is limited too."""
    FILE_LOCKS = "file_locks"
    """Two boxes cannot signal each other by locks on files that they share."""
    SNAPSHOT = "snapshot"
    """`snapshot` and `restore` keep the whole state between two executions, which is the files."""
    FORK = "fork"
    """A second box can start from a snapshot of the first."""

    @classmethod
    def isolating(cls) -> frozenset[Capability]:
        """What code that nobody vouches for needs at the least; for `SandboxSpec.needs`."""
        containing = {cls.HOST_FILES, cls.HOST_PROCESSES, cls.NETWORK, cls.KERNEL, cls.HONEST_ANSWERS}
        return frozenset(containing | {cls.NO_LEFTOVERS, cls.PROCESSES, cls.DISK})


_DESTINATION = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")


def _check_destination(text: str) -> str:
    port = text.rpartition(":")[2]
    if not _DESTINATION.fullmatch(text) or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r} is no destination: write host:port or *.domain:port, such as pypi.org:443")
    return text.lower()


_MOST_S = 24 * 86_400.0  # a box that somebody forgot for longer is surely nobody's
_OUTPUT_FACTOR = 8
"""An execution ends when it wrote this many times what is kept; until then its server holds some of it."""


class Limits(Config):
    """What one execution and one sandbox may use."""

    wall_s: float = Field(default=10.0, gt=0)
    """Wall clock of one execution with all its processes, in seconds; below `lifetime_s`."""
    cpu_s: float = Field(default=10.0, gt=0, le=_MOST_S)
    """CPU time of one execution with all its processes, in seconds."""
    memory_mb: int = Field(default=512, ge=32, le=1 << 22)
    """Memory of the sandbox in MiB where the back end can limit it as a whole, else of each process; 32 to 2^22."""
    processes: int = Field(default=64, gt=0, le=1 << 15)
    """Processes and threads alive at once in the sandbox; at most 32,768."""
    workspace_mb: int = Field(default=64, gt=0)
    """Size of each of the three writable places (/workspace, /tmp, /dev/shm) in MiB, below `memory_mb`. What they hold
    counts as memory: all three are full at once only where three times as much is below `memory_mb`."""
    file_mb: int = Field(default=64, gt=0)
    """Largest file a process may write, in MiB; at most `workspace_mb` where it is set."""
    open_files: int = Field(default=512, ge=16, le=1 << 16)
    """File descriptors of one process; 16 to 65,536."""
    output_kb: int = Field(default=64, gt=0, le=1 << 15)
    """Standard output, and standard error, kept of one execution, in KiB: the head and the tail. At most 32,768, so
    that both travel together, and an eighth of `memory_mb`."""
    lifetime_s: float = Field(default=3600.0, gt=0, le=_MOST_S)
    """A sandbox ends this many seconds after its lease began or was renewed, whoever forgot it; at most 24 days."""

    @model_validator(mode="after")
    def _agree(self) -> Limits:
        if self.file_mb > self.workspace_mb and "file_mb" in self.model_fields_set:
            raise ValueError(f"file_mb = {self.file_mb} is more than workspace_mb = {self.workspace_mb} can hold")
        if self.workspace_mb >= self.memory_mb:
            raise ValueError(
                f"workspace_mb = {self.workspace_mb} must be below memory_mb = {self.memory_mb}: the files of each of "
                "the three writable places are kept in the sandbox's memory, beside its processes"
            )
        if _OUTPUT_FACTOR * self.output_kb > self.memory_mb << 10:
            raise ValueError(
                f"output_kb = {self.output_kb} is more than memory_mb = {self.memory_mb} can hold: "
                f"at most {(self.memory_mb << 10) // _OUTPUT_FACTOR}, an eighth"
            )
        if self.wall_s >= self.lifetime_s:
            raise ValueError(f"wall_s = {self.wall_s:g} must be below lifetime_s = {self.lifetime_s:g}")
        return self


class SandboxSpec(Config):
    """What to create: the same spec gives the same userland on every back end."""

    limits: Limits = Limits()
    """Limits that hold for the life of the sandbox."""
    allow: tuple[Annotated[str, AfterValidator(_check_destination)], ...] = ()
    """Destinations that it may reach, as host:port or *.domain:port, through the proxy that HTTP_PROXY and
    HTTPS_PROXY name inside; none by default. A name counts only while it resolves to public addresses."""
    needs: frozenset[Capability] = frozenset()
    """What the back end must have proved to contain or offer here; creation is refused otherwise."""

    @property
    def required(self) -> frozenset[Capability]:
        """`needs`, and what the other settings imply."""
        return self.needs | {Capability.ALLOW_LIST} if self.allow else self.needs

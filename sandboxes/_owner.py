"""Who made a sandbox, so that what a dead process left is told from what a living one uses.

Invariant: an owner is a boot, a process id and that process's start time; a pid that came again is another owner.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


def owner_of(pid: int) -> str:
    """The owner text of a process; one that is dead has a start time that no process has."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = "dead"
    return f"{_boot_id()}:{pid}:{start}"


def this_owner() -> str:
    """The owner text of this process."""
    return owner_of(os.getpid())


def is_dead(owner: str) -> bool:
    """Whether the process that made something is surely gone; False for another boot, as of a remote host."""
    boot_id, pid, _ = owner.split(":")
    return boot_id == _boot_id() and owner_of(int(pid)) != owner


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

"""What a process has in hand: processes below it, descriptors, leases, temporary files, memory.

Covers: whatever inherited the mark in its environment or descends from this process, also when it was re-parented.
Does not cover: what a daemon of others (a container engine) holds without a lease.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from palaestra.sandboxes.leases import list_leases
from palaestra.trainer._proc import descendants, inheritors, share_mb
from palaestra.trainer.doctor._marks import MARK


@dataclass(frozen=True, slots=True)
class Census:
    """Counts, and memory in MiB: of this process alone, and of everything below it too."""

    processes: int
    descriptors: int
    leases: int
    files: int
    own_mb: int
    all_mb: int


def take_census(scratch: Path) -> Census:
    """Count now. `scratch` is the folder for this process's temporary files."""
    own, mark = os.getpid(), os.environ.get(MARK)
    family = descendants(own) | (inheritors(MARK, mark) if mark else set())
    owners = {own, *family}
    return Census(
        processes=len(family),
        descriptors=len(os.listdir("/proc/self/fd")) - 1,
        leases=sum(lease.owner_pid in owners for lease in list_leases()),
        files=sum(1 for _ in scratch.iterdir()),
        own_mb=int(share_mb(own)),
        all_mb=int(sum(map(share_mb, owners))),
    )

"""What a process has in hand: processes below it, descriptors, threads, leases, files, memory.

Covers: whatever inherited the mark in its environment or descends from this process, also when it was re-parented.
Does not cover: what a daemon of others (a container engine) holds without a lease.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from palaestra.sandboxes.leases import list_leases
from palaestra.trainer._proc import descendants, inheritors, share_mb
from palaestra.trainer.doctor._footprints import Footprints
from palaestra.trainer.doctor._marks import MARK

_POOLED = "asyncio_"


@dataclass(frozen=True, slots=True)
class Census:
    """Counts, and memory in MiB: of this process alone, and of everything below it too."""

    processes: int
    descriptors: int
    threads: int
    leases: int
    files: int
    strays: frozenset[str]
    own_mb: int
    all_mb: int


def take_census(footprints: Footprints) -> Census:
    """Count now."""
    own, mark = os.getpid(), os.environ.get(MARK)
    family = descendants(own) | (inheritors(MARK, mark) if mark else set())
    owners = {own, *family}
    return Census(
        processes=len(family),
        descriptors=len(os.listdir("/proc/self/fd")) - 1,
        threads=len(os.listdir("/proc/self/task")) - _num_pooled(),
        leases=sum(lease.owner_pid in owners for lease in list_leases()),
        files=footprints.num_files(),
        strays=footprints.strays(),
        own_mb=int(share_mb(own)),
        all_mb=int(sum(map(share_mb, owners))),
    )


def _num_pooled() -> int:
    """Threads of the event loop's own pool, which grows with what is asked of it, up to a bound."""
    return sum(thread.name.startswith(_POOLED) for thread in threading.enumerate())

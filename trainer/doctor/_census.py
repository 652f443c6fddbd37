"""What a process has in hand: processes below it, descriptors, leases, temporary files, memory.

Covers: whatever inherited the mark in its environment or descends from this process, also when it was re-parented.
Does not cover: what a daemon of others (a container engine) holds without a lease.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from palaestra.sandboxes.leases import list_leases
from palaestra.trainer.doctor._marks import MARK, has_mark, parents_of_all


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
    family = _family()
    owners = {os.getpid(), *family}
    return Census(
        processes=len(family),
        descriptors=len(os.listdir("/proc/self/fd")) - 1,
        leases=sum(lease.owner_pid in owners for lease in list_leases()),
        files=sum(1 for _ in scratch.iterdir()),
        own_mb=_resident_mb(os.getpid()),
        all_mb=sum(map(_resident_mb, owners)),
    )


def _family() -> set[int]:
    """Live processes below this one, by descent or by the mark that they inherited."""
    own, mark = os.getpid(), os.environ.get(MARK, "")
    parents = parents_of_all()
    return {pid for pid in parents if pid != own and (_descends(pid, own, parents) or has_mark(pid, mark))}


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def _resident_mb(pid: int) -> int:
    """Pages that several processes share count in part with each, so that a browser's are not counted tenfold."""
    with contextlib.suppress(OSError, ValueError, StopIteration):  # ended meanwhile, or not ours to look into
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) >> 10
    return 0

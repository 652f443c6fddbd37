"""Processes as /proc shows them: family, marks, processor time, memory. What has ended counts as nothing."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_KB_PER_MB = 1024
_IDLE = (3, 4)
"""Columns of /proc/stat: idle, and waiting for a disk."""


def cpu_seconds(pid: int) -> float:
    """User and system seconds of one process since it started, all threads; 0 when it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def parents_of_all() -> dict[int, int]:
    """The parent of every live process; one that ended and was not waited for is not among them."""
    stats = {int(path.name): _stat(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    return {pid: int(fields[1]) for pid, fields in stats.items() if fields and fields[0] != "Z"}


def descendants(pid: int, *, without: Collection[int] = ()) -> set[int]:
    """Processes below `pid`, whatever their session; `without` and what is below those are left out."""
    parents = parents_of_all()
    found: set[int] = set()
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found - set(without)
        found |= frontier
    return found


def inheritors(variable: str, value: str) -> set[int]:
    """Live processes that were started with this environment variable, whoever their parent is now; never this one."""
    entry = f"{variable}={value}".encode()
    return {pid for pid in parents_of_all() if pid != os.getpid() and entry in _environ(pid)}


def tree_seconds(pid: int, *, without: Collection[int] = ()) -> float:
    """Processor seconds of a process and of what lives below it."""
    return cpu_seconds(pid) + sum(cpu_seconds(child) for child in descendants(pid, without=without))


def machine_seconds() -> float:
    """Processor seconds that all cores of the machine have worked since it started, for anybody."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    return sum(int(ticks) for position, ticks in enumerate(fields[:8]) if position not in _IDLE) / _TICKS_PER_S


def memory_mb(pid: int, *, is_peak: bool = False) -> float:
    """Resident memory of a process now, or at most so far; 0 when it is gone."""
    return _kb(Path("/proc", str(pid), "status"), "VmHWM" if is_peak else "VmRSS") / _KB_PER_MB


def share_mb(pid: int) -> float:
    """Memory of a process now, pages that several share counted in part with each; 0 where we may not look."""
    return _kb(Path("/proc", str(pid), "smaps_rollup"), "Pss") / _KB_PER_MB


def available_mb() -> float:
    """Memory of the machine that can be had without swapping."""
    return _kb(Path("/proc/meminfo"), "MemAvailable") / _KB_PER_MB


def _kb(path: Path, name: str) -> float:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0.0)


def _environ(pid: int) -> list[bytes]:
    try:
        return Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return []


def _stat(pid: int) -> list[str]:
    """The fields after the command, which may itself hold spaces and parentheses."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []

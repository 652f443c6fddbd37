"""Processor time and memory of processes, read from /proc; what has ended counts as nothing."""

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


def descendants(pid: int, *, without: Collection[int] = ()) -> set[int]:
    """Processes below `pid`, whatever their session; `without` and what is below those are left out."""
    parents = {int(path.name): _parent(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    found: set[int] = set()
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found - set(without)
        found |= frontier
    return found


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


def available_mb() -> float:
    """Memory of the machine that can be had without swapping."""
    return _kb(Path("/proc/meminfo"), "MemAvailable") / _KB_PER_MB


def _kb(path: Path, name: str) -> float:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0.0)


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """The fields after the command, which may itself hold spaces and parentheses."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []

"""A browser's processes as the host sees them: who is in the family, how much memory it uses, when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

_FIRST = "500"


class Process:
    """A process by file descriptor, since by the time of a kill its number may be another's."""

    def __init__(self, pid: int, on_death: Callable[[], None]) -> None:
        """Watch `pid`, and call `on_death` once; raises `OSError` when it is already gone."""
        self.pid = pid
        self._on_death = on_death
        self._fd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._fd, self._died)

    def kill(self) -> None:
        """Send SIGKILL; nothing happens when it is gone."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        """Kill it and stop watching; idempotent."""
        if self._fd >= 0:
            self.kill()
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _died(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        self._on_death()


def parent_of(pid: int) -> int:
    """Its parent's process id."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def family_of(pid: int) -> list[int]:
    """The process and its descendants, as far as they still run."""
    children: list[int] = []
    with contextlib.suppress(OSError):  # it is gone
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that ended meanwhile has no children
                children += map(int, (task / "children").read_text().split())
    return [pid, *(one for child in children for one in family_of(child))]


def memory_mb(pid: int) -> float:
    """Memory of the whole family: pages shared by several processes count in part (PSS), else in full."""
    return sum(map(_pss_kb, family_of(pid))) / 1024


def shared_memory_mb(pids: Iterable[int]) -> float:
    """Memory of those of a browser's processes that serve all pages, files not counted."""
    return sum(_own_kb(pid) for pid in pids if not is_renderer(pid)) / 1024


def is_renderer(pid: int) -> bool:
    """Whether it runs pages, of one browser context."""
    try:
        return b"--type=renderer" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def offer_to_kernel(pid: int) -> None:
    """Have the kernel take this process before others when memory runs out, as far as we may."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(_FIRST)


def _own_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, IndexError):
        pass  # not ours to look into, or gone
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except (OSError, IndexError):
        return 0

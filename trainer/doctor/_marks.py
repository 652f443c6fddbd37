"""Marks by which processes are known that left the family of whoever started them: a variable that they inherit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

MARK = "PALAESTRA_DOCTOR_MARK"
"""The variable; its value is unique to one examination, or to its probe."""

_LEAVE_TRIES, _DIE_TRIES, _WAIT_S = 20, 20, 0.1


@asynccontextmanager
async def marked(mark: str) -> AsyncIterator[None]:
    """What this process starts meanwhile inherits the mark, and is ended at the end."""
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before
        await end_marked(mark)


async def end_marked(mark: str) -> None:
    """Kill every process with this mark, after a moment in which what clears up after a dead owner may finish."""
    if await _are_gone(mark, _LEAVE_TRIES):
        return
    for pid in await asyncio.to_thread(find_marked, mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    await _are_gone(mark, _DIE_TRIES)


async def _are_gone(mark: str, num_tries: int) -> bool:
    for _ in range(num_tries):
        if not await asyncio.to_thread(find_marked, mark):
            return True
        await asyncio.sleep(_WAIT_S)
    return False


def find_marked(mark: str) -> set[int]:
    """Live processes that inherited this mark, whoever their parent is now; never this one."""
    return {pid for pid in parents_of_all() if pid != os.getpid() and has_mark(pid, mark)}


def has_mark(pid: int, mark: str) -> bool:
    """Whether a process was started with this mark; False too where we may not look."""
    with contextlib.suppress(OSError):  # ended meanwhile, or another user's
        return bool(mark) and f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def parents_of_all() -> dict[int, int]:
    """The parent of every live process."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):  # ended meanwhile
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(path.name)] = int(parent)
    return parents

"""Marks by which processes are known that left the family of whoever started them: a variable that they inherit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from palaestra.trainer._proc import inheritors

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
    for pid in await asyncio.to_thread(inheritors, MARK, mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    await _are_gone(mark, _DIE_TRIES)


async def _are_gone(mark: str, num_tries: int) -> bool:
    for _ in range(num_tries):
        if not await asyncio.to_thread(inheritors, MARK, mark):
            return True
        await asyncio.sleep(_WAIT_S)
    return False

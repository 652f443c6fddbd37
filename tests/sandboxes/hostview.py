"""What the host sees: processes, containers and cgroups, looked at from outside the boxes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_numbers = itertools.count()


def marker() -> str:
    """A number of seconds that no other process sleeps for: the name of a sleeper."""
    return f"98{os.getpid()}.{next(_numbers):04d}"


def processes_with(text: str) -> list[int]:
    """Host pids whose command line has `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in command:
                found.append(int(entry.name))
    return found


def children_of(pid: int) -> list[int]:
    """Direct children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def traces_of(pid: int) -> list[str]:
    """Cgroup folders and containers that the process `pid` made."""
    name = f"palaestra-{pid}-"
    # not glob, which fails where another process's folder goes away meanwhile
    walked = os.walk("/sys/fs/cgroup")
    traces = [os.path.join(parent, folder) for parent, folders, _ in walked for folder in folders if name in folder]
    for engine in ("docker", "podman"):
        if shutil.which(engine):
            command = [engine, "ps", "-aq", "--filter", f"name=palaestra-{pid}-"]
            traces += subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return traces


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Poll until the condition holds or time is up; whether it held."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True

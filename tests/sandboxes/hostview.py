"""What the host sees: processes, containers, cgroups and mounts, looked at from outside the boxes.

Invariant: what an engine keeps under names of its own (a cgroup by container id, a mount by layer) is seen too:
whatever came and belongs to no container that an engine lists was left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from tests.sandboxes.engines import containers, words_of

_CGROUPS = "/sys/fs/cgroup"
_STORES = {"/var/lib/docker", "/var/lib/containers/storage/overlay", "/run/netns", "/run/docker/netns/default"}
"""Mounts that an engine makes once for itself, when it is first used."""
_ENGINES_OWN = re.compile(r"[0-9a-f]{64}")
_numbers = itertools.count()


def marker() -> str:
    """A number of seconds that no other process sleeps for, and that nobody can guess: the name of a sleeper."""
    return f"98{int.from_bytes(os.urandom(3)):08d}.{next(_numbers):04d}"


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
    """Cgroup folders that the process `pid` named, and containers with its label, whatever they are called."""
    named = [path for path in cgroups() if f"palaestra-{pid}-" in Path(path).name]
    return named + [one.id for one in containers(owned=True) if one.owner_pid == pid]


def cgroups() -> list[str]:
    """All cgroup folders of this machine."""
    # not glob, which fails where another process's folder goes away meanwhile
    return [os.path.join(parent, folder) for parent, folders, _ in os.walk(_CGROUPS) for folder in folders]


def mounts() -> set[str]:
    """All mount points of this machine, those of container engines among them."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


_LOOKS, _LOOK_S = 6, 0.1


class Ground:
    """The mounts and engines' cgroups of the machine as they were, to tell later what was left there."""

    def __init__(self) -> None:
        self._before = _places()

    def left(self) -> list[str]:
        """What came since and belongs to no container that is listed; what is on its way only is not left."""
        strays = self._strays()
        for _ in range(_LOOKS):
            if strays:  # others on this machine make and remove containers too, whose traces stay unlisted for a moment
                time.sleep(_LOOK_S)
                strays &= self._strays()
        return sorted(strays)

    def _strays(self) -> set[str]:
        known = containers()  # before and after, since one may come or go meanwhile
        places = _places() - self._before
        if not places:
            return set()
        known = list({one.id: one for one in [*known, *containers()]}.values())
        words = set[str]().union(*map(words_of, known))
        return {place for place in places if not any(word in place for word in words)}


def _places() -> set[str]:
    return mounts() - _STORES | {path for path in cgroups() if _ENGINES_OWN.search(Path(path).name)}


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Poll until the condition holds or time is up; whether it held. A look that began in time counts."""
    deadline = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        if condition():
            return True
        if began > deadline:
            return False
        await asyncio.sleep(0.02)

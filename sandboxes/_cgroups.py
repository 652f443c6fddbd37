"""Memory limits of jails by cgroup, where this process may make cgroups; v1 or v2, whichever has the controller.

A cgroup is a slot that serves one box after another (a box's processes and pages are gone before the next
one enters), since dead cgroups cost kernel memory for as long as a cached page is charged to them.
Invariant: the folder goes when the owner closes it or dies, by a shell that waits for the owner's pipe to close.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Literal

from palaestra.sandboxes._execution import Shortage, read_shortage
from palaestra.sandboxes._owner import is_dead, this_owner

_MOUNT = Path("/sys/fs/cgroup")
_V1, _V2 = "memory.limit_in_bytes", "memory.max"
_SWAP = {_V1: ("memory.memsw.limit_in_bytes", 1), _V2: ("memory.swap.max", 0)}
"""The file that keeps a box from swap instead, and how many times its memory is written there."""
_NOW = "memory.usage_in_bytes", "memory.current"
_PEAK = "memory.max_usage_in_bytes", "memory.peak"
_GUARD = """
read _
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    rmdir "$1"/* 2>/dev/null
    rmdir "$1" 2>/dev/null
    [ -d "$1" ] || exit 0
    sleep 0.1
done
"""


class Slot:
    """One cgroup, held by at most one box at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory_mb = 0
        self._before = self._shortage()

    def enter(self, pid: int) -> None:
        """Move a process, and what it forks from now on, into the cgroup."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def shortage(self) -> Shortage:
        """How often memory ran short here since the last call."""
        before, self._before = self._before, self._shortage()
        return self._before.since(before)

    def whose_memory(self) -> Literal["", "box", "host"]:
        """Whose memory ran out so that a process was killed here, since the last call: see `BoxHost.whose_memory`."""
        short = self.shortage()
        return "" if not short.oom_kills else "box" if short.at_limit else "host"

    def _shortage(self) -> Shortage:
        try:
            return read_shortage(str(self.folder))
        except OSError:
            return Shortage(0, 0)

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes in use now, and the most since the slot was taken; None for what this kernel does not tell."""
        return self._read(_NOW), self._read(_PEAK)

    def _read(self, names: tuple[str, str]) -> int | None:
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                return int((self.folder / name).read_text())
        return None


class MemoryCgroups:
    """The slots of one owner. Make it with `open`."""

    def __init__(self, root: Path, limit_file: str, guard: asyncio.subprocess.Process) -> None:
        self._root = root
        self._limit_file = limit_file
        self._guard = guard
        self._free: list[Slot] = []
        self._num_made = 0

    @classmethod
    async def open(cls) -> MemoryCgroups | None:
        """A folder for slots, or None where this process cannot limit memory by cgroup."""
        found = _make_root(_name())
        if found is None:
            return None
        root, limit_file = found
        try:
            guard = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                _GUARD,
                "palaestra-cgroup-guard",
                str(root),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            with contextlib.suppress(OSError):  # a guard that did start may have removed it
                root.rmdir()
            raise
        return cls(root, limit_file, guard)

    def take(self, memory_mb: int) -> Slot:
        """An empty slot with this limit; raises `OSError` when the kernel refuses."""
        if self._free:
            slot = self._free.pop()
        else:
            folder = self._root / f"box{self._num_made}"
            self._num_made += 1
            folder.mkdir()
            slot = Slot(folder)
        if slot.memory_mb != memory_mb:
            try:
                self._limit(slot, memory_mb)
            except BaseException:
                slot.memory_mb = 0  # not known any more
                self._free.append(slot)
                raise
        with contextlib.suppress(OSError):  # version 1 only: a slot of version 2 keeps the most of all its boxes
            (slot.folder / _PEAK[0]).write_text("0")
        slot.shortage()
        return slot

    def _limit(self, slot: Slot, memory_mb: int) -> None:
        name, times = _SWAP[self._limit_file]
        memory, swap = slot.folder / self._limit_file, slot.folder / name
        is_raised = 0 < slot.memory_mb < memory_mb
        for file, most in ((swap, times * memory_mb), (memory, memory_mb))[:: 1 if is_raised else -1]:
            if file == memory or file.exists():  # a kernel may not account for swap
                file.write_text(str(most << 20))
        slot.memory_mb = memory_mb

    def give_back(self, slot: Slot) -> None:
        """Return a slot whose processes are gone."""
        self._free.append(slot)

    async def aclose(self) -> None:
        """Remove the folder; every box must have ended."""
        for folder in (*self._root.glob("box*"), self._root):
            with contextlib.suppress(OSError):  # the guard tries again for a while
                folder.rmdir()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        await self._guard.wait()


def _make_root(name: str) -> tuple[Path, str] | None:
    for parent, limit_file in _candidates():
        _sweep(parent)
        root = parent / name
        try:
            root.mkdir()
        except OSError:
            continue
        if _allows_children(root, limit_file):
            return root, limit_file
        root.rmdir()
    return None


def find_place() -> str | None:
    """Where this process can make memory cgroups, and of which version; None where it cannot."""
    found = _make_root(_name())
    if found is None:
        return None
    root, limit_file = found
    root.rmdir()
    return f"version {1 if limit_file == _V1 else 2}, below {root.parent}"


def sweep() -> list[str]:
    """Remove what dead owners left everywhere, and return the folders."""
    return [folder for parent, _ in _candidates() for folder in _sweep(parent)]


def _sweep(parent: Path) -> list[str]:
    """Remove what owners left whose guard was killed with them; a cgroup that has a process refuses to go."""
    removed = []
    for root in parent.glob("palaestra-*-*"):
        if is_dead(_owner(root.name)):
            for folder in (*root.glob("box*"), root):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if not root.exists():
                removed.append(str(root))
    return removed


def _name() -> str:
    _, pid, start, namespace = this_owner().split(":")
    return f"palaestra-{pid}-{start}-{namespace}-{os.urandom(4).hex()}"


def _owner(name: str) -> str:
    boot_id = this_owner().partition(":")[0]  # a cgroup does not outlive it
    return ":".join([boot_id, *name.split("-")[1:4]])


def _candidates() -> list[tuple[Path, str]]:
    """Folders that may take a child with a memory limit, best first: below our own cgroup, then the top."""
    found: list[tuple[Path, str]] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, limit_file = _MOUNT / "memory", _V1
        elif not controllers:
            top, limit_file = _MOUNT, _V2
        else:
            continue
        found += [(top / path.lstrip("/"), limit_file), (top, limit_file)]
    return [(folder, limit_file) for folder, limit_file in found if folder.is_dir()]


def _allows_children(root: Path, limit_file: str) -> bool:
    control = root / "cgroup.subtree_control"
    try:
        if control.exists():
            control.write_text("+memory")
        probe = root / "probe"
        probe.mkdir()
    except OSError:
        return False
    try:
        return (probe / limit_file).exists()
    finally:
        probe.rmdir()

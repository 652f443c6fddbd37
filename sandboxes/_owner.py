"""Who made a sandbox, so that what a dead process left is told from what a living one uses.

Invariants: an owner is a boot, a process id, that process's start time and the namespace in which the id counts; a
pid that came again is another owner; an owner that cannot be seen from here is never taken for a dead one, and a
process that ended is dead though nobody has waited for it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_DEAD = "dead"


def owner_of(pid: int) -> str:
    """The owner text of a process; one that is dead has a start time that no process has. Raises `OSError`."""
    return f"{_boot_id()}:{pid}:{_start_time(pid)}:{_namespace()}"


def this_owner() -> str:
    """The owner text of this process."""
    return owner_of(os.getpid())


def is_dead(owner: str) -> bool:
    """Whether the process that made something is surely gone.

    False for another boot, as of a remote host, for another PID namespace, as of a container that shares its daemon,
    for a text that is no owner, and where /proc cannot be read, as without a free descriptor.
    """
    parts = owner.split(":")
    try:
        if len(parts) != 4 or not parts[1].isdecimal() or (parts[0], parts[3]) != (_boot_id(), _namespace()):
            return False
        pid = int(parts[1])
        return owner_of(pid) != owner and not _is_hidden(pid)
    except OSError:
        return False


def is_of_another_boot(owner: str) -> bool:
    """Whether the machine, where an owner was on this one, has started anew since."""
    return owner.split(":")[0] != _boot_id()


def _start_time(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _DEAD
    state, num_threads, began = fields[0], int(fields[17]), fields[19].decode()
    # the first thread of a process may end before the others
    return _DEAD if state in (b"Z", b"X") and num_threads <= 1 else began


def _is_hidden(pid: int) -> bool:
    """Whether a process exists of which /proc, mounted with `hidepid`, tells nothing."""
    if _start_time(pid) != _DEAD:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False  # it is ours, so it would have been seen: it ended meanwhile


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)

"""What killed harnesses left on this machine, of every kind, whoever named it.

Invariant: what belongs to a living process that is none of the watched is not counted.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from palaestra.sandboxes._records import lease_folder
from tests.sandboxes.engines import Container, containers, inspect
from tests.sandboxes.hostview import Ground, cgroups

_IMAGE = "palaestra/base"
_ELSEWHERE = ("/dev/shm", "/run", "/var/tmp")


class Leftovers:
    """Looks for what processes left that were started, and counted in `pids`, since it was made."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the temporary folder of them all, and of this process."""
        self.pids: list[int] = []
        self._folder = folder
        self._ground = Ground()
        self._containers = {one.id for one in containers()}
        self._elsewhere = self._named_elsewhere()

    def look(self) -> dict[str, list[str]]:
        """What is there now, by kind; every list is empty when nothing was left."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        # this process is the subreaper: whatever was a descendant of theirs is its child now
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        names = [f"palaestra-{pid}-" for pid in self.pids]
        strays = self._ground.left()
        return {
            "processes": [_command_of(pid) for pid in children],
            "containers": [f"{one.engine} {one.name}" for one in containers() if self._is_left(one)],
            "mounts": [path for path in strays if not path.startswith("/sys/fs/cgroup/")],
            "cgroups": [path for path in strays if path.startswith("/sys/fs/cgroup/")]
            + [path for path in cgroups() if any(name in Path(path).name for name in names)],
            "records": sorted(path.name for path in lease_folder().iterdir()),
            "temporary folders": sorted(
                [path.name for path in self._folder.iterdir() if path != lease_folder()]
                + [path for path in self._named_elsewhere() - self._elsewhere if not _is_used_by_others(path)]
            ),
        }

    def _is_left(self, container: Container) -> bool:
        """Whether it is one of theirs, or a new one of our image that no living process owns."""
        if container.owner_pid is not None:
            return container.owner_pid in self.pids or not Path(f"/proc/{container.owner_pid}").exists()
        if container.id in self._containers:
            return False
        return _IMAGE in str((inspect(container).get("Config") or {}).get("Image", "")) or any(
            f"palaestra-{pid}-" in container.name for pid in self.pids
        )

    def _named_elsewhere(self) -> set[str]:
        """What is named like ours where nobody was told to put it; of /tmp only lists, since others use it too."""
        found = set()
        for place in _ELSEWHERE:
            with contextlib.suppress(OSError):
                found |= {entry.path for entry in os.scandir(place) if entry.name.startswith("palaestra-")}
        found |= {str(path) for path in Path("/tmp").glob("palaestra-leases*")}
        return found - {str(lease_folder())}


def _is_used_by_others(path: str) -> bool:
    """Whether a living process has a path in its command line or is in it, or has it open."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            places = [os.readlink(entry / "cwd"), *(os.readlink(fd) for fd in (entry / "fd").iterdir())]
            if path.encode() in (entry / "cmdline").read_bytes() or any(one.startswith(path) for one in places):
                return True
        except OSError:
            continue
    owner = Path(path, ".owner")
    with contextlib.suppress(OSError, ValueError, IndexError):
        return Path("/proc", owner.read_text().split(":")[1]).exists()
    return False


def _command_of(pid: str) -> str:
    """What a process was started as."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        words = b""
    return f"{pid} {words.decode(errors='replace')[:100]}"

"""Files that this process makes, noted as they are made, wherever they lie; and what is new where everybody writes.

Covers: whatever Python code of this process creates, renames or links, in any folder, and new entries of the common
temporary folders, whoever made them. Does not cover: what other programs write into folders that are already there.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path
from typing import Any

COMMON = ("/tmp", "/var/tmp", "/dev/shm")
"""Where any user's programs put what they need for a while."""

_NO_FILES = ("/proc/", "/sys/")
_CACHED = "__pycache__"
_KEPT = (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK, stat.S_ISSOCK, stat.S_ISFIFO)


class Footprints:
    """Watches from its making on, as long as the process lives: Python takes no audit hook back."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._made: set[str] = set()
        self._there = self._in_common_places()
        sys.addaudithook(self._note)

    def num_files(self) -> int:
        """Files and folders of this process that exist, and whatever lies in its folder for temporary files."""
        self._made.difference_update([path for path in tuple(self._made) if not _is_there(path)])
        beside = sum(Path(path).parent != self._scratch for path in tuple(self._made))
        return beside + sum(1 for _ in self._scratch.iterdir())

    def strays(self) -> frozenset[str]:
        """New entries of common places that nobody noted: a child's, native code's, or some other program's."""
        return self._in_common_places() - self._there - self._made - {str(self._scratch.parent)}

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        match event:
            case "open" if isinstance(args[2], int) and args[2] & os.O_CREAT:
                path = args[0]
            case "os.mkdir":
                path = args[0]
            case "os.rename" | "os.link" | "os.symlink":
                path = args[1]
            case _:
                return
        with contextlib.suppress(OSError, ValueError, TypeError):  # a number, or no folder to be relative to
            self._made.add(os.path.abspath(os.fsdecode(path)))

    def _in_common_places(self) -> frozenset[str]:
        found: set[str] = set()
        for place in COMMON:
            with contextlib.suppress(OSError), os.scandir(place) as entries:
                found |= {entry.path for entry in entries if _is_own(entry)}
        return frozenset(found)


def _is_own(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # gone
        return entry.stat(follow_symlinks=False).st_uid == os.getuid()
    return False


def _is_there(path: str) -> bool:
    if path.startswith(_NO_FILES) or _CACHED in path:
        return False
    with contextlib.suppress(OSError, ValueError):
        mode = os.lstat(path).st_mode
        return any(is_kind(mode) for is_kind in _KEPT)
    return False

"""Whole folders into and out of a box, as tar archives, by a child with the agent's limits.

Standard library only; runs inside, with no process of the agent alive. Invariants: nothing is written outside
the folder that was named; what is refused is refused by its name, before or where it stands in the archive.
Does not cover: state that is not files, since between two executions there is none; sockets and device nodes.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
_MAX_HEADER = 1 << 16


class _Member(tarfile.TarInfo):
    """A member whose extended header, which is read whole before anything is known of it, has a bound."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _MAX_HEADER:
            raise OSError(errno.EFBIG, f"a header has more than {_MAX_HEADER} bytes", self.name)
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]


def report(work: Callable[[], None]) -> NoReturn:
    """Do the work in this child; what went wrong goes to the error output as JSON."""
    try:
        work()
        sys.stdout.flush()
        os._exit(0)
    except OSError as error:
        reason = {"errno": error.errno or errno.EIO, "error": error.strerror or str(error), "name": error.filename}
    except tarfile.TarError as error:
        reason = {"errno": errno.EINVAL, "error": f"not a tar archive: {error}", "name": None}
    except (MemoryError, RecursionError) as error:
        reason = {"errno": errno.ENOMEM, "error": type(error).__name__, "name": None}
    os.write(2, json.dumps(reason).encode())
    os._exit(1)


def raise_reported(text: bytes, oom_kills: int) -> NoReturn:
    """Raise what a child reported; one that could not report ran out of memory."""
    try:
        reason = json.loads(text)
    except ValueError:
        raise OSError(errno.ENOMEM if oom_kills else errno.EIO, "out of memory" if oom_kills else "it died") from None
    name = reason["name"]
    raise OSError(reason["errno"], f"{reason['error']}: {name}" if name else reason["error"])


def pack(places: list[str], header: dict[str, Any]) -> None:
    """Write an archive to the standard output: members by their path, below its number if places are many."""
    num_files = 0
    with os.fdopen(1, "wb", closefd=False) as output, tarfile.open(fileobj=output, mode="w|") as archive:
        for number, place in enumerate(places):
            prefix = f"{number}/" if header["path"] is None else ""
            for path, name in _walk(place):
                num_files += 1
                if num_files > header["max_files"]:
                    raise OSError(errno.EFBIG, f"more than {header['max_files']} files")
                _add(archive, path, prefix + name, header)


def _add(archive: tarfile.TarFile, path: str, name: str, header: dict[str, Any]) -> None:
    kind = os.lstat(path).st_mode
    is_wanted = stat.S_ISREG(kind) if header["only_files"] else not stat.S_ISSOCK(kind)
    if not is_wanted:
        return
    if header["only_files"]:
        archive.inodes = {}  # type: ignore[attr-defined]  # a second name of a file is written, and counted, in full
    member = archive.gettarinfo(path, name)
    if not member.isreg():
        archive.addfile(member)
        return
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        archive.addfile(member, file)


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """Everything below a folder, in order, links not followed."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = os.path.join(folder, entry.name)
            yield entry.path, name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(name)


def unpack(places: list[str], header: dict[str, Any]) -> None:
    """Read an archive from the standard input; a snapshot's replaces everything in its places."""
    is_snapshot = header["path"] is None
    if is_snapshot:
        for place in places:
            _empty(place)
    else:
        os.makedirs(places[0], exist_ok=True)
    modes: list[tuple[str, int]] = []
    num_bytes = num_files = 0
    with os.fdopen(0, "rb", closefd=False) as data, tarfile.open(fileobj=data, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            num_files += 1
            num_bytes += member.size
            if num_files > header["max_files"] or num_bytes > header["max_bytes"]:
                limit = f"{header['max_files']} members or {header['max_bytes']} bytes"
                raise OSError(errno.EFBIG, f"the archive has more than {limit}", member.name)
            number, _, name = member.name.partition("/") if is_snapshot else ("0", "", member.name)
            _extract(archive, member, places[int(number)], name, modes, may_link_out=is_snapshot)
    for path, mode in reversed(modes):
        os.chmod(path, mode)


def _extract(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    place: str,
    name: str,
    modes: list[tuple[str, int]],
    *,
    may_link_out: bool,
) -> None:
    target = _inside(place, name)
    if target == place:
        return
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    if os.path.realpath(parent) != parent:
        raise OSError(errno.EPERM, "a link leads out of its place in the archive", name)
    if member.isdir():
        os.makedirs(target, exist_ok=True)
        modes.append((target, member.mode & 0o777))  # last, since it may forbid to write
        return
    if os.path.lexists(target):
        os.unlink(target)
    if member.type in _REGULAR:
        source = archive.extractfile(member)
        assert source is not None
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            while chunk := source.read(1 << 20):
                file.write(chunk)
        os.chmod(target, member.mode & 0o777)
        os.utime(target, (member.mtime, member.mtime))
    elif member.issym():
        if not may_link_out:
            _inside(place, os.path.join(os.path.dirname(name), member.linkname))
        os.symlink(member.linkname, target)
    elif member.islnk():
        linked = member.linkname.partition("/")[2] if member.name != name else member.linkname
        os.link(_inside(place, linked), target, follow_symlinks=False)
    elif member.isfifo():
        os.mkfifo(target, member.mode & 0o777)
    else:
        raise OSError(errno.EPERM, "a device does not belong in an archive", name)


def _inside(place: str, name: str) -> str:
    target = os.path.normpath(os.path.join(place, name))
    if os.path.isabs(name) or not (target + "/").startswith(place + "/"):
        raise OSError(errno.EPERM, "it leads out of the folder", name)
    return target


def _empty(place: str) -> None:
    entries = [os.path.join(place, name) for name in os.listdir(place)]
    if entries:
        # the programs can do what no recursion of ours can: any depth, any mode
        subprocess.run(["chmod", "-R", "u+rwX", "--", *entries], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", "--", *entries], check=True)

"""The host's list of leased sandboxes and browsers: who owns which, since when, for how long.

One small file each, in a folder of this user's alone: the same one for every session and after every log-out.
Invariant: a record is there, and whole, before its owner has the sandbox and goes after the sandbox; so what a record
names and no living owner holds is what a killed run left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._owner import is_dead, is_of_another_boot, owner_of, this_owner

_REMEDY = "set TMPDIR to a folder where you may write"
_UNWRITABLE = (errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS)
_PARTIAL_S = 60.0
"""No record takes so long to write: its owner died over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One sandbox of one owner. `handle` says what holds it: `process OWNER`, `container ENGINE`, `folder PATH`,
    `tab BROWSER`."""

    id: str
    backend: str
    owner: str
    label: str
    handle: str
    lifetime_s: float
    began_s: float
    """When the lease began or was renewed last, on `boot_s`, which does not jump as a wall clock does."""

    @property
    def owner_pid(self) -> int:
        """Process id of the owner."""
        return int(self.owner.split(":")[1])

    @property
    def is_orphan(self) -> bool:
        """Whether its owner is gone."""
        return is_dead(self.owner) or is_of_another_boot(self.owner)

    def left_s(self, now_s: float) -> float:
        """Lifetime left, in seconds; negative when it is over."""
        return self.began_s + self.lifetime_s - now_s


class Record:
    """The file of one lease, for its owner."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def write(cls, *, lease_id: str, backend: str, label: str, handle: str, lifetime_s: float) -> Record:
        """Note a lease of this process that begins now.

        Raises `ConfigError` when there is no place for it, `SandboxError` when there is no room.
        """
        path = _path(lease_id)
        values = {"backend": backend, "label": label, "handle": handle, "lifetime_s": lifetime_s}
        partial = path.with_suffix(".partial")
        try:
            with _told(path.parent):
                partial.write_text(json.dumps({**values, "owner": this_owner()}))
                partial.replace(path)
                _date(path)  # not before: whoever lists meanwhile would take the partial file for an old one
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        return cls(path)

    def renew(self) -> None:
        """Begin the lease anew."""
        with _told(self._path.parent), contextlib.suppress(FileNotFoundError):  # reaped
            _date(self._path)

    def remove(self) -> None:
        """Forget the lease; idempotent."""
        with _told(self._path.parent):
            self._path.unlink(missing_ok=True)


def boot_s() -> float:
    """Seconds since the machine was started, suspended or not: what leases are reckoned in."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def lease_folder() -> Path:
    """This user's folder of records; raises `ConfigError` when another user has taken its name."""
    # not XDG_RUNTIME_DIR, which is another one in a session without a login and goes away at log-out
    folder = Path(os.environ.get("TMPDIR") or "/tmp").absolute() / f"palaestra-leases-{os.geteuid()}"
    with _told(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = folder.lstat().st_uid == os.geteuid() and not folder.is_symlink()
    if not is_ours:
        raise ConfigError(f"{folder} belongs to another user; {_REMEDY}")
    return folder


def list_leases() -> list[Lease]:
    """All leases of this user on this machine, oldest first."""
    found = []
    folder = lease_folder()
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # whole meanwhile
            if time.time() - partial.stat().st_mtime > _PARTIAL_S:
                partial.unlink()
    for path in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            lease = _read(path)
            if lease is not None:
                found.append(lease)
    return sorted(found, key=lambda lease: lease.began_s)


def forget(lease_id: str) -> None:
    """Remove a record whose sandbox is gone."""
    _path(lease_id).unlink(missing_ok=True)


def _date(path: Path) -> None:
    """Let a lease begin now. Its file's own date is the wall clock's, which may jump by a day."""
    now_s = boot_s()
    os.utime(path, (now_s, now_s))


def process_handle(pid: int) -> str:
    """The handle of a sandbox that ends with a process."""
    return f"process {owner_of(pid)}"


def _path(lease_id: str) -> Path:
    return lease_folder() / f"{quote(lease_id, safe='')}.json"


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Tell what the file system refuses with the remedy."""
    try:
        yield
    except OSError as error:
        reason = f"cannot keep the list of sandboxes in {folder}: {error.strerror or error}"
        if error.errno in _UNWRITABLE:
            raise ConfigError(f"{reason}; {_REMEDY}") from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise SandboxError(f"{reason}; raise `ulimit -n`") from error
        raise SandboxError(f"{reason}; free space there, or set TMPDIR to another folder") from error


def _read(path: Path) -> Lease | None:
    began_s = path.stat().st_mtime
    try:
        values: Mapping[str, object] = json.loads(path.read_text())
        owner = str(values["owner"])
        int(owner.split(":")[1])
        return Lease(
            id=unquote(path.stem),
            backend=str(values["backend"]),
            owner=owner,
            label=str(values["label"]),
            handle=str(values["handle"]),
            lifetime_s=float(str(values["lifetime_s"])),
            began_s=began_s,
        )
    except (ValueError, LookupError, TypeError):  # not written by us
        if time.time() - began_s > _PARTIAL_S:
            path.unlink(missing_ok=True)
        return None

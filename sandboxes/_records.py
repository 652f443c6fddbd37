"""The host's list of leased sandboxes and browsers: who owns which, since when, for how long.

One small file each, in a folder of this user's alone. Invariant: a record is there before its owner has the
sandbox and goes after the sandbox; so what a record names and no living owner holds is what a killed run left.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from palaestra.errors import ConfigError
from palaestra.sandboxes._owner import is_dead, is_of_another_boot, owner_of, this_owner


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
    """Unix time at which the lease began or was renewed last."""

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
        """Note a lease of this process that begins now; raises `ConfigError` when there is no place for it."""
        path = lease_folder() / f"{lease_id}.json"
        values = {"backend": backend, "owner": this_owner(), "label": label, "handle": handle, "lifetime_s": lifetime_s}
        path.write_text(json.dumps(values))
        return cls(path)

    def renew(self) -> None:
        """Begin the lease anew."""
        with contextlib.suppress(FileNotFoundError):  # reaped
            os.utime(self._path)

    def remove(self) -> None:
        """Forget the lease; idempotent."""
        self._path.unlink(missing_ok=True)


def lease_folder() -> Path:
    """This user's folder of records; raises `ConfigError` when another user has taken its name."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"palaestra-leases-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = folder.lstat().st_uid == os.geteuid() and not folder.is_symlink()
    except OSError as error:
        raise ConfigError(f"cannot keep the list of sandboxes in {folder}: {error}; set XDG_RUNTIME_DIR") from error
    if not is_ours:
        raise ConfigError(f"{folder} belongs to another user; set XDG_RUNTIME_DIR to a folder of yours")
    return folder


def list_leases() -> list[Lease]:
    """All leases of this user on this machine, oldest first."""
    found = []
    for path in lease_folder().glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            lease = _read(path)
            if lease is not None:
                found.append(lease)
    return sorted(found, key=lambda lease: lease.began_s)


def forget(lease_id: str) -> None:
    """Remove a record whose sandbox is gone."""
    (lease_folder() / f"{lease_id}.json").unlink(missing_ok=True)


def process_handle(pid: int) -> str:
    """The handle of a sandbox that ends with a process."""
    return f"process {owner_of(pid)}"


def _read(path: Path) -> Lease | None:
    began_s = path.stat().st_mtime
    try:
        values: Mapping[str, object] = json.loads(path.read_text())
        return Lease(
            id=path.stem,
            backend=str(values["backend"]),
            owner=str(values["owner"]),
            label=str(values["label"]),
            handle=str(values["handle"]),
            lifetime_s=float(str(values["lifetime_s"])),
            began_s=began_s,
        )
    except (ValueError, KeyError):
        if time.time() - began_s > 60:  # its owner died while it wrote
            path.unlink(missing_ok=True)
        return None

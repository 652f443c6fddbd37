"""Clears what killed runs left on this machine: by owner and lifetime, never by the look of a name.

Invariant: nothing of a living owner within its lifetime is touched, and a process is killed only while it is the
very one that the record names.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palaestra.errors import PalaestraError
from palaestra.sandboxes import _cgroups
from palaestra.sandboxes._folders import orphans, remove_folder
from palaestra.sandboxes._owner import owner_of
from palaestra.sandboxes._records import Lease, boot_s, forget, list_leases

_GRACE_S = 30.0
"""A sandbox ends by itself when its lifetime is over; one that is still there so much later does not."""

_NO_OWNER = "its owner is gone"


@dataclass(frozen=True, slots=True)
class Reaped:
    """Something that was cleared, or could not be: then `error` says why."""

    what: str
    why: str
    error: str = ""


def reap(now_s: float | None = None) -> list[Reaped]:
    """Clear what dead owners left and what has outlived its lease, at `now_s` on `boot_s`; blocks for up to seconds."""
    now_s = boot_s() if now_s is None else now_s
    cleared = []
    for lease in list_leases():
        why = _NO_OWNER if lease.is_orphan else "its lifetime is over"
        if lease.is_orphan or lease.left_s(now_s) < -_GRACE_S:
            cleared.append(_attempt(f"{lease.backend} {lease.id}", why, lambda lease=lease: _end(lease)))  # type: ignore[misc]
    for folder in orphans():
        cleared.append(_attempt(f"folder {folder}", _NO_OWNER, lambda folder=folder: remove_folder(folder)))  # type: ignore[misc]
    sweeps: tuple[tuple[str, Callable[[], list[str]]], ...] = (
        ("cgroup", _cgroups.sweep),
        ("docker container", lambda: _sweep_containers("docker")),
        ("podman container", lambda: _sweep_containers("podman")),
    )
    for kind, sweep in sweeps:
        try:
            cleared += [Reaped(f"{kind} {name}", _NO_OWNER) for name in sweep()]
        except (PalaestraError, OSError) as error:
            cleared.append(Reaped(f"{kind}s", _NO_OWNER, _reason(error)))
    return cleared


def _attempt(what: str, why: str, action: Callable[[], None]) -> Reaped:
    try:
        action()
    except (PalaestraError, OSError, ValueError, LookupError) as error:  # the last two of a handle that is none
        return Reaped(what, why, _reason(error))
    return Reaped(what, why)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _end(lease: Lease) -> None:
    kind, _, value = lease.handle.partition(" ")
    if kind == "process":
        _kill(value)
    elif kind == "container":
        client = _client(value)
        if client is None:
            raise OSError(f"no {value} daemon answers")
        with contextlib.closing(client):
            from palaestra.sandboxes import _containers

            _containers.remove(client, lease.id)
    elif kind == "folder":
        remove_folder(Path(value))
    elif kind == "tab" and not lease.is_orphan:  # its browser, which others use too, is another entry's
        raise OSError("its owner lives, and has not ended it")
    forget(lease.id)


def _kill(process: str) -> None:
    pid = int(process.split(":")[1])
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if owner_of(pid) == process:  # and not another one with its number
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _sweep_containers(engine: str) -> list[str]:
    client = _client(engine)
    if client is None:
        return []
    with contextlib.closing(client):
        from palaestra.sandboxes import _containers

        return _containers.sweep(client)


def _client(engine: str) -> Any:
    """A client of the engine's daemon, or None where there is none."""
    try:
        from palaestra.sandboxes import _containers
    except ImportError:
        return None
    try:
        return _containers.connect(_containers.docker_urls() if engine == "docker" else _containers.podman_urls())
    except PalaestraError:
        return None

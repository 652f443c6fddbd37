"""What this machine can and cannot isolate, found out by trying it.

Invariant: every line is what a probe saw now; a part that is missing comes with the remedy.
"""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from palaestra.errors import PalaestraError
from palaestra.sandboxes import _cgroups
from palaestra.sandboxes._backends import check_backend, open_backend
from palaestra.sandboxes._limits import Capability
from palaestra.sandboxes._rootfs import cache_folder
from palaestra.sandboxes._seccomp import filter_program

ISOLATING = ("jail", "docker", "podman")
_LEAST_FREE_MB = 500
_LEAST_FILES = 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One part of the machine: whether it serves, what was seen, and what to do if not."""

    part: str
    is_ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was looked at."""

    machine: list[Finding]
    backends: dict[str, frozenset[Capability]]
    """What each back end that runs here provides."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why the others do not, with the remedy."""

    @property
    def can_isolate(self) -> bool:
        """Whether some back end contains code that nobody vouches for."""
        return any(Capability.isolating() <= capabilities for capabilities in self.backends.values())


def diagnose(names: Sequence[str] = ISOLATING) -> Diagnosis:
    """Look at this machine and try each of these back ends; takes some seconds, blocks."""
    backends: dict[str, frozenset[Capability]] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        reason = check_backend(name)
        if reason is None:
            try:
                backends[name] = asyncio.run(_capabilities(name))
                continue
            except (PalaestraError, OSError) as error:
                reason = " ".join(str(error).split())
        unavailable[name] = reason
    machine = [_user_namespaces(), _memory_cgroups(), _system_calls(), _browser(), _memory(), *_disks(), _open_files()]
    return Diagnosis(machine, backends, unavailable)


async def _capabilities(name: str) -> frozenset[Capability]:
    backend = await open_backend(name, label="doctor")
    try:
        return await backend.capabilities()
    finally:
        await backend.aclose()


def _user_namespaces() -> Finding:
    most = _number("/proc/sys/user/max_user_namespaces")
    is_restricted = _number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1
    is_off = most == 0 or _number("/proc/sys/kernel/unprivileged_userns_clone") == 0
    remedy = "sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1"
    if is_restricted:
        remedy = "sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    detail = "off" if is_off else "restricted by AppArmor" if is_restricted else f"up to {most}"
    is_ok = not is_off and not is_restricted
    return Finding("user namespaces", is_ok, detail, "" if is_ok else remedy)


def _memory_cgroups() -> Finding:
    place = _cgroups.find_place()
    if place is not None:
        return Finding("memory cgroups", True, place)
    remedy = "run as root, or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes)"
    return Finding("memory cgroups", False, "this process cannot make any: jails limit each process alone", remedy)


def _system_calls() -> Finding:
    machine = platform.machine()
    if filter_program(machine):
        return Finding("system-call filter", True, machine)
    return Finding("system-call filter", False, f"no table for {machine}", "use an x86_64 or aarch64 machine")


def _browser() -> Finding:
    from palaestra.sandboxes.browser import find_chromium, why_no_cage

    try:
        chromium = find_chromium()
    except PalaestraError as error:
        return Finding("Chromium", False, "not found", str(error))
    reason = why_no_cage(chromium)
    if reason is not None:
        return Finding("Chromium", False, f"{chromium}, which cannot be caged", reason)
    return Finding("Chromium", True, f"{chromium}, in a cage of its own")


def _memory() -> Finding:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free_mb = int(line.split()[1]) // 1024
            is_ok = free_mb >= _LEAST_FREE_MB
            return Finding("memory", is_ok, f"{free_mb:,} MB available", "" if is_ok else "end other programs")
    return Finding("memory", False, "unknown", "mount /proc")


def _disks() -> list[Finding]:
    found = []
    for what, folder in (("userland cache", cache_folder()), ("temporary folder", Path(tempfile.gettempdir()))):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_mb = shutil.disk_usage(existing).free >> 20
        is_ok = free_mb >= _LEAST_FREE_MB and os.access(existing, os.W_OK)
        variable = "XDG_CACHE_HOME" if what == "userland cache" else "TMPDIR"
        remedy = "" if is_ok else f"free space, or set {variable} to a writable folder with {_LEAST_FREE_MB} MB"
        found.append(Finding(what, is_ok, f"{folder}: {free_mb:,} MB free", remedy))
    return found


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_ok = soft >= _LEAST_FILES
    return Finding("open files", is_ok, f"up to {soft}", "" if is_ok else f"ulimit -n {min(hard, 65536)}")


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None

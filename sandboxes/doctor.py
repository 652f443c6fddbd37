"""What this machine can and cannot isolate, found out by trying it.

Invariant: every line is what a probe saw now; a part that is missing comes with the remedy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from palaestra.errors import PalaestraError
from palaestra.sandboxes import _cgroups
from palaestra.sandboxes._backends import check_backend, open_backend
from palaestra.sandboxes._bwrap import JAIL_UID
from palaestra.sandboxes._limits import Capability
from palaestra.sandboxes._rootfs import cache_folder
from palaestra.sandboxes._seccomp import filter_program

ISOLATING = ("jail", "docker", "podman")
_LEAST_FREE_MB = 500
_LEAST_FILES = 1024
_UNLIMITED_FILES = 65_536
_TRY_S = 20.0
_CGROUP_MOUNT = Path("/sys/fs/cgroup")
_CGROUPS = "run as root, or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes)"
_FEW_USERS = "run as an ordinary user, as the machine's root, or map more users into it (unshare --map-auto)"
_TRY_NAMESPACES = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
uid = int(sys.argv[1])
try:
    if uid != os.geteuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for flags in (0x10000000, 0x60020000):  # a user namespace, and in it what only its root may make
        if libc.unshare(flags):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
except OSError as error:
    sys.exit(f"cannot make one: {error.strerror}")
"""


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
                reason = _one_line(error)
        unavailable[name] = reason
    if "jail" in unavailable and os.geteuid() == 0 and not _is_mapped(JAIL_UID):
        unavailable["jail"] += f"; this is the root of a user namespace without other users: {_FEW_USERS}"
    machine = [
        _look("user namespaces", lambda: _user_namespaces("jail" in backends)),
        _look("memory cgroups", _memory_cgroups),
        _look("system-call filter", _system_calls),
        _look("Chromium", _browser),
        _look("memory", _memory),
        _disk("userland cache", "XDG_CACHE_HOME", cache_folder),
        _disk("temporary folder", "TMPDIR", lambda: Path(tempfile.gettempdir())),
        _look("open files", _open_files),
    ]
    return Diagnosis(machine, backends, unavailable)


def remedy_for(name: str, missing: Capability, backends: Mapping[str, frozenset[Capability]]) -> str:
    """What helps where a back end of these lacks a capability."""
    others = " or ".join(other for other in backends if missing in backends[other])
    instead = f"use {others} where it is needed" if others else "no back end here has it"
    if missing is Capability.MEMORY:
        return _CGROUPS if name == "jail" else f"give the engine the memory controller of its cgroups, or {instead}"
    if missing is Capability.KERNEL and name != "jail":
        return f"let the engine use its seccomp profile, or {instead}"
    return instead


async def _capabilities(name: str) -> frozenset[Capability]:
    backend = await open_backend(name, label="doctor")
    try:
        return await backend.capabilities()
    finally:
        await backend.aclose()


def _user_namespaces(is_used: bool) -> Finding:
    """`is_used`: the jail runs, so there are some, though perhaps for bubblewrap alone."""
    most = _number("/proc/sys/user/max_user_namespaces")
    uid = JAIL_UID if os.geteuid() == 0 else os.geteuid()
    command = [sys.executable, "-I", "-S", "-c", _TRY_NAMESPACES, str(uid)]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=_TRY_S, check=False)
    if tried.returncode == 0 or is_used:
        return Finding("user namespaces", True, f"made one, of up to {most}" if tried.returncode == 0 else "the jail's")
    reason = (tried.stderr.strip().splitlines() or ["no reason told"])[-1]
    if os.geteuid() == 0 and not _is_mapped(JAIL_UID):
        return Finding("user namespaces", False, f"{reason}: this is the root of one without other users", _FEW_USERS)
    settings = "sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1"
    if _number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1:
        settings = "sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    return Finding("user namespaces", False, reason, f"{settings}; in Docker --security-opt seccomp=unconfined")


def _is_mapped(uid: int) -> bool:
    """Whether a user exists in the user namespace that this process is in."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges)


def _memory_cgroups() -> Finding:
    place = _cgroups.find_place()
    if place is not None:
        return Finding("memory cgroups", True, place)
    return Finding("memory cgroups", False, "this process cannot make any: jails limit each process alone", _CGROUPS)


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


def free_memory() -> tuple[int, str]:
    """MiB of memory that this process may still take, and whose limit that is."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_mb = next(int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable:"))
    limited_mb = _cgroup_free_mb()
    if limited_mb is not None and limited_mb < free_mb:
        return limited_mb, "left of what this process's cgroup may use"
    return free_mb, "available"


def _memory() -> Finding:
    free_mb, whose = free_memory()
    is_ok = free_mb >= _LEAST_FREE_MB
    return Finding("memory", is_ok, f"{free_mb:,} MB {whose}", "" if is_ok else "end other programs, or allow it more")


def _cgroup_free_mb() -> int | None:
    """What is left below the limits of our cgroup and those above it; None without any."""
    left = []
    for folder, (limit_file, usage_file, cache) in _memory_folders():
        with contextlib.suppress(OSError, ValueError):  # not there, or `max`
            limit, usage = int((folder / limit_file).read_text()), int((folder / usage_file).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(limit - usage + int(counts.get(cache, 0)))  # the kernel gives cached files back
    return max(0, min(left)) >> 20 if left else None


def _memory_folders() -> list[tuple[Path, tuple[str, str, str]]]:
    found: list[tuple[Path, tuple[str, str, str]]] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, files = (
                _CGROUP_MOUNT / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        elif not controllers:
            top, files = _CGROUP_MOUNT, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        own = Path(name.lstrip("/"))
        found += [(top / part, files) for part in (own, *own.parents)]
    return found


def _disk(what: str, variable: str, find: Callable[[], Path]) -> Finding:
    remedy = f"free space, or set {variable} to a writable folder with {_LEAST_FREE_MB} MB"
    try:
        folder = find()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_mb = shutil.disk_usage(existing).free >> 20
    except (PalaestraError, OSError) as error:
        return Finding(what, False, _one_line(error), remedy)
    is_writable = os.access(existing, os.W_OK | os.X_OK)
    is_ok = free_mb >= _LEAST_FREE_MB and is_writable
    detail = f"{folder}: {free_mb:,} MB free" if is_writable else f"{folder}: not writable"
    return Finding(what, is_ok, detail, "" if is_ok else remedy)


def _open_files() -> Finding:
    soft, hard = (
        _UNLIMITED_FILES if most == resource.RLIM_INFINITY else most
        for most in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft >= _LEAST_FILES:
        return Finding("open files", True, f"up to {soft}")
    remedy = f"ulimit -n {min(hard, _UNLIMITED_FILES)}"
    if hard < _LEAST_FILES:
        remedy = f"let root raise the hard limit, which is {hard} (LimitNOFILE=, /etc/security/limits.conf)"
    return Finding("open files", False, f"up to {soft}", remedy)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _look(part: str, find: Callable[[], Finding]) -> Finding:
    """A finding; what cannot be looked at is one, too."""
    try:
        return find()
    except (PalaestraError, OSError, ValueError, StopIteration, subprocess.TimeoutExpired) as error:
        return Finding(
            part, False, f"cannot be looked at: {_one_line(error)}", "mount /proc and /sys, and run this again"
        )


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None

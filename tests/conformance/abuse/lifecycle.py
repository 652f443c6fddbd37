"""Attempts 58 to 62: a killed harness, cancelled creations, a soak, a rush, and a host that does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palaestra.errors import ConfigError, PalaestraError, SandboxError
from palaestra.sandboxes import Admission, Capability, SandboxSpec, _bwrap, _containers, _records, open_backend
from tests.conformance.abuse.scene import CLOSE_S, Scene, attempt, proves_itself
from tests.sandboxes.daemons import FAULTS, STAGES, bad_daemon, line_to_daemon, served_at
from tests.sandboxes.hostview import children_of, eventually, processes_with, traces_of

_HARNESS = """
import asyncio, sys
from palaestra.sandboxes import SandboxSpec, open_backend

async def main():
    backend = await open_backend(sys.argv[1], allow_unsafe=True)
    idle = await backend.create(SandboxSpec())
    busy = await backend.create(SandboxSpec())
    print("ready", flush=True)
    if sys.argv[3] == "busy":
        await busy.exec(["bash", "-c", f"trap '' TERM; setsid sleep {sys.argv[2]} & sleep {sys.argv[2]}"])
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def _mounts() -> set[str]:
    """Mount points of this machine, less those of the containers of others."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return {point for point in points if not point.startswith(("/var/lib/", "/run/docker", "/run/containerd"))}


_HERE = ("docker", "jail", "podman", "subprocess")
"""Back ends without a server of ours, whose own end is in tests/sandboxes/test_remote_ends.py."""


@attempt(58, "killed-harness", Capability.NO_LEFTOVERS, backends=_HERE)
async def _(scene: Scene) -> bool:
    gone = [await _is_gone_with_its_harness(scene, moment) for moment in ("busy", "idle")]
    for pid in processes_with(f"sleep\0{scene.marker}"):  # without isolation
        os.kill(pid, signal.SIGKILL)
    return all(gone)


async def _is_gone_with_its_harness(scene: Scene, moment: str) -> bool:
    mounts = _mounts()
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", _HARNESS, scene.backend.name, scene.marker, moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as harness:
        assert harness.stdout is not None
        assert harness.stdout.readline() == b"ready\n"
        if moment == "busy":
            assert await eventually(lambda: len(processes_with(f"sleep\0{scene.marker}")) >= 2)
        offspring = children_of(harness.pid)
        assert traces_of(harness.pid) or offspring
        harness.send_signal(signal.SIGKILL)

    def is_gone() -> bool:
        alive = [pid for pid in offspring if Path(f"/proc/{pid}").exists()]
        return not (processes_with(f"sleep\0{scene.marker}") or alive or traces_of(harness.pid) or _mounts() - mounts)

    return await eventually(is_gone, CLOSE_S)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += children_of(one)
    return found[1:]


def _counts(holder_pid: int) -> dict[str, int]:
    """What the holder of the boxes has on the machine, and how many tasks this process has."""
    return {
        "descriptors": len(os.listdir(f"/proc/{holder_pid}/fd")),
        "processes": len(_descendants(holder_pid)),
        "mounts": len(_mounts()),
        "traces": len(traces_of(holder_pid)),
        "leases": sum(lease.owner_pid == holder_pid for lease in _records.list_leases()),
        "tasks": len(asyncio.all_tasks()),
    }


async def _are_flat(scene: Scene, before: dict[str, int], slack: int) -> bool:
    """Whether nothing is more than it was, but for `slack` connections that a client may keep."""

    def is_flat() -> bool:
        now = _counts(scene.holder_pid)
        now["descriptors"] -= slack
        return all(now[key] <= before[key] for key in now)

    return await eventually(is_flat, CLOSE_S)


def _kept_connections(scene: Scene) -> int:
    return 0 if scene.backend.name == "jail" else 12  # of a client of HTTP, one for each request at once


@attempt(59, "cancelled-creations", control=proves_itself)
async def _(scene: Scene) -> bool:
    took_s = []
    for _ in range(3):
        began_s = time.monotonic()
        box = await scene.backend.create(SandboxSpec())
        took_s.append(time.monotonic() - began_s)
        await box.aclose()
    before = _counts(scene.holder_pid)
    moments = random.Random(59)
    num_cancelled = 0
    for _ in range(20):
        creating = asyncio.ensure_future(scene.backend.create(SandboxSpec()))
        await asyncio.wait([creating], timeout=moments.uniform(0.0, min(took_s)))
        creating.cancel()
        await asyncio.wait([creating])
        num_cancelled += creating.cancelled()
        if not creating.cancelled():
            await creating.result().aclose()
    assert num_cancelled >= 10  # they really were under way
    is_flat = await _are_flat(scene, before, _kept_connections(scene))
    assert is_flat, (before, _counts(scene.holder_pid))
    return (await (await scene.make()).exec(["true"])).is_ok


@attempt(60, "many-episodes-with-daemons", control=proves_itself)
async def _(scene: Scene) -> bool:
    is_container = scene.backend.name in ("docker", "podman")

    async def live(count: int) -> None:
        for _ in range(count):
            box = await scene.backend.create(SandboxSpec())
            result = await box.exec(["sh", "-c", "setsid sleep 99 & setsid sleep 99 & true"])
            assert (result.is_ok, result.num_survivors) == (True, 2)
            await box.aclose()

    async def live_at_once(count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(live(count // 8 + (number < count % 8)))

    await live_at_once(8)
    before = _counts(scene.holder_pid)
    await live_at_once(16 if is_container else 500)  # containers take a second each
    return await _are_flat(scene, before, _kept_connections(scene))


@attempt(61, "rush-of-creations", control=proves_itself, backends=_HERE)
async def _(scene: Scene) -> bool:
    admission = Admission(max_boxes=16, max_creating=4)
    backend = await open_backend(scene.backend.name, admission=admission)
    waited: list[float] = []

    async def live() -> None:
        box = await backend.create(SandboxSpec())
        waited.append(box.queue_s)  # type: ignore[attr-defined]
        result = await box.exec(["sh", "-c", "echo here"], wall_s=5.0)
        assert (result.stdout, result.is_ok) == (b"here\n", True)
        assert result.wall_s < 5.0
        await box.aclose()

    try:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(64):
                group.create_task(live())
        took_s = time.monotonic() - began_s
    finally:
        await backend.aclose()
    assert len(waited) == 64
    assert took_s / 4 < max(waited) < took_s  # the last one waited for most of it, and was told so
    return sum(one > 0.01 for one in waited) >= 40


@attempt(62, "host-that-does-not-answer", control=proves_itself, backends=_HERE)
async def _(scene: Scene) -> bool:
    if scene.backend.name == "jail":
        return await _tells_of_bad_bubblewrap(scene)
    return await _tells_of_bad_daemon(scene)


async def _tells_of_bad_daemon(scene: Scene) -> bool:
    name = scene.backend.name
    async with line_to_daemon(name) as line:
        with served_at(name, line.path):  # the control: the same way, to the real one
            async with await open_backend(name) as backend:
                assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_containers, "_API_TIMEOUT_S", 1)
        for stage in STAGES:
            for fault in FAULTS:
                async with bad_daemon(fault, stage) as path:
                    with served_at(name, path):
                        await _fails_with_a_line(name, f"{stage}: {fault}")
    return True


async def _fails_with_a_line(name: str, case: str) -> None:
    async with asyncio.timeout(10.0):
        backend = await open_backend(name)
        try:
            with pytest.raises((SandboxError, ConfigError)) as told:
                await (await backend.create(SandboxSpec())).exec(["true"])
            assert "\n" not in str(told.value), case
        finally:
            with contextlib.suppress(PalaestraError):
                await backend.aclose()


@contextmanager
def _bubblewrap(folder: Path, script: str) -> Iterator[None]:
    program = folder / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bwrap, "_START_S", 0.5)
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


async def _tells_of_bad_bubblewrap(scene: Scene) -> bool:
    for script in ("exit 1", "echo no user namespaces >&2; exit 1", "kill -9 $$", "exec sleep 60"):
        with _bubblewrap(scene.folder, script):
            await _fails_with_a_line("jail", script)
    with _bubblewrap(scene.folder, 'PATH="${PATH#*:}"; exec bwrap "$@"'), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bwrap, "_START_S", 20.0)
        async with await open_backend("jail") as backend:
            assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok
    return True

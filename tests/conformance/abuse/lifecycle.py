"""Attempts 58 to 61: a killed harness, cancelled creations, a soak, and a rush."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from palaestra.sandboxes import Admission, Capability, SandboxBackend, SandboxSpec, _records, open_backend
from palaestra.sandboxes.leases import reap
from tests.conformance.abuse.scene import CLOSE_S, Scene, attempt
from tests.sandboxes.hostview import Ground, children_of, eventually, mounts, processes_with, traces_of
from tests.sandboxes.remote_server import running_server

_LEASE_S = 2.0
_SOAK_S = 10.0
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


_HERE = ("docker", "jail", "podman", "subprocess")
"""Back ends without a server of ours, whose own end is in tests/sandboxes/test_remote_ends.py."""


@attempt(58, "killed-harness", Capability.NO_LEFTOVERS, backends=_HERE)
async def _(scene: Scene) -> bool:
    gone = [await _is_gone_with_its_harness(scene, moment) for moment in ("busy", "idle")]
    for pid in processes_with(f"sleep\0{scene.marker}"):  # without isolation
        os.kill(pid, signal.SIGKILL)
    if scene.is_unsafe:
        assert [one for one in reap() if not one.error]  # nor does its folder go by itself
    return all(gone)


async def _is_gone_with_its_harness(scene: Scene, moment: str) -> bool:
    ground = Ground()
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", _HARNESS, scene.backend.name, scene.marker, moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as harness:
        assert harness.stdout is not None
        try:
            assert harness.stdout.readline() == b"ready\n"
            if moment == "busy":
                assert await eventually(lambda: len(processes_with(f"sleep\0{scene.marker}")) >= 2)
            offspring = _descendants(harness.pid)
            assert traces_of(harness.pid) or offspring
        finally:
            harness.send_signal(signal.SIGKILL)

    def is_gone() -> bool:
        alive = [pid for pid in offspring if Path(f"/proc/{pid}").exists()]
        return not (processes_with(f"sleep\0{scene.marker}") or alive or traces_of(harness.pid) or ground.left())

    return await eventually(is_gone, CLOSE_S)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += children_of(one)
    return found[1:]


class _Counts:
    """What the holder of a back end's boxes has on the machine, to see whether it grows."""

    def __init__(self, backend: SandboxBackend, holder_pid: int) -> None:
        self.backend = backend
        self._holder_pid = holder_pid
        self._ground = Ground()
        self.before: dict[str, int] = {}

    def now(self) -> dict[str, int]:
        """How many there are of each."""
        return {
            "descriptors": len(os.listdir(f"/proc/{self._holder_pid}/fd")),
            "own descriptors": len(os.listdir("/proc/self/fd")),
            "processes": len(_descendants(self._holder_pid)),
            "plain mounts": sum(not path.startswith(("/var/lib/", "/run/")) for path in mounts()),
            "left by engines": len(self._ground.left()),
            "traces": len(traces_of(self._holder_pid)),
            "leases": sum(lease.owner_pid == self._holder_pid for lease in _records.list_leases()),
            "folders": len(_unsafe_folders(self._holder_pid)),
            "tasks": len(asyncio.all_tasks()),
        }

    async def settle(self, live: Callable[[], Awaitable[None]]) -> None:
        """Live until every connection that a client keeps is there, and take that for the beginning."""
        await _at_once(16, 16, live)
        raw = getattr(self.backend, "_raw", None)
        client, pulse = getattr(raw, "_client", None), getattr(raw, "_pulse", None)
        if client is not None:  # as many calls of the daemon at once as there are threads for them
            async with asyncio.TaskGroup() as group:
                for _ in range(64):
                    group.create_task(asyncio.to_thread(client.info))
        if pulse is not None:  # its next sign of life opens a connection beside the one that holds
            await pulse.call("heartbeat", {"boxes": []})
        self.before = self.now()

    async def are_flat(self, within_s: float = CLOSE_S) -> bool:
        """Whether nothing is more than it was."""
        is_flat = await eventually(lambda: all(self.now()[key] <= self.before[key] for key in self.before), within_s)
        assert is_flat, (self.before, self.now(), self._ground.left())
        return is_flat


def _unsafe_folders(pid: int) -> list[Path]:
    """A process's folders for boxes of the back end without isolation."""
    return list(Path(tempfile.gettempdir()).glob(f"palaestra-unsafe-{pid}-*"))


async def _at_once(width: int, count: int, live: Callable[[], Awaitable[None]], until_s: float = 0.0) -> int:
    """Live `count` times, `width` at once, and on until a time of the monotonic clock; how often it was."""
    done = 0

    async def work() -> None:
        nonlocal done
        while done < count or time.monotonic() < until_s:
            done += 1
            await live()

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(work())
    return done


def _live_in(backend: SandboxBackend) -> Callable[[], Awaitable[None]]:
    async def live() -> None:
        async with await backend.create(SandboxSpec()) as box:
            result = await box.exec(["sh", "-c", "setsid sleep 99 & setsid sleep 99 & true"])
            assert (result.is_ok, result.num_survivors) == (True, 2)

    return live


async def _a_forgotten_one_is_counted(scene: Scene) -> None:
    """The control: boxes that nobody closes, a lost descriptor, and a process, are more than there were."""
    counts = _Counts(scene.backend, os.getpid())
    await counts.settle(_live_in(scene.backend))
    assert await counts.are_flat()
    box = await scene.make()
    reader, writer = os.pipe()
    more = {key for key, count in counts.now().items() if count > counts.before[key]}
    os.close(reader)
    os.close(writer)
    assert more >= {"descriptors", "processes", "leases"}
    await box.aclose()
    assert await counts.are_flat()


@attempt(59, "cancelled-creations", control=_a_forgotten_one_is_counted)
async def _(scene: Scene) -> bool:
    if scene.backend.name != "remote":
        return await _cancelled_creations_leave_nothing(scene.backend, scene.holder_pid, 0.0)
    # a box whose answer was under way when its client hung up ends with the lease: a short one, to see it
    with running_server(lease_s=_LEASE_S) as server:
        async with await open_backend(server.url) as backend:
            return await _cancelled_creations_leave_nothing(backend, server.process.pid, _LEASE_S + 1.0)


async def _cancelled_creations_leave_nothing(backend: SandboxBackend, holder_pid: int, lease_s: float) -> bool:
    counts = _Counts(backend, holder_pid)
    await counts.settle(_live_in(backend))
    took_s = []
    for _ in range(3):
        began_s = time.monotonic()
        box = await backend.create(SandboxSpec())
        took_s.append(time.monotonic() - began_s)
        await box.aclose()
    moments = random.Random(59)
    num_cancelled = 0
    for _ in range(20 if backend.name == "docker" else 40):
        creating = asyncio.ensure_future(backend.create(SandboxSpec()))
        await asyncio.wait([creating], timeout=moments.uniform(0.0, min(took_s)))
        creating.cancel()
        await asyncio.wait([creating])
        num_cancelled += creating.cancelled()
        if not creating.cancelled():
            await creating.result().aclose()
    assert num_cancelled >= 10  # they really were under way
    is_flat = await counts.are_flat(lease_s + CLOSE_S)
    async with await backend.create(SandboxSpec()) as box:
        return is_flat and (await box.exec(["true"])).is_ok


@attempt(60, "many-episodes-with-daemons", control=_a_forgotten_one_is_counted)
async def _(scene: Scene) -> bool:
    counts, live = _Counts(scene.backend, scene.holder_pid), _live_in(scene.backend)
    await counts.settle(live)
    # a quiet machine lives through more than 500 jails in this time, and a few dozen containers
    count = 24 if scene.backend.name in ("docker", "podman") else 100
    assert await _at_once(8, count, live, time.monotonic() + _SOAK_S) >= count
    return await counts.are_flat()


async def _without_a_queue_all_are_made_at_once(scene: Scene) -> None:
    backend = await open_backend(scene.backend.name, allow_unsafe=True, admission=Admission(max_boxes=64))
    try:
        made = [await backend.create(SandboxSpec()) for _ in range(20)]
        alive = sum(lease.owner_pid == os.getpid() for lease in _records.list_leases())
        assert alive >= 20
        assert all(box.queue_s < 0.5 for box in made)  # type: ignore[attr-defined]
    finally:
        await backend.aclose()


@attempt(61, "rush-of-creations", control=_without_a_queue_all_are_made_at_once, backends=_HERE)
async def _(scene: Scene) -> bool:
    most = 16
    backend = await open_backend(
        scene.backend.name, allow_unsafe=True, admission=Admission(max_boxes=most, max_creating=4)
    )
    before = {lease.id for lease in _records.list_leases()}
    waited: list[float] = []
    alive: list[int] = []

    async def live() -> None:
        box = await backend.create(SandboxSpec())
        waited.append(box.queue_s)  # type: ignore[attr-defined]
        ours = (lease for lease in _records.list_leases() if lease.id not in before)
        alive.append(sum(lease.owner_pid == os.getpid() for lease in ours))
        result = await box.exec(["sh", "-c", "echo here"], wall_s=5.0)
        assert (result.stdout, result.is_ok) == (b"here\n", True)
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
    assert 1 <= max(alive) <= most  # by the host's own list
    assert took_s / 4 < max(waited) < took_s  # the last one waited for most of it, and was told so
    return sum(one > 0.01 for one in waited) >= 40

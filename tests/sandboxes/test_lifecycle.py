"""Nothing of a box is left: after close, after cancellation, after the owner's violent death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import SandboxBackend, SandboxSpec, _bwrap, open_backend
from palaestra.sandboxes._rootfs import ensure_rootfs
from tests.sandboxes.hostview import Ground, children_of, eventually, marker, processes_with, traces_of

pytestmark = pytest.mark.usefixtures("whole_machine")  # what one of them plants, another would find

_HARNESS = """
import asyncio, sys
from palaestra.sandboxes import SandboxSpec, open_backend


async def main():
    backend = await open_backend(sys.argv[1])
    idle = await backend.create(SandboxSpec())
    busy = await backend.create(SandboxSpec())
    print("ready", flush=True)
    await busy.exec(["bash", "-c", f"trap '' TERM; setsid sleep {sys.argv[2]} & sleep {sys.argv[2]}"])

asyncio.run(main())
"""


@pytest.mark.usefixtures("held_here")
async def test_close_leaves_no_process_descriptor_cgroup_or_container(backend_name: str) -> None:
    before = len(os.listdir("/proc/self/fd")), set(children_of(os.getpid()))
    name, ground = marker(), Ground()
    backend = await open_backend(backend_name)
    box = await backend.create(SandboxSpec())
    running = asyncio.ensure_future(box.exec(["sleep", name]))
    assert await eventually(lambda: bool(processes_with(name)))
    await box.aclose()
    await asyncio.wait([running])
    assert processes_with(name) == []
    await box.aclose()  # idempotent
    await backend.aclose()
    await backend.aclose()
    assert traces_of(os.getpid()) == []
    assert await eventually(lambda: ground.left() == [])
    assert (len(os.listdir("/proc/self/fd")), set(children_of(os.getpid()))) == before


async def test_closing_the_backend_closes_its_boxes(backend_name: str) -> None:
    backend = await open_backend(backend_name)
    boxes = [await backend.create(SandboxSpec()) for _ in range(2)]
    await backend.aclose()
    for box in boxes:
        with pytest.raises(SandboxError, match="closed"):
            await box.exec(["true"])
    with pytest.raises(SandboxError, match="closed"):
        await backend.create(SandboxSpec())
    assert traces_of(os.getpid()) == []


async def test_nothing_passes_from_one_box_to_the_next(backend: SandboxBackend) -> None:
    plant = "for p in ('/tmp/m', '/dev/shm/m', '/workspace/m'): open(p, 'w').write('m')\nprint('planted')"
    look = "import os; print([os.listdir(p) for p in ('/tmp', '/dev/shm', '/workspace')])"
    for code, expected in ((plant, b"planted\n"), (look, b"[[], [], []]\n")):
        box = await backend.create(SandboxSpec())
        assert (await box.run_python(code)).stdout == expected
        await box.aclose()


@pytest.mark.usefixtures("held_here")
@pytest.mark.parametrize("moment", ["busy", "idle"])
async def test_a_killed_harness_leaves_nothing(backend_name: str, moment: str) -> None:
    name, ground = marker(), Ground()
    command = [sys.executable, "-P", "-c", _HARNESS, backend_name, name]
    with _start(command) as harness:
        assert harness.stdout is not None
        try:
            assert harness.stdout.readline() == b"ready\n"
            if moment == "busy":
                assert await eventually(lambda: len(processes_with(f"sleep\0{name}")) >= 2)
            offspring = children_of(harness.pid)
            assert traces_of(harness.pid) or offspring
        finally:
            harness.send_signal(signal.SIGKILL)
    assert await eventually(lambda: not processes_with(name))
    assert await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in offspring))
    assert await eventually(lambda: not traces_of(harness.pid) and ground.left() == [])


@pytest.mark.usefixtures("held_here")
async def test_cancelled_creation_leaks_nothing(backend: SandboxBackend, backend_name: str) -> None:
    await (await backend.create(SandboxSpec())).aclose()  # warm up
    descriptors, ground = len(os.listdir("/proc/self/fd")), Ground()
    step_s, count = (0.0008, 12) if backend_name == "jail" else (0.08, 5)
    for number in range(count):
        creating = asyncio.ensure_future(backend.create(SandboxSpec()))
        await asyncio.wait([creating], timeout=number * step_s)
        creating.cancel()
        await asyncio.wait([creating])
        if not creating.cancelled():
            await creating.result().aclose()
    if backend_name == "jail":  # Docker's client keeps connections
        assert await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    else:
        assert await eventually(lambda: traces_of(os.getpid()) == [] and ground.left() == [])
    assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok


async def test_creation_cancelled_in_the_turn_of_an_answer_leaks_nothing(
    backend: SandboxBackend, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend_name != "jail":
        pytest.skip("Docker's client keeps connections")
    discarded_by = []

    def discard(pidfd: int) -> None:
        discarded_by.append(sys._getframe(1).f_code.co_name)
        original(pidfd)

    original = _bwrap.discard
    monkeypatch.setattr(_bwrap, "discard", discard)
    await (await backend.create(SandboxSpec())).aclose()  # warm up
    descriptors = len(os.listdir("/proc/self/fd"))
    loop = asyncio.get_running_loop()
    for turns in 20 * [*range(16)]:
        if turns == 0 and "fork_box" in discarded_by:
            break
        creating = asyncio.ensure_future(backend.create(SandboxSpec()))
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(0.03)  # noqa: ASYNC251 - the loop stands still, so that what it waits for is there when it goes on
        loop.call_later(0, creating.cancel)  # timers run after the readers of the same turn
        await asyncio.wait([creating])
        if not creating.cancelled():
            await creating.result().aclose()
    assert "fork_box" in discarded_by, "an answer and its cancellation never met"
    assert await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok


@pytest.mark.usefixtures("held_here")
@pytest.mark.parametrize("is_warm", [False, True])
async def test_creation_cancelled_twice_leaves_nothing_after_the_backend(backend_name: str, is_warm: bool) -> None:
    before = set(children_of(os.getpid()))
    for number in range(6):
        backend = await open_backend(backend_name)
        if is_warm:
            await (await backend.create(SandboxSpec())).aclose()
        creating = asyncio.ensure_future(backend.create(SandboxSpec()))
        await asyncio.wait([creating], timeout=0.015 * number)
        for _ in range(2):
            creating.cancel()
            await asyncio.sleep(0.001)
        await asyncio.wait([creating])
        if not creating.cancelled():
            await creating.result().aclose()
        await backend.aclose()
        assert traces_of(os.getpid()) == []
        assert set(children_of(os.getpid())) == before


async def test_a_cancelled_first_creation_does_not_lose_the_memory_limit(backend_name: str) -> None:
    if backend_name != "jail" or not (probe := await _cgroup_jail()):
        pytest.skip("only a jail with cgroups can lose them")
    await probe.aclose()
    for number in range(10):
        backend = await open_backend("jail")
        creating = asyncio.ensure_future(backend.create(SandboxSpec()))
        await asyncio.wait([creating], timeout=0.002 * number**1.5)
        creating.cancel()
        await asyncio.wait([creating])
        assert creating.cancelled() or creating.result()  # and no error: what it had started has ended
        await backend.create(SandboxSpec())
        assert len([name for name in traces_of(os.getpid()) if "box" not in name]) == 1
        await backend.aclose()
        assert await eventually(lambda: traces_of(os.getpid()) == [])


async def test_a_zygote_closed_at_any_moment_of_its_start_ends_whole(
    backend: SandboxBackend, backend_name: str
) -> None:
    if backend_name != "jail":
        pytest.skip("only the jail has a zygote")
    before = set(children_of(os.getpid()))
    rootfs = ensure_rootfs()
    for number in range(60):
        zygote = _bwrap.ZygoteProcess(rootfs)
        await asyncio.sleep(0.0002 * number)  # within, bubblewrap's second process waits for its first
        await zygote.aclose()  # raises when anything of it is left
        assert set(children_of(os.getpid())) == before


async def test_a_zygote_that_does_not_answer_is_told_with_the_remedy(
    backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend_name != "jail":
        pytest.skip("only the jail has a zygote")
    monkeypatch.setattr(_bwrap, "_START_S", 0.2)
    with tempfile.TemporaryDirectory() as folder:
        mute = Path(folder, "bwrap")
        mute.write_text("#!/bin/sh\nexec sleep 600\n")
        for path in (mute, mute.parent):
            path.chmod(0o755)  # the jail's user runs it
        monkeypatch.setenv("PATH", folder, prepend=os.pathsep)
        backend = await open_backend("jail")
        with pytest.raises(ConfigError, match=r"no answer within 0\.2 s; unprivileged user namespaces"):
            await backend.create(SandboxSpec())
        await backend.aclose()


@pytest.mark.usefixtures("held_here")
async def test_many_lifecycles_leave_counts_flat(backend: SandboxBackend, backend_name: str) -> None:
    async def live(count: int) -> None:
        for _ in range(count):
            box = await backend.create(SandboxSpec())
            await box.exec(["sh", "-c", "setsid sleep 99 & true"])
            await box.aclose()

    await live(1)
    before, ground = len(os.listdir("/proc/self/fd")), Ground()
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(live(15 if backend_name == "jail" else 1))
    if backend_name == "jail":  # Docker's client keeps connections
        assert len(os.listdir("/proc/self/fd")) <= before
    else:
        assert await eventually(lambda: traces_of(os.getpid()) == [] and ground.left() == [])


async def test_what_a_killed_guard_left_is_swept_at_the_next_start(backend_name: str) -> None:
    if backend_name != "jail" or not (backend := await _cgroup_jail()):
        pytest.skip("only a jail with cgroups has a guard")
    folder = Path(traces_of(os.getpid())[0])
    _, _, start, namespace, _ = folder.name.split("-")
    orphan = folder.with_name(f"palaestra-4194305-{start}-{namespace}-00")  # above the kernel's largest pid
    strange = folder.with_name(f"palaestra-4194305-{start}-1-00")  # of another PID namespace, where it may live
    for each in (orphan / "box0", strange):
        each.mkdir(parents=True)
    await backend.aclose()
    other = await open_backend("jail")
    await other.create(SandboxSpec())
    await other.aclose()
    assert not orphan.exists()
    assert strange.exists()
    strange.rmdir()


async def test_a_dead_zygote_is_an_infrastructure_error_and_is_replaced(backend: SandboxBackend) -> None:
    if backend.name != "jail":
        pytest.skip("only the jail has a zygote")
    before = set(children_of(os.getpid()))
    box = await backend.create(SandboxSpec())
    (bwrap,) = [pid for pid in set(children_of(os.getpid())) - before if pid in processes_with("--as-pid-1")]
    os.kill(bwrap, signal.SIGKILL)

    async def read_until_it_dies() -> None:
        while True:  # the kernel takes a moment to end the boxes below it
            await box.read_file("/etc/passwd")

    with pytest.raises(SandboxError, match=r"died|unusable"):
        await asyncio.wait_for(read_until_it_dies(), 10)
    await box.aclose()
    assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok


async def _cgroup_jail() -> SandboxBackend | None:
    backend = await open_backend("jail")
    await backend.create(SandboxSpec())
    if traces_of(os.getpid()):
        return backend
    await backend.aclose()
    return None


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})

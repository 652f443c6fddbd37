"""Whose doing an end is, brought about for real: by the agent's code, by this process, by the host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable

import pytest

from palaestra.errors import SandboxError
from palaestra.sandboxes import Ended, Limits, Sandbox, SandboxBackend, SandboxSpec, open_backend
from palaestra.sandboxes._bwrap import JAIL_UID
from palaestra.sandboxes._managed import LeasedBox
from palaestra.sandboxes.leases import list_leases
from tests.sandboxes.hostview import eventually, marker, processes_with

_CHILD_RUNS_OUT = """
import os
pid = os.fork()
if pid == 0:
    data = bytearray(400 << 20)
    os._exit(0)
print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
"""


async def _while_it_runs(box: Sandbox, act: Callable[[], Awaitable[object]]) -> None:
    """Run something long, do something to its box, and see it to its end."""
    name = marker()
    running = asyncio.ensure_future(box.exec(["sleep", name]))
    assert await eventually(lambda: bool(processes_with(name)))
    await act()
    await running


def _kill_from_outside(box: Sandbox) -> None:
    kind, _, value = next(lease.handle for lease in list_leases() if lease.id == box.id).partition(" ")
    if kind == "container":
        subprocess.run([value, "kill", box.id], check=True, stdout=subprocess.DEVNULL)
    else:
        os.kill(int(value.split(":")[1]), signal.SIGKILL)


@pytest.mark.usefixtures("held_here")
async def test_a_box_killed_from_outside_is_ours_even_after_memory_ran_out_in_it(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(memory_mb=160)))
    result = await box.run_python(_CHILD_RUNS_OUT)
    assert (result.ended, result.stdout) == (Ended.EXIT, b"9\n"), "its child was killed for memory, and it went on"
    assert (await box.exec(["false"])).ended is Ended.EXIT
    with pytest.raises(SandboxError, match=r"killed from outside|does not tell"):
        await _while_it_runs(box, lambda: asyncio.to_thread(_kill_from_outside, box))
    with pytest.raises(SandboxError, match="unusable"):
        await box.exec(["true"])


async def test_a_box_that_we_close_while_it_runs_is_not_the_agents_doing(backend: SandboxBackend, box: Sandbox) -> None:
    with pytest.raises(SandboxError):
        await _while_it_runs(box, box.aclose)


@pytest.mark.usefixtures("held_here")
async def test_a_connection_that_is_lost_is_not_the_agents_doing(box: Sandbox) -> None:
    async def cut() -> None:
        assert isinstance(box, LeasedBox)
        writer: asyncio.StreamWriter = box._box._wire._io._writer  # type: ignore[attr-defined]
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)

    with pytest.raises(SandboxError, match=r"connection to this process was lost|does not tell"):
        await _while_it_runs(box, cut)


async def test_a_file_larger_than_what_is_left_of_the_memory_can_be_read(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(memory_mb=128)))
    result = await box.exec(["sh", "-c", "head -c 60000000 /dev/zero > /workspace/f"])
    assert result.is_ok, result
    assert len(await box.read_file("/workspace/f", max_bytes=64 << 20)) == 60_000_000
    assert len(await box.read_file("/workspace/f", offset=59_999_990)) == 10


async def test_our_own_work_on_files_is_not_bound_by_what_the_agent_may_compute(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(cpu_s=0.05)))
    await box.put_tree({f"d/{number}": b"x" for number in range(3000)})
    assert len(await box.get_tree()) == 3000


async def test_a_long_lifetime_is_no_number_that_overflows(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec(limits=Limits(lifetime_s=2_050_000.0, wall_s=2_040_000.0)))
    assert (await box.exec(["true"])).is_ok


_BOMB = """
import os, time
for _ in range(100):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        break
print("full", flush=True)
time.sleep(60)
"""


async def test_a_host_that_cannot_fork_costs_one_box_and_not_those_that_live(backend_name: str) -> None:
    if backend_name != "jail" or os.geteuid() != 0:
        pytest.skip("all jails of root are one other user, whose processes can be limited")
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (_num_processes(JAIL_UID) + 100, hard))
    try:
        async with await open_backend("jail") as backend:
            living = await backend.create(SandboxSpec())
            boxes = [await backend.create(SandboxSpec()) for _ in range(4)]
            async with asyncio.TaskGroup() as group:
                for box in boxes:
                    group.create_task(_until_full(box))
            with pytest.raises(SandboxError, match="Resource temporarily unavailable"):
                await backend.create(SandboxSpec())
            for box in boxes:
                await box.aclose()
            assert (await living.exec(["true"])).is_ok
            assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))


async def _until_full(box: Sandbox) -> None:
    """Let it fork all it can; it stays so until its box is closed."""
    full = asyncio.Event()
    running = asyncio.ensure_future(box.run_python(_BOMB, on_output=lambda *_: full.set()))
    running.add_done_callback(lambda done: done.exception())  # closed meanwhile
    async with asyncio.timeout(20):
        await full.wait()


def _num_processes(uid: int) -> int:
    found = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            found += entry.name.isdigit() and entry.stat().st_uid == uid
    return found

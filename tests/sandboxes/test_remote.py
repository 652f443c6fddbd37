"""Boxes on a server: what crosses the wire, whose they are, and what is left when one side dies."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator

import pytest

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import Capability, Limits, Sandbox, SandboxSpec, fork, open_backend
from palaestra.sandboxes._remote import RemoteBackend
from palaestra.sandboxes._remote_box import RemoteSandbox
from palaestra.sandboxes._remote_http import Connection
from tests.sandboxes.hostview import eventually, marker, processes_with
from tests.sandboxes.remote_server import Server, running_server

_BYTES = bytes(range(256)) * 20_480  # 5 MiB


@pytest.fixture
async def remote(server: Server) -> AsyncIterator[RemoteBackend]:
    async with RemoteBackend(server.url) as backend:
        yield backend


@pytest.fixture
async def far_box(remote: RemoteBackend) -> RemoteSandbox:
    return await remote.create(SandboxSpec())


async def test_five_megabytes_of_all_bytes_survive_every_way_in_and_out(remote: RemoteBackend) -> None:
    box = await remote.create(SandboxSpec(limits=Limits(output_kb=8192)))
    await box.write_file("a", _BYTES)
    assert await box.read_file("a", max_bytes=8 << 20) == _BYTES
    assert await box.read_file("a", offset=len(_BYTES) - 3) == _BYTES[-3:]
    await box.put_tree({"deep/b": _BYTES, "empty": b""})
    assert await box.get_tree() == {"a": _BYTES, "deep/b": _BYTES, "empty": b""}
    streamed = bytearray()
    result = await box.exec(["cat"], stdin=_BYTES, on_output=lambda _, piece: streamed.extend(piece))
    assert (result.stdout == _BYTES, bytes(streamed) == _BYTES) == (True, True)
    code = "import sys; sys.stderr.buffer.write(sys.stdin.buffer.read())"
    assert (await box.run_python(code, stdin=_BYTES)).stderr == _BYTES


async def test_output_arrives_while_the_program_runs(far_box: Sandbox) -> None:
    pieces: list[tuple[str, bytes]] = []
    has_come = asyncio.Event()

    def on_output(stream: str, piece: bytes) -> None:
        pieces.append((stream, piece))
        has_come.set()

    command = ["sh", "-c", "echo first; sleep 2; echo second >&2"]
    running = asyncio.ensure_future(far_box.exec(command, on_output=on_output))
    await asyncio.wait_for(has_come.wait(), 10)
    assert not running.done()
    assert pieces == [("stdout", b"first\n")]
    result = await running
    assert pieces[1:] == [("stderr", b"second\n")]
    assert (result.stdout, result.stderr) == (b"first\n", b"second\n")


async def test_a_callback_that_fails_is_told_as_it_is_and_ends_the_box(far_box: Sandbox) -> None:
    def on_output(stream: str, piece: bytes) -> None:
        raise TimeoutError("of the caller")

    with pytest.raises(TimeoutError, match="of the caller"):
        await far_box.exec(["echo", "x"], on_output=on_output)
    with pytest.raises(SandboxError, match="unusable"):
        await far_box.exec(["true"])


async def test_errors_keep_their_kind(remote: RemoteBackend, far_box: Sandbox) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        await far_box.read_file("/workspace/no")
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, "/workspace/no")
    with pytest.raises(OSError, match="leads out of the folder") as outside:
        await far_box.put_tree({"../up": b""})
    assert outside.value.errno is not None
    for bad in (far_box.exec([]), far_box.read_file("a", offset=-1), far_box.get_tree(max_files=-1)):
        with pytest.raises(ValueError, match=r"argv is empty|offset|at most"):
            await bad
    with pytest.raises(ValueError, match="more than"):
        await far_box.write_file("a", bytes((64 << 20) + 1))
    with pytest.raises(ValueError, match="must be texts"):
        await far_box.exec(["echo", 1])  # type: ignore[list-item]
    assert (await far_box.exec(["true"])).is_ok  # none of these ended it
    missing_here = sorted(set(Capability) - await remote.capabilities())
    assert missing_here, "a jail that contained everything could refuse nothing"
    with pytest.raises(ConfigError, match=f"does not provide {missing_here[0]}"):
        await remote.create(SandboxSpec(needs=frozenset(missing_here[:1])))


async def test_capabilities_are_what_the_server_proved_for_its_own_back_end(remote: RemoteBackend) -> None:
    jail = await open_backend("jail")
    proved = await jail.capabilities()
    await jail.aclose()
    assert Capability.isolating() <= proved
    assert await remote.capabilities() == proved


async def test_a_snapshot_crosses_and_both_boxes_go_their_own_ways(remote: RemoteBackend, far_box: Sandbox) -> None:
    await far_box.exec(["sh", "-c", "echo one > a; echo two > /tmp/b; chmod 700 a"])
    twin = await fork(remote, far_box, SandboxSpec())
    await far_box.write_file("a", b"changed")
    look = ["sh", "-c", "cat a /tmp/b; stat -c %a a"]
    assert (await twin.exec(look)).stdout == b"one\ntwo\n700\n"
    jail = await open_backend("jail")
    near = await fork(jail, twin, SandboxSpec())
    assert (await near.exec(look)).stdout == b"one\ntwo\n700\n"
    await jail.aclose()


async def test_what_a_box_uses_and_its_lifetime_are_told_across(remote: RemoteBackend) -> None:
    box = await remote.create(SandboxSpec(limits=Limits(lifetime_s=100.0)))
    await box.write_file("a", bytes(10_000))
    await box.exec(["true"])
    usage = await box.stats()
    assert (usage.num_execs, usage.num_files, usage.workspace_bytes >= 10_000) == (1, 1, True)
    await asyncio.sleep(0.3)
    await box.renew()
    assert (await box.stats()).lifetime_left_s > usage.lifetime_left_s - 0.3


async def test_a_box_is_only_its_clients_and_its_key_is_not_its_name(server: Server, far_box: RemoteSandbox) -> None:
    key = far_box.key
    assert len(key) == 40
    assert key not in far_box.id
    stranger = Connection(server.url, "", "f" * 32)
    try:
        for op in ("exec", "read", "close", "heartbeat"):
            header, _ = await stranger.call(op, {"box": key, "boxes": [key], "argv": ["true"], "cwd": "/", "env": {}})
            assert "does not hold this box" in header.get("text", "") or op in ("close", "heartbeat")
    finally:
        await stranger.aclose()
    assert (await far_box.exec(["true"])).is_ok


async def test_an_answer_does_not_wait_for_acknowledgements(remote: RemoteBackend) -> None:
    await remote.create(SandboxSpec())
    connection = remote._calls
    times = []
    for _ in range(20):
        began_s = time.perf_counter()
        await connection.call("hello")
        times.append(time.perf_counter() - began_s)
    assert min(times) < 0.03  # without TCP_NODELAY every one takes 40 ms


async def test_waiting_for_a_turn_on_the_server_is_reported() -> None:
    with running_server(admission={"max_running": 1}) as server:
        backend = await open_backend(server.url)
        boxes = [await backend.create(SandboxSpec()) for _ in range(2)]
        results = await asyncio.gather(*[box.exec(["sleep", "1"]) for box in boxes])
        waits = sorted(result.queue_s for result in results)
        assert waits[0] < 0.5 < waits[1]
        assert all(result.wall_s < waits[1] + 1.0 for result in results)
        await backend.aclose()


@pytest.mark.slow
async def test_a_thousand_creations_at_once_wait_their_turn() -> None:
    with running_server(admission={"max_boxes": 6, "max_creating": 2}) as server:
        alive, most = 0, 0
        waits: list[float] = []

        async def live() -> None:
            nonlocal alive, most
            box = await backend.create(SandboxSpec())
            alive += 1
            most = max(most, alive)
            waits.append(box.queue_s)
            alive -= 1
            await box.aclose()

        began_s = time.monotonic()
        async with RemoteBackend(server.url) as backend, asyncio.TaskGroup() as group:
            for _ in range(1000):
                group.create_task(live())
        took_s = time.monotonic() - began_s
        assert len(waits) == 1000
        assert took_s / 2 < max(waits) < took_s  # the last one's, here and over there
        assert most <= 6


async def test_a_cancelled_execution_ends_its_box_on_the_server(server: Server, far_box: Sandbox) -> None:
    name, held = marker(), len(server.boxes())
    running = asyncio.ensure_future(far_box.exec(["sleep", name]))
    assert await eventually(lambda: bool(processes_with(name)))
    running.cancel()
    await asyncio.wait([running])
    assert await eventually(lambda: not processes_with(name))
    assert await eventually(lambda: len(server.boxes()) == held - 1)

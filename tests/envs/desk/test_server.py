"""The desk's server under faults: our failures have our type, the next episode works, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from palaestra.envs import EnvLimits
from palaestra.envs._tools import ToolError
from palaestra.envs.desk import ToolDesk
from palaestra.envs.desk import _client as client_module
from palaestra.envs.desk._client import DeskServer
from palaestra.envs.desk._service import DeskServiceConfig, serve
from palaestra.errors import ConfigError, SandboxError
from palaestra.resources import Resources
from palaestra.types import Message
from tests.cancelling import cancel_many

Call = Callable[..., Message]
KEY = ("desk", 0)


async def server_of(resources: Resources) -> DeskServer:
    """The server that episodes of these resources use."""

    async def refuse() -> DeskServer:
        raise AssertionError("no server was running")

    return await resources.get(KEY, refuse)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_server_killed_mid_episode_is_our_fault_and_the_next_episode_works(play: Any, call: Call) -> None:
    async with Resources() as resources:
        env, neighbour, idle = (ToolDesk(resources=resources) for _ in range(3))
        await env.areset(options={"index": 0})
        await neighbour.areset(options={"index": 1})
        first = await server_of(resources)
        os.kill(first.pid, signal.SIGKILL)
        for broken in (env, neighbour):
            with pytest.raises(SandboxError, match="desk server, GET /customers"):
                await broken.astep(call("find_customer", name="ana ruiz"))
        await idle.areset(options={"index": 2})
        with pytest.raises(SandboxError, match="it failed and was replaced"):
            await env.astep(call("find_customer", name="ana ruiz"))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(play(e, 3)) for e in (env, neighbour)]
        assert [task.result().facts["success"] for task in tasks] == [1.0, 1.0]
        second = await server_of(resources)
        assert second.pid != first.pid
        assert not is_running(first.pid)
    assert not is_running(second.pid)


async def test_a_server_killed_before_the_verdict_gives_no_number(call: Call) -> None:
    async with Resources() as resources:
        env = ToolDesk(resources=resources)
        await env.areset(options={"index": 0})
        os.kill((await server_of(resources)).pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="DELETE /episodes/current"):
            await env.astep(call("done"))
        await env.aclose()


async def test_a_server_that_hangs_is_replaced(play: Any, call: Call) -> None:
    limits = EnvLimits(tool_s=1.0)
    async with Resources() as resources:
        env = ToolDesk(resources=resources, limits=limits)
        await env.areset(options={"index": 0})
        first = await server_of(resources)
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(SandboxError, match=r"timeout 0\.5 s"):
            await env.astep(call("find_customer", name="ana ruiz"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client_module, "_HEALTH_S", 0.5)
            assert (await play(env, 0)).facts["success"] == 1.0
        assert not is_running(first.pid)


async def test_a_server_that_was_only_slow_is_kept(play: Any, call: Call) -> None:
    async with Resources() as resources:
        env = ToolDesk(resources=resources, limits=EnvLimits(tool_s=1.0))
        await env.areset(options={"index": 0})
        server = await server_of(resources)
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(SandboxError):
            await env.astep(call("find_customer", name="ana ruiz"))
        os.kill(server.pid, signal.SIGCONT)
        assert (await play(env, 0)).facts["success"] == 1.0
        assert await server_of(resources) is server


async def test_closing_leaves_no_process_port_or_file(play: Any) -> None:
    env = ToolDesk()
    await play(env, 0)
    server = await server_of(env.resources)
    pid, port, folder = server.pid, server.port, server.log_folder
    assert is_running(pid)
    assert folder.exists()
    await env.aclose()
    await env.aclose()
    assert not is_running(pid)
    assert not folder.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


async def test_a_taken_port_is_one_clear_line_of_configuration() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with Resources() as resources:
            env = ToolDesk(resources=resources, server_port=port)
            with pytest.raises(ConfigError) as caught:
                await env.areset()
            await env.aclose()
    expected = f"the desk server cannot listen on 127.0.0.1:{port}: Address already in use; "
    assert str(caught.value) == expected + "free the port, or set server_port = 0 to take any free one"


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_one_clear_line_of_configuration(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.delitem(sys.modules, "palaestra.envs.desk._app", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        serve(DeskServiceConfig(admin_key="x"))
    assert str(caught.value) == f"the desk server needs the package {package}: run `pip install 'palaestra[tools]'`"


async def test_folders_of_dead_owners_go_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(["true"]) as ended:
        pass
    dead, alive = tmp_path / f"palaestra-desk-{ended.pid}-x", tmp_path / f"palaestra-desk-{os.getppid()}-x"
    stranger = tmp_path / "palaestra-desk-notes-x"
    for folder in (dead, alive, stranger):
        folder.mkdir()
        (folder / "server.log").touch()
    server = await DeskServer.start()
    await server.aclose()
    assert server.log_folder.name.startswith(f"palaestra-desk-{os.getpid()}-")
    assert sorted(tmp_path.iterdir()) == sorted([alive, stranger])


async def test_a_fixed_port_is_used_again_after_the_server_died(play: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with Resources() as resources:
        env = ToolDesk(resources=resources, server_port=port)
        assert (await play(env, 0)).facts["success"] == 1.0

        async def refuse() -> DeskServer:
            raise AssertionError

        server = await resources.get(("desk", port), refuse)
        os.kill(server.pid, signal.SIGKILL)
        with contextlib.suppress(SandboxError):  # the death may be seen before the next episode, or by it
            await play(env, 0)
        assert (await play(env, 0)).facts["success"] == 1.0


async def test_a_token_opens_only_its_own_episode() -> None:
    tables = {"customers": [{"id": 17, "name": "ana ruiz"}]}
    server = await DeskServer.start()
    try:
        mine = await server.open_session(tables, timeout_s=5)
        yours = await server.open_session({}, timeout_s=5)
        assert await mine.request("GET", "/customers", query={"name": "Ana Ruiz"}) == [{"id": 17, "name": "ana ruiz"}]
        with pytest.raises(ToolError, match="no customer ana ruiz"):
            await yours.request("GET", "/customers", query={"name": "ana ruiz"})
        assert (await mine.close())["customers"] == tables["customers"]
        with pytest.raises(SandboxError, match="401 unknown token"):
            await mine.close()
        await yours.close()
    finally:
        await server.aclose()


async def test_the_server_answers_nobody_without_a_token() -> None:
    server = await DeskServer.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as stranger:
            opened = await stranger.post("/episodes", json={"tables": {}})
            dropped = await stranger.delete("/episodes/current")
            listed = await stranger.get("/customers/1/tickets", headers={"authorization": "Bearer x"})
        assert [opened.status_code, dropped.status_code, listed.status_code] == [401, 401, 401]
    finally:
        await server.aclose()


async def test_rows_that_break_the_schema_are_our_fault() -> None:
    server = await DeskServer.start()
    try:
        with pytest.raises(SandboxError, match="500"):
            await server.open_session({"customers": [{"id": "x", "name": None}]}, timeout_s=5)
    finally:
        await server.aclose()


@pytest.mark.parametrize("request_line", [b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\n"])
async def test_bytes_that_are_no_http_do_not_end_the_server(request_line: bytes) -> None:
    server = await DeskServer.start()
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_line)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        session = await server.open_session({}, timeout_s=5)
        assert await session.close() == {"customers": [], "tickets": [], "orders": []}
    finally:
        await server.aclose()


async def test_requests_that_are_cancelled_while_they_wait_take_no_place() -> None:
    server = await DeskServer.start()
    try:
        session = await server.open_session({}, timeout_s=5)
        ask = partial(session.request, "GET", "/customers/1/tickets")
        await cancel_many(ask)
        for _ in range(3):
            with pytest.raises(ToolError, match="no customer 1"):
                await ask()
        await session.close()
    finally:
        await server.aclose()

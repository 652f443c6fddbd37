"""The ends of a server and of its clients, however violent, and who may be a client at all."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import httpx
import pytest

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import SandboxSpec, _remote_http, open_backend
from palaestra.sandboxes._frames import CLIENT_HEADER, PROTOCOL, TOKEN_VARIABLE
from palaestra.sandboxes._remote import RemoteBackend
from palaestra.sandboxes._remote_http import Connection
from palaestra.sandboxes.server import serve
from palaestra.sandboxes.server._leases import Leases
from tests.sandboxes.hostview import eventually, marker, processes_with, traces_of
from tests.sandboxes.remote_server import Server, running_server, start_python

_TOKEN = "a-token-of-sixteen-characters"
_CLIENT = """
import asyncio, sys
from palaestra.sandboxes import SandboxSpec, open_backend

async def main():
    backend = await open_backend(sys.argv[1])
    boxes = [await backend.create(SandboxSpec()) for _ in range(2)]
    await boxes[1].exec(["true"])
    print("ready", flush=True)
    if sys.argv[2] == "idle":
        await asyncio.Event().wait()
    await boxes[0].exec(["bash", "-c", f"trap '' TERM; setsid sleep {sys.argv[2]} & sleep {sys.argv[2]}"])

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def _needs_jails(server: Server) -> None:
    """A machine that cannot make jails skips these."""


async def test_boxes_of_a_client_that_fell_silent_end_with_the_lease() -> None:
    lease_s = 2.0
    with running_server(lease_s=lease_s) as server, start_python(_CLIENT, server.url, "idle") as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        await asyncio.sleep(2 * lease_s)
        assert len(server.boxes()) == 2  # a living client keeps them
        client.send_signal(signal.SIGSTOP)  # its connections stay open, as with a network that went away
        try:
            assert await eventually(lambda: not server.boxes(), timeout_s=lease_s + 2)
        finally:
            client.kill()


async def test_nothing_of_a_killed_client_is_left_after_two_seconds(server: Server) -> None:
    name = marker()
    held = len(server.boxes())
    with start_python(_CLIENT, server.url, name) as client:
        assert await eventually(lambda: len(processes_with(f"sleep\0{name}")) >= 2, timeout_s=30)
        assert len(server.boxes()) == held + 2
        client.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        assert await eventually(lambda: not processes_with(name) and len(server.boxes()) == held)
        assert time.monotonic() - killed_s < 2


async def test_a_connection_that_breaks_and_is_made_anew_costs_no_box() -> None:
    async with await open_backend("jail") as backend, Leases(lease_s=60.0) as leases:
        box = await backend.create(SandboxSpec())
        held = leases.add("client", box)
        _break_a_hold(leases)
        await asyncio.sleep(0.5)
        with suppress(ConnectionError), leases.hold("client"):
            await asyncio.sleep(2)
            assert leases.get("client", held.key) is held
            assert (await box.exec(["true"])).is_ok
            raise ConnectionError
        await asyncio.sleep(1.9)
        with pytest.raises(SandboxError, match="does not hold"):
            leases.get("client", held.key)


async def test_a_hold_that_lasted_its_time_or_a_client_that_is_heard_costs_no_box() -> None:
    async with await open_backend("jail") as backend, Leases(lease_s=60.0) as leases:
        held = leases.add("client", await backend.create(SandboxSpec()))
        with leases.hold("client"):
            pass
        await asyncio.sleep(2)
        assert leases.get("client", held.key) is held
        _break_a_hold(leases)
        await asyncio.sleep(0.1)
        assert leases.heard("client")
        await asyncio.sleep(2)
        assert leases.get("client", held.key) is held


async def test_a_server_that_stood_still_hears_its_clients_before_it_judges_them() -> None:
    async with await open_backend("jail") as backend, Leases(lease_s=60.0) as leases:
        held = leases.add("client", await backend.create(SandboxSpec()))
        _break_a_hold(leases)
        await asyncio.sleep(0.1)
        time.sleep(1.5)  # noqa: ASYNC251 - the loop stands still, and what the client sent meanwhile waits
        asyncio.get_running_loop().call_later(0.1, leases.heard, "client")
        await asyncio.sleep(1)
        assert leases.get("client", held.key) is held


async def test_a_client_takes_its_hold_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held_s: list[float] = []

    async def call(_: Connection, op: str, *__: object, **___: object) -> tuple[dict[str, object], bytes]:
        if op == "hold":
            held_s.append(time.monotonic())
            await asyncio.sleep(0.6 if len(held_s) == 1 else 0)
            raise SandboxError("broken")
        return {"protocol": PROTOCOL, "queue_s": 1.0, "lease_s": 60.0, "capabilities": []}, b""

    monkeypatch.setattr(Connection, "call", call)
    async with RemoteBackend("http://127.0.0.1:9") as backend:
        await backend.capabilities()
        await asyncio.sleep(1.8)
    gaps_s = [later - sooner for sooner, later in pairwise(held_s)]
    assert gaps_s[0] < 0.8, "it held, broke, and was taken again at once"
    assert 0.5 <= gaps_s[1] < 0.8, "then it waits a little"


async def test_a_client_that_stands_still_as_its_hold_runs_out_keeps_its_boxes() -> None:
    with running_server(before="import palaestra.sandboxes._frames as F; F.HOLD_S = 0.6\n") as server:
        backend = RemoteBackend(server.url)
        box = await backend.create(SandboxSpec())
        await asyncio.sleep(0.5)
        time.sleep(2.2)  # noqa: ASYNC251 - far less than a lease
        assert (await box.exec(["true"])).is_ok
        await backend.aclose()


async def test_a_box_whose_creation_got_no_answer_ends_with_the_lease() -> None:
    with running_server(lease_s=1.0) as server:
        async with RemoteBackend(server.url) as backend:
            named = await backend.create(SandboxSpec())
            unnamed, _ = await backend._calls.call("create", {"spec": {}})  # as if its answer had been lost
            assert len(server.boxes()) == 2
            assert await eventually(lambda: len(server.boxes()) == 1, timeout_s=3)
            await asyncio.sleep(1.5)
            assert (await named.exec(["true"])).is_ok
            header, _ = await backend._calls.call("renew", {"box": unnamed["box"]})
            assert "does not hold this box" in header["text"]


async def test_closing_a_client_closes_its_boxes_on_the_server_and_no_others(server: Server) -> None:
    async with RemoteBackend(server.url) as other:
        kept = await other.create(SandboxSpec())
        before = server.boxes()
        async with RemoteBackend(server.url) as backend:
            for _ in range(3):
                await backend.create(SandboxSpec())
            assert len(server.boxes()) == len(before) + 3
        assert server.boxes() == before
        assert (await kept.exec(["true"])).is_ok


async def test_a_server_killed_during_an_execution_is_an_infrastructure_error() -> None:
    with running_server() as server:
        backend = RemoteBackend(server.url)
        box, idle = await backend.create(SandboxSpec()), await backend.create(SandboxSpec())
        name = marker()
        running = asyncio.ensure_future(box.exec(["sleep", name]))
        assert await eventually(lambda: bool(processes_with(name)))
        server.kill()
        with pytest.raises(SandboxError, match=rf"no answer to exec from the sandbox server at {server.url}"):
            await running
        with pytest.raises(SandboxError, match="unusable"):
            await box.exec(["true"])
        for call in (idle.read_file("/etc/passwd"), backend.create(SandboxSpec())):
            with pytest.raises(SandboxError, match=r"see whether it runs there"):
                await call
        with pytest.raises(SandboxError, match="goodbye"):
            await backend.aclose()  # boxes were open, and nobody said that they ended
        await backend.aclose()
        assert await eventually(lambda: not processes_with(name))


async def test_a_restarted_server_does_not_know_old_boxes_and_makes_new_ones() -> None:
    with running_server() as first:
        backend = RemoteBackend(first.url)
        old = await backend.create(SandboxSpec())
        first.kill()
    with running_server(port=first.port):
        with pytest.raises(SandboxError, match="the server was restarted"):
            await old.exec(["true"])
        await old.aclose()
        assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok
        await backend.aclose()


async def test_a_server_told_to_stop_ends_what_runs_and_leaves_nothing() -> None:
    with running_server() as server:
        backend = RemoteBackend(server.url)
        box, name = await backend.create(SandboxSpec()), marker()
        running = asyncio.ensure_future(box.exec(["sleep", name]))
        assert await eventually(lambda: bool(processes_with(name)))
        pid = server.process.pid
        server.process.terminate()
        with pytest.raises(SandboxError):
            await asyncio.wait_for(running, 10)
        assert await asyncio.to_thread(server.process.wait, 10) in (0, -signal.SIGTERM)
        assert processes_with(name) == []
        assert server.boxes() == []
        assert await eventually(lambda: traces_of(pid) == [])
        with pytest.raises(SandboxError):
            await backend.aclose()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops", "status 500 oops"),
        (b"HTTP/1.1 307 Moved\r\nLocation: /v1/hello\r\nContent-Length: 0\r\n\r\n", "status 307"),
        (b"", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n\0\0", "closed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n\0\0\0\2\0\0\0\0[]", "no table"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n\xff\xff\xff\xff\0\0\0\0", "more than is taken"),
        (None, "ReadTimeout"),
    ],
)
async def test_whatever_is_no_answer_is_an_infrastructure_error_and_never_sent_again(
    answer: bytes | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_remote_http, "_SILENT_S", 0.5)
    async with _false_server(answer) as (url, count):
        backend = RemoteBackend(url)
        with pytest.raises(SandboxError, match=rf"no answer to hello from the sandbox server at {url}.*{reason}"):
            await backend.create(SandboxSpec())
        await backend.aclose()
        assert count() == 1


async def test_a_call_has_a_deadline_however_alive_its_server_seems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_remote_http, "GRACE_S", 0.5)
    async with _false_server(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", drip=True) as (url, _):
        connection = Connection(url, "", "f" * 32)
        with pytest.raises(SandboxError, match=r"no answer within 0\.5"):
            await connection.call("stats")
        await connection.aclose()


@pytest.mark.parametrize("token", ["", "another-token-of-sixteen-characters"])
async def test_without_the_token_nothing_is_done(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(token=_TOKEN) as server:
        async with RemoteBackend(server.url, token) as backend:
            with pytest.raises(ConfigError, match=f"refuses this client .*set {TOKEN_VARIABLE}"):
                await backend.create(SandboxSpec())
        assert server.boxes() == []
        monkeypatch.setenv(TOKEN_VARIABLE, _TOKEN)
        async with RemoteBackend(server.url) as backend:
            assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok


@pytest.mark.parametrize("token", ["short", "töken of sixteen characters", "line\nend-0123456789abc", f"{_TOKEN}\n"])
async def test_a_token_that_no_header_carries_is_refused_and_not_told(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ConfigError, match=f"{TOKEN_VARIABLE} must be at least 16 printable ASCII") as caught:
        await open_backend("http://127.0.0.1:9")
    assert token not in str(caught.value)
    with pytest.raises(ConfigError, match="at least 16 printable ASCII"):
        serve(token=token)


async def test_a_web_page_of_the_same_machine_is_refused(server: Server) -> None:
    hello = f"{server.url}/v1/hello"
    client = {CLIENT_HEADER: "f" * 32}
    async with httpx.AsyncClient() as http:
        frame = b"\0\0\0\2\0\0\0\0{}"
        assert (await http.post(hello, content=frame, headers=client)).status_code == 200
        assert (await http.post(hello, content=frame, headers={**client, "Host": "evil.example"})).status_code == 403
        assert (await http.post(hello, content=frame)).status_code == 400
        preflight = await http.options(hello, headers={"Origin": "http://evil.example", **client})
        assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("hello", b"", 413),
        ("hello", b"\xff\xff\xff\xff\0\0\0\0", 413),
        ("hello", b"\0\0\0\2\0\0\0\0{}" * 2, 413),
        ("hello", b"\0\0\0\2\0\0\0\0[]", 413),
        ("nothing", b"\0\0\0\2\0\0\0\0{}", 404),
    ],
)
async def test_bodies_that_are_no_requests_are_refused(server: Server, path: str, body: bytes, status: int) -> None:
    async with httpx.AsyncClient(headers={CLIENT_HEADER: "f" * 32}) as http:
        assert (await http.post(f"{server.url}/v1/{path}", content=body)).status_code == status


@pytest.mark.parametrize(("token", "status"), [("Bearer wrong", b"401"), (f"Bearer {_TOKEN}", b"413")])
async def test_too_large_a_body_is_refused_before_it_is_read(token: str, status: bytes) -> None:
    with running_server(token=_TOKEN) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST /v1/hello HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n{CLIENT_HEADER}: {'f' * 32}\r\n"
        writer.write(f"{head}Content-Length: {1 << 40}\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == status
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("host", "token", "message"),
    [
        ("0.0.0.0", "", f"others reach 0.0.0.0: set {TOKEN_VARIABLE}"),
        ("::", "", "others reach"),
        ("example.org", "", "others reach"),
        ("127.0.0.1", "short", "at least 16"),
    ],
)
def test_a_server_that_others_reach_needs_a_token(host: str, token: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve(host, 0, token=token)


def test_a_missing_package_and_a_taken_port_are_told_with_the_remedy(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}: Address already in use"):
        serve("127.0.0.1", server.port, token="")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "palaestra.sandboxes.server._app", raising=False)
    with pytest.raises(ConfigError, match=r"needs the package fastapi: run `pip install 'palaestra\[tools\]'`"):
        serve(token="")


@pytest.mark.parametrize("url", ["http://", "http://u:p@host", "http://host?x=1", "ftp://host", "http://host:x"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address of a sandbox server"):
        RemoteBackend(url)


def _break_a_hold(leases: Leases) -> None:
    with suppress(ConnectionError), leases.hold("client"):
        raise ConnectionError


@asynccontextmanager
async def _false_server(answer: bytes | None, *, drip: bool = False) -> AsyncIterator[tuple[str, Callable[[], int]]]:
    num_requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_requests
        await reader.readuntil(b"\r\n\r\n")
        num_requests += 1
        try:
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
            until_s = time.monotonic() + 10
            alive = b'\0\0\0\x0f\0\0\0\0{"alive": true}'
            while drip and time.monotonic() < until_s and not reader.at_eof():
                writer.write(b"%x\r\n%s\r\n" % (len(alive), alive))
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lambda: num_requests

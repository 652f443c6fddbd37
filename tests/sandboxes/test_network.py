"""The allow-list: what is listed is reached through the proxy, and nothing else, by any trick."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from palaestra.errors import ConfigError
from palaestra.sandboxes import Capability, Sandbox, SandboxBackend, SandboxSpec
from palaestra.sandboxes._egress import _parse, _RefusedError

_BLOB = bytes(range(256)) * 8192  # two mebibytes, more than any window
_CLIENT = """
import socket, sys
def proxied(request, keep=1 << 23):
    with socket.create_connection(("127.0.0.1", 3128), timeout=10) as sock:
        sock.sendall(request)
        data = b""
        try:
            while len(data) < keep and (chunk := sock.recv(1 << 16)):
                data += chunk
        except OSError as error:
            data += type(error).__name__.encode()
        return data
def status(request):
    print(proxied(request).partition(b"\\r\\n")[0].decode())
"""


class Server:
    """A small HTTP server on the host that remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head)
            body = b"ok"
            if head.startswith(b"GET /blob"):
                body = _BLOB
            elif head.startswith(b"POST"):
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                body = hashlib.sha256(await reader.readexactly(length)).hexdigest().encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # whoever asked went away
        finally:
            writer.close()


@asynccontextmanager
async def _serving() -> AsyncIterator[Server]:
    served = Server()
    async with await asyncio.start_server(served.answer, "127.0.0.1", 0) as server:
        served.port = server.sockets[0].getsockname()[1]
        yield served


@pytest.fixture
async def listed() -> AsyncIterator[Server]:
    async with _serving() as server:
        yield server


@pytest.fixture
async def other() -> AsyncIterator[Server]:
    async with _serving() as server:
        yield server


@pytest.fixture
async def box(backend: SandboxBackend, listed: Server) -> Sandbox:
    return await backend.create(SandboxSpec(allow=(f"127.0.0.1:{listed.port}",)))


async def test_large_answers_and_requests_arrive_whole_and_several_at_once(box: Sandbox, listed: Server) -> None:
    code = f"""
import hashlib, os, threading, urllib.request
os.environ["no_proxy"] = ""
url = "http://127.0.0.1:{listed.port}"
def get():
    print(hashlib.sha256(urllib.request.urlopen(url + "/blob").read()).hexdigest())
def post():
    print(urllib.request.urlopen(url + "/", data=bytes(3_000_000)).read().decode())
threads = [threading.Thread(target=each) for each in 3 * [get, post]]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    result = await box.run_python(code)
    expected = [hashlib.sha256(_BLOB).hexdigest(), hashlib.sha256(bytes(3_000_000)).hexdigest()]
    assert sorted(result.stdout.decode().split()) == sorted(3 * expected), result


async def test_a_tunnel_carries_both_ways(box: Sandbox, listed: Server) -> None:
    connect = f"CONNECT 127.0.0.1:{listed.port} HTTP/1.1\\r\\n\\r\\nGET /tunnelled HTTP/1.1\\r\\n\\r\\n"
    result = await box.run_python(_CLIENT + f'print(proxied(b"{connect}"))')
    assert b"200 Connection established" in result.stdout
    assert result.stdout.rstrip().endswith(b"ok'")
    assert listed.requests[0].startswith(b"GET /tunnelled")


async def test_nothing_else_is_reached(box: Sandbox, listed: Server, other: Server) -> None:
    targets = [
        f"127.0.0.1:{other.port}",
        f"localhost:{listed.port}",  # a name that is not listed, of an address that is
        f"localhost:{other.port}",
        f"[::1]:{listed.port}",
        f"127.0.0.2:{listed.port}",
        f"0.0.0.0:{listed.port}",
        f"2130706433:{listed.port}",
        f"127.0.0.1:{other.port}@127.0.0.1:{other.port}",
        "169.254.169.254:80",
    ]
    for target in targets:
        lines = [f"CONNECT {target} HTTP/1.1\\r\\n\\r\\n", f"GET http://{target}/ HTTP/1.1\\r\\n\\r\\n"]
        result = await box.run_python(_CLIENT + "".join(f'status(b"{line}")\n' for line in lines))
        said = result.stdout.decode().splitlines()
        assert len(said) == 2, result
        assert all(line.startswith(("HTTP/1.1 403", "HTTP/1.1 400")) for line in said), (target, said)
    assert other.requests == []
    direct = f"import socket\nsocket.create_connection(('127.0.0.1', {listed.port}), timeout=2)"
    assert b"ConnectionRefusedError" in (await box.run_python(direct)).stderr
    assert listed.requests == []


async def test_a_listed_name_of_an_address_that_is_not_public_is_refused(
    backend: SandboxBackend, listed: Server
) -> None:
    box = await backend.create(SandboxSpec(allow=(f"localhost:{listed.port}", f"*.localhost:{listed.port}")))
    for name in ("localhost", "a.localhost"):
        line = f"GET http://{name}:{listed.port}/ HTTP/1.1\\r\\n\\r\\n"
        result = await box.run_python(_CLIENT + f'print(proxied(b"{line}").decode())')
        assert b"403" in result.stdout or b"502" in result.stdout, result.stdout
    assert listed.requests == []


async def test_nonsense_is_answered_and_the_box_lives(box: Sandbox, listed: Server) -> None:
    code = """
status(b"\\xff\\x00 nonsense\\r\\n\\r\\n")
status(b"CONNECT / HTTP/1.1\\r\\n\\r\\n")
status(b"GET http://[::1 HTTP/1.1\\r\\n\\r\\n")
status(b"GET ftp://127.0.0.1/ HTTP/1.1\\r\\n\\r\\n")
status(b"A" * 40_000)
socks = [socket.create_connection(("127.0.0.1", 3128)) for _ in range(100)]
print(len(socks))
"""
    result = await box.run_python(_CLIENT + code)
    said = result.stdout.decode().splitlines()
    assert [line[9:12] for line in said[:5]] == ["400", "400", "400", "400", "431"], result
    assert said[5] == "100"
    fine = f"GET http://127.0.0.1:{listed.port}/ HTTP/1.1\\r\\n\\r\\n"
    assert b"200 OK" in (await box.run_python(_CLIENT + f'status(b"{fine}")')).stdout


async def test_connections_end_with_their_execution(box: Sandbox, listed: Server) -> None:
    half = f"CONNECT 127.0.0.1:{listed.port} HTTP/1.1\\r\\n\\r\\n"
    code = (
        _CLIENT + f'sock = socket.create_connection(("127.0.0.1", 3128)); sock.sendall(b"{half}"); print(sock.recv(99))'
    )
    assert b"established" in (await box.run_python(code)).stdout
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("egress")] == []


async def test_without_a_list_there_is_no_proxy(backend: SandboxBackend) -> None:
    box = await backend.create(SandboxSpec())
    result = await box.run_python("import socket, os\nprint('HTTP_PROXY' in os.environ)\n" + _CLIENT + "proxied(b'')")
    assert result.stdout == b"False\n"
    assert b"ConnectionRefusedError" in result.stderr


@pytest.mark.parametrize("text", ["pypi.org", "pypi.org:0", "pypi.org:99999", "*:443", "a b:1", "http://x:1", ":80"])
def test_what_is_no_destination_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="no destination: write host:port"):
        SandboxSpec.parse({"allow": [text]})


def test_a_list_needs_the_capability() -> None:
    assert Capability.ALLOW_LIST in SandboxSpec(allow=("pypi.org:443",)).required
    assert SandboxSpec().required == frozenset()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"CONNECT a.b:443 HTTP/1.1\r\nHost: c\r\n\r\n", ("a.b", 443, b"")),
        (b"GET http://A.b./p?q HTTP/1.1\r\nHost: A.b\r\nProxy-Connection: keep-alive\r\n\r\n",
         ("a.b", 80, b"GET /p?q HTTP/1.1\r\nHost: A.b\r\nConnection: close\r\n\r\n")),
        (b"GET http://[::1]:8/ HTTP/1.1\r\n\r\n", ("::1", 8, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")),
    ],
)  # fmt: skip
def test_requests_are_taken_apart_and_forwarded_in_plain_form(head: bytes, expected: tuple[str, int, bytes]) -> None:
    assert _parse(head) == expected


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1", b"CONNECT a HTTP/1.1", b"GET https://a/ HTTP/1.1", b"x", b""])
def test_what_is_no_proxy_request_is_refused(line: bytes) -> None:
    with pytest.raises(_RefusedError):
        _parse(line + b"\r\n\r\n")

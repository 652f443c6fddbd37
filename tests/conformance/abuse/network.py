"""Attempts 40 to 45: the host's loopback and addresses, sockets without a file, name servers, other boxes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from palaestra.sandboxes import Capability
from tests.conformance.abuse.scene import DONE, Scene, attempt

_CONNECT = """
def connect(address, kind, family):
    with socket.socket(family, kind) as sock:
        sock.settimeout(2)
        sock.connect(tuple(address) if isinstance(address, list) else address)
        sock.send(told["mark"].encode())
for number, (family, kind, address) in enumerate(told["targets"]):
    attempt(str(number), lambda: connect(address, kind, family))
"""


class Listener:
    """Sockets of the host that note whether anybody came."""

    def __init__(self, family: int, address: object) -> None:
        self.targets: list[tuple[int, int, object]] = []
        self._sockets: list[socket.socket] = []
        kinds = [socket.SOCK_STREAM, socket.SOCK_DGRAM]
        for kind in kinds:
            sock = socket.socket(family, kind)
            self._sockets.append(sock)
            name = f"{address}{kind}" if family == socket.AF_UNIX else address
            sock.bind(name)  # type: ignore[arg-type]
            if kind == socket.SOCK_STREAM:
                sock.listen()
            sock.settimeout(0.1)
            bound = sock.getsockname()
            self.targets.append((family, int(kind), name if family == socket.AF_UNIX else list(bound[:2])))

    def visits(self) -> int:
        """How many came since the last call."""
        count = 0
        stream, datagrams = self._sockets
        with contextlib.suppress(TimeoutError):
            while True:
                stream.accept()[0].close()
                count += 1
        with contextlib.suppress(TimeoutError):
            while True:
                datagrams.recv(99)
                count += 1
        return count

    def close(self) -> None:
        """Listen no more."""
        for sock in self._sockets:
            sock.close()


@contextmanager
def _listening(*addresses: tuple[int, object]) -> Iterator[list[Listener]]:
    listeners: list[Listener] = []
    try:
        for family, address in addresses:
            listeners.append(Listener(family, address))
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


async def _is_out_of_reach(scene: Scene, listeners: list[Listener]) -> bool:
    targets = [target for listener in listeners for target in listener.targets]
    said = await scene.ask(_CONNECT, targets=targets, mark=scene.marker)
    assert len(said) == len(targets)
    visits = sum(listener.visits() for listener in listeners)
    # a datagram may leave for nowhere; what counts is that nobody gets it
    connected = [said[str(number)] for number, target in enumerate(targets) if target[1] == socket.SOCK_STREAM]
    assert not scene.is_unsafe or visits == len(targets)  # the control: all of them are really there
    return visits == 0 and DONE not in connected


@attempt(40, "host-loopback", Capability.NETWORK)
async def _(scene: Scene) -> bool:
    addresses: list[tuple[int, object]] = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET, ("127.0.0.53", 0))]
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        addresses.append((socket.AF_INET6, ("::1", 0)))
    with _listening(*addresses) as listeners:
        return await _is_out_of_reach(scene, listeners)


def own_address() -> str:
    """An address of this machine as others see it; skips where it has none but its loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing, but chooses the interface
        except OSError as error:
            pytest.skip(f"this machine has no address but its loopback: {error}")
        return str(sock.getsockname()[0])


@attempt(41, "host-address", Capability.NETWORK)
async def _(scene: Scene) -> bool:
    with _listening((socket.AF_INET, (own_address(), 0))) as listeners:
        return await _is_out_of_reach(scene, listeners)


@attempt(42, "abstract-socket", Capability.NETWORK)
async def _(scene: Scene) -> bool:
    with _listening((socket.AF_UNIX, f"\0palaestra-{scene.marker}")) as listeners:
        return await _is_out_of_reach(scene, listeners)


@attempt(43, "socket-of-a-daemon", Capability.HOST_FILES)
async def _(scene: Scene) -> bool:
    path = scene.folder / "daemon.sock"
    with _listening((socket.AF_UNIX, str(path))) as listeners:
        for kind in (1, 2):
            os.chmod(f"{path}{kind}", 0o777)
        real = [(1, 1, name) for name in ("/var/run/docker.sock", "/run/docker.sock", "/run/dbus/system_bus_socket")]
        if not scene.is_unsafe:
            said = await scene.ask(_CONNECT, targets=real, mark="")
            assert set(said.values()) == {"ENOENT"}
        return await _is_out_of_reach(scene, listeners)


_NAMES = """
query = struct.pack("!6H", 7, 256, 1, 0, 0, 0) + b"\\7example\\3com\\0" + struct.pack("!2H", 1, 1)
def ask(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.sendto(query, tuple(address))
        sock.recv(512)
def connect(address):
    socket.create_connection(tuple(address), timeout=0.5).close()
attempt("name server", lambda: ask(told["server"]))
if not told["is_unsafe"]:
    for address in ("192.0.2.1", "198.51.100.7", "169.254.169.254", "8.8.8.8"):
        attempt(f"tcp {address}", lambda: connect((address, 80)))
        attempt(f"udp {address}", lambda: ask((address, 53)))
    attempt("look up", lambda: socket.getaddrinfo("example.com", 80))
"""


@attempt(44, "outside-addresses-and-names", Capability.NETWORK)
async def _(scene: Scene) -> bool:
    asked = asyncio.Event()

    class Server(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.DatagramTransport, transport)

        def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
            asked.set()
            self.transport.sendto(data, address)

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Server, (own_address(), 0))
    try:
        server = transport.get_extra_info("sockname")[:2]
        said = await scene.ask(_NAMES, server=server, is_unsafe=scene.is_unsafe)
    finally:
        transport.close()
    if asked.is_set() or DONE in said.values():
        assert not scene.is_unsafe or said["name server"] == DONE
        return False
    assert said.pop("look up") == "gaierror", said
    # what only took too long was on its way
    return set(said.values()) == {"ENETUNREACH"}


_SERVE = """
server = socket.create_server(("127.0.0.1", told["port"]))
connection = socket.create_connection(("127.0.0.1", told["port"]))
server.accept()
print("serving", flush=True)
server.accept()
print("visited", flush=True)
"""


@attempt(45, "port-of-another-box", Capability.NETWORK)
async def _(scene: Scene) -> bool:
    other = await scene.make()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    serving = asyncio.ensure_future(
        scene.run(_SERVE, box=other, port=port, on_output=lambda _, piece: heard.put_nowait(piece))
    )
    try:
        async with asyncio.timeout(10.0):
            assert await heard.get() == b"serving\n"  # it really listens, and goes on until somebody comes
        target = [(int(socket.AF_INET), int(socket.SOCK_STREAM), ["127.0.0.1", port])]
        said = await scene.ask(_CONNECT, targets=target, mark="x")
        if said["0"] == DONE:
            async with asyncio.timeout(10.0):
                assert await heard.get() == b"visited\n"
            return False
        assert not serving.done()
        return bool(said["0"] == "ECONNREFUSED" and heard.empty())
    finally:
        serving.cancel()
        await asyncio.wait([serving])

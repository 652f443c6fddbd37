"""Which capabilities a back end really has on this machine: each one is tried, from inside, in boxes of its own.

Invariant: a capability is claimed only when an attempt to break it ran and failed; an attempt that could not run
proves nothing. The back end without isolation has none of the containing ones by the same attempts, which is
what shows that they can succeed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

from palaestra.errors import PalaestraError, SandboxError
from palaestra.sandboxes._folders import owned_folder
from palaestra.sandboxes._limits import Capability, Limits, SandboxSpec
from palaestra.sandboxes._probe_code import FETCH, FILL, FLOOD, FLOOD_FILES, FORKS, HOLD, LOCK, PLACES, PROCESSES, REACH
from palaestra.sandboxes._protocol import Ended, ExecResult, Sandbox

_HOLD_S = 15.0
_LOCK_TRIES = 5
_SPEC = SandboxSpec(limits=Limits(memory_mb=96, workspace_mb=8, file_mb=8, processes=PROCESSES, wall_s=20.0))


class Maker(Protocol):
    """What makes boxes to probe."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A fresh sandbox."""


async def probe(backend: Maker, wanted: frozenset[Capability] = frozenset(Capability)) -> dict[Capability, bool]:
    """Whether a back end has each wanted capability, and those that are found out with them.

    Takes about a second for all of them. Raises like the back end's `create`.
    """
    found: dict[Capability, bool] = {}
    for group, attempt in _GROUPS.items():
        if wanted & group:
            proved = await attempt(backend)
            found |= {capability: capability in proved for capability in group}
    return found


async def _probe_reach(backend: Maker) -> set[Capability]:
    number = int.from_bytes(os.urandom(4))
    outside, inside = f"60.{number}1", f"60.{number}2"  # names of sleepers that no other process has
    async with _box(backend) as box:
        with _host_targets() as targets, _sleeper(outside):
            told = {**targets, "marker": outside}
            result = _ran(await box.run_python(REACH, stdin=json.dumps(told).encode()))
        contained = {Capability(name) for name, was_reached in json.loads(result.stdout).items() if not was_reached}
        _ran(await box.exec(["sh", "-c", f"setsid sleep {inside} & :"]))
        if not await asyncio.to_thread(_is_running, inside) and Capability.HONEST_ANSWERS in contained:
            contained.add(Capability.NO_LEFTOVERS)
    if Capability.NETWORK in contained and await _reaches_only_allowed(backend):
        contained.add(Capability.ALLOW_LIST)
    return contained


async def _probe_amounts(backend: Maker) -> set[Capability]:
    """Each in a box of its own, since one that ran out of something may end."""
    attempts: tuple[tuple[Capability, str, Callable[[list[int]], bool]], ...] = (
        (Capability.PROCESSES, FORKS, lambda said: 0 < said[0] <= PROCESSES),
        (Capability.MEMORY, HOLD, lambda said: said[0] < 2 and said[1] > 0),
        (Capability.DISK, FILL, lambda said: 0 < said[0] <= 8 << 20),
        (Capability.INODES, FLOOD, lambda said: 1000 < said[0] < FLOOD_FILES),
    )
    found = set()
    for capability, code, is_contained in attempts:
        async with _tidied() as name, _box(backend) as box:
            result = await box.run_python(code, stdin=name.encode())
            said = [int(word) for word in result.stdout.split()]
            ran_out = capability is Capability.MEMORY and result.ended is Ended.OOM
            if ran_out or (said and is_contained(said)):
                found.add(capability)
    return found


@asynccontextmanager
async def _tidied() -> AsyncIterator[str]:
    """The name of folders that a box may fill; where nothing is isolated they are this host's, and are removed."""
    name = f"palaestra-probe-{os.getpid()}-{os.urandom(6).hex()}"
    try:
        yield name
    finally:
        for place in PLACES:
            await asyncio.to_thread(shutil.rmtree, Path(place, name), ignore_errors=True)


async def _probe_sharing(backend: Maker) -> set[Capability]:
    async with _box(backend) as twin:
        async with _box(backend) as box:
            found = await _probe_snapshot(box, twin)
        for _ in range(_LOCK_TRIES):
            async with _box(backend) as box:
                is_seen = await _sees_lock(box, twin)
            if is_seen is not None:
                return found if is_seen else found | {Capability.FILE_LOCKS}
    raise SandboxError("a probe of the sandbox did not run: its lock was not held")


async def _sees_lock(box: Sandbox, twin: Sandbox) -> bool | None:
    """Whether a lock that is held in one box all the while is seen in the other; None when it was not held.

    The first box is of no use afterwards.
    """
    number = str(int.from_bytes(os.urandom(4)))  # of a file: where boxes share them, somebody else may probe too
    said: list[bytes] = []
    speaks = asyncio.Event()

    def hear(_: object, piece: bytes) -> None:
        said.append(piece)
        speaks.set()

    holding = asyncio.ensure_future(box.exec(["python3", "-c", LOCK, number, "hold"], on_output=hear, wall_s=_HOLD_S))
    waiting = asyncio.ensure_future(speaks.wait())
    try:
        await asyncio.wait([holding, waiting], return_when=asyncio.FIRST_COMPLETED)
        if b"".join(said) != b"free\n":
            return None
        result = _ran(await twin.exec(["python3", "-c", LOCK, number]))
        if holding.done() or result.stdout not in (b"free\n", b"taken\n"):
            return None
        return result.stdout == b"taken\n"
    finally:
        for task in (holding, waiting):
            task.cancel()
        await asyncio.wait([holding, waiting])


async def _probe_snapshot(box: Sandbox, twin: Sandbox) -> set[Capability]:
    await box.write_file("/workspace/state", b"kept")
    snapshot = await box.snapshot()
    await box.write_file("/workspace/state", b"changed")
    await box.restore(snapshot)
    await twin.restore(snapshot)
    found = set()
    if await box.read_file("/workspace/state") == b"kept":
        found.add(Capability.SNAPSHOT)
    if await twin.read_file("/workspace/state") == b"kept":
        found.add(Capability.FORK)
    return found


async def _reaches_only_allowed(backend: Maker) -> bool:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with (
        await asyncio.start_server(answer, "127.0.0.1", 0) as listed,
        await asyncio.start_server(answer, "127.0.0.1", 0) as other,
    ):
        ports = [server.sockets[0].getsockname()[1] for server in (listed, other)]
        spec = SandboxSpec(limits=_SPEC.limits, allow=(f"127.0.0.1:{ports[0]}",))
        try:
            async with _box(backend, spec) as box:
                urls = "\n".join(f"http://127.0.0.1:{port}/" for port in ports)
                environment = {"no_proxy": "", "NO_PROXY": ""}
                result = await box.exec(["python3", "-c", FETCH], stdin=urls.encode(), env=environment)
        except PalaestraError:
            return False
    return result.stdout == b"204\n403\n"


@contextmanager
def _host_targets() -> Iterator[dict[str, object]]:
    """Things of the host that a box must not reach; they are really there while the block runs."""
    with (
        owned_folder("probe") as folder,
        socket.create_server(("0.0.0.0", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        secret = folder / "secret"
        secret.write_text("secret")
        for path, mode in ((folder, 0o755), (secret, 0o644)):
            path.chmod(mode)
        name = f"palaestra-probe-{os.getpid()}-{os.urandom(3).hex()}"
        abstract.bind("\0" + name)
        abstract.listen()
        yield {
            "secret": str(secret),
            "port": server.getsockname()[1],
            "addresses": sorted({"127.0.0.1", _own_address()}),
            "abstract": name,
        }


def _own_address() -> str:
    """This host's address towards others; nothing is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(sock.getsockname()[0])


@contextmanager
def _sleeper(name: str) -> Iterator[None]:
    """A process with this word in its command line, which ends when ours does, however violently."""
    with subprocess.Popen(["sh", "-c", "read _", name], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.kill()


@asynccontextmanager
async def _box(backend: Maker, spec: SandboxSpec = _SPEC) -> AsyncIterator[Sandbox]:
    box = await backend.create(spec)
    try:
        yield box
    finally:
        await box.aclose()


def _ran(result: ExecResult) -> ExecResult:
    if not result.is_ok:
        raise SandboxError(f"a probe of the sandbox did not run: {result.ended}: {result.text('stderr')}")
    return result


def _is_running(argument: str) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if argument.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    return True
            except OSError:
                continue
    return False


_GROUPS: dict[frozenset[Capability], Callable[[Maker], Awaitable[set[Capability]]]] = {
    frozenset(
        {
            Capability.HOST_FILES,
            Capability.HOST_PROCESSES,
            Capability.NETWORK,
            Capability.ALLOW_LIST,
            Capability.KERNEL,
            Capability.HONEST_ANSWERS,
            Capability.NO_LEFTOVERS,
        }
    ): _probe_reach,
    frozenset({Capability.PROCESSES, Capability.MEMORY, Capability.DISK, Capability.INODES}): _probe_amounts,
    frozenset({Capability.FILE_LOCKS, Capability.SNAPSHOT, Capability.FORK}): _probe_sharing,
}

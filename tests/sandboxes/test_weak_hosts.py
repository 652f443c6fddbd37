"""Hosts and boxes that are weaker than usual lose the capability, and a claim and a real try always agree.

Invariant: what is made weaker here is made so in what the engine or the kernel is asked for, not in the probe.
"""

from __future__ import annotations

import asyncio
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from palaestra.errors import ConfigError
from palaestra.sandboxes import (
    Capability,
    Limits,
    Sandbox,
    SandboxBackend,
    SandboxSpec,
    _containers,
    _managed,
    fork,
    open_backend,
)
from palaestra.sandboxes._cgroups import MemoryCgroups
from tests.conformance.abuse import amounts, filesystem  # noqa: F401 - they put their attempts on the list
from tests.conformance.abuse.scene import ATTEMPTS, Scene
from tests.sandboxes.conftest import BACKENDS, require_backend
from tests.sandboxes.remote_server import running_server

_ALLOW_ALL = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # return SECCOMP_RET_ALLOW
_FETCH = """
import sys, urllib.error, urllib.request
for url in sys.stdin.read().split():
    try:
        print(urllib.request.urlopen(url, timeout=10).status)
    except urllib.error.HTTPError as error:
        print(error.code)
    except OSError as error:
        print(type(error).__name__)
"""


class _Forgetful(dict[tuple[str, ...], dict[Capability, bool]]):
    """Remembers no proof, since the same back end is weaker from one moment to the next here."""

    def setdefault(self, _: object, proved: dict[Capability, bool], /) -> dict[Capability, bool]:
        return proved


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_managed, "_PROVED", _Forgetful())


@pytest.fixture
async def jail_without_cgroups(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SandboxBackend]:
    require_backend("jail")

    async def none() -> None:
        return None

    monkeypatch.setattr(MemoryCgroups, "open", none)
    async with await open_backend("jail") as backend:
        yield backend


async def test_a_jail_without_memory_cgroups_does_not_claim_memory_and_everything_else(
    jail_without_cgroups: SandboxBackend,
) -> None:
    async with await open_backend("jail") as usual:
        assert await jail_without_cgroups.capabilities() == await usual.capabilities() - {Capability.MEMORY}
    with pytest.raises(ConfigError, match="does not provide memory"):
        await jail_without_cgroups.create(SandboxSpec(needs=frozenset({Capability.MEMORY})))


@pytest.mark.parametrize("number", [5, 6, 17, 18, 19, 20, 21])
async def test_attempts_on_amounts_end_as_declared_without_memory_cgroups(
    jail_without_cgroups: SandboxBackend, number: int, tmp_path: Path
) -> None:
    attempt, capabilities = ATTEMPTS[number], await jail_without_cgroups.capabilities()
    scene = Scene(jail_without_cgroups, capabilities, await jail_without_cgroups.create(SandboxSpec()), tmp_path)
    try:
        assert await attempt.attack(scene) == (attempt.capability is None or attempt.capability in capabilities)
    finally:
        await scene.aclose()
    assert (number == 20) == (attempt.capability not in capabilities and attempt.capability is not None)


@contextmanager
def _asked_for(config: dict[str, Any] | None = None, **settings: Any) -> Iterator[None]:
    """Containers of this process are made with these settings in place of ours."""
    describe, make = _containers.describe, docker.APIClient.create_host_config

    def host_config(self: Any, *arguments: Any, **given: Any) -> Any:
        return make(self, *arguments, **{**given, **settings})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker.APIClient, "create_host_config", host_config)
        patch.setattr(_containers, "describe", lambda *given, **named: {**describe(*given, **named), **(config or {})})
        yield


async def _lost(config: dict[str, Any] | None = None, **settings: Any) -> frozenset[Capability]:
    """What a Docker container claims no more once it is made so."""
    require_backend("docker")
    async with await open_backend("docker") as usual:
        before = await usual.capabilities()
    with _asked_for(config, **settings):
        async with await open_backend("docker") as weak:
            return before - await weak.capabilities()


async def test_a_container_with_a_network_loses_it() -> None:
    assert await _lost(network_mode="bridge") >= {Capability.NETWORK}


async def test_a_container_without_a_filter_of_system_calls_loses_the_kernel() -> None:
    with tempfile.TemporaryDirectory(prefix="palaestra-filter-") as folder:
        program = Path(folder, "filter")
        program.write_bytes(_ALLOW_ALL)
        binds = [f"{program}:/palaestra/seccomp.bpf:ro"]
        lost = await _lost(security_opt=["no-new-privileges", "seccomp=unconfined"], binds=binds)
    assert lost == {Capability.KERNEL}


async def test_a_container_with_privileges_loses_the_kernel() -> None:
    assert await _lost(cap_drop=[], security_opt=[]) == {Capability.KERNEL}


async def test_a_container_that_may_write_to_its_root_loses_the_userland_and_the_disk() -> None:
    lost = await _lost({"user": "0:0"}, read_only=False)
    assert lost >= {Capability.HOST_FILES, Capability.DISK}


async def test_a_container_without_a_limit_of_processes_or_memory_loses_them() -> None:
    assert await _lost(pids_limit=-1) == {Capability.PROCESSES}
    assert Capability.MEMORY in await _lost(mem_limit=2 << 30, memswap_limit=2 << 30)


@pytest.fixture
async def every_backend(request: pytest.FixtureRequest) -> AsyncIterator[SandboxBackend]:
    if request.param != "subprocess":
        require_backend(request.param)
    if request.param == "remote":
        with running_server() as server:
            async with await open_backend(server.url) as backend:
                yield backend
    else:
        async with await open_backend(request.param, allow_unsafe=True) as backend:
            yield backend


every = pytest.mark.parametrize("every_backend", [*BACKENDS, "subprocess"], indirect=True)


@every
async def test_snapshot_and_fork_are_what_is_claimed(every_backend: SandboxBackend) -> None:
    capabilities = await every_backend.capabilities()
    # without isolation /tmp is the machine's own, and no part of the box
    places = ("/workspace/a/b",) if every_backend.name == "subprocess" else ("/workspace/a/b", "/tmp/c", "/dev/shm/d")

    async def state(box: Sandbox) -> set[bytes]:
        return {await box.read_file(path) for path in places}

    async def write_state(box: Sandbox, text: bytes) -> None:
        for path in places:
            await box.write_file(path, text)

    async with await every_backend.create(SandboxSpec()) as box:
        await write_state(box, b"kept")
        snapshot = await box.snapshot()
        async with await fork(every_backend, box, SandboxSpec()) as twin:
            await write_state(box, b"changed")
            is_forked = await state(twin) == {b"kept"}
            await write_state(twin, b"its own")
            assert await state(box) == {b"changed"}
        await box.restore(snapshot)
        is_restored = await state(box) == {b"kept"}
    assert (is_restored, is_forked) == (Capability.SNAPSHOT in capabilities, Capability.FORK in capabilities)


@every
async def test_the_allow_list_is_what_is_claimed(every_backend: SandboxBackend) -> None:
    is_claimed = Capability.ALLOW_LIST in await every_backend.capabilities()
    async with _answering() as listed, _answering() as other:
        spec = SandboxSpec(limits=Limits(), allow=(f"127.0.0.1:{listed}",))
        if not is_claimed:
            with pytest.raises(ConfigError, match="does not provide allow_list"):
                await every_backend.create(spec)
            return
        async with await every_backend.create(spec) as box, await every_backend.create(SandboxSpec()) as closed:
            urls = "\n".join(f"http://127.0.0.1:{port}/" for port in (listed, other)).encode()
            settings = {"no_proxy": "", "NO_PROXY": ""}
            said = await box.exec(["python3", "-c", _FETCH], stdin=urls, env=settings)
            assert said.stdout == b"204\n403\n"
            said = await closed.exec(["python3", "-c", _FETCH], stdin=urls, env=settings)
            assert said.stdout == b"URLError\nURLError\n"


@asynccontextmanager
async def _answering() -> AsyncIterator[int]:
    """A server on loopback, and its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
